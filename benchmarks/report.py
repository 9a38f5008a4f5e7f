"""From samples to the table: medians, spread, ratios to the best of the peers, targets."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.contenders import CeleryMem
from benchmarks.harness import Outcome, figure
from benchmarks.workloads import WORKLOADS, Workload


@dataclass(frozen=True)
class Line:
    """One contender on one workload.

    Attributes:
        ratio: the median against that of the best peer; None where there is none.
        target: the bound in words, on the lines that it is about.
        met: whether the bound holds; None where there is none, or nothing to hold it against.
    """

    workload: str
    contender: str
    unit: str
    median: float
    low: float
    high: float
    repetitions: int
    ratio: float | None
    target: str | None
    met: bool | None


def best_peer(workload: Workload, medians: dict[str, float]) -> float | None:
    """The best of the medians of a workload's peers, if any of them ran."""
    candidates = [medians[name] for name in workload.peers if name in medians]
    if not candidates:
        return None
    return max(candidates) if workload.higher_is_better else min(candidates)


def judge(workload: Workload, median: float, ratio: float | None) -> bool | None:
    """Whether the target of a workload holds for a median; None without a target or a reference."""
    if workload.target is None:
        return None
    figure = median if workload.target.absolute else ratio
    if figure is None:
        return None
    return figure >= workload.target.limit if workload.higher_is_better else figure <= workload.target.limit


def summarise(outcome: Outcome) -> list[Line]:
    """The lines of the table, in the order of the workloads, celery-mem first."""
    return [
        line for name in WORKLOADS if name in outcome.samples for line in _lines(WORKLOADS[name], outcome)
    ]


def _lines(workload: Workload, outcome: Outcome) -> Iterator[Line]:
    samples = outcome.samples[workload.name]
    medians = {contender: statistics.median(values) for contender, values in samples.items()}
    reference = best_peer(workload, medians)
    for contender in sorted(samples, key=lambda name: (name != CeleryMem.name, name)):
        median, ratio = medians[contender], None
        if reference is not None:
            ratio = median / reference
        ours = contender == CeleryMem.name
        yield Line(
            workload=workload.name,
            contender=contender,
            unit=workload.unit,
            median=median,
            low=min(samples[contender]),
            high=max(samples[contender]),
            repetitions=len(samples[contender]),
            ratio=ratio,
            target=describe_target(workload) if ours else None,
            met=judge(workload, median, ratio) if ours else None,
        )


def describe_target(workload: Workload) -> str | None:
    """`>= 8x`, `<= 1/8x`, `<= 0.7x`, `<= 1024 bytes`; None without a target."""
    if workload.target is None:
        return None
    sign, limit = ">=" if workload.higher_is_better else "<=", workload.target.limit
    if workload.target.absolute:
        return f"{sign} {limit:g}{'' if workload.unit == 'x' else ' '}{workload.unit}"
    is_fraction = limit < 1 and (1 / limit).is_integer()
    return f"{sign} 1/{1 / limit:g}x" if is_fraction else f"{sign} {limit:g}x"


def render(lines: list[Line]) -> str:
    """The table as plain text; `*` marks the reference that ratios are to."""
    head = ("workload", "contender", "median", "min - max", "unit", "ratio", "target", "")
    rows: list[tuple[str, ...]] = []
    previous = None
    for line in lines:
        is_reference = line.contender in WORKLOADS[line.workload].peers and line.ratio == 1.0
        rows.append(
            (
                line.workload if line.workload != previous else "",
                line.contender,
                figure(line.median),
                f"{figure(line.low)} - {figure(line.high)}",
                line.unit,
                "" if line.ratio is None else f"{line.ratio:.3g}x{'*' if is_reference else ''}",
                line.target or "",
                {None: "", True: "met", False: "MISSED"}[line.met],
            )
        )
        previous = line.workload
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    right = {2, 3}
    text = []
    for row in [head, tuple("-" * width for width in widths), *rows]:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def machine() -> dict[str, Any]:
    """What of the machine explains a figure."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "?")
    except OSError:
        model = platform.processor() or "?"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": model,
        "cores": usable,
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
    }


def as_json(outcome: Outcome, lines: list[Line], settings: dict[str, Any]) -> dict[str, Any]:
    """Everything, with the single samples, for programs."""
    return {
        "settings": settings,
        "versions": outcome.versions,
        "lines": [asdict(line) for line in lines],
        "samples": outcome.samples,
        "failures": outcome.failures,
    }
