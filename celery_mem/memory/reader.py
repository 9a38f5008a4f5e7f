"""Reads a result from the cheapest place that has it: the own node, this host, Redis, another host."""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from celery_mem.errors import CeleryMemError
from celery_mem.memory.asking import NobodyThere, ask, in_datagrams, socket_name, tell
from celery_mem.memory.durable import DurableFiles, read_durable
from celery_mem.memory.files import Incoming, NodeFolder, NoSpace
from celery_mem.memory.publisher import HERE, NOT_HERE, finish
from celery_mem.memory.transit import receive, transit_name
from celery_mem.state.keys import NODE, Keys
from celery_mem.state.letters import publish_copy
from celery_mem.state.link import Link
from celery_mem.state.store import DURABLE, REDIS, Location, Store

log = logging.getLogger("celery_mem.memory")

_LOOK_AGAIN_S = 10.0
_ASK_AGAIN_S = 5.0
_WAIT_S = 1.0
_ANNOUNCE_S = 0.01


class Sources(NamedTuple):
    """Where a result is, as Redis says.

    Attributes:
        token: names its bytes.
        owner: slot that made it, `<node>|<process>.<n>`; empty if a client brought it.
        nbytes: its size.
        places: nodes, `@redis` and `@durable`.
    """

    token: str
    owner: str
    nbytes: int
    places: tuple[str, ...]

    @classmethod
    def parse(cls, data: bytes) -> Sources:
        """Read the lines of an `Input` of kind "r"."""
        token, owner, nbytes, *places = data.decode().split("\n")
        return cls(token, owner, int(nbytes), tuple(places))

    @classmethod
    def at(cls, location: Location) -> Sources:
        """Take what a reader needs of a location."""
        return cls(location.token, location.owner, location.nbytes, location.places)


def find_sources(store: Store, key: str) -> Sources | None:
    """Ask Redis where the copies of a result are now; None if it has none."""
    (location,) = store.locate([key])
    return None if location is None or not location.places else Sources.at(location)


class Found(NamedTuple):
    """A result that was read.

    Attributes:
        head: its pickle stream.
        buffers: its buffers, writable, and nobody else's.
        nbytes: bytes of all parts.
        is_kept: it is in the reader's node folder now and was not before: tell Redis (`gain`), or drop it.
        lost: places that Redis names and that do not have it (`lose`).
    """

    head: Any
    buffers: Sequence[Any]
    nbytes: int
    is_kept: bool = False
    lost: tuple[str, ...] = ()


class Gone(CeleryMemError):  # noqa: N818 (a plain fact; whoever meets it reports it and waits)
    """A result is in none of the places that Redis names.

    Args:
        key: its key.
        token: names the bytes that were looked for.
        places: where they are not; none if Redis names none (any more).
    """

    def __init__(self, key: str, token: str, places: tuple[str, ...]) -> None:
        super().__init__(key, token, places)
        self.key = key
        self.token = token
        self.places = places

    def __str__(self) -> str:
        return f"the result of {self.key} ({self.token}) is not at {', '.join(self.places) or 'any place'}"


