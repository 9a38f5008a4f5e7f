"""What slots write for recordings, and what is made of it when it is not theirs."""

from __future__ import annotations

import json
import zlib

import pytest

from celery_mem.profiling.lines import (
    AGAIN,
    CANCELLED,
    DONE,
    FAILED,
    MOST_BYTES,
    MOST_TEXT,
    Line,
    Notebook,
    Parcel,
    pack,
    unpack,
)
from celery_mem.state.keys import node_of

LINES = [
    Line("inc-1", "inc", 1_000.0, 1_000.25, 1_000.5, 28),
    Line("('x', 0)", "sum", 1_001.0, 1_001.0, 1_002.0, 0, FAILED, "ValueError: ünknown \ud800"),
    Line("b", "b", 1.0, 1.0, 1.0, 0, CANCELLED),
    Line("c", "c", 1.0, 1.0, 1.0, 0, AGAIN),
]


def test_lines_come_back_as_they_were() -> None:
    parcel = unpack(pack(Parcel("worker-0@host|12-34.1", 7, LINES)))
    assert (parcel.slot, parcel.first) == ("worker-0@host|12-34.1", 7)
    assert parcel.lines[0] == LINES[0]
    assert [line.outcome for line in parcel.lines] == [DONE, FAILED, CANCELLED, AGAIN]
    assert parcel.lines[1].error == "ValueError: ünknown ?"
    assert node_of(parcel.slot) == "worker-0@host"


def test_what_is_long_is_cut() -> None:
    line = LINES[1]._replace(key="k" * 10_000, function="f" * 10_000, error="e" * 10_000)
    [found] = unpack(pack(Parcel("s", 0, [line]))).lines
    assert (len(found.key), len(found.function), len(found.error)) == (MOST_TEXT,) * 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        zlib.compress(b"{"),
        zlib.compress(b"[1, 2]"),
        zlib.compress(json.dumps(["slot", 0, [[1]]]).encode()),
        zlib.compress(json.dumps(["slot", 0, [["k", "f", 0, 0, 0, 0, 99, ""]]]).encode()),
        zlib.compress(json.dumps(["slot", 0, [["k", "f", "soon", 0, 0, 0, 0, ""]]]).encode()),
        zlib.compress(b" " * (MOST_BYTES + 1)),
        pack(Parcel("s", 0, LINES))[:-3],
    ],
)
def test_what_is_no_parcel_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="unreadable lines"):
        unpack(data)


def test_a_notebook_numbers_lines_for_each_recording() -> None:
    notebook = Notebook()
    assert not notebook.is_open
    notebook.turn_to(("a",))
    assert notebook.is_open
    assert [name for name, _ in notebook.pages("s", LINES)] == ["a"]
    notebook.count(4)
    notebook.turn_to(("a", "b"))
    firsts = {name: unpack(data).first for name, data in notebook.pages("s", LINES[:1])}
    assert firsts == {"a": 4, "b": 0}
    assert {name: unpack(data).first for name, data in notebook.pages("s", LINES[:1])} == firsts
    notebook.turn_to(())
    assert notebook.pages("s", LINES) == []
