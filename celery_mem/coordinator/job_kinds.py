"""What jobs do. `advance` takes one look, does what can be done now, and notes in the job how far it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from celery_mem.coordinator.errands import Errands, seconds_for
from celery_mem.coordinator.outside import Outside
from celery_mem.coordinator.plans import (
    Move,
    Node,
    nodes_of,
    plan_balance,
    plan_copies,
    plan_rescue,
    plan_trim,
)
from celery_mem.coordinator.shedding import shed, source_of
from celery_mem.state.keys import ACTIVE, LEAVING
from celery_mem.state.letters import fetch_copy
from celery_mem.state.store import Location, Store

MOVES_AT_ONCE = 200
TRIES = 3
"""A move for which a node was asked so often and that did not come is given up."""
ROUNDS = 500
"""Work goes on meanwhile, so balance may never be reached."""
STOP_AGAIN_S = 5.0


class JobKind(ABC):
    """One kind of job.

    A job has: kind; status, one of running, done, failed; reason, why it failed; total and done, which say
    how far it is; result, what the client is told in the end; and what the client asked for.
    """

    def __init__(self, store: Store, outside: Outside, now_s: Callable[[], float]) -> None:
        self.store = store
        self.outside = outside
        self.now_s = now_s

    @abstractmethod
    def advance(self, job: dict[str, Any]) -> None:
        """Go on with a job, by changing what it says."""

    def nodes(self) -> dict[str, Node]:
        """Read the live nodes."""
        return nodes_of(self.store.node_infos(), self.store.settings.memory_target)

    def located(self, keys: Iterable[str]) -> list[Location]:
        """Read where copies are; keys without a record are left out."""
        return [r for r in self.store.locate(list(dict.fromkeys(keys))) if r is not None]


class Replicate(JobKind):
    """Waits until all copies that were asked for are there, which is the duty of others; drops those beyond.

    Asked for: keys.
    """

    def advance(self, job: dict[str, Any]) -> None:
        nodes, results = self.nodes(), self.located(job["keys"])
        missing = {copy.key for copy in plan_copies(results, nodes)}
        missing |= {r.key for r in results if r.state in ACTIVE}
        shed(self.store, plan_trim([r for r in results if r.key not in missing], nodes))
        job["done"] = job["total"] - len(missing)
        if not missing:
            job["status"] = "done"


class Moves(JobKind):
    """Carries out moves: asks for the new copy, and gives up the old one once that is there.

    Asked for: moves, each with when it was asked for last, in ms, and how often. Besides: given_up, keys.
    """

    def advance(self, job: dict[str, Any]) -> None:
        self.settle(job, set(self.nodes()))
        if not job["moves"]:
            self.end(job)

    def settle(self, job: dict[str, Any], names: set[str]) -> None:
        """Finish moves whose copy has come, ask for those that are due, forget those that are void."""
        now_ms = int(self.now_s() * 1000)
        by_key = {r.key: r for r in self.located(row[0] for row in job["moves"])}
        left, drops = [], []
        mail: dict[str, list[str]] = {}
        for *fields, asked_ms, tries in job["moves"]:
            move = Move(*fields)
            result = by_key.get(move.key)
            if result is None or result.token != move.token or move.source not in result.places:
                continue
            if move.target in result.places:
                drops.append(source_of(move))
                job["done"] += 1
            elif move.target in names:
                if now_ms >= asked_ms + seconds_for(move.nbytes) * 1000:
                    if tries == TRIES:
                        job.setdefault("given_up", []).append(move.key)
                        continue
                    mail.setdefault(move.target, []).append(fetch_copy(move.token, move.nbytes, move.key))
                    asked_ms, tries = now_ms, tries + 1  # noqa: PLW2901 (what is noted is what was done)
                left.append([*move, asked_ms, tries])
        shed(self.store, drops)
        for node, messages in mail.items():
            self.store.mail(node, *messages)
        job["moves"] = left

    def end(self, job: dict[str, Any]) -> None:
        """Say how it went."""
        job.update(status="done", total=job["done"])
        if job.get("given_up"):
            n, first = len(job["given_up"]), job["given_up"][0]
            job.update(status="failed", reason=f"{n} results could not be moved, first {first!r}")


class Rebalance(Moves):
    """Moves results from nodes with many bytes to nodes with few.

    Asked for: keys that may move, None for all; nodes to be balanced, None for all. Besides: rounds.
    """

    def advance(self, job: dict[str, Any]) -> None:
        nodes = self.nodes()
        names = [n for n, node in nodes.items() if node.takes and n in (job["nodes"] or nodes)]
        self.settle(job, set(names))
        if job["moves"]:
            return
        job["rounds"] = job.get("rounds", 0) + 1
        plan = self._plan(job, names) if job["rounds"] <= ROUNDS else []
        if not plan:
            self.end(job)
            return
        # Written down before anybody is asked, so that a copy is never made whose origin is not given up.
        job["moves"] = [[*move, 0, 0] for move in plan[:MOVES_AT_ONCE]]
        job["total"] = job["done"] + len(plan)

    def _plan(self, job: dict[str, Any], names: list[str]) -> list[Move]:
        results = self.located(key for node in names for key in self.store.on_node(node))
        loads = {node: sum(r.nbytes for r in results if node in r.places) for node in names}
        may_move = None if job["keys"] is None else set(job["keys"])
        given_up = set(job.get("given_up", ()))
        return plan_balance(
            results, loads, lambda r: r.key not in given_up and (may_move is None or r.key in may_move)
        )


class Retire(JobKind):
    """Copies away what only leaving nodes have, waits for what they run, then stops their workers.

    Asked for: nodes; close, whether the workers are to end.
    """

    def __init__(self, store: Store, outside: Outside, now_s: Callable[[], float]) -> None:
        super().__init__(store, outside, now_s)
        self._errands = Errands(store, now_s)
        self._stopped: dict[str, float] = {}

    def advance(self, job: dict[str, Any]) -> None:
        infos = self.store.node_infos()
        leaving = [node for node in job["nodes"] if node in infos]
        for node in leaving:
            if infos[node].get("status") not in LEAVING:
                self.store.heartbeat(node, status="retiring")
                infos[node]["status"] = "retiring"
        located = {r.key: r for r in self.located(k for node in leaving for k in self.store.on_node(node))}
        nodes = nodes_of(infos, self.store.settings.memory_target)
        unique = plan_rescue(located.values(), set(leaving), nodes)
        plan = plan_rescue(self._errands.with_expected(located.values()), set(leaving), nodes)
        self._errands.send(plan, lambda key: located[key].places)
        job["total"] = max(job["total"], len(unique))
        job["done"] = job["total"] - len(unique)
        if unique or any(self._is_busy(node) for node in leaving):
            return
        if not job["close"]:
            # They hold nothing any more and get nothing; whoever manages them ends them.
            items = [
                (node, [(r.key, r.token) for r in located.values() if node in r.places]) for node in leaving
            ]
            for node, copies in items:
                if copies:
                    self.store.shed(node, copies)
            job["status"] = "done"
        elif leaving:
            self._stop(leaving)
        else:
            job["status"] = "done"

    def _is_busy(self, node: str) -> bool:
        keys, link = self.store.keys, self.store.link
        slots = link.call("SMEMBERS", keys.of("node_slots", node))
        return any(link.call("HLEN", keys.of("slot", slot.decode())) for slot in slots)

    def _stop(self, nodes: list[str]) -> None:
        now = self.now_s()
        for node in nodes:
            if now >= self._stopped.get(node, 0.0):
                self.outside.stop_worker(node)
                self._stopped[node] = now + STOP_AGAIN_S
