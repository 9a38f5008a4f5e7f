"""A recording as one page of HTML that needs neither network nor server; every name in it is text."""

from __future__ import annotations

import heapq
import html
import json
import re
import time
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from celery_mem.profiling.lines import OUTCOMES
from celery_mem.profiling.memory import Memory
from celery_mem.profiling.recording import FunctionRow, Ran, Recording, Summary
from celery_mem.state.keys import node_of

MOST_DRAWN = 50_000
"""Attempts in the picture; of more, the longest are drawn."""
MOST_FUNCTIONS = 200
MOST_SAMPLES = 2_000
MOST_GAPS = 10
TOUCH_S = 1e-4
"""Attempts that overlap by less follow each other: begins are by a clock that is corrected now and then."""
COLOURS = (
    "#4269d0",
    "#efb118",
    "#3ca951",
    "#a463f2",
    "#6cc5b0",
    "#ff8ab7",
    "#97bbf5",
    "#9c6b4e",
    "#38a3a5",
    "#c77d0a",
    "#7d8cc4",
    "#8fb339",
)
"""Of the functions that took longest; none is the red of errors. Others get one by turns."""
_PLACE = re.compile(r"<!--([A-Z]+)-->")


def render(recording: Recording, title: str = "") -> str:
    """Return the page."""
    summary = recording.summary()
    colours = {row.name: COLOURS[i % len(COLOURS)] for i, row in enumerate(summary.functions)}
    drawn = _longest(recording)
    headline = title or f"What ran on {recording.namespace or 'the cluster'}"
    parts = {
        "TITLE": html.escape(headline),
        "WHEN": _when(recording),
        "CARDS": _cards(recording, summary),
        "NOTES": _notes(recording, len(drawn)),
        "FUNCTIONS": _function_table(summary.functions, colours),
        "DATA": _embed(_data(recording, summary, drawn, colours)),
    }
    template = (files("celery_mem.profiling") / "report.html").read_text(encoding="utf-8")
    return _PLACE.sub(lambda place: parts[place[1]], template)


def _embed(data: Any) -> str:
    """Return JSON that can stand inside a script element, whatever is in it."""
    text = json.dumps(data, separators=(",", ":"))  # all but ASCII is escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _longest(recording: Recording) -> list[Ran]:
    return heapq.nlargest(MOST_DRAWN, recording, key=lambda row: row.line.ended - row.line.began)


# --- data of the pictures -----------------------------------------------------------------------------------


def _data(
    recording: Recording, summary: Summary, drawn: list[Ran], colours: Mapping[str, str]
) -> dict[str, Any]:
    drawn = sorted(drawn, key=lambda row: row.line.began)
    begin = min([row.line.began for row in drawn] + [recording.began])
    end = max([row.line.ended for row in drawn] + [recording.ended])
    numbers = {name: i for i, name in enumerate(colours)}
    rows, lanes = _lanes(drawn)
    return {
        "end": round(end - begin, 6),
        "began": begin,
        "functions": list(colours),
        "colours": list(colours.values()),
        "outcomes": OUTCOMES,
        "lanes": lanes,
        "tasks": {
            "row": rows,
            "function": [numbers[row.line.function] for row in drawn],
            "began": [_micros(row.line.began - begin) for row in drawn],
            "called": [_micros(row.line.called - row.line.began) for row in drawn],
            "took": [_micros(row.line.ended - row.line.began) for row in drawn],
            "nbytes": [row.line.nbytes for row in drawn],
            "outcome": [OUTCOMES.index(row.line.outcome) for row in drawn],
            "key": [row.line.key for row in drawn],
            "errors": {i: row.line.error for i, row in enumerate(drawn) if row.line.error},
        },
        "memory": _memory(recording.memory, begin),
    }


