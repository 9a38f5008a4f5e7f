"""Hours of random traffic in minutes: several client processes, one cluster, and nothing left at the end.

    python -m benchmarks.soak --minutes 5

Client processes submit, hold, pass on, release and cancel at random and check every value
(`traffic.py`); now and then one is killed without a chance to say goodbye and another takes its
place. Meanwhile Redis' memory is sampled. At the end every client leaves, and then `audit` must have
nothing to say, no key of a task, result or client may be left, and memory must be where it began.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import redis

from benchmarks.traffic import Traffic, run_client

ROOT = Path(__file__).resolve().parent.parent
# What is the cluster's own, and stays while it runs; every other key belongs to a task, result or client.
OWN_NAMES = ("meta", "counts", "nodes", "slots", "idle", "tickets", "leader")
OWN_KINDS = ("slot", "wake", "node", "node_slots")
LONGEST_LEASE_S = (
    130  # a result that was stored and then not wanted goes after 120 s, a dead client after 60 s
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, default=3, help="client processes at a time")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, help="of all random choices; chosen and printed if not given")
    parser.add_argument(
        "--crash-every", type=float, default=20.0, help="seconds between killed clients; 0: never"
    )
    parser.add_argument("--max-held", type=int, default=300, help="futures that one client holds at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts and memory samples there too")
    parser.add_argument("--as-client", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the soak; the exit code is 0 only if every check at the end holds."""
    args = parse(argv)
    if args.as_client:
        return run_client(json.loads(args.as_client))
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    print(
        f"seed {seed}, {args.minutes:g} minutes, {args.clients} clients, {args.workers} workers", flush=True
    )

    from celery_mem import LocalCluster

    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with LocalCluster(n_workers=args.workers, env={"PYTHONPATH": python_path}) as cluster:
        watch = Watch(cluster.url, cluster.namespace)
        crew = Crew(cluster, args, seed, python_path)
        # Fixed costs (scripts, connections, Celery's own keys) belong to the baseline.
        crew.warm_up()
        baseline = watch.wait_empty(10) or watch.sample()
        crew.run(watch)
        watch.redis.delete(Traffic.MAILBOX)
        ended = time.monotonic()
        final = watch.wait_empty(LONGEST_LEASE_S)
        report = judge(watch, crew, baseline, final, time.monotonic() - ended)
    print(report.text)
    if args.json:
        figures = {"seed": seed, "counts": crew.counts, "samples": watch.samples, "faults": report.faults}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if report.faults else 0


class Watch:
    """Reads Redis' memory and what is left in the namespace, with a connection of its own."""

    def __init__(self, url: str, namespace: str) -> None:
        from celery_mem.config import Settings
        from celery_mem.state.store import Store

        self.redis = redis.Redis.from_url(url, decode_responses=True)
        self.store = Store.connect(Settings.load(url=url, namespace=namespace))
        keys = self.store.keys
        self.own_names = {keys.fixed(name) for name in OWN_NAMES}
        self.own_prefixes = tuple(keys.of(kind, "") for kind in OWN_KINDS)
        self.samples: list[dict[str, float]] = []  # under traffic
        self.started = time.monotonic()

    def sample(self) -> dict[str, float]:
        """Seconds since the start, bytes in use and number of keys, now."""
        return {
            "seconds": round(time.monotonic() - self.started, 1),
            "used_memory": int(self.redis.info("memory")["used_memory"]),
            "keys": int(self.redis.dbsize()),
        }

    def left(self) -> list[str]:
        """Redis keys of tasks, results and clients."""
        found = self.redis.scan_iter(match=self.store.keys.prefix + "*", count=1000)
        return sorted(k for k in found if k not in self.own_names and not k.startswith(self.own_prefixes))

    def violations(self) -> list[Any]:
        """What `audit` names twice in a row: the cluster is alive, one reading may see it in mid-step."""
        from celery_mem.state.audit import audit

        first = {(v.rule, v.key) for v in audit(self.store)}
        return [v for v in audit(self.store) if (v.rule, v.key) in first]

    def wait_empty(self, seconds: float) -> dict[str, float] | None:
        """A sample once nothing of tasks and clients is left; None if that does not happen in time."""
        deadline = time.monotonic() + seconds
        while self.left():
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)
        return self.sample()


