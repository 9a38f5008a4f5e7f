"""How long an app's own Celery tasks wait for their turn, on workers that a graph would keep busy for ever.

    python -m benchmarks.own_tasks --tasks 60

A worker with two slots has an app with tasks of its own, which are sent one after the other, at random
moments: while nothing else is there, then while the graph has more ready tasks than it can get done, short
ones and then long ones. What is measured is the time from before a task is sent until it begins.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery

from celery_mem import Client
from celery_mem.graph.tickets import broker_url
from tests import tasks
from tests.deployment import Deployment

APP = "tests.worker.shop"
SLOTS = 2
LATE = 0.95
GRAPHS = {"nothing": 0.0, "tasks of 20 ms": 0.02, "tasks of 500 ms": 0.5}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.own_tasks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--tasks", type=int, default=60, help="own tasks beside each graph (default 60)")
    parser.add_argument(
        "--slice", type=float, default=1.0, help="mem_slice, seconds (default 1, as in general)"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if args.tasks < 2:
        parser.error("--tasks must be two or more")
    return args


def waits(app: Celery, n: int, slice_s: float, rng: random.Random) -> Iterator[float]:
    """Send tasks, each at any moment of the slice that began after the last; seconds that each waited."""
    for _ in range(n):
        time.sleep(rng.uniform(0.0, slice_s))
        sent = time.time()
        answer = app.send_task(f"{APP}.now", queue="shop")
        yield answer.get(timeout=120) - sent
        answer.forget()


@contextmanager
def busy(client: Client, seconds: float, n: int) -> Iterator[list[Any]]:
    """Have the graph full of ready tasks of so many seconds, which no two slots get done in time."""
    futures = client.map(tasks.nap, [seconds] * n, range(n)) if seconds else []
    if futures:
        futures[0].result(timeout=120)  # it runs
    yield futures
    client.cancel(futures)


def measure(n: int, slice_s: float, seed: int) -> dict[str, list[float]]:
    """Seconds that each own task waited, by what the graph had to do."""
    found = {}
    with Deployment(slice=slice_s) as it:
        it.start_coordinator()
        it.start_worker("w0", app=APP, slots=SLOTS, env={"SHOP_PREFETCH": "1"})
        url = broker_url(it.url)
        with Celery("shop", broker=url, backend=url, set_as_current=False) as app, it.client() as client:
            app.send_task(f"{APP}.now", queue="shop").get(timeout=120)
            for name, seconds in GRAPHS.items():
                with busy(client, seconds, 100_000 if seconds < 0.1 else 20_000) as futures:
                    found[name] = list(waits(app, n, slice_s, random.Random(seed)))
                    if futures and all(future.done() for future in futures):
                        raise AssertionError(f"the graph of {name} was over before the own tasks")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run and print."""
    args = parse(argv)
    found = measure(args.tasks, args.slice, args.seed)
    print(
        f"own tasks of an app on {SLOTS} slots, {args.tasks} beside each graph, mem_slice {args.slice:g} s\n"
    )
    print(f"{'the graph has':<18}{'median':>10}{'p95':>10}{'longest':>10}   wait for their turn, ms")
    for name, seconds in found.items():
        ordered = sorted(1e3 * s for s in seconds)
        late = ordered[min(len(ordered) - 1, int(LATE * len(ordered)))]
        print(f"{name:<18}{statistics.median(ordered):>10.1f}{late:>10.1f}{ordered[-1]:>10.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
