"""What the slots of one process share: the node's folder, and the results that nobody else has yet."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

from celery_mem.config import Settings
from celery_mem.memory import blobs
from celery_mem.memory.asking import Listener, socket_name
from celery_mem.memory.files import NodeFolder
from celery_mem.memory.limits import memory_limit
from celery_mem.memory.process import own_identity
from celery_mem.memory.serialize import Frames
from celery_mem.state.keys import NODE
from celery_mem.state.store import REDIS, Store
from celery_mem.worker.keeper import PAUSED
from celery_mem.worker.live import LiveResults

log = logging.getLogger("celery_mem.worker")

LIVE_SHARE = 8
"""Part of a small host's or container's memory that may be live results of one process."""
WRITE_TIMEOUT_S = 20.0
"""Who asks for a result asks again after some time."""


class ProcessMemory:
    """Node memory as one process that runs tasks has it. Made there, after the fork: it starts threads.

    Args:
        folder: the node's folder.
        node: name of the node.
    """

    def __init__(self, folder: NodeFolder, node: str, settings: Settings) -> None:
        self.folder = folder
        self.node = node
        self.settings = settings
        most = min(settings.live_bytes, memory_limit(settings.memory_limit) // LIVE_SHARE)
        self.live = LiveResults(folder, most, settings.write_behind, self._to_redis)
        self._listener = Listener(folder.path, socket_name(own_identity()), self._answer).start()
        self._mark = os.path.join(folder.path, PAUSED)
        self._store: Store | None = None
        self._lock = threading.Lock()

    @property
    def is_paused(self) -> bool:
        """Whether the node's agent wants no new task taken: memory is short."""
        return os.path.exists(self._mark)

    def drop(self, tokens: Sequence[str]) -> None:
        """Drop results that this process made, written or not."""
        if tokens:
            self.live.drop(tokens)
            self.folder.drop(tokens)

    def forget_generation(self, generation: str) -> None:
        """Drop the results of a namespace that was reset."""
        self.live.drop([t for t in self.live.tokens() if t.endswith(token_suffix(generation))])

    def close(self) -> None:
        """Write what is not written yet: the process ends in good order."""
        self.live.write_all(self.settings.save_seconds)
        self.live.close()
        self._listener.close()  # only now: until here somebody may ask for what is being written
        if self._store is not None:
            self._store.link.close()

    def _answer(self, question: str) -> str | None:
        """Answer a process of this host.

        `w <token>` writes a result now; `u <token>...` says that somebody will come for these soon;
        `d <token>...` drops some; `live` asks for the bytes that are not written yet.
        """
        verb, *words = question.split(" ")
        if verb == "w":
            is_there = self.live.write(words[0], WRITE_TIMEOUT_S) or self.folder.has(words[0])
            return f"{'y' if is_there else 'n'} {words[0]}"
        if verb == "u":
            self.live.hurry(words)
            return None
        if verb == "d":
            return str(self.live.drop(words))
        return str(self.live.nbytes) if verb == "live" else None

    def _to_redis(self, key: str, token: str, head: bytes, buffers: Sequence[Any]) -> None:
        """Keep a result in Redis for which the folder has no room."""
        with self._lock:
            if self._store is None:
                self._store = Store.connect(self.settings)
        save(self._store, key, token, Frames(head, list(buffers), ()))
        self._store.lose(self.node, [(key, token)])  # if nobody wants it any more, that changes nothing


def save(store: Store, key: str, token: str, frames: Frames) -> bool:
    """Write a result to Redis as a lasting copy; returns whether it was still wanted."""
    s, name = store.settings, store.keys.blob(token, key)
    blobs.write(
        store.link, blobs.write_commands(name, frames, piece_bytes=s.piece_bytes, lease_s=s.blob_lease)
    )
    if store.gain(REDIS, [(key, token)]):
        store.link.call("UNLINK", name)
        return False
    return True


def token_suffix(generation: str) -> str:
    """Return the end of all tokens of a namespace: after a reset attempts are numbered anew, tokens never."""
    return f"-{generation[:8]}"


def folder_of(app: Any, settings: Settings, node: str) -> NodeFolder | None:
    """Return the folder of the node that this process belongs to; None if it keeps nothing in files."""
    path = getattr(app, "mem_folder", None)
    if path is None:  # a pool child that was not forked
        store = Store.connect(settings)
        told = store.link.call("HGET", store.keys.of("node", node), NODE["dir"])
        store.link.close()
        path = "" if told is None else told.decode()
    return NodeFolder.open(path) if path else None
