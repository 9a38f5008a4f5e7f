"""What is broken, in which order: a function of the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

WEIGHTS = {
    "kill a pool child": 6,
    "kill a worker": 3,
    "kill an agent": 3,
    "kill a coordinator": 1,
    "kill the leader": 3,
    "kill a client": 3,
    "end a worker": 1,
    "stop a node": 2,
    "stop a pool child": 3,
    "stop an agent": 2,
    "stop a coordinator": 1,
    "stop the leader": 2,
    "stop a client": 2,
    "kill Redis": 2,
    "cut connections": 6,
    "delete a blob": 3,
    "delete a file": 6,
    "drop a ticket": 4,
    "repeat a ticket": 4,
    "jump a clock": 3,
    "forget scripts": 1,
    "replace processes": 1,
}
"""How often each kind of fault comes, in proportion. "stop": for longer than its lease, then it goes on."""


@dataclass(frozen=True)
class Step:
    """One fault.

    Attributes:
        number: from 1.
        pause_s: time between the fault before and this one.
        kind: one of `WEIGHTS`.
        seed: of all further choices (which process, which file); equal choices where the same is there.
    """

    number: int
    pause_s: float
    kind: str
    seed: str

    def chance(self) -> random.Random:
        """Return a new source of the further choices."""
        return random.Random(self.seed)


def schedule(seed: int, every_s: float, weights: dict[str, int] | None = None) -> Iterator[Step]:
    """Yield faults without end, on average one in `every_s` seconds; sometimes several come at once."""
    weights = WEIGHTS if weights is None else weights
    chance = random.Random(f"schedule/{seed}")
    kinds, shares = list(weights), list(weights.values())
    number = 0
    while True:
        number += 1
        (kind,) = chance.choices(kinds, shares)
        pause_s = 0.0 if chance.random() < 0.15 else chance.expovariate(0.85 / every_s)
        yield Step(number, min(pause_s, 4 * every_s), kind, f"{seed}/{number}")
