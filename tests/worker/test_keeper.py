"""A node keeps within its memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from celery_mem.config import Settings
from celery_mem.memory.files import NodeFolder
from celery_mem.memory.process import own_identity
from celery_mem.worker import keeper as keeper_module
from celery_mem.worker.keeper import PAUSED, MemoryKeeper

MB = 1_000_000


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> NodeFolder:
    """A folder in shared memory, which is what limits are about."""
    folder = NodeFolder.create("/dev/shm", "keeper", "node@host", own_identity())
    if not folder.is_memory:
        folder.destroy()
        pytest.skip("/dev/shm is no shared memory here")
    monkeypatch.setattr(keeper_module, "private_memory", lambda pids: PRIVATE[0])
    PRIVATE[0] = 0
    return folder


PRIVATE = [0]
"""What the worker's processes have for themselves."""


@pytest.fixture
def keeper(folder: NodeFolder) -> object:
    settings = Settings(url="redis://nowhere", memory_target=0.6, memory_pause=0.85)
    yield MemoryKeeper(folder, 20 * MB, os.getpid(), settings)
    folder.destroy()


def fill(folder: NodeFolder, names: str) -> None:
    for i, token in enumerate(names):
        folder.write(token, b"head", [bytes(MB)])
        os.utime(f"{folder.path}/files/{token}", (i, i))  # the first is the coldest


def in_memory(folder: NodeFolder) -> str:
    return "".join(sorted(token for token, _ in folder.coldest()))


def test_below_the_target_nothing_is_spilled(folder: NodeFolder, keeper: MemoryKeeper) -> None:
    fill(folder, "abcdefgh")
    figures = keeper.look()
    assert figures["spilled"] == 0
    assert figures["limit"] == 20 * MB
    assert 8 * MB <= figures["files"] == figures["total"] < 12 * MB
    assert in_memory(folder) == "abcdefgh"


def test_above_the_target_what_nobody_read_for_long_is_spilled_and_can_be_read(
    folder: NodeFolder, keeper: MemoryKeeper
) -> None:
    fill(folder, "abcdefgh")
    PRIVATE[0] = 6 * MB
    figures = keeper.look()
    assert figures["total"] <= 12 * MB
    assert figures["spilled"] > 0
    left = in_memory(folder)
    assert "abcdefgh".endswith(left)
    assert left not in ("", "abcdefgh")
    assert bytes(folder.read("a").buffers[0]) == bytes(MB)  # type: ignore[union-attr]
    assert not keeper.is_paused


def test_files_that_wait_to_be_used_again_go_before_results(folder: NodeFolder, keeper: MemoryKeeper) -> None:
    fill(folder, "abcdefgh")
    folder.drop("abcd")
    if folder.usage().pool_nbytes == 0:
        pytest.skip("files are not recycled here")
    PRIVATE[0] = 7 * MB
    figures = keeper.look()
    assert figures["spilled"] == 0
    assert figures["total"] <= 12 * MB
    assert in_memory(folder) == "efgh"


def test_above_the_limit_the_node_pauses_and_goes_on_when_there_is_room_again(
    folder: NodeFolder, keeper: MemoryKeeper
) -> None:
    mark = Path(folder.path) / PAUSED
    PRIVATE[0] = 18 * MB
    keeper.look()
    assert keeper.is_paused
    assert mark.exists()
    assert MemoryKeeper(folder, 1, os.getpid(), keeper.settings).is_paused  # an agent that was started anew
    PRIVATE[0] = 16_900_000
    keeper.look()
    assert keeper.is_paused  # a little below is not enough
    PRIVATE[0] = 10 * MB
    keeper.look()
    assert not keeper.is_paused
    assert not mark.exists()
