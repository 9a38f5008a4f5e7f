"""scatter: data that a client brings goes into the memory of nodes.

On the same host it is written into the folder of the node that is to have it, and nothing of it passes
through Redis. For a node of another host it is a blob in Redis until that node has fetched it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from celery_mem.client.states import KeyState
from celery_mem.errors import UnknownNodeError
from celery_mem.graph.constraints import Workers, select
from celery_mem.graph.keys import Key, key_of, text_of
from celery_mem.memory.files import NodeFolder, NoSpace
from celery_mem.memory.serialize import Frames, dumps
from celery_mem.state.letters import save_copy
from celery_mem.state.store import REDIS, NewData

if TYPE_CHECKING:
    from celery_mem.client.client import Client
    from celery_mem.client.future import Future

CHUNK_DATA = 500
CHUNK_BYTES = 4 << 20
"""Most objects, and bytes, that go in one call."""


class _Target(NamedTuple):
    node: str
    folder: NodeFolder | None


class Scattering:
    """Puts data on the cluster for one client, round robin by slots over all its calls."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._folders: dict[str, NodeFolder | None] = {}
        self._turn = itertools.count()

    def put(self, items: Mapping[Any, Any], workers: Workers = None) -> tuple[dict[Key, Future], list[str]]:
        """Put objects on the cluster under their keys.

        Returns:
            a future for each; and the key texts of the large ones, of which there can be copies.
        """
        session = self._client.session
        ring = self._ring(workers) if workers else None
        out: dict[Key, Future] = {}
        new: list[KeyState] = []
        large: list[str] = []
        chunk: list[NewData] = []
        moves: list[list[Any]] = []
        # As with a submission: nobody else may refer to these keys before they are there.
        with session.order:
            session.check_open()
            epoch = session.next_epoch()
            try:
                for key, value in items.items():
                    text = text_of(key)
                    state, is_new = session.refer(text, epoch)
                    out[key] = self._client.future_of(key, state)
                    if is_new:
                        new.append(state)
                        frames = session.seal.close_frames(text, dumps(value, f"data {key!r}"))
                        data = self._inline(text, value, frames)
                        if data is None:
                            large.append(text)
                            ring = self._ring(None) if ring is None else ring
                            data = self._stored(text, value, frames, ring, moves)
                        chunk.append(data)
                    if len(chunk) >= CHUNK_DATA or sum(len(d.data) for d in chunk) > CHUNK_BYTES:
                        self._send(chunk, epoch, items)
                        chunk = []
                if chunk:
                    self._send(chunk, epoch, items)
            except BaseException:
                session.forget(new, "its call failed")
                session.releases.owe(s.text for s in new)
                raise
        if moves:
            self._client.control.move(moves)
        if large and self._client.settings.publish == "always":
            self._publish(large)
        return out, large

    def _publish(self, texts: Sequence[str]) -> None:
        """Have each result saved to Redis by a node that has it."""
        store = self._client.session.store
        for found in store.locate(texts):
            if found is not None and found.places and REDIS not in found.places:
                store.mail(found.places[0], save_copy(found.token, found.key))

    def _inline(self, text: str, value: Any, frames: Frames) -> NewData | None:
        if frames.nbytes > self._client.settings.inline_limit:
            return None
        return NewData(text, frames.nbytes, type(value).__qualname__, "v", frames.inline(), frames.contains)

    def _stored(
        self, text: str, value: Any, frames: Frames, ring: Sequence[_Target], moves: list[list[Any]]
    ) -> NewData:
        """Write a large object: into the folder of the node whose turn it is, else into Redis."""
        token = self._client.next_blob_token()
        facts = (text, frames.nbytes, type(value).__qualname__)
        target = ring[next(self._turn) % len(ring)] if ring else None
        if target is not None and target.folder is not None:
            try:
                target.folder.write(token, frames.head, frames.buffers)
                return NewData(*facts, "n", token, frames.contains, target.node)
            except NoSpace:
                target = None  # nor would it find room for a copy
        self._client.write_blob(token, text, frames)
        if target is not None:
            moves.append([text, token, frames.nbytes, REDIS, target.node])
        return NewData(*facts, "b", token, frames.contains)

    def _send(self, chunk: Sequence[NewData], epoch: int, items: Mapping[Any, Any]) -> None:
        session = self._client.session
        try:
            session.put(chunk, epoch)
        except UnknownNodeError:  # it left a moment ago, and its folder with it
            session.put([self._anew(d, items) if d.kind == "n" else d for d in chunk], epoch)

    def _anew(self, data: NewData, items: Mapping[Any, Any]) -> NewData:
        folder = self._folders.get(data.place)
        if folder is not None:
            folder.drop([str(data.data)])
        frames = dumps(items[key_of(data.key)], f"data {data.key}")
        frames = self._client.session.seal.close_frames(data.key, frames)
        token = self._client.next_blob_token()
        self._client.write_blob(token, data.key, frames)
        return data._replace(kind="b", data=token, place="")

    def _ring(self, workers: Workers) -> list[_Target]:
        """Return the nodes that may take data, each as often as it has slots.

        Raises:
            UnknownWorkerError: one that was named is not there.
        """
        infos = self._client.session.store.node_infos()
        chosen = select(workers, infos)
        if not self._client.settings.node_memory:
            return []
        able = [n for n in chosen if infos[n].get("dir") and infos[n].get("status", "running") == "running"]
        targets = {n: _Target(n, self._folder(n, infos[n]["dir"])) for n in able}
        if not workers and any(t.folder for t in targets.values()):
            # Unless somebody asks for others, what can be had without a way through Redis is taken.
            targets = {n: t for n, t in targets.items() if t.folder}
        slots = {n: max(1, int(infos[n].get("slots") or 0)) for n in targets}
        return [targets[n] for i in range(max(slots.values(), default=0)) for n in targets if i < slots[n]]

    def _folder(self, node: str, path: str) -> NodeFolder | None:
        known = self._folders.get(node)
        if known is None or known.path != path:
            known = self._folders[node] = NodeFolder.open(path)
        return known


def places_wanted(broadcast: bool | int, workers: Workers, nodes: Iterable[str]) -> tuple[int, list[str]]:
    """Return how many copies `broadcast=` asks for, and the nodes that are to have one.

    Raises:
        TypeError, ValueError: it is neither True nor False nor a number above zero.
    """
    if isinstance(broadcast, bool):
        chosen = select(workers, nodes) if broadcast else []
        return max(1, len(chosen)), chosen
    if not isinstance(broadcast, int):
        raise TypeError(f"broadcast is True, False or a number of copies, not {broadcast!r}")
    if broadcast < 1:
        raise ValueError(f"broadcast: at least one copy is needed, not {broadcast}")
    return broadcast, []
