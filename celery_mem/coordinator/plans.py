"""Which copy goes where: pure functions from what Redis says to what is to be done.

A plan is a wish. Nothing in it is remembered: whoever carries it out may stop anywhere, and what is still due
then follows from Redis again. A copy is always made before the one that it replaces is given up.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from celery_mem.state.keys import LEAVING
from celery_mem.state.store import OUTLIVE_NODES, REDIS, Location

DEAD_BAND = 0.05
"""Nodes within this share of the mean have no need of balancing."""


class Node(NamedTuple):
    """What a plan knows of a live node.

    Attributes:
        nbytes: its results.
        stays: whether its copies count: it is not about to leave.
        takes: whether it may be given more: it has a memory, stays, and does not suffer from lack of it.
        excess: bytes above what it should hold.
    """

    nbytes: int
    stays: bool = True
    takes: bool = True
    excess: int = 0


class Copy(NamedTuple):
    """A copy to be made at `target`, a node or `REDIS`."""

    key: str
    token: str
    nbytes: int
    target: str


class Move(NamedTuple):
    """A copy to be made at `target`, after which the one at `source` is given up."""

    key: str
    token: str
    nbytes: int
    source: str
    target: str


class Drop(NamedTuple):
    """A copy that is one too many."""

    key: str
    token: str
    nbytes: int
    place: str


def nodes_of(infos: Mapping[str, Mapping[str, Any]], target: float = 0.6) -> dict[str, Node]:
    """Return what plans need to know of the nodes.

    Args:
        infos: as `Store.node_infos` returns it.
        target: share of its limit that a node should use at most.
    """
    return {name: _node_of(info, target) for name, info in infos.items()}


def _node_of(info: Mapping[str, Any], target: float) -> Node:
    memory = info.get("memory") or {}
    # What is spilled lies on a disk, but it comes back when it is read: it is part of the load.
    held = sum(int(memory.get(part) or 0) for part in ("files", "live"))
    limit = int(memory.get("limit") or info.get("limit") or 0)
    status = info.get("status") or "running"
    stays = status not in LEAVING and bool(info.get("dir"))
    return Node(
        nbytes=held + int(memory.get("spilled") or 0),
        stays=stays,
        takes=stays and status == "running",
        excess=max(0, held - int(target * limit)) if limit else 0,
    )


# --- copies -------------------------------------------------------------------------------------------------


def plan_copies(results: Iterable[Location], nodes: Mapping[str, Node]) -> list[Copy]:
    """Return the copies that are missing of those asked for.

    Recipients are, first, the nodes that were named, and then those with the fewest bytes.
    """
    loads = {name: node.nbytes for name, node in nodes.items() if node.takes}
    plan: list[Copy] = []
    for result in results:
        if not _has_copies(result):
            continue
        holders = {place for place in result.places if place in nodes and nodes[place].stays}
        targets = [node for node in result.copies_on if node in loads and node not in holders]
        missing = result.copies - len(holders) - len(targets)
        if missing > 0:
            others = loads.keys() - holders - {*targets}
            targets += sorted(others, key=lambda node: (loads[node], node))[:missing]
        for target in targets:
            loads[target] += result.nbytes
            plan.append(Copy(result.key, result.token, result.nbytes, target))
    return plan


def plan_rescue(
    results: Iterable[Location], leaving: Collection[str], nodes: Mapping[str, Node]
) -> list[Copy]:
    """Return a copy for each result that no place would have without the nodes in `leaving`.

    It goes to the node with the fewest bytes, or to Redis if no node is left that takes it.
    """
    loads = {name: node.nbytes for name, node in nodes.items() if node.takes and name not in leaving}
    plan = []
    for result in results:
        if not _has_copies(result) or not set(result.places).issubset(leaving):
            continue
        target = min(loads, key=lambda node: (loads[node], node), default=REDIS)
        if target in loads:
            loads[target] += result.nbytes
        plan.append(Copy(result.key, result.token, result.nbytes, target))
    return plan


def plan_surplus(results: Iterable[Location], nodes: Mapping[str, Node]) -> list[Drop]:
    """Return copies to give up where nodes hold more than they should, large ones first."""
    left = {result.key: _spare(result, nodes) for result in results if _has_copies(result)}
    plan: list[Drop] = []
    for name, node in sorted(nodes.items(), key=lambda item: -item[1].excess):
        excess = node.excess
        mine = [result for result in results if name in result.places and left.get(result.key, 0) > 0]
        for result in sorted(mine, key=lambda result: -result.nbytes):
            if excess <= 0:
                break
            if name in result.copies_on:
                continue
            left[result.key] -= 1
            excess -= result.nbytes
            plan.append(Drop(result.key, result.token, result.nbytes, name))
    return plan


def plan_trim(results: Iterable[Location], nodes: Mapping[str, Node]) -> list[Drop]:
    """Return the copies beyond the number asked for: on the nodes with most bytes, on none that was named."""
    loads = {name: node.nbytes for name, node in nodes.items()}
    plan = []
    for result in results:
        if not _has_copies(result):
            continue
        places = [place for place in result.places if place in nodes and place not in result.copies_on]
        places.sort(key=lambda place: (nodes[place].stays, -loads[place], place))
        for place in places[: _spare(result, nodes)]:
            loads[place] -= result.nbytes
            plan.append(Drop(result.key, result.token, result.nbytes, place))
    return plan


def _has_copies(result: Location) -> bool:
    return result.state == "memory" and bool(result.token)


def _spare(result: Location, nodes: Mapping[str, Node]) -> int:
    """Count the copies on nodes beyond those asked for; the last one anywhere is never one of them."""
    holders = [place for place in result.places if place in nodes]
    if result.copies <= 1 and not result.copies_on and OUTLIVE_NODES & set(result.places):
        return len(holders)  # nobody asked for copies on nodes, and there is one that needs none
    return max(0, len(holders) - max(result.copies, 1))


# --- balance ------------------------------------------------------------------------------------------------


def plan_balance(
    results: Sequence[Location], loads: Mapping[str, int], may_move: Callable[[Location], bool] | None = None
) -> list[Move]:
    """Return moves after which every node holds nearly as many bytes, or no single move helps any more.

    A move helps if the receiving node then has less than the giving one had. Each takes the copy that comes
    nearest to closing the gap from the fullest node to the emptiest one.

    Args:
        results: what is on the nodes.
        loads: bytes that each node of those to be balanced holds, with what must not move.
        may_move: whether a result may; None means all of them.
    """
    scene = _Scene(results, loads, may_move)
    if len(loads) < 2 or not sum(loads.values()):
        return []
    mean = sum(loads.values()) / len(loads)
    while True:
        fullest_first = sorted(scene.loads, key=lambda node: (-scene.loads[node], node))
        top, bottom = scene.loads[fullest_first[0]], scene.loads[fullest_first[-1]]
        if top <= mean * (1 + DEAD_BAND) and bottom >= mean * (1 - DEAD_BAND):
            break
        if not scene.improve(fullest_first, mean):
            break
    return scene.moves()


class _Scene:
    """Where copies would be after some moves."""

    def __init__(
        self,
        results: Sequence[Location],
        loads: Mapping[str, int],
        may_move: Callable[[Location], bool] | None,
    ) -> None:
        self.loads = dict(loads)
        self._before = {r.key: r for r in results if _has_copies(r)}
        self._places = {key: set(r.places) for key, r in self._before.items()}
        self._movable: dict[str, list[tuple[int, str]]] = {node: [] for node in loads}  # by size
        for key, result in self._before.items():
            if result.nbytes <= 0 or (may_move is not None and not may_move(result)):
                continue
            for place in result.places:
                if place in self._movable and place not in result.copies_on:
                    bisect.insort(self._movable[place], (result.nbytes, key))

    def improve(self, fullest_first: Sequence[str], mean: float) -> bool:
        """Carry out the best move from the fullest node that can give to the emptiest that can take."""
        for source in fullest_first:
            if self.loads[source] <= mean:
                return False
            for target in reversed(fullest_first):
                if self.loads[target] >= mean:
                    break
                ideal = min(self.loads[source] - mean, mean - self.loads[target])
                found = self._nearest(source, target, ideal, self.loads[source] - self.loads[target])
                if found is not None:
                    self._carry_out(found, source, target)
                    return True
        return False

    def _nearest(self, source: str, target: str, ideal: float, below: int) -> tuple[int, str] | None:
        """Return the copy at `source`, none at `target`, of a size nearest to `ideal` and under `below`."""
        mine = self._movable[source]
        up = bisect.bisect_left(mine, (ideal, ""))
        down = up - 1
        while down >= 0 or up < len(mine):
            if down < 0 or (up < len(mine) and mine[up][0] - ideal < ideal - mine[down][0]):
                item, up = mine[up], up + 1
            else:
                item, down = mine[down], down - 1
            if item[0] < below and target not in self._places[item[1]]:
                return item
        return None

    def _carry_out(self, item: tuple[int, str], source: str, target: str) -> None:
        nbytes, key = item
        mine = self._movable[source]
        del mine[bisect.bisect_left(mine, item)]
        bisect.insort(self._movable[target], item)
        self._places[key] -= {source}
        self._places[key] |= {target}
        self.loads[source] -= nbytes
        self.loads[target] += nbytes

    def moves(self) -> list[Move]:
        """Return what leads there: each copy moves at most once, however often it was moved in thought."""
        out = []
        for key, result in self._before.items():
            gone = sorted(set(result.places) - self._places[key])
            come = sorted(self._places[key] - set(result.places))
            pairs = zip(gone, come, strict=True)
            out += [Move(key, result.token, result.nbytes, source, target) for source, target in pairs]
        return out
