"""How long steps and tickets took, as counts per range: kept by each slot, added up in Redis."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper ends of the ranges, seconds; what takes longer is in a last one without an end."""
NO_BOUND = "+Inf"
STEP = "step"
"""Round trips of steps."""
TICKET = "ticket"
"""Times from the reservation of a ticket to its begin in a slot."""
LATE = "late"
"""Tickets that began after they had been given up; how late is unknown."""

_BOUNDS = (*map(str, BOUNDS_S), NO_BOUND)
_FIELDS = {kind: tuple(f"{kind}:{bound}" for bound in _BOUNDS) for kind in (STEP, TICKET)}
_SUMS = {kind: f"{kind}:us" for kind in (STEP, TICKET)}


class Tally:
    """What one slot counted since it told Redis last; the caller sees that one thread at a time uses it."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def note(self, kind: str, seconds: float) -> None:
        """Count one duration of a `STEP` or a `TICKET`."""
        counts = self._counts
        counts[_FIELDS[kind][bisect_left(BOUNDS_S, seconds)]] += 1
        counts[_SUMS[kind]] += int(seconds * 1e6)

    def note_ticket(self, age_ms: int) -> None:
        """Count a ticket, as a step tells of it."""
        if age_ms < 0:
            self._counts[LATE] += 1
        else:
            self.note(TICKET, age_ms / 1000)

    def take(self) -> Mapping[str, int]:
        """Return what there is, by field of `counts`, and begin anew."""
        found, self._counts = self._counts, Counter()
        return found

    def restore(self, counts: Mapping[str, int]) -> None:
        """Put back what did not arrive."""
        self._counts.update(counts)


class Histogram(NamedTuple):
    """Durations as Prometheus has them.

    Attributes:
        buckets: upper end in seconds, as text -> how many were not above it.
        total_s: all together.
    """

    buckets: list[tuple[str, int]]
    total_s: float


def histogram(counts: Mapping[str, int], kind: str) -> Histogram:
    """Read the durations of one kind from the namespace's counts."""
    buckets, below = [], 0
    for bound, field in zip(_BOUNDS, _FIELDS[kind], strict=True):
        below += counts.get(field, 0)
        buckets.append((bound, below))
    return Histogram(buckets, counts.get(_SUMS[kind], 0) / 1e6)
