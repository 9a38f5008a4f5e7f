"""Errands: copies that agents were asked to make, and that have not come yet.

Known to one coordinator for a short while. Whoever does not know of one asks again, which does no harm: an
agent that has a copy says so, and one copy too many is a surplus.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from celery_mem.coordinator.plans import Copy
from celery_mem.state.letters import fetch_copy, save_copy
from celery_mem.state.store import OUTLIVE_NODES, REDIS, Location, Store

PATIENCE_S = 5.0
BYTES_PER_S = 20e6
"""An agent gets this time and, for each so many bytes, a second, before it is asked again."""
AT_ONCE = 500
"""Most copies on their way."""


def seconds_for(nbytes: int) -> float:
    """Return for how long a copy may be on its way."""
    return PATIENCE_S + nbytes / BYTES_PER_S


class Errands:
    """What was asked of agents.

    Args:
        now_s: the time.
    """

    def __init__(self, store: Store, now_s: Callable[[], float]) -> None:
        self._store = store
        self._now_s = now_s
        self._due: dict[tuple[str, str, str], float] = {}  # (key, token, target) -> when it should be there

    def with_expected(self, results: Iterable[Location]) -> list[Location]:
        """Return the results as they will be when all that was asked for has come."""
        now = self._now_s()
        self._due = {errand: due for errand, due in self._due.items() if due > now}
        coming: dict[tuple[str, str], list[str]] = {}
        for key, token, target in self._due:
            coming.setdefault((key, token), []).append(target)
        out = []
        for result in results:
            more = coming.get((result.key, result.token), ())
            new = tuple(place for place in more if place not in result.places)
            for place in more:
                if place in result.places:  # it has come; should it be lost, it is asked for again
                    del self._due[result.key, result.token, place]
            out.append(result._replace(places=(*result.places, *new)) if new else result)
        return out

    def send(self, plan: Sequence[Copy], places: Callable[[str], Collection[str]]) -> int:
        """Ask agents for the copies of a plan, as many as may be on their way; returns how many it asked for.

        Args:
            places: tells where copies of a key are.
        """
        room = AT_ONCE - len(self._due)
        now = self._now_s()
        mail: dict[str, list[str]] = {}
        for copy in plan[: max(0, room)]:
            node, message = _message(copy, places(copy.key))
            if node is not None:
                mail.setdefault(node, []).append(message)
                self._due[copy.key, copy.token, copy.target] = now + seconds_for(copy.nbytes)
        for node, messages in mail.items():
            self._store.mail(node, *messages)
        return sum(map(len, mail.values()))


def _message(copy: Copy, places: Collection[str]) -> tuple[str | None, str]:
    """Return who is to be asked, and what."""
    if copy.target != REDIS:
        return copy.target, fetch_copy(copy.token, copy.nbytes, copy.key)
    source = next((place for place in places if place not in OUTLIVE_NODES), None)
    return source, save_copy(copy.token, copy.key)
