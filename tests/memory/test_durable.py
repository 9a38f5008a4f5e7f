"""Durable files: whole or not at all, under any address of fsspec."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from celery_mem.config import Settings
from celery_mem.errors import ConfigError, RedisUnavailableError
from celery_mem.memory.durable import DurableFiles, durable_files, read_durable
from celery_mem.memory.serialize import dumps, loads


@pytest.fixture
def files(tmp_path: Path) -> DurableFiles:
    return DurableFiles(f"file://{tmp_path}/results", "mem")


def write(files: DurableFiles, token: str, obj: object) -> None:
    frames = dumps(obj)
    files.write(token, frames.head, frames.buffers)


def read(files: DurableFiles, token: str) -> object:
    kept = files.read(token)
    assert kept is not None
    return loads(bytes(kept.head), kept.buffers)


def test_what_is_written_is_read_and_belongs_to_its_reader(files):
    write(files, "1-abc", [np.arange(5), np.zeros((0, 3)), "text"])
    one, empty, text = read(files, "1-abc")
    one += 1
    assert (list(one), empty.shape, text) == ([1, 2, 3, 4, 5], (0, 3), "text")
    assert list(read(files, "1-abc")[0]) == [0, 1, 2, 3, 4]


def test_any_file_system_of_fsspec_will_do():
    files = DurableFiles("memory://results", "mem")
    write(files, "1-abc", np.ones(3))
    assert read(files, "1-abc").sum() == 3
    assert [name for name, _ in files.files()] == ["1-abc"]
    files.drop("1-abc")
    files.drop("1-abc")
    assert files.read("1-abc") is None


def test_a_file_that_is_not_what_was_written_is_none(files, tmp_path):
    path = tmp_path / "results" / "mem" / "1-abc"
    write(files, "1-abc", np.arange(100))
    whole = path.read_bytes()
    for spoilt in (b"", whole[:3], whole[:20], whole[:-1], whole[:-5] + b"12345", b"XXXX" + whole[4:]):
        path.write_bytes(spoilt)
        assert files.read("1-abc") is None
    write(files, "1-abc", np.arange(100))
    assert path.read_bytes() == whole


def test_a_writer_that_fails_leaves_nothing(files, monkeypatch):
    write(files, "0-abc", 1)
    monkeypatch.setattr(files._fs, "mv", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        write(files, "1-abc", 2)
    assert [name for name, _ in files.files()] == ["0-abc"]


def test_writers_and_readers_may_meet(files):
    write(files, "1-abc", np.arange(1000))
    threads = [threading.Thread(target=write, args=(files, "1-abc", np.arange(1000))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        assert len(read(files, "1-abc")) == 1000
    for thread in threads:
        thread.join()
    assert len(list(files.files())) == 1


def test_a_place_that_is_away_is_not_a_lost_file(files, tmp_path):
    write(files, "1-abc", 1)
    assert read_durable(files, "key", "2-abc") is None
    (tmp_path / "results").rename(tmp_path / "away")
    with pytest.raises(RedisUnavailableError, match=r"durable file of key at .*is it mounted here"):
        read_durable(files, "key", "1-abc")
    assert list(files.files()) == []


def test_who_was_not_told_of_the_place_says_which_setting_is_missing():
    settings = Settings(url="redis://not-used")
    assert durable_files(settings) is None
    with pytest.raises(ConfigError, match="mem_durable_url is not set in this process"):
        read_durable(None, "key", "1-abc")
    with pytest.raises(ConfigError, match="mem_durable_url 'nonsense://x' cannot be used"):
        durable_files(settings.replace(durable_url="nonsense://x"))