class Reader:
    """Reads results for one process. Threads may read at once.

    Args:
        link: to Redis; transfers have links of their own.
        keys: of the namespace.
        locate: tells afresh where a key's result is; None if it has none.
        mail: puts a message into a node's mailbox; returns False if the node is gone.
        node: name of the node this process belongs to; empty for a client.
        folder: that node's folder; what comes through Redis is kept there.
        durable: the place of durable files, if there is one.
        ask_timeout: seconds for which the maker of a result on this host may take to write it.
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        *,
        locate: Callable[[str], Sources | None],
        mail: Callable[[str, str], bool],
        node: str = "",
        folder: NodeFolder | None = None,
        durable: DurableFiles | None = None,
        ask_timeout: float = 60.0,
    ) -> None:
        self.link = link
        self.keys = keys
        self.locate = locate
        self.mail = mail
        self.node = node
        self.folder = folder
        self.durable = durable
        self.ask_timeout = ask_timeout
        self.folders = Folders(link, keys)
        self._links = _Links(link)

    def read(self, key: str, sources: Sources) -> Found:
        """Return a result.

        Raises:
            Gone: no copy is where Redis says, or Redis names none.
            RedisUnavailableError: see `Link`.
        """
        while True:
            found = self._here(sources.token)
            lost: list[str] = []
            for place in () if found else self._by_cost(sources.places):
                found = self._from(place, key, sources)
                if found is not None:
                    break
                lost.append(place)
            if found is not None:
                return found._replace(lost=tuple(lost))
            # It may have been moved, or made again, since Redis said so.
            now = self.locate(key)
            if now is None or not now.places:
                raise Gone(key, sources.token, ())
            if (now.token, set(now.places)) == (sources.token, set(sources.places)):
                raise Gone(key, sources.token, tuple(lost))
            sources = now

    def announce(self, wanted: Iterable[Sources]) -> None:
        """Tell their makers on this host of results that will be read now, so that they write them at once.

        Several makers then write at a time, and while the first results are read already. It may do nothing.
        """
        by_maker: dict[tuple[str, str], list[str]] = {}
        for sources in wanted:
            node, _, slot = sources.owner.rpartition("|")
            if node not in sources.places:
                continue
            folder = self._folder(node)
            if folder is not None and not folder.is_in_files(sources.token):
                by_maker.setdefault((folder.path, slot.partition(".")[0]), []).append(sources.token)
        for (path, process), tokens in by_maker.items():
            for message in in_datagrams("u", tokens):
                with contextlib.suppress(NobodyThere, TimeoutError):
                    tell(path, socket_name(process), message, timeout=_ANNOUNCE_S)

    def close(self) -> None:
        """Close the links of transfers."""
        self._links.close()

    # --- by cost --------------------------------------------------------------------------------------------

    def _here(self, token: str) -> Found | None:
        """Look in the own node's folder, whatever Redis says: that costs no journey."""
        return None if self.folder is None else _in_folder(self.folder, token)

    def _by_cost(self, places: Sequence[str]) -> list[str]:
        def cost(place: str) -> int:
            if place == self.node:
                return 0
            if place in (REDIS, DURABLE):
                return 2
            return 3 if self._folder(place) is None else 1

        return sorted(places, key=cost)

    def _from(self, place: str, key: str, sources: Sources) -> Found | None:
        """Return what is at a place; None if it is not there."""
        if place == REDIS:
            return self._from_redis(key, sources.token)
        if place == DURABLE:
            kept = read_durable(self.durable, key, sources.token)
            return None if kept is None else Found(*kept)
        folder = self._folder(place)
        if folder is None:
            return self._from_afar(place, key, sources.token)
        found = self._from_folder(folder, place, sources)
        if found is None and place != self.node:
            fresh = self.folders.of(place, refresh=True)  # a node of this name may have started anew
            if fresh is None or fresh.path != folder.path:
                return (
                    self._from(place, key, sources) if fresh else self._from_afar(place, key, sources.token)
                )
        return found

    def _folder(self, node: str) -> NodeFolder | None:
        if node == self.node and self.folder is not None:
            return self.folder
        return self.folders.of(node)

    def _from_folder(self, folder: NodeFolder, node: str, sources: Sources) -> Found | None:
        found = _in_folder(folder, sources.token)
        owner_node, _, slot = sources.owner.rpartition("|")
        if found is not None or owner_node != node:
            return found
        # Its maker has not written it yet. One that dies now may have done so before.
        with contextlib.suppress(NobodyThere, TimeoutError):
            ask(
                folder.path,
                socket_name(slot.partition(".")[0]),
                f"w {sources.token}",
                timeout=self.ask_timeout,
            )
        return _in_folder(folder, sources.token)

    def _from_redis(self, key: str, token: str) -> Found | None:
        with self._links.take() as link:
            return self._receive(link, self.keys.blob(token, key), token)

    def _from_afar(self, node: str, key: str, token: str) -> Found | None:
        """Ask a node of another host to publish its copy, and read that."""
        reply = self.keys.of("reply", secrets.token_hex(8))
        asked_at = float("-inf")
        with self._links.take() as link:
            try:
                while True:
                    if time.monotonic() - asked_at > _ASK_AGAIN_S:  # its agent may have missed it
                        asked_at = time.monotonic()
                        if not self.mail(node, publish_copy(token, reply, key)):
                            return None
                    word, name = _next_word(link, reply)
                    if word == NOT_HERE:
                        return None
                    if word == HERE:
                        wait = functools.partial(self._goes_on, link, reply, node, key, token)
                        found = self._receive(link, name, token, wait)
                        finish(link, name, reply)
                        if found is not None:
                            return found
                        asked_at = float("-inf")  # it went with its last reader just before we came
                    elif not word and not self._is_at(key, token, node):
                        return None
            finally:
                link.call("UNLINK", reply)

    def _is_at(self, key: str, token: str, node: str) -> bool:
        now = self.locate(key)
        return now is not None and now.token == token and node in now.places

    def _goes_on(self, link: Link, reply: str, node: str, key: str, token: str) -> bool:
        """Wait for the next piece; tells whether there may be one."""
        word, _ = _next_word(link, reply)
        if word:
            return word != NOT_HERE
        name = transit_name(self.keys, token, key)
        return self._is_at(key, token, node) and bool(link.call("HEXISTS", name, "h"))

    def _receive(
        self, link: Link, name: str, token: str, wait: Callable[[], bool] | None = None
    ) -> Found | None:
        """Read a blob into the node's files, or into plain memory where there is no room (or no node)."""
        incoming: Incoming | None = None
        parts: Sequence[memoryview] = ()

        def make(sizes: Sequence[int]) -> Sequence[memoryview]:
            nonlocal incoming, parts
            if self.folder is not None:
                with contextlib.suppress(NoSpace):
                    incoming = self.folder.begin(token, sizes)
                    return incoming.parts
            parts = [memoryview(bytearray(size)) for size in sizes]
            return parts

        try:
            if not receive(link, name, make, wait=wait):
                return None
            if incoming is None:
                head, *buffers = parts
                return Found(head, buffers, sum(part.nbytes for part in parts))
            mapped = incoming.mapped()
            try:
                incoming.commit()
            except NoSpace:  # the folder was removed; what is mapped stays
                return Found(*mapped)
            return Found(*mapped, is_kept=True)
        finally:
            if incoming is not None:
                incoming.abort()


