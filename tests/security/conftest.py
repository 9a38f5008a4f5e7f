"""Namespaces whose processes have a key, and whoever else can write to their Redis."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from celery_mem.errors import SignatureError
from celery_mem.graph.keys import text_of
from celery_mem.memory.checksum import checksum_of
from celery_mem.state.keys import TASK
from tests.worker.conftest import Space

KEY = "a key of the right length for tests only"
OTHER_KEY = "another key of the right length for tests"


class Intruder:
    """Can write to Redis, has seen all that is there, and has no key.

    Attributes:
        trace: a folder that is there once code of the intruder has run.
    """

    def __init__(self, space: Space, trace: Path) -> None:
        self.space = space
        self.trace = trace
        self.link = space.store.link

    def pickle(self) -> bytes:
        """What makes the trace when it is unpickled."""
        return pickle.dumps(self, protocol=5)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)

    def _name(self, future: Any) -> str:
        return self.space.store.keys.of("task", text_of(future.key))

    def read(self, future: Any, field: str) -> bytes:
        return bytes(self.link.call("HGET", self._name(future), TASK[field]))

    def write(self, future: Any, field: str, value: bytes) -> None:
        self.link.call("HSET", self._name(future), TASK[field], value)

    def function_of(self, future: Any) -> str:
        return str(self.read(future, "recipe").decode().split(" ")[2])

    def write_function(self, future: Any, code: bytes) -> None:
        self.link.call("SET", self.space.store.keys.of("function", self.function_of(future)), code)

    def write_blob(self, future: Any, head: bytes) -> None:
        """Put another pickle stream in place of a large result's, with all that makes it look whole."""
        token = self.read(future, "replicas").decode().split("\n")[0]
        name = self.space.store.keys.blob(token, text_of(future.key))
        self.link.call("DEL", name)
        self.link.call("HSET", name, "h", len(head).to_bytes(8, "little"), "c", checksum_of([head]), 0, head)

    def check(self, future: Any, kind: str) -> str:
        """The future says what was refused, and nothing ran; returns the text."""
        with pytest.raises(SignatureError) as info:
            future.result(timeout=10)
        assert not self.trace.exists()
        assert info.value.kind == kind
        return str(info.value)


@pytest.fixture
def space(redis_server: str, tmp_path: Path) -> Iterator[Space]:
    space = Space(redis_server, tmp_path, secret_key=KEY, node_memory=False)
    yield space
    space.close()


@pytest.fixture
def intruder(space: Space, tmp_path: Path) -> Intruder:
    return Intruder(space, tmp_path / "trace")
