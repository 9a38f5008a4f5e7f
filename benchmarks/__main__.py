"""Command line of the benchmarks: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import report
from benchmarks.contenders import CONTENDERS, N_WORKERS
from benchmarks.harness import alternate, figure
from benchmarks.limits import measure_limits
from benchmarks.workloads import DEFAULT, WORKLOADS


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="celery-mem against dask.distributed, in alternation, every value checked.",
        epilog="workloads: " + "; ".join(f"{w.name}: {w.title}" for w in WORKLOADS.values()),
    )
    parser.add_argument("--only", type=_names_of(WORKLOADS), default=list(DEFAULT), metavar="A,B")
    parser.add_argument("--contenders", type=_names_of(CONTENDERS), default=list(CONTENDERS), metavar="A,B")
    parser.add_argument("--reps", type=int, default=5, help="repetitions (default 5)")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all sizes; targets hold at 1")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one contender's repetition")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write figures and samples there too")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a target is missed")
    args = parser.parse_args(argv)
    if args.reps < 1 or args.scale <= 0:
        parser.error("--reps and --scale must be positive")
    return args


def _names_of(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(
                f"no such name: {', '.join(unknown)}; there are: {', '.join(known)}"
            )
        return chosen

    return names


def present(contenders: list[str]) -> list[str]:
    """Those that can run here; the others are named in a line each."""
    lacks = {name: CONTENDERS[name].missing() for name in contenders}
    for name, module in lacks.items():
        if module:
            print(f"{name} is left out: there is no {module} to import here")
    return [name for name, module in lacks.items() if not module]


def main(argv: list[str] | None = None) -> int:
    """Run and print; exit code 2 after a failure or a wrong value, 1 after a missed target if `--strict`."""
    args = parse(argv)
    machine = report.machine()
    contenders = present(args.contenders)
    limits = measure_limits(args.scale)
    started = time.monotonic()
    outcome = alternate(
        contenders,
        args.only,
        reps=args.reps,
        scale=args.scale,
        timeout_s=args.timeout,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    lines = report.summarise(outcome)
    versions = ", ".join(f"{name} {version}" for name, version in outcome.versions.items())
    print(f"\n{versions}; Python {machine['python']}; {machine['cores']} cores of {machine['cpu']}")
    print(
        f"{args.reps} repetitions in alternation, {N_WORKERS} single-threaded worker processes each, "
        f"sizes x {args.scale:g}, {time.monotonic() - started:.0f} s in all; * is what ratios are to\n"
    )
    print(report.render(lines))
    print("\nlimits of the machine: " + ", ".join(f"{what} {figure(v)} GB/s" for what, v in limits.items()))
    for failure in outcome.failures:
        print(f"\nFAILED  {failure}")
    judged = [line.met for line in lines if line.met is not None]
    print(f"\n{sum(judged)} of {len(judged)} targets met; every value was checked")
    if args.json:
        settings = {
            "repetitions": args.reps,
            "scale": args.scale,
            "workers": N_WORKERS,
            "machine": machine,
            "limits": limits,
            "contenders": contenders,
            "workloads": args.only,
        }
        args.json.write_text(json.dumps(report.as_json(outcome, lines, settings), indent=1) + "\n")
    if outcome.failures:
        return 2
    return 1 if args.strict and not all(judged) else 0


if __name__ == "__main__":
    sys.exit(main())
