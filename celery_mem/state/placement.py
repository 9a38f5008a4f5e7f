"""Where ready tasks go, in plain Python: the part of the model that lib/queue.lua is checked against.

A ready task is in exactly one queue: that of its constraint if it has one; else that of its home, a node
that it prefers or that has most bytes of its inputs; else the shared one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SIZE_CLASSES = "0123456789abcdefghijklmnopqrstuvwxyz"
"""What a queue of a node says of the bytes of an entry's inputs there: class n is less than 2**(n + 17)."""
STEAL_FROM_LAST = 32
"""Entries at the end of a queue among which a thief looks for the one that is cheapest to move."""
DEFAULT_PACE_MS = 5.0


@dataclass
class Node:
    """A live node."""

    slots: int = 1
    status: str = "running"
    pace_ms: float = DEFAULT_PACE_MS
    resources: dict[str, float] = field(default_factory=dict)

    @property
    def takes(self) -> bool:
        """Whether it takes new tasks."""
        return self.slots > 0 and self.status == "running"

    @property
    def may_take(self) -> bool:
        """Whether it does, or will once it is not paused any more."""
        return self.slots > 0 and self.status in {"running", "paused"}


class Entry(NamedTuple):
    """A ready task in its queue; entries sort in the order in which they run."""

    score: float  # minus the user's priority
    text: str  # as the queue has it: rank, in the queue of a node the size class, key
    key: str
    letter: str = ""  # the size class


def size_class(nbytes: int) -> str:
    """Return the letter of the class that `nbytes` falls into."""
    return SIZE_CLASSES[min(max(nbytes.bit_length() - 17, 0), len(SIZE_CLASSES) - 1)]


def move_ms(letter: str) -> float:
    """Return what it takes to move inputs of that size class, at most."""
    return float(1 + 2 ** (SIZE_CLASSES.index(letter) + 17) / 1e6)


def may_run_on(constraint: str, node: str) -> bool:
    """Tell whether a constraint lets `node` run the task, resources aside."""
    workers = json.loads(constraint).get("workers", []) if constraint else []
    return not workers or node in workers or node.partition("@")[2] in workers


def needs_of(constraint: str) -> dict[str, float]:
    """Return the resources that a task under the constraint uses."""
    return dict(json.loads(constraint).get("resources", {})) if constraint else {}


def fits(needs: dict[str, float], free: dict[str, float]) -> bool:
    return all(free.get(name, 0) >= amount for name, amount in needs.items())


def best_homes(bytes_at: dict[str, int], preferred: Sequence[str]) -> set[str]:
    """Return the nodes that may be the home of a task: which of several is open.

    Without any it goes to the shared queue. Inputs of no bytes are as near to any node: they choose none.

    Args:
        bytes_at: node that takes tasks -> bytes of the task's inputs there.
        preferred: nodes that take tasks and that the task prefers.
    """
    candidates = dict.fromkeys(preferred, 0) if preferred else {}
    for node, nbytes in bytes_at.items():
        if nbytes > 0 and (not preferred or node in candidates):
            candidates[node] = nbytes
    most = max(candidates.values(), default=0)
    return {node for node, nbytes in candidates.items() if nbytes == most}


def fair_share(length: int, slots: int) -> int:
    """Return how many of a queue's entries one of `slots` slots may take at once."""
    return max(1, math.ceil(length / max(1, slots)))


def wait_ms(node: Node | None, length: int, *, has_idle_slots: bool) -> float:
    """Return how long the last entry of a node's queue will wait there."""
    if node is None or not node.takes:
        return math.inf
    return 0 if has_idle_slots else length / node.slots * node.pace_ms


def cheapest(entries: Iterable[Entry]) -> Entry | None:
    """Return the entry of a node's queue that is cheapest to move, the last one of several."""
    last = sorted(entries)[-STEAL_FROM_LAST:]
    return min(reversed(last), key=lambda entry: entry.letter, default=None)
