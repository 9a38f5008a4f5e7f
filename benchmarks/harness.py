"""Alternation: repetition by repetition, contender by contender, one cluster alive at a time.

Each repetition gives each contender a new process and a new cluster, and takes them away before the
next one starts: an idle cluster still wakes up for heartbeats, and on two cores that would be noise
in somebody else's figure. The order rotates, so that no contender always runs on a machine that
another has just warmed up. A drift of the machine over the run hits all alike.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Outcome:
    """What a run measured.

    Attributes:
        samples: workload name -> contender name -> one figure per repetition.
        failures: one sentence (and the end of its output) per child process that failed.
        versions: of everything that the contenders named.
    """

    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def alternate(
    contenders: list[str],
    workloads: list[str],
    *,
    reps: int,
    scale: float = 1.0,
    timeout_s: float = 900,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Run `reps` repetitions of every workload on every contender it is about.

    Args:
        timeout_s: for one child process; past it the process and all it started are killed.
        say: called with one line per finished child process.
    """
    outcome = Outcome()
    for rep in range(reps):
        shift = rep % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            for names in clusters(name for name in workloads if WORKLOADS[name].only in (None, contender)):
                entries, failure = _run_child(contender, names, scale, timeout_s)
                _merge(outcome, contender, entries)
                if failure:
                    outcome.failures.append(f"repetition {rep + 1}, {contender}: {failure}")
                say(f"repetition {rep + 1}/{reps}  {contender:<18}  " + (_brief(entries) or "no figures"))
    return outcome


def clusters(names: Iterable[str]) -> list[list[str]]:
    """Which workloads share a cluster: all but those whose memory is a figure, for they need empty pools."""
    groups: dict[str, list[str]] = {}
    with_peak = {workload.peak_of for workload in WORKLOADS.values()}
    for name in names:
        of = WORKLOADS[name].peak_of or name
        groups.setdefault(of if of in with_peak else "", []).append(name)
    return list(groups.values())


def _merge(outcome: Outcome, contender: str, entries: list[dict]) -> None:
    for entry in entries:
        outcome.versions.update(entry.get("versions", {}))
        if "workload" in entry:
            per_contender = outcome.samples.setdefault(entry["workload"], {})
            per_contender.setdefault(contender, []).append(entry["value"])


def _brief(entries: list[dict]) -> str:
    measured = [entry for entry in entries if "workload" in entry]
    return "  ".join(
        f"{e['workload']} {figure(e['value'])} {WORKLOADS[e['workload']].unit}" for e in measured
    )


def figure(value: float) -> str:
    """Three digits that matter, and separators for thousands."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _run_child(
    contender: str, names: list[str], scale: float, timeout_s: float
) -> tuple[list[dict], str | None]:
    """Run one contender once in a process (and session) of its own: its entries, and what went wrong."""
    with tempfile.TemporaryDirectory(prefix="celery-mem-bench-") as folder:
        out, log = Path(folder, "out.jsonl"), Path(folder, "log.txt")
        out.touch()
        spec = {"contender": contender, "workloads": names, "scale": scale, "out": str(out)}
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.child", json.dumps(spec)],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(_python_path())},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
            try:
                code: int | None = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _stop_session(process)
        entries = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        if code == 0 and any(entry.get("finished") for entry in entries):
            return entries, None
        reason = f"not finished after {timeout_s:g} s" if code is None else f"exit code {code}"
        return entries, f"{reason}\n{log.read_text(errors='replace')[-3000:]}"


def _python_path() -> list[str]:
    """The checkout first: workers of every contender must be able to import `benchmarks.workloads`."""
    return [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _stop_session(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a child's session: first asked to stop, after ten seconds killed."""
    for sig in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sig)
        except ProcessLookupError:
            break
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
