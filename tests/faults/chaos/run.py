"""One run: faults by schedule while clients work, then all that must hold afterwards."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from celery_mem.state.audit import audit, read
from tests.faults.chaos.arena import Arena, Auditor, wait_for_calm
from tests.faults.chaos.schedule import Step, schedule

RECOVERED = {
    "slots whose process ended": r"ended in the middle of \d+ tasks",
    "new leaders": r" leads, term ",
    "nodes given up": r"gave up node|node .* is given up|is gone",
    "agents started again": r"the agent of node .* is gone",
    "reports that came too late": r"not counted|came too late|stale",
}
AUDIT_EVERY_S = 2.0
CALM_S = 150.0  # a file of which its agent was never told goes when the agent looks twice, a minute apart
"""How long after the last fault everything may take to be as it should."""


@dataclass
class Report:
    """What happened.

    Attributes:
        faults: what is wrong, one text each; none is what a run is for.
        injected: kind -> times; `nothing_there` counts steps that found nothing to break.
    """

    seed: int
    faults: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    nothing_there: Counter[str] = field(default_factory=Counter)
    jobs: Counter[str] = field(default_factory=Counter)
    cut_short: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    tasks: int = 0
    runs: int = 0
    longest_job_s: float = 0.0
    seconds: float = 0.0
    logged: dict[str, int] = field(default_factory=dict)
    n_cuts: int = 0
    calm_s: float = 0.0

    def text(self) -> str:
        """Return it for people."""
        jobs = ", ".join(f"{name} {n}" for name, n in sorted(self.jobs.items()))
        lines = [
            (
                f"seed {self.seed}: {sum(self.injected.values())} faults in {self.seconds:.0f} s "
                f"({sum(self.nothing_there.values())} more found nothing to break)"
            ),
            *(f"  {n:5}  {kind}" for kind, n in sorted(self.injected.items())),
            (
                f"jobs done, every value right: {sum(self.jobs.values())} ({jobs}), "
                f"{self.cut_short} ended with their client"
            ),
            (
                f"tasks that count their runs: {self.tasks}, run again: {self.runs - self.tasks}; "
                f"the longest job took {self.longest_job_s:.1f} s"
            ),
            "recovered: " + ", ".join(f"{n} {what}" for what, n in {**self.logged, **self.notes}.items()),
            (
                f"connections cut in the middle: {self.n_cuts}; "
                f"all was calm {self.calm_s:.1f} s after the last fault"
            ),
        ]
        lines += [f"FAULT  {fault}" for fault in self.faults] or ["0 wrong values, 0 hangs, 0 leaks"]
        return "\n".join(lines)


class Run:
    """Drives an arena by a schedule.

    Args:
        say: called with a line per fault.
        keep: a folder that gets all logs if anything is wrong.
    """

    def __init__(
        self,
        arena: Arena,
        seed: int,
        *,
        every_s: float,
        weights: dict[str, int] | None = None,
        say: Callable[[str], None] = lambda _: None,
        keep: Path | None = None,
    ) -> None:
        self.arena = arena
        self.report = Report(seed)
        self.steps = schedule(seed, every_s, weights)
        self.say = say
        self.keep = keep
        self.begun: dict[str, tuple[str, float]] = {}  # player -> its job, and since when
        self._started = time.monotonic()
        self._auditor = Auditor(arena.deployment.store())
        self._audit_due = 0.0

    def go(self, seconds: float) -> Report:
        """Break things for some time, then see that all becomes calm and nothing is left."""
        end = time.monotonic() + seconds
        while (step := next(self.steps)) and time.monotonic() + step.pause_s < end and not self.report.faults:
            self._tend_until(time.monotonic() + step.pause_s)
            if not self.report.faults:
                self._inject(step)
        self.report.seconds = time.monotonic() - self._started
        if not self.report.faults:
            self._see_it_calm()
        self.report.n_cuts = self.arena.proxy.n_cuts
        self._count_logged()
        if self.report.faults:
            self._autopsy()
        return self.report

    def _inject(self, step: Step) -> None:
        is_done = self.arena.inject(step)
        (self.report.injected if is_done else self.report.nothing_there)[step.kind] += 1
        since = time.monotonic() - self._started
        line = f"{since:7.2f} s  #{step.number:<4} {step.kind}" + ("" if is_done else "  (nothing there)")
        self.report.steps.append(line)
        self.say(line)

    def _tend_until(self, deadline: float) -> None:
        while not self.report.faults:
            self.arena.tend()
            self._listen()
            self._audit()
            if (left := deadline - time.monotonic()) <= 0:
                return
            time.sleep(min(0.05, left))

    def _listen(self) -> None:
        now = time.monotonic()
        report = self.report
        for entry in self.arena.news():
            player = entry["player"]
            if "begun" in entry:
                report.cut_short += player in self.begun
                self.begun[player] = entry["job"], now
            elif "done" in entry:
                self.begun.pop(player, None)
                report.jobs[entry["job"]] += 1
                report.tasks += entry["tasks"]
                report.runs += entry["runs"]
                report.notes.update(entry["notes"])
                report.longest_job_s = max(report.longest_job_s, entry["seconds"])
            elif "failed" in entry and self._may_have_lost(player, entry):
                report.notes["clients that were told that their lease was over"] += 1
                self.begun.pop(player, None)
                self.arena.replace(player)
            elif "failed" in entry:
                report.faults.append(f"{entry['failed']} ({entry['job']}): {entry['text']}")

    def _may_have_lost(self, player: str, entry: dict[str, Any]) -> bool:
        """Large results of a client that stood still for longer than its lease are gone; it must say so."""
        since = self.begun.get(player, ("", 0.0))[1]
        is_told = entry["error"] == "StateLostError" and "its lease ran out" in entry["text"]
        return is_told and self.arena.stopped_clients.get(player, 0.0) > since

    def _audit(self) -> None:
        if time.monotonic() >= self._audit_due:
            self._audit_due = time.monotonic() + AUDIT_EVERY_S
            with contextlib.suppress(Exception):  # Redis may have been killed at this moment
                self.report.faults += [f"audit: {v}" for v in self._auditor.look()]

    def _see_it_calm(self) -> None:
        started = time.monotonic()
        arena = self.arena
        arena.calm_down()
        deadline = started + arena.patience_s + CALM_S
        while arena.deployment.processes.pids().keys() & set(arena.players):
            self._tend_until(time.monotonic() + 0.1)
            if self.report.faults:
                return
            if time.monotonic() > deadline:
                self.report.faults.append(f"clients that do not end, in {self.begun}")
                return
        self._listen()
        self.say(f"clients have ended after {time.monotonic() - started:.1f} s")
        arena.deployment.forget_runs()
        store = arena.deployment.store()
        checks: dict[str, Callable[[], Any]] = {
            "left in Redis": arena.left,
            "left in files": arena.files_left,
            "audit": lambda: audit(store),
        }
        for what, look in checks.items():
            if found := wait_for_calm(look, CALM_S):
                self.report.faults.append(f"{what}: {found}")
            self.say(f"nothing {what} after {time.monotonic() - started:.1f} s")
        store.link.close()
        self.report.calm_s = time.monotonic() - started

    def _count_logged(self) -> None:
        logs = "".join(path.read_text(errors="replace") for path in self.arena.folder.glob("*.log"))
        self.report.logged = {
            what: n for what, pattern in RECOVERED.items() if (n := len(re.findall(pattern, logs)))
        }

    def _autopsy(self) -> None:
        """Keep what tells why."""
        if self.keep is None:
            return
        self.keep.mkdir(parents=True, exist_ok=True)
        for path in self.arena.folder.glob("*.log"):
            (self.keep / path.name).write_bytes(path.read_bytes())
        (self.keep / "steps.txt").write_text("\n".join(self.report.steps))
        (self.keep / "faults.txt").write_text("\n\n".join(self.report.faults))
        it = self.arena.deployment
        with contextlib.suppress(Exception):
            store = it.store()
            (self.keep / "namespace.txt").write_text(repr(read(store)).replace("Row(", "\nRow("))
        lines = []
        for name in it.redis.scan_iter(it.key("*"), 1000):
            kind = it.redis.type(name)
            value = {
                b"hash": lambda n: {k: v[:300] for k, v in it.redis.hgetall(n).items()},
                b"string": it.redis.get,
                b"set": it.redis.smembers,
                b"zset": lambda n: it.redis.zrange(n, 0, -1, withscores=True),
                b"list": lambda n: it.redis.lrange(n, 0, -1),
                b"stream": it.redis.xrange,
            }.get(kind, lambda n: None)(name)
            lines.append(f"{name!r} {kind!r} {value!r}"[:3000])
        (self.keep / "redis.txt").write_text("\n".join([f"TIME {it.redis.time()}", *sorted(lines)]))
        if py_spy := _program("py-spy"):
            with (self.keep / "stacks.txt").open("wb") as out:
                for name, pid in it.processes.pids().items():
                    out.write(f"=== {name} {pid}\n".encode())
                    out.flush()
                    command = [py_spy, "dump", "--nonblocking", "--subprocesses", "--pid", str(pid)]
                    subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, timeout=60, check=False)


def _program(name: str) -> str | None:
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else None
