"""A million tasks through one cluster: what it takes at the end it must have taken after the first tenth.

    python -m benchmarks.endurance --tasks 1000000 --arrays 20000

Client processes come, have their share of tasks done, check every value and go; now and then one is killed
while it holds results. After each tenth of the amount, when nothing is held any more, the memory of Redis,
and memory and open files of every process of the cluster are read. What grew by more than 5 % between
the first reading and the last is a leak. Memory of a process is what it has for itself (USS).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from benchmarks.checks import check_equal
from benchmarks.soak import Watch, mib

ROOT = Path(__file__).resolve().parent.parent
TENTHS = 10
CLIENTS_EACH = 10
"""Client processes in a tenth, one of which is killed."""
AT_ONCE = 2
CHUNK = 2_000
ARRAY_BYTES = 256 << 10
LEASE = {"CELERY_MEM_CLIENT_LEASE": "5"}
"""After it the results of a killed client are freed, which each tenth waits for."""
GROWTH = 0.05
SLACK_BYTES = 1 << 20
"""Of a process: pages come and go."""
SLACK_FILES = 2


# --- what a client does -------------------------------------------------------------------------------


def inc(x: int) -> int:
    return x + 1


def make(x: int) -> Any:
    import numpy

    return numpy.full(ARRAY_BYTES // 8, x, dtype="i8")


def double(array: Any) -> Any:
    return 2 * array


def total(*arrays: Any) -> int:
    return int(sum(int(array[0]) + int(array[-1]) for array in arrays))


def be_client(url: str, namespace: str, number: int, n_tasks: int, n_arrays: int, is_killed: bool) -> None:
    """Do one client's share: small tasks in chunks, arrays in chains of two with a sum over each four."""
    from celery_mem import Client

    first = number * 10_000_000
    client = Client(url, namespace=namespace)
    for start in range(first, first + n_tasks, CHUNK):
        numbers = range(start, min(start + CHUNK, first + n_tasks))
        check_equal(client.gather(client.map(inc, numbers)), [x + 1 for x in numbers])
    # Of nine array tasks four make, four double, one sums up.
    for start in range(first, first + n_arrays, 9):
        numbers = range(start, start + 4)
        doubled = client.map(double, client.map(make, numbers))
        check_equal(client.submit(total, *doubled).result(), 4 * sum(numbers))
    if is_killed:
        kept = client.map(make, range(-first - 8, -first))
        client.gather(kept)
        os._exit(0)
    client.close()


# --- the cluster, seen from outside ---------------------------------------------------------------------


def processes(pids: dict[str, int]) -> Iterator[tuple[str, psutil.Process]]:
    """Every process of the cluster, under a name that stays the same."""
    for name, pid in pids.items():
        main = psutil.Process(pid)
        yield name, main
        n_children = 0
        for child in sorted(main.children(recursive=True), key=lambda p: p.create_time()):
            if "celery_mem.worker.agent" in child.cmdline():
                yield f"{name} agent", child
            else:
                yield f"{name} child {n_children}", child
                n_children += 1


def read(watch: Watch, pids: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Memory in bytes and open files, by process; of Redis what is in use apart from connections."""
    found = {}
    for name, process in processes(pids):
        memory = process.memory_full_info().uss
        if name == "redis":
            # Its own diary of slow commands holds up to half a megabyte of arguments, and fills up slowly.
            watch.redis.slowlog_reset()
            watch.redis.memory_purge()
            facts = watch.redis.info("memory")
            memory = int(facts["used_memory"]) - int(facts["mem_clients_normal"])
        found[name] = memory, process.num_fds()
    return found


def growth(first: dict[str, tuple[int, int]], last: dict[str, tuple[int, int]]) -> list[str]:
    """What takes more than it did, one sentence each."""
    faults = []
    for name, (memory, files) in last.items():
        before = first.get(name)
        if before is None:
            faults.append(f"{name} was not there after the first tenth")
            continue
        if memory - before[0] > max(GROWTH * before[0], 0 if name == "redis" else SLACK_BYTES):
            faults.append(f"{name} has {mib(memory)}, it had {mib(before[0])}")
        if files - before[1] > max(GROWTH * before[1], SLACK_FILES):
            faults.append(f"{name} has {files} files open, it had {before[1]}")
    return faults


# --- the run --------------------------------------------------------------------------------------------


def run_clients(cluster: Any, tenth: int, n_tasks: int, n_arrays: int) -> list[str]:
    """Have a tenth of the work done; returns what went wrong."""

    def one(i: int) -> str:
        number = tenth * CLIENTS_EACH + i + 1
        spec = [
            *(cluster.url, cluster.namespace, number),
            *(n_tasks // CLIENTS_EACH, n_arrays // CLIENTS_EACH, i == CLIENTS_EACH // 2),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.endurance", "--as-client", json.dumps(spec)],
            cwd=ROOT,
            env=os.environ | LEASE,
            capture_output=True,
            text=True,
            check=False,
        )
        return "" if done.returncode == 0 else f"client {number}: {done.stderr[-2000:]}"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [fault for fault in pool.map(one, range(CLIENTS_EACH)) if fault]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.endurance", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--tasks", type=int, default=1_000_000, help="small tasks in all")
    parser.add_argument("--arrays", type=int, default=20_000, help="tasks that make or read arrays, in all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--as-client", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run; the exit code is 0 only if every value was right and nothing grew."""
    args = parse(argv)
    if args.as_client:
        be_client(*json.loads(args.as_client))
        return 0
    from celery_mem import LocalCluster

    faults: list[str] = []
    readings: list[dict[str, tuple[int, int]]] = []
    started = time.monotonic()
    with LocalCluster(n_workers=args.workers, env={"PYTHONPATH": str(ROOT)} | LEASE) as cluster:
        watch = Watch(cluster.url, cluster.namespace)
        for tenth in range(TENTHS):
            faults += run_clients(cluster, tenth, args.tasks // TENTHS, args.arrays // TENTHS)
            if watch.wait_empty(60) is None:
                faults.append(f"left after tenth {tenth + 1}: {watch.left()[:10]}")
            faults += [f"audit: {violation}" for violation in watch.violations()]
            readings.append(read(watch, cluster.pids()))
            print(
                f"{time.monotonic() - started:6.0f} s  {(tenth + 1) * args.tasks // TENTHS:9,} small and "
                f"{(tenth + 1) * args.arrays // TENTHS:7,} array tasks  "
                + "  ".join(
                    f"{name} {memory / 2**20:.1f}/{files}" for name, (memory, files) in readings[-1].items()
                ),
                flush=True,
            )
            if faults:
                break
        faults += growth(readings[0], readings[-1])
    print("\nmemory and open files of each process, after the first tenth and at the end:")
    for name, (memory, files) in readings[-1].items():
        before, files_before = readings[0].get(name, (0, 0))
        percent = 100 * (memory - before) / (before or 1)
        print(
            f"  {name:20} {mib(before):>12} {mib(memory):>12} {percent:+6.1f} %   {files_before:4} {files:4}"
        )
    for fault in faults:
        print(f"FAULT  {fault}")
    verdict = "FAILED" if faults else "passed"
    print(f"{verdict}: {args.tasks:,} small and {args.arrays:,} array tasks, every value checked")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