def _micros(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


def _lanes(drawn: Iterable[Ran]) -> tuple[list[int], list[dict[str, Any]]]:
    """Give each attempt a row: slots are lanes, with more than one row where attempts lie over each other.

    Returns:
        rows in order of `drawn`, which is sorted by begin; and of each lane slot, node and number of rows.
    """
    ends: dict[str, list[float]] = {}  # slot -> end of the last attempt of each of its rows
    places: list[tuple[str, int]] = []
    for line, slot in drawn:
        rows = ends.setdefault(slot, [])
        free = next((i for i, end in enumerate(rows) if end <= line.began + TOUCH_S), len(rows))
        rows[free : free + 1] = [line.ended]
        places.append((slot, free))
    first: dict[str, int] = {}
    lanes: list[dict[str, Any]] = []
    numbers: dict[str, int] = {}
    n_rows = 0
    for slot in sorted(ends, key=lambda slot: (node_of(slot), slot)):
        node = node_of(slot)
        numbers[node] = numbers.get(node, 0) + 1
        lanes.append({"slot": slot, "node": node, "number": numbers[node], "rows": len(ends[slot])})
        first[slot] = n_rows
        n_rows += len(ends[slot])
    return [first[slot] + row for slot, row in places], lanes


def _memory(memory: Memory, begin: float) -> dict[str, Any]:
    samples = memory.samples[:: len(memory.samples) // MOST_SAMPLES + 1]
    names = sorted({name for sample in samples for name in sample.nodes})
    return {
        "at": [round(sample.at - begin, 3) for sample in samples],
        "redis": [sample.redis for sample in samples],
        "nodes": {
            name: [list(sample.nodes[name]) if name in sample.nodes else None for sample in samples]
            for name in names
        },
    }


# --- texts and tables ---------------------------------------------------------------------------------------


def _when(recording: Recording) -> str:
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(recording.began))
    namespace = f"namespace {html.escape(recording.namespace)}, " if recording.namespace else ""
    return f"{namespace}from {began}, for {seconds(recording.ended - recording.began)}"


def _cards(recording: Recording, summary: Summary) -> str:
    cards = [
        ("tasks", f"{summary.tasks:,}", ""),
        ("failed", f"{summary.failed:,}", "bad" if summary.failed else ""),
        ("first to last", seconds(summary.wall_s), ""),
        ("slots", f"{summary.slots:,}", ""),
        ("busy", f"{100 * summary.utilisation:.0f} %", ""),
        ("results made", size(summary.nbytes), ""),
        ("peak memory", size(summary.peak_nbytes) if recording.memory.samples else "-", ""),
    ]
    return "".join(
        f'<div class="card {kind}"><b>{html.escape(value)}</b>{html.escape(name)}</div>'
        for name, value, kind in cards
    )


def _notes(recording: Recording, n_drawn: int) -> str:
    notes = []
    if recording.dropped:
        notes.append(
            f"{recording.dropped:,} tasks are not in this recording: there were more than it keeps, and the "
            "oldest were dropped."
        )
    if n_drawn < len(recording):
        notes.append(
            f"The picture has the {n_drawn:,} longest of {len(recording):,} tasks; the table counts all."
        )
    notes += recording.gaps[:MOST_GAPS]
    if len(recording.gaps) > MOST_GAPS:
        notes.append(f"and {len(recording.gaps) - MOST_GAPS:,} more gaps")
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def _function_table(rows: list[FunctionRow], colours: Mapping[str, str]) -> str:
    total = sum(row.total_s for row in rows) or 1.0
    lines = []
    for i, row in enumerate(rows[:MOST_FUNCTIONS]):
        share = 100 * row.total_s / total
        numbers = (f"{row.tasks:,}", f"{row.failed:,}" if row.failed else "-")
        times = (seconds(row.total_s), seconds(row.mean_s), seconds(row.max_s), seconds(row.waited_s))
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (*numbers, *times, size(row.nbytes)))
        lines.append(
            f'<tr data-function="{i}" tabindex="0"><th scope="row">'
            f'<i style="background:{colours[row.name]}"></i>'
            f'<span title="slowest: {html.escape(row.slowest)}">{html.escape(row.name)}</span>'
            f'<u style="width:{share:.1f}%;background:{colours[row.name]}"></u></th>{cells}</tr>'
        )
    if len(rows) > MOST_FUNCTIONS:
        lines.append(f'<tr><th scope="row">and {len(rows) - MOST_FUNCTIONS:,} more</th></tr>')
    return "".join(lines) or '<tr><td colspan="8">No task ran meanwhile.</td></tr>'


def seconds(s: float) -> str:
    """Return a time for people."""
    if s >= 100:
        return f"{s:,.0f} s"
    if s >= 1:
        return f"{s:.2f} s"
    return f"{s * 1e3:.1f} ms" if s >= 1e-3 else f"{s * 1e6:.0f} µs"


def size(nbytes: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} TiB"
