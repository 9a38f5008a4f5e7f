"""Real work for minutes while whatever can break is broken: no wrong value, no hang, no leak.

    python -m benchmarks.chaos --minutes 10 --seed 1

Clients (processes of their own) do jobs with known answers on four nodes: random sums, trees and chains of
large arrays, a shuffled dataframe, a small year of flights, tasks in tasks, errors, cancellation, durable
results. Meanwhile faults come by a schedule that the seed reproduces: processes are killed, or stopped for
longer than their lease, Redis is killed and started again, connections are cut in the middle of a
command, results are deleted, tickets lost and repeated, clocks set. At the end every value must have been
right, `audit` have nothing to say, and nothing be left: in Redis, in files, of processes.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
from pathlib import Path

from tests.faults.chaos.arena import PLAYERS, Arena
from tests.faults.chaos.run import Run
from tests.faults.chaos.schedule import WEIGHTS, schedule


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--seed", type=int, help="of the schedule and the jobs; chosen and printed if not given"
    )
    parser.add_argument("--every", type=float, default=1.7, help="mean seconds between faults")
    parser.add_argument(
        "--patience", type=float, default=90.0, help="seconds after which a result counts as a hang"
    )
    parser.add_argument("--clients", type=int, default=len(PLAYERS), choices=range(1, len(PLAYERS) + 1))
    parser.add_argument(
        "--jobs", default="", metavar="A,B", help="only these jobs, by their names in jobs.py"
    )
    parser.add_argument(
        "--only", default="", metavar="A,B", help="only these kinds of faults: " + ", ".join(WEIGHTS)
    )
    parser.add_argument("--without", default="", metavar="A,B", help="all kinds of faults but these")
    parser.add_argument("--keep", type=Path, help="folder for logs and state if anything is wrong")
    parser.add_argument(
        "--plan", action="store_true", help="print the first 30 steps of the schedule, and end"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run; the exit code is 0 only if nothing is wrong."""
    args = parse(argv)
    logging.getLogger("celery_mem.local").setLevel(logging.ERROR)  # that processes die is no news here
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    chosen = set(filter(None, args.only.split(","))) or set(WEIGHTS)
    chosen -= set(filter(None, args.without.split(",")))
    weights = {kind: weight for kind, weight in WEIGHTS.items() if kind in chosen}
    if args.plan:
        for _, step in zip(range(30), schedule(seed, args.every, weights), strict=False):
            print(f"#{step.number:<3} after {step.pause_s:5.2f} s  {step.kind}")
        return 0
    print(f"seed {seed}, {args.minutes:g} minutes, a fault in {args.every:g} s", flush=True)
    keep = args.keep or Path(tempfile.gettempdir(), f"chaos-{seed}")
    jobs = tuple(filter(None, args.jobs.split(",")))
    with Arena(seed, patience_s=args.patience, jobs=jobs, players=args.clients) as arena:
        run = Run(
            arena,
            seed,
            every_s=args.every,
            weights=weights,
            say=lambda line: print(line, flush=True),
            keep=keep,
        )
        report = run.go(args.minutes * 60)
        if not report.faults:
            report.faults += [f"left at the end: {what}" for what in arena.close()]
    print(report.text())
    if report.faults:
        print(f"logs and state are in {keep}")
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