class Crew:
    """The client processes: started, killed at random, replaced, listened to."""

    def __init__(self, cluster: Any, args: argparse.Namespace, seed: int, python_path: str) -> None:
        self.cluster, self.args, self.seed = cluster, args, seed
        self.env = os.environ | {"PYTHONPATH": python_path}
        self.rng = random.Random(f"{seed}/crew")
        self.members: dict[int, subprocess.Popen[str]] = {}
        self.latest: dict[int, dict[str, int]] = {}
        self.errors: list[str] = []
        self.crashes = 0
        self._number = 0

    @property
    def counts(self) -> dict[str, int]:
        """Operations of all client processes so far; a killed one's last second is missing."""
        together: Counter[str] = Counter()
        for counts in list(self.latest.values()):
            together.update(counts)
        return dict(sorted(together.items()))

    def warm_up(self) -> None:
        """A little traffic of one client, to the end."""
        self.start(min(5.0, self.args.minutes * 6))
        self.join()

    def run(self, watch: Watch) -> None:
        """Keep `--clients` processes busy until the time is over, printing memory as it goes."""
        started = time.monotonic()
        end = started + self.args.minutes * 60
        next_line = started
        next_crash = started + (self.args.crash_every or float("inf"))
        every = max(2.0, self.args.minutes * 2)
        try:
            while (now := time.monotonic()) < end and not self.errors:
                while len(self.members) < self.args.clients and end - now > 2:
                    self.start(end - now)
                if now >= next_crash:
                    self.crash()
                    next_crash = now + self.args.crash_every
                sample = watch.sample()
                watch.samples.append(sample)
                if now >= next_line:
                    print(
                        f"{now - started:6.0f} s  Redis {sample['used_memory'] / 2**20:7.2f} MiB  "
                        f"{sample['keys']:6} keys  {self.counts.get('futures', 0):9,} futures so far",
                        flush=True,
                    )
                    next_line = now + every
                time.sleep(min(0.5, max(0.0, end - now)))
                self.reap()
        finally:
            self.join()

    def start(self, seconds: float) -> None:
        self._number += 1
        number = self._number
        spec = {
            "url": self.cluster.url,
            "namespace": self.cluster.namespace,
            "seed": f"{self.seed}/{number}",
            "seconds": seconds,
            "max_held": self.args.max_held,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak", "--as-client", json.dumps(spec)],
            cwd=ROOT,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.members[number] = process
        threading.Thread(target=self._listen, args=(number, process), daemon=True).start()

    def _listen(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the end of a killed client's last line is missing
            if "counts" in entry:
                self.latest[number] = entry["counts"]
            if "error" in entry:
                self.errors.append(f"client {number}: {entry['error']}")

    def crash(self) -> None:
        """Kill one client process in the middle of whatever it does."""
        if self.members:
            self.members[self.rng.choice(sorted(self.members))].kill()
            self.crashes += 1

    def reap(self) -> None:
        for number, process in list(self.members.items()):
            code = process.poll()
            if code is not None:
                del self.members[number]
                if code not in (0, -9):
                    self.errors.append(f"client {number}: exit code {code}")

    def join(self, timeout_s: float = 150) -> None:
        """Wait for every client process to end by itself; who does not is killed, and that is a fault."""
        for number, process in list(self.members.items()):
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self.errors.append(f"client {number}: still running {timeout_s:g} s after its time")
        self.reap()


class Verdict:
    """The end of the report, and what is wrong, one sentence each."""

    def __init__(self, text: str, faults: list[str]) -> None:
        self.text, self.faults = text, faults


def judge(
    watch: Watch,
    crew: Crew,
    baseline: dict[str, float],
    final: dict[str, float] | None,
    waited_s: float,
) -> Verdict:
    """Check errors, leftovers, audit and memory; write the summary."""
    faults = list(dict.fromkeys(crew.errors))
    left = watch.left()
    if left:
        faults.append(f"{len(left)} keys are left: {', '.join(left[:10])}")
    violations = watch.violations()
    faults += [f"audit: {violation}" for violation in violations]

    early, late = thirds(watch.samples)
    if late > 1.5 * early + 2**20:
        faults.append(
            f"Redis memory rose from {early / 2**20:.2f} to {late / 2**20:.2f} MiB under equal traffic"
        )
    end = final or watch.sample()
    grown = end["used_memory"] - baseline["used_memory"]
    if grown > 2**20:
        faults.append(f"Redis keeps {mib(grown)} more than before the traffic")

    counts = ", ".join(f"{name} {n:,}" for name, n in crew.counts.items())
    lines = [
        "",
        f"operations     {counts}",
        f"killed clients {crew.crashes}",
        f"Redis, busy    {mib(early)} in the first third, {mib(late)} in the last (medians)",
        f"Redis, empty   {mib(baseline['used_memory'])} before the traffic, {mib(end['used_memory'])} after",
        f"keys left      {len(left)} of tasks, results and clients, {waited_s:.1f} s after the last one left",
        f"               {end['keys']:g} in all of Redis, {baseline['keys']:g} before the traffic",
        f"audit          {f'{len(violations)} violations' if violations else 'clean'}",
        *(f"FAULT          {fault}" for fault in faults),
    ]
    return Verdict("\n".join(lines), faults)


def mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.2f} MiB"


def thirds(samples: list[dict[str, float]]) -> tuple[float, float]:
    """Median memory of the first and of the last third of the samples."""
    memory = [sample["used_memory"] for sample in samples]
    third = max(1, len(memory) // 3)
    return statistics.median(memory[:third]), statistics.median(memory[-third:])


if __name__ == "__main__":
    sys.exit(main())
