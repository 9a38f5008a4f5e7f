"""A recording of what ran: each attempt at a task, and memory over time; saved, read back, summed up."""

from __future__ import annotations

import json
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from celery_mem.errors import RecordingError
from celery_mem.profiling.lines import DONE, FAILED, OUTCOMES, Line
from celery_mem.profiling.memory import Memory, NodeMemory, Sample

if TYPE_CHECKING:
    import pandas

FORMAT = "celery-mem recording"
VERSION = 1
MOST_TASKS = 200_000
"""Attempts that a recording keeps unless it is told otherwise: some 80 MB."""


class Ran(NamedTuple):
    """One attempt at a task, and the slot that made it."""

    line: Line
    slot: str


class FunctionRow(NamedTuple):
    """What all attempts at tasks of one function took together.

    Attributes:
        name: of the function.
        tasks: attempts.
        failed: of these, those that raised an error.
        total_s: seconds in the function.
        mean_s: per attempt.
        max_s: of the slowest.
        slowest: key of that one.
        waited_s: seconds in which slots fetched inputs for it.
        nbytes: of all results.
    """

    name: str
    tasks: int
    failed: int
    total_s: float
    mean_s: float
    max_s: float
    slowest: str
    waited_s: float
    nbytes: int


class Summary(NamedTuple):
    """A recording in figures.

    Attributes:
        tasks: attempts that were recorded.
        failed: of these, those that raised an error.
        slots: that ran any.
        wall_s: from the begin of the first to the end of the last.
        busy_s: seconds in which slots ran tasks, together.
        nbytes: of all results.
        peak_nbytes: most bytes of results in the memory of all nodes.
        functions: those that took longest first.
    """

    tasks: int
    failed: int
    slots: int
    wall_s: float
    busy_s: float
    nbytes: int
    peak_nbytes: int
    functions: list[FunctionRow]

    @property
    def utilisation(self) -> float:
        """Which part of their time the slots ran tasks."""
        return self.busy_s / (self.slots * self.wall_s) if self.slots and self.wall_s else 0.0


