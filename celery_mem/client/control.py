"""Control of data: where it is, how much of it, how many copies, and who is to have it."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celery_mem.client.states import CANCELLED, seconds_left
from celery_mem.errors import JobError, MissingKeyError, RedisUnavailableError, UnsupportedPoolError
from celery_mem.graph import collections as lowering
from celery_mem.graph import inside
from celery_mem.graph.constraints import Workers, select
from celery_mem.graph.keys import Key, key_of, text_of
from celery_mem.state.letters import replace_processes
from celery_mem.state.link import Link
from celery_mem.state.store import REDIS

if TYPE_CHECKING:
    from celery_mem.client.client import Client

LOOK_S = 0.02
ANSWER_S = 5.0
"""So often a client that waits for a job makes sure that Redis still knows of it."""


class DataControl:
    """What a client may ask about data, and the jobs it may give to the coordinator."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._session = client.session

    # --- questions ---

    def texts(self, futures: Any) -> list[str]:
        """Return key texts: of futures and collections, or of keys; None means all that the client holds."""
        if futures is None:
            with self._session.order:
                self._session.releases.count()  # who just dropped a future does not hold it any more
                with self._session.lock:
                    return list(self._session.states)
        if found := lowering.futures_of(futures):
            for future in found:
                if future.client is self._client and future.status == CANCELLED:
                    self._client.raise_cancelled(future._state, future.key)
            return list(dict.fromkeys(text_of(f.key) for f in found))
        if isinstance(futures, (list, set)):
            return list(dict.fromkeys(text_of(key) for key in futures))
        return [text_of(futures)]

    def who_has(self, futures: Any) -> dict[Key, list[str]]:
        texts = self._flushed(futures)
        out = {}
        for text, location in zip(texts, self._session.store.locate(texts), strict=True):
            places: Sequence[str] = ()
            if location is not None and location.state == "memory":
                places = location.places or (REDIS,)
            out[key_of(text)] = sorted(places)
        return out

    def has_what(self, workers: Workers) -> dict[str, list[Key]]:
        self._session.flush()
        store = self._session.store
        return {node: [key_of(t) for t in sorted(store.on_node(node))] for node in self.nodes(workers)}

    def nbytes(self, keys: Any, summary: bool) -> dict[Any, int]:
        from dask.utils import key_split

        out: dict[Any, int] = {}
        for location in self._session.store.locate(self._flushed(keys)):
            if location is not None and location.state == "memory":
                key = key_of(location.key)
                name = key_split(key) if summary else key
                out[name] = out.get(name, 0) + location.nbytes
        return out

    def ncores(self, workers: Workers) -> dict[str, int]:
        infos = self.infos()
        return {node: int(infos[node].get("slots") or 0) for node in select(workers, infos)}

    def infos(self) -> dict[str, dict[str, Any]]:
        """Return what the live nodes say of themselves."""
        self._session.check_open()
        return self._session.store.node_infos()

    def nodes(self, workers: Workers = None) -> list[str]:
        """Return the live nodes that `workers` names.

        Raises:
            UnknownWorkerError: one is not there.
        """
        return select(workers, self.infos())

    def _flushed(self, futures: Any) -> list[str]:
        self._session.check_open()
        self._session.flush()
        return self.texts(futures)

    # --- restarts ---

    def restart(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        nodes = self.nodes()
        self._session.restart()
        while missing := set(nodes).difference(self.infos()):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"restart: all state is gone, but {', '.join(sorted(missing))} did not come back in "
                    f"{timeout:g} s"
                )
            time.sleep(LOOK_S)

    def restart_workers(self, workers: Workers, timeout: float, raise_for_error: bool) -> dict[str, str]:
        deadline = time.monotonic() + timeout
        infos = self.infos()
        nodes = select(workers, infos)
        for node in nodes:
            if (pool := infos[node].get("pool")) != "prefork":
                raise UnsupportedPoolError(
                    f"restart_workers: the tasks of node {node} run in its own process (pool {pool}), "
                    "which cannot be replaced; stop its worker and start it again"
                )
        token = f"r-{secrets.token_hex(6)}"
        for node in nodes:
            self._session.store.mail(node, replace_processes(token))
        while True:
            infos = self.infos()
            waiting = [node for node in nodes if node in infos and infos[node].get("replaced") != token]
            if not waiting or time.monotonic() > deadline:
                break
            time.sleep(LOOK_S)
        if waiting and raise_for_error:
            raise TimeoutError(f"restart_workers: no answer from {', '.join(waiting)} for {timeout:g} s")
        return {n: "timed out" if n in waiting else "OK" if n in infos else "removed" for n in nodes}

    # --- jobs ---

    def replicate(self, futures: Any, n: Any, workers: Workers, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        texts = self._finished(futures, timeout)
        nodes = self.nodes(workers)
        if n is None:
            n, named = max(1, len(nodes)), nodes if workers else []
        elif isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"replicate: at least one copy is needed, not {n!r}")
        elif workers and n >= len(nodes):
            n, named = len(nodes), nodes
        else:
            named = []
        if workers and not named:
            for nodes_of_some, some in self._spread(texts, n, nodes).items():
                self.want(some, n, nodes_of_some)
        else:
            self.want(texts, n, named)
        self.await_copies(texts, seconds_left(deadline))

    def await_copies(self, texts: Sequence[str], timeout: float | None) -> None:
        """Wait until there are as many copies of keys as are wanted."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if texts:
            self.run("replicate", deadline, keys=list(texts), total=len(texts))

    def _spread(self, texts: Sequence[str], n: int, nodes: Sequence[str]) -> dict[tuple[str, ...], list[str]]:
        """Choose `n` of the nodes for each key: those that have it, then each as often as the others."""
        out: dict[tuple[str, ...], list[str]] = {}
        given = dict.fromkeys(nodes, 0)
        for text, location in zip(texts, self._session.store.locate(texts), strict=True):
            holders = () if location is None else location.places
            chosen = sorted(nodes, key=lambda node: (node not in holders, given[node]))[:n]
            for node in chosen:
                given[node] += node not in holders
            out.setdefault(tuple(sorted(chosen)), []).append(text)
        return out

    def want(self, texts: Sequence[str], n: int, nodes: Sequence[str]) -> None:
        """Say how many copies are wanted, and where; from then on the coordinator sees to it."""
        for start in range(0, len(texts), 500):
            unknown = self._session.store.want_copies(texts[start : start + 500], n, nodes)
            if unknown:
                raise MissingKeyError(key_of(unknown[0]), "replicate")

    def rebalance(self, futures: Any, workers: Workers, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        keys = None
        if futures is not None:
            keys = self._finished(futures, timeout)
            for text, location in zip(keys, self._session.store.locate(keys), strict=True):
                if location is None:
                    raise MissingKeyError(key_of(text), "rebalance")
        nodes = self.nodes(workers) if workers else None
        self._session.flush()
        self.run("rebalance", deadline, keys=keys, nodes=nodes, moves=[])

    def retire(self, workers: Workers, close: bool, timeout: float | None) -> dict[str, dict[str, Any]]:
        if not workers:
            raise ValueError(
                "retire_workers: name the workers that are to go, as status and ncores() list them"
            )
        infos = self.infos()
        nodes = select(workers, infos)
        deadline = None if timeout is None else time.monotonic() + timeout
        self.run("retire", deadline, nodes=nodes, close=close)
        return {node: infos[node] for node in nodes}

    def move(self, moves: list[list[Any]]) -> None:
        """Have copies moved, as [key, token, nbytes, from, to]; nobody waits for it."""
        self._post("move", moves=[[*move, 0, 0] for move in moves], total=len(moves))

    def _finished(self, futures: Any, timeout: float | None) -> list[str]:
        """Wait for futures, whatever becomes of them; returns their key texts."""
        found = lowering.futures_of(futures)
        texts = self._flushed(futures)
        self._client.wait_for([f._bound()[1] for f in found], timeout, "the futures")
        return texts

    def _post(self, kind: str, **asked: Any) -> str:
        name = f"{kind}-{secrets.token_hex(6)}"
        job = {
            "kind": kind,
            "client": self._session.id,
            "status": "running",
            "reason": "",
            "done": 0,
            "total": 0,
        }
        self._session.check_open()
        self._session.store.post_job(name, job | asked)
        return name

    def run(self, kind: str, deadline: float | None, **asked: Any) -> None:
        """Give the coordinator a job and wait for its end.

        Raises:
            TimeoutError: it goes on.
            JobError: not all could be done.
        """
        name = self._post(kind, **asked)
        link = Link.connect(self._session.settings, blocking=True)
        try:
            answer = None
            while answer is None:
                answer = self._answer(link, name, kind, deadline)
        finally:
            link.close()
        if answer["status"] != "done":
            raise JobError(kind, answer["reason"])

    def _answer(self, link: Link, name: str, kind: str, deadline: float | None) -> dict[str, Any] | None:
        """Wait a while for the answer to a job."""
        reply = self._session.store.keys.of("reply", name)
        found: list[Any] = []

        def listen(timeout: float | None) -> bool:
            got = link.call("BLPOP", reply, max(0.001, ANSWER_S if timeout is None else timeout))
            found.extend(got or ())
            return bool(found)

        left = seconds_left(deadline)
        inside.wait_for(listen, ANSWER_S if left is None else min(left, ANSWER_S))
        self._session.check_open()
        if found:
            answer: dict[str, Any] = json.loads(found[1])
            return answer
        if left is not None and left <= ANSWER_S:
            raise TimeoutError(f"{kind}: not done in time; job {name} goes on, status shows how far it is")
        if name not in self._session.store.jobs() and not link.call("EXISTS", reply):
            raise RedisUnavailableError(f"{kind}: Redis knows nothing of job {name} any more")
        return None
