"""What a client offers to see where time and memory go."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery_mem.client.session import Session
    from celery_mem.profiling.memory import MemorySampler
    from celery_mem.profiling.recorder import LiveRecording


class ProfilingMethods:
    """The methods of `Client` for those who look at a cluster at work."""

    _session: Session

    def profile_memory(self, label: str | None = None, *, interval: float = 0.5) -> MemorySampler:
        """Return a sampler of the memory of the cluster: `with client.profile_memory() as ms: ...`.

        It looks from a thread that ends with the block, at results in memory and on disk and the limit of
        each node, and at what Redis uses; `ms.to_pandas()` and `ms.plot()` show it. `with ms.sample("b"):`
        adds runs to compare. While Redis is away it misses looks and goes on.

        Args:
            label: what the run is called.
            interval: seconds between two looks. Nodes tell of theirs twice a second then.
        """
        from celery_mem.profiling.memory import MemorySampler

        self._session.check_open()
        return MemorySampler(self._session.store.twin, interval, label)

    def record(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        interval: float = 0.5,
        most: int | None = None,
    ) -> LiveRecording:
        """Return a recording of what runs, of all clients: `with client.record() as rec: ...`.

        Each attempt at a task that a slot begins meanwhile: key, function, slot, times, bytes, error. And
        memory over time. `rec.report("graph.html")` makes a page of it, `rec.summary()` figures.

        Args:
            path: a file to save it in at the end: JSON, or the page if its name ends in .html.
            interval: seconds between two looks at the memory.
            most: attempts to keep, 200,000 by default; of more, the oldest are dropped, and `rec.dropped`
                says how many.
        """
        from celery_mem.profiling.recorder import LiveRecording
        from celery_mem.profiling.recording import MOST_TASKS

        session = self._session
        session.check_open()
        return LiveRecording(
            session.store.twin,
            session.settings.namespace,
            path,
            interval=interval,
            most=MOST_TASKS if most is None else most,
        )
