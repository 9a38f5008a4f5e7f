"""Inputs of tasks: from this process, from the node's files, from another node or from Redis."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from celery_mem.config import Settings
from celery_mem.errors import DataLostError
from celery_mem.graph.keys import key_of
from celery_mem.memory import blobs
from celery_mem.memory.durable import durable_files, read_durable
from celery_mem.memory.files import MAP_LEAST
from celery_mem.memory.reader import Gone, Reader, Sources, find_sources
from celery_mem.memory.seal import seal_of
from celery_mem.memory.serialize import Frames
from celery_mem.state.store import DURABLE, Input, Store
from celery_mem.worker.cache import Cached, ResultCache
from celery_mem.worker.live import Copy
from celery_mem.worker.memory import WRITE_TIMEOUT_S, ProcessMemory

log = logging.getLogger("celery_mem.worker")


class InputsMissingError(Exception):
    """Inputs of a task are not where Redis says: the task has to wait until they are made again.

    Args:
        lost: dependency, token and place of each copy that was looked for in vain.
    """

    def __init__(self, lost: Sequence[tuple[str, str, str]]) -> None:
        super().__init__(lost)
        self.lost = lost


class Inputs(Protocol):
    """Gives a slot the inputs of its tasks."""

    def read(self, given: Sequence[Input], lent: list[memoryview] | None = None) -> list[Any]:
        """Return the values, each an object of its own: a task that writes into it spoils nobody's.

        Args:
            lent: takes what of their memory is not theirs, as the task will not write; it cannot.
        Raises:
            InputsMissingError: some are not there, the task is to be handed back.
        """

    def note(self, key: str, token: str, frames: Frames) -> None:
        """Take note of a result of this slot that went to Redis."""

    def close(self) -> None:
        """Close what was opened for reading."""


class StoredInputs:
    """Results that go through Redis, with those that this slot made or read last at hand."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store = store
        self.seal = seal_of(settings)
        self.results = ResultCache(settings.cache_bytes)
        self.durable = durable_files(settings)

    def read(self, given: Sequence[Input], lent: list[memoryview] | None = None) -> list[Any]:
        return [self._read(i) for i in given]

    def note(self, key: str, token: str, frames: Frames) -> None:
        self._keep(token, key, frames.head, frames.buffers)

    def close(self) -> None:
        pass

    def _read(self, given: Input) -> Any:
        what = f"input {given.key}"
        if given.kind == "v":
            return self.seal.load_inline(given.key, given.data, what)
        sources = sources_of(given)
        cached = self.results.get(f"{sources.token}:{given.key}")
        if cached is not None:
            return self.seal.load(given.key, cached.head, [bytearray(b) for b in cached.buffers], what)
        found: tuple[Any, list[Any]] | None
        found = blobs.read(self.store.link, self.store.keys.blob(sources.token, given.key), given.key)
        if found is None and DURABLE in sources.places:
            kept = read_durable(self.durable, given.key, sources.token)
            found = None if kept is None else (kept.head, kept.buffers)
        if found is None:
            raise InputsMissingError([(given.key, sources.token, place) for place in sources.places])
        self._keep(sources.token, given.key, bytes(found[0]), found[1])
        return self.seal.load(given.key, memoryview(found[0]), found[1], what)

    def _keep(self, token: str, key: str, head: bytes, buffers: Sequence[Any]) -> None:
        """Keep a copy of a result: the buffers are the task's own, which may write into them at any time."""
        nbytes = len(head) + sum(memoryview(b).nbytes for b in buffers)
        if self.results.has_room(nbytes):
            self.results.put(f"{token}:{key}", Cached(head, [bytes(b) for b in buffers], nbytes))


class NodeInputs:
    """Results in node memory. What came from elsewhere stays as a further copy: data in demand spreads."""

    def __init__(self, store: Store, memory: ProcessMemory) -> None:
        self.store = store
        self.seal = seal_of(store.settings)
        self.memory = memory
        self.reader = Reader(
            store.link,
            store.keys,
            locate=lambda key: find_sources(store, key),
            mail=store.mail,
            node=memory.node,
            folder=memory.folder,
            durable=durable_files(store.settings),
        )

    def read(self, given: Sequence[Input], lent: list[memoryview] | None = None) -> list[Any]:
        values: list[Any] = []
        lost: list[tuple[str, str, str]] = []
        is_complete = True
        sources = {i.key: sources_of(i) for i in given if i.kind != "v"}
        if len(sources) > 1:
            self._announce(sources.values())
        for i in given:
            what = f"input {i.key}"
            try:
                if i.kind == "v":
                    values.append(self.seal.load_inline(i.key, i.data, what))
                else:
                    values.append(self._read(i.key, sources[i.key], what, lent))
            except Gone as gone:  # go on: all that is missing is told at once
                is_complete = False
                lost += [(gone.key, gone.token, place) for place in gone.places]
        if not is_complete:
            raise InputsMissingError(lost)
        return values

    def note(self, key: str, token: str, frames: Frames) -> None:
        pass

    def close(self) -> None:
        self.reader.close()

    def _read(self, key: str, sources: Sources, what: str, lent: list[memoryview] | None) -> Any:
        if lent is not None and (loan := self.memory.live.lend(sources.token)) is not None:
            lent += loan.buffers
            return self.seal.load(key, loan.head, loan.buffers, what)
        copy = self._copy_of(sources.token)
        if copy is not None:
            return self.seal.load(key, copy.head, copy.buffers, what)
        found = self.reader.read(key, sources)
        for place in found.lost:
            self.store.lose(place, [(key, sources.token)])
        if found.is_kept and self.store.gain(self.memory.node, [(key, sources.token)]):
            self.memory.folder.drop([sources.token])  # freed meanwhile; what we mapped stays
        return self.seal.load(key, found.head, found.buffers, what)

    def _announce(self, sources: Iterable[Sources]) -> None:
        """Have other processes write what is about to be read, while the first inputs are read already."""
        self.reader.announce(s for s in sources if self.memory.live.sizes(s.token) is None)

    def _copy_of(self, token: str) -> Copy | None:
        """Return a copy of a live result for one reader; None if it is to be read from the node's files.

        Where a warm file waits to be used again, the result goes there and its readers map it. That takes
        about as long as a copy, but it is in memory once and not twice.
        """
        live = self.memory.live
        sizes = live.sizes(token)
        if sizes is None:
            return None
        is_large = sum(sizes) >= MAP_LEAST
        if is_large and self.memory.folder.can_recycle(sizes) and live.write(token, WRITE_TIMEOUT_S):
            return None
        return live.copy(token)


def sources_of(given: Input) -> Sources:
    """Return where the copies of an input are.

    Raises:
        DataLostError: there are none.
    """
    if given.kind != "r":
        raise DataLostError(key_of(given.key), "its data was gone when a task came to read it")
    return Sources.parse(given.data)
