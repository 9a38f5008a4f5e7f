"""What an agent does for its node's folder: mail, deaths of processes, memory, and the end."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence

from celery_mem.errors import CeleryMemError
from celery_mem.memory.asking import Listener, NobodyThere, ask, in_datagrams, listeners, socket_name
from celery_mem.memory.audit_files import YOUNG_S
from celery_mem.memory.durable import DurableFiles, durable_files
from celery_mem.memory.files import NodeFolder
from celery_mem.memory.process import is_alive
from celery_mem.memory.publisher import Publisher, find_here
from celery_mem.memory.reader import Found, Reader, Sources, find_sources
from celery_mem.memory.roots import AGENT_SOCKET
from celery_mem.memory.serialize import Frames
from celery_mem.state.store import DURABLE, Store
from celery_mem.worker.keeper import MemoryKeeper
from celery_mem.worker.memory import save
from celery_mem.worker.replicas import Replicas

log = logging.getLogger("celery_mem.agent")

LIVE_TIMEOUT_S = 0.2
"""A process that writes a large result just now does not answer at once; its figure can wait."""

DROP_TIMEOUT_S = 1.0
"""A process whose task holds the GIL does not answer; what it writes late goes when the folder is swept."""


class Housekeeper:
    """Keeps one node's folder in order.

    Args:
        node: name of the node.
        parent: pid of the worker's main process.
        limit: bytes that the node may use.
    """

    def __init__(self, node: str, parent: int, folder: NodeFolder, store: Store, limit: int) -> None:
        self.node = node
        self.folder = folder
        self.store = store
        self.keeper = MemoryKeeper(folder, limit, parent, store.settings)
        self.replicas = Replicas(node, folder, store)
        self._moves = store.twin()  # for what takes long, in other threads
        self._publisher = Publisher(
            self._moves.link,
            store.keys,
            lambda token: find_here(folder, token),
            piece_bytes=store.settings.piece_bytes,
            lease_s=store.settings.blob_lease,
        )
        self._durable = durable_files(store.settings)
        self._reader = Reader(
            self._moves.link,
            store.keys,
            locate=lambda key: find_sources(self._moves, key),
            mail=self._moves.mail,
            node=node,
            folder=folder,
            durable=self._durable,
        )
        self._processes: set[str] = set()
        self._freed = 0
        self._check_at = 0.0  # a new agent does not know what happened before it came
        self._sweep_at = time.monotonic() + YOUNG_S
        self._listener: Listener | None = None

    def start(self) -> None:
        """Be there for the processes of this host."""
        self._listener = Listener(self.folder.path, AGENT_SOCKET, lambda _: None).start()

    def close(self) -> None:
        """End what `start` began."""
        if self._listener is not None:
            self._listener.close()
        self._reader.close()
        self._moves.link.close()

    def begin_anew(self, generation: str | None = None) -> None:
        """Redis forgot the node, or everything: what is here and was not told since is of no use."""
        if generation is not None:
            self._moves.generation = generation
        self._check_at = time.monotonic()
        self._sweep_at = time.monotonic() + YOUNG_S

    def look(self) -> dict[str, int]:
        """Keep the node within its memory; returns the figures, and how many copies were freed so far."""
        live = 0
        for process in self._processes:
            with contextlib.suppress(NobodyThere, TimeoutError):
                answer = ask(self.folder.path, socket_name(process), "live", timeout=LIVE_TIMEOUT_S)
                live += int(answer)
        return self.keeper.look() | {"live": live, "freed": self._freed}

    @property
    def is_paused(self) -> bool:
        """Whether the node takes no new task."""
        return self.keeper.is_paused

    def drop(self, tokens: Sequence[str]) -> None:
        """Drop copies, from files and from the processes that have not written them yet."""
        self._freed += len(tokens)
        for name in listeners(self.folder.path):
            if name != AGENT_SOCKET:
                for message in in_datagrams("d", list(tokens)):
                    with contextlib.suppress(NobodyThere, TimeoutError):
                        ask(self.folder.path, name, message, timeout=DROP_TIMEOUT_S)
        # Only once they have answered: what one was writing is in the folder by now, or it drops it itself.
        self.folder.drop(tokens)

    def look_for_deaths(self) -> None:
        """See which processes ended, and tell Redis of the results that went with them; at times, tidy."""
        now = time.monotonic()
        found = {n.removesuffix(".sock") for n in listeners(self.folder.path) if n != AGENT_SOCKET}
        gone = {process for process in found | self._processes if not is_alive(process)}
        if gone or (self._check_at and now >= self._check_at):
            self.replicas.report_lost()
            self._check_at = 0.0
        for process in gone & found:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.folder.path}/{socket_name(process)}")
        self._processes = found - gone
        if now >= self._sweep_at:
            self.folder.tidy()
            self._sweep_at = now + YOUNG_S + self.replicas.remove_unknown() / 100

    def save_unique(self, meanwhile: Callable[[], None]) -> None:
        """Save to Redis what only this node has, the smallest first, as long as there is time.

        Args:
            meanwhile: called between results, to keep the node's lease.
        """
        self.replicas.report_lost()
        unique = self.replicas.unique()
        end = time.monotonic() + self.store.settings.save_seconds
        saved = 0
        for place in unique:
            if time.monotonic() >= end:
                break
            meanwhile()
            try:
                saved += self._save(place.token, place.key)
            except (CeleryMemError, OSError) as error:
                log.warning("no more results of node %s can be saved: %s", self.node, error)
                break
        if unique:
            log.info("saved %d of %d results that only node %s had", saved, len(unique), self.node)

    def move(self, verb: str, fields: list[str]) -> None:
        """Carry out a message of the mailbox; see `Store.mail`."""
        if verb == "p":
            token, reply, key = fields
            was_here = self._publisher.serve(token, reply, key)
            if was_here and self.store.settings.publish == "pinned":
                self._save(token, key)
        elif verb == "f":
            token, _, key = fields
            self._fetch(token, key)
        elif verb == "k" and self._durable is not None:
            self._keep(self._durable, *fields)
        else:
            self._save(*fields)

    # --- inside ---

    def _fetch(self, token: str, key: str) -> None:
        sources = find_sources(self._moves, key)
        if sources is None or sources.token != token:
            return  # freed, or made anew
        found = self._reader.read(key, sources)
        if not self.folder.has(token):  # it is of a node of this host, or there was no room for it
            self._copy_from_neighbour(sources, found)
        if self._moves.gain(self.node, [(key, token)]):
            self.folder.drop([token])
        for place in found.lost:
            self._moves.lose(place, [(key, token)])

    def _copy_from_neighbour(self, sources: Sources, found: Found) -> None:
        folders = map(self._reader.folders.of, sources.places)
        if not any(folder is not None and self.folder.link(folder, sources.token) for folder in folders):
            self.folder.write(sources.token, found.head, found.buffers)

    def _keep(self, durable: DurableFiles, token: str, key: str) -> None:
        found = find_here(self.folder, token)
        if found is None:
            return  # freed meanwhile, or lost; then whoever misses it says so
        durable.write(token, found.head, found.buffers)
        if self._moves.gain(DURABLE, [(key, token)]):
            durable.drop(token)
        elif not durable.has(token):  # a coordinator was deleting an earlier file of this name
            self._moves.lose(DURABLE, [(key, token)])

    def _save(self, token: str, key: str) -> bool:
        found = find_here(self.folder, token)
        if found is None:
            return False  # freed meanwhile, or lost; then whoever misses it says so
        return save(self._moves, key, token, Frames(bytes(found.head), list(found.buffers), ()))