class Recording:
    """What ran on a cluster for a while.

    Attributes:
        namespace: of the cluster.
        began, ended: seconds since 1970.
        dropped: attempts that are not in it, as they were too many.
        gaps: what else is missing, in words.
    """

    def __init__(self, namespace: str = "", most: int = MOST_TASKS) -> None:
        if most < 1:
            raise ValueError(f"most: the number of tasks to keep, at least 1, not {most!r}")
        self.namespace = namespace
        self.began = self.ended = 0.0
        self.dropped = 0
        self.gaps: list[str] = []
        self.memory = Memory()
        self._ran: deque[Ran] = deque(maxlen=most)

    def add(self, slot: str, lines: Iterable[Line]) -> None:
        """Add attempts; of too many the oldest go."""
        for line in lines:
            if len(self._ran) == self._ran.maxlen:
                self.dropped += 1
            self._ran.append(Ran(line, slot))

    def __len__(self) -> int:
        return len(self._ran)

    def __iter__(self) -> Iterator[Ran]:
        """Go through the attempts, in the order in which they came in."""
        return iter(list(self._ran))

    def summary(self) -> Summary:
        """Sum it up."""
        rows = list(self)
        groups: dict[str, list[Line]] = {}
        for line, _ in rows:
            groups.setdefault(line.function, []).append(line)
        functions = [_function_row(name, lines) for name, lines in groups.items()]
        wall = max((r.line.ended for r in rows), default=0.0) - min((r.line.began for r in rows), default=0.0)
        return Summary(
            tasks=len(rows),
            failed=sum(row.failed for row in functions),
            slots=len({slot for _, slot in rows}),
            wall_s=wall,
            busy_s=_busy(rows),
            nbytes=sum(row.nbytes for row in functions),
            peak_nbytes=max((s.total("memory") or 0 for s in self.memory.samples), default=0),
            functions=sorted(functions, key=lambda row: (-row.total_s, row.name)),
        )

    def to_pandas(self) -> pandas.DataFrame:
        """Return a row for each attempt.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas() makes a pandas.DataFrame: pip install pandas") from error
        frame = pd.DataFrame([(*line, slot) for line, slot in self], columns=[*Line._fields, "slot"])
        for name in ("began", "called", "ended"):
            frame[name] = pd.to_datetime(frame[name], unit="s")
        return frame

    # --- files ---

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file: as JSON, or where the name ends in .html as the page that `report` makes."""
        if os.fspath(path).lower().endswith((".html", ".htm")):
            self.report(path)
        else:
            write_text(path, json.dumps(self._as_json(), separators=(",", ":")))

    def report(self, path: str | os.PathLike[str] | None = None, *, title: str = "") -> str:
        """Return it as one page of HTML, that needs no network.

        Args:
            path: a file to write the page to, too.
            title: its headline.
        """
        from celery_mem.profiling.report import render

        page = render(self, title)
        if path is not None:
            write_text(path, page)
        return page

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote. Nothing in it is run or unpickled.

        Raises:
            RecordingError: it is something else.
            OSError: it cannot be read.
        """
        text = Path(path).read_bytes()
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise RecordingError(f"{os.fspath(path)} is no recording of celery-mem")
            if data.get("version") != VERSION:
                raise RecordingError(
                    f"{os.fspath(path)} is a recording of version {data.get('version')!r}; this celery-mem "
                    f"reads version {VERSION}"
                )
            return cls._from_json(data)
        except RecordingError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
            raise RecordingError(f"{os.fspath(path)} is no recording of celery-mem: {error}") from error

    def _as_json(self) -> dict[str, Any]:
        functions: dict[str, int] = {}
        slots: dict[str, int] = {}
        tasks = []
        for line, slot in self:
            tasks.append(
                [
                    line.key,
                    functions.setdefault(line.function, len(functions)),
                    slots.setdefault(slot, len(slots)),
                    round(line.began - self.began, 6),
                    round(line.called - self.began, 6),
                    round(line.ended - self.began, 6),
                    line.nbytes,
                    line.outcome,
                    line.error,
                ]
            )
        memory = [
            [round(s.at - self.began, 3), s.redis, {name: list(node) for name, node in s.nodes.items()}]
            for s in self.memory.samples
        ]
        return {
            "format": FORMAT,
            "version": VERSION,
            "namespace": self.namespace,
            "began": self.began,
            "ended": self.ended,
            "dropped": self.dropped,
            "gaps": self.gaps,
            "functions": list(functions),
            "slots": list(slots),
            "tasks": tasks,
            "memory": memory,
        }

    @classmethod
    def _from_json(cls, data: dict[str, Any]) -> Self:
        self = cls(str(data["namespace"]), most=max(1, len(data["tasks"])))
        self.began, self.ended = float(data["began"]), float(data["ended"])
        functions, slots = [str(f) for f in data["functions"]], [str(s) for s in data["slots"]]
        for key, function, slot, began, called, ended, nbytes, outcome, error in data["tasks"]:
            if outcome not in OUTCOMES:
                raise RecordingError(f"a task of a recording is {outcome!r}")
            line = Line(
                str(key),
                functions[function],
                self.began + float(began),
                self.began + float(called),
                self.began + float(ended),
                int(nbytes),
                outcome,
                str(error),
            )
            self.add(slots[slot], [line])
        for at, redis, nodes in data["memory"]:
            found = {str(name): NodeMemory(*map(int, figures)) for name, figures in nodes.items()}
            self.memory.add(Sample(self.began + float(at), found, None if redis is None else int(redis)))
        self.dropped, self.gaps = int(data["dropped"]), [str(text) for text in data["gaps"]]
        return self

    def __repr__(self) -> str:
        return f"<Recording: {len(self)} tasks in {self.ended - self.began:.1f} s>"


def _function_row(name: str, lines: list[Line]) -> FunctionRow:
    times = [line.ended - line.called for line in lines]
    slowest = max(lines, key=lambda line: line.ended - line.called)
    return FunctionRow(
        name,
        len(lines),
        sum(line.outcome == FAILED for line in lines),
        sum(times),
        sum(times) / len(times),
        max(times),
        slowest.key,
        sum(line.called - line.began for line in lines),
        sum(line.nbytes for line in lines if line.outcome == DONE),
    )


def _busy(rows: list[Ran]) -> float:
    """Sum up when slots ran something; a task that waits for others lies over those in its slot."""
    total = 0.0
    until: dict[str, float] = {}
    for line, slot in sorted(rows, key=lambda row: row.line.began):
        total += max(0.0, line.ended - max(line.began, until.get(slot, 0.0)))
        until[slot] = max(line.ended, until.get(slot, 0.0))
    return total


def check_place(path: str | os.PathLike[str]) -> None:
    """Raise OSError if `write_text` could not write there; to be told when a run is over would be late."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder} to write {os.path.basename(path)} in")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{os.fspath(path)} is a folder, and no place for a recording")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"nothing can be written in {folder}")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file in one go: whoever reads it finds the old one or the new one.

    Raises:
        OSError: there is no place for it.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