class Folders:
    """The folders of nodes on this host, by what the nodes say of themselves in Redis."""

    def __init__(self, link: Link, keys: Keys) -> None:
        self.link = link
        self.keys = keys
        self._known: dict[str, tuple[NodeFolder | None, float]] = {}

    def of(self, node: str, *, refresh: bool = False) -> NodeFolder | None:
        """Return a node's folder; None if it is not on this host."""
        folder, looked_at = self._known.get(node, (None, float("-inf")))
        if not refresh and (folder is not None or time.monotonic() - looked_at < _LOOK_AGAIN_S):
            return folder
        path = self.link.call("HGET", self.keys.of("node", node), NODE["dir"])
        if folder is None or path is None or folder.path != path.decode():
            folder = None if path is None else NodeFolder.open(path.decode())
        self._known[node] = (folder, time.monotonic())
        return folder


class _Links:
    """Links for transfers, each used by one thread at a time."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free: list[Link] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def take(self) -> Iterator[Link]:
        with self._lock:
            link = self._free.pop() if self._free else self._link.twin()
        try:
            yield link
        finally:
            with self._lock:
                self._free.append(link)

    def close(self) -> None:
        with self._lock:
            for link in self._free:
                link.close()
            self._free.clear()


def _in_folder(folder: NodeFolder, token: str) -> Found | None:
    try:
        mapped = folder.read(token)
    except NoSpace as error:
        log.warning("a spilled result cannot be fetched: %s", error)
        return None
    return None if mapped is None else Found(*mapped)


def _next_word(link: Link, reply: str) -> tuple[str, str]:
    got = link.call("BLPOP", reply, _WAIT_S)
    if got is None:
        return "", ""
    word, _, rest = got[1].decode().partition(" ")
    return word, rest
