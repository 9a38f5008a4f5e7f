"""Results that are only in the process that made them: when they are written, and who sees what."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from celery_mem.memory.files import NodeFolder, NoSpace
from celery_mem.memory.process import own_identity
from celery_mem.memory.serialize import Frames, dumps
from celery_mem.worker.live import LiveResults, is_ours
from tests.deployment import wait_until

NEVER_S = 3600.0


class Overflow:
    """Stands in for Redis: takes what the folder has no room for."""

    def __init__(self) -> None:
        self.taken: dict[str, bytes] = {}
        self.error: Exception | None = None
        self.calls = 0

    def __call__(self, key: str, token: str, head: bytes, buffers: Sequence[Any]) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error
        self.taken[token] = head


@pytest.fixture
def folder(tmp_path: Path) -> NodeFolder:
    return NodeFolder.create(str(tmp_path), "ns", "node@host", own_identity())


@pytest.fixture
def overflow() -> Overflow:
    return Overflow()


@pytest.fixture
def make(folder: NodeFolder, overflow: Overflow) -> Iterator[Callable[..., LiveResults]]:
    made: list[LiveResults] = []

    def make(limit: int = 1 << 30, write_behind: float = NEVER_S, busy: bool = True) -> LiveResults:
        live = LiveResults(folder, limit, write_behind, overflow)
        if busy:
            live.begin()
        made.append(live)
        return live

    yield make
    for live in made:
        live.close()


def frames(n: int = 100_000, fill: int = 1) -> Frames:
    """The pickled form of an array that nobody else has."""
    return dumps(np.full(n, fill, dtype="u1"))


def value(found: Any) -> Any:
    return pickle.loads(found.head, buffers=found.buffers)


def test_a_result_is_not_written_while_tasks_run_and_its_turn_has_not_come(
    make: Callable[..., LiveResults], folder: NodeFolder
) -> None:
    live = make()
    live.add("a", "1", frames())
    assert live.nbytes > 100_000
    assert live.tokens() == ["1"]
    assert list(folder.tokens()) == []


@pytest.mark.parametrize(
    "why", ["the slots idle", "its turn comes", "there are too many", "somebody asks", "the process ends"]
)
def test_a_result_is_written_when(why: str, make: Callable[..., LiveResults], folder: NodeFolder) -> None:
    live = make(
        limit=50_000 if why == "there are too many" else 1 << 30,
        write_behind=0.01 if why == "its turn comes" else NEVER_S,
    )
    live.add("a", "1", frames(fill=7))
    if why == "the slots idle":
        live.end()
    elif why == "somebody asks":
        assert live.write("1")
    elif why == "the process ends":
        live.write_all(10)
    wait_until(lambda: live.tokens() == [], "it to be written")
    assert live.nbytes == 0
    assert live.copy("1") is None
    assert value(folder.read("1")).tolist() == [7] * 100_000
    assert live.written == 1


def test_what_is_freed_before_is_never_written(make: Callable[..., LiveResults], folder: NodeFolder) -> None:
    live = make()
    for i in range(100):
        live.add("a", str(i), frames())
        assert live.drop([str(i), "unknown"]) == 1
    live.end()
    live.add("b", "last", frames())
    wait_until(lambda: live.tokens() == [], "the last one to be written")
    assert live.written == 1
    assert list(folder.tokens()) == ["last"]


def test_what_is_freed_while_it_is_written_is_not_left_in_the_folder(
    make: Callable[..., LiveResults], folder: NodeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = make()
    write, begun, go_on = folder.write, threading.Event(), threading.Event()

    def slow(*args: Any) -> int:
        begun.set()
        assert go_on.wait(10)
        return write(*args)

    monkeypatch.setattr(folder, "write", slow)
    live.add("a", "1", frames())
    live.end()
    assert begun.wait(10)
    assert live.drop(["1"]) == 1
    go_on.set()
    wait_until(lambda: live.tokens() == [], "the writer to be done")
    live.close()
    assert list(folder.tokens()) == []


def test_each_reader_gets_a_copy(make: Callable[..., LiveResults]) -> None:
    live = make()
    live.add("a", "1", frames(fill=1))
    one, two = value(live.copy("1")), value(live.copy("1"))
    one += 1
    assert two.max() == 1
    assert value(live.copy("1")).max() == 1


def test_who_adds_above_the_limit_waits_until_others_are_written(make: Callable[..., LiveResults]) -> None:
    live = make(limit=250_000)
    for i in range(10):
        live.add("a", str(i), frames())
        assert live.nbytes <= 250_000
    assert live.written >= 8


def test_a_result_for_which_there_is_no_room_goes_to_redis_once_redis_knows_it(
    make: Callable[..., LiveResults],
    folder: NodeFolder,
    overflow: Overflow,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: Any) -> int:
        raise NoSpace("full")

    monkeypatch.setattr(folder, "write", refuse)
    live = make(limit=0)
    live.add("a", "1", frames())
    live.add("b", "2", frames())
    assert not live.has_room  # who makes more is to store it in Redis at once
    assert overflow.taken == {}
    assert live.tokens() == ["1", "2"]
    live.now_known(["1", "2"])
    wait_until(lambda: live.tokens() == [], "both to be in Redis")
    assert set(overflow.taken) == {"1", "2"}
    assert sum("no room" in r.message for r in caplog.records) == 1


def test_what_neither_folder_nor_redis_takes_is_tried_again(
    make: Callable[..., LiveResults],
    folder: NodeFolder,
    overflow: Overflow,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("celery_mem.worker.live.RETRY_S", 0.01)
    write = folder.write
    monkeypatch.setattr(folder, "write", lambda *_: (_ for _ in ()).throw(NoSpace("full")))
    overflow.error = MemoryError("Redis is full")
    live = make()
    live.add("a", "1", frames())
    live.now_known(["1"])
    live.end()
    wait_until(lambda: overflow.calls > 2, "some tries")
    assert live.tokens() == ["1"]
    monkeypatch.setattr(folder, "write", write)
    wait_until(lambda: live.tokens() == [], "the folder to take it")
    assert folder.has("1")


# --- whose memory -------------------------------------------------------------------------------------------

SHARED = np.zeros(1000)


def made() -> Any:
    return np.zeros(1000)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (made, [True]),
        (lambda: made()[10:], [True]),
        (lambda: made().reshape(10, 100).T, [True]),
        (lambda: {"x": made(), "y": [made()]}, [True, True]),
        (lambda: SHARED, [False]),
        (lambda: SHARED[:10], [False]),
        (lambda: [made(), SHARED], [True, False]),
        (lambda: np.frombuffer(bytearray(800)), [True]),
    ],
)
def test_memory_is_ours_if_nothing_else_leads_to_it(build: Callable[[], Any], expected: list[bool]) -> None:
    box = [build()]
    pickled = dumps(box.pop())
    assert [is_ours(b) for b in pickled.buffers] == expected


def test_what_somebody_else_may_still_write_into_is_copied(make: Callable[..., LiveResults]) -> None:
    kept = np.zeros(1000)
    live = make()
    live.add("a", "1", dumps(kept))
    kept += 1
    assert value(live.copy("1")).max() == 0


def test_what_is_announced_is_written_before_what_is_older(
    make: Callable[..., LiveResults], folder: NodeFolder
) -> None:
    live = make()
    for token in ("1", "2", "3"):
        live.add("k", token, frames())
    live.hurry(["3", "unknown"])
    wait_until(lambda: live.tokens() == ["1", "2"], "the last to be written")
    assert list(folder.tokens()) == ["3"]
