"""The memory of a cluster over time: what one look finds, and a sampler that looks again and again."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from redis.exceptions import RedisError

from celery_mem.errors import CeleryMemError, NamespaceResetError
from celery_mem.state.inspect import server_facts
from celery_mem.state.store import WATCH_S, Store

if TYPE_CHECKING:
    import pandas

MEASURES = ("memory", "spilled", "processes", "limit", "redis")
RETRY_S = 2.0
"""How long a look may take while Redis is away; then it is left out."""
MOST_SAMPLES = 20_000
"""Of more in one run, every second one is dropped."""
MIN_INTERVAL_S = 0.05


class NodeMemory(NamedTuple):
    """Bytes of one node.

    Attributes:
        memory: of results in its memory.
        spilled: of results on its disk.
        processes: that its processes use besides.
        limit: that it may use.
    """

    memory: int = 0
    spilled: int = 0
    processes: int = 0
    limit: int = 0


class Sample(NamedTuple):
    """What one look found.

    Attributes:
        at: when, seconds since 1970.
        nodes: by name; without those that have told nothing yet.
        redis: bytes that Redis uses; None if it does not say.
    """

    at: float
    nodes: dict[str, NodeMemory]
    redis: int | None

    def total(self, measure: str) -> int | None:
        """Return one of `MEASURES` for the whole cluster; None if nobody told it."""
        if measure == "redis" or not self.nodes:
            return self.redis if measure == "redis" else None
        return sum(int(getattr(node, measure)) for node in self.nodes.values())


def look(store: Store) -> Sample:
    """Read how much memory a cluster uses. Nodes tell it twice a second while somebody watches."""
    infos = store.node_infos()
    nodes = {name: _node_memory(info) for name, info in infos.items() if info.get("memory")}
    return Sample(time.time(), nodes, server_facts(store.link)["used_memory"])


def _node_memory(info: Mapping[str, Any]) -> NodeMemory:
    told = info.get("memory") or {}

    def of(*kinds: str) -> int:
        return sum(int(told.get(kind) or 0) for kind in kinds)

    limit = of("limit") or int(info.get("limit") or 0)
    return NodeMemory(of("files", "live"), of("spilled"), of("processes"), limit)


class Watch:
    """Has the nodes of a cluster tell of their memory often, for as long as it is renewed.

    Args:
        store: a connection of its own.
        records: whether slots are to note what they run.
    """

    def __init__(self, store: Store, *, records: bool) -> None:
        store.link.retry_timeout = RETRY_S  # whoever ends it waits for it
        self.store = store
        self.id = uuid.uuid4().hex[:16]
        self._records = records
        self._due = 0.0

    def renew(self) -> bool:
        """Renew it if that is due; returns whether it began now, or anew: before, nobody was told.

        Raises:
            CeleryMemError, RedisError: Redis cannot be asked.
        """
        now = time.monotonic()
        if now < self._due:
            return False
        try:
            goes_on = self.store.watch(self.id, records=self._records)
        except NamespaceResetError:
            self.store.rejoin()
            goes_on = self.store.watch(self.id, records=self._records)
        self._due = now + WATCH_S / 10
        return not goes_on

    def end(self) -> None:
        """End it, and the connection; if Redis is away, it ends by itself."""
        try:
            self.store.end_watch(self.id)
        except (CeleryMemError, RedisError):
            pass
        finally:
            self.store.link.close()


class Memory:
    """Samples in order of time, never too many."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.missed = 0
        """Looks that found no Redis."""

    def add(self, sample: Sample) -> None:
        """Add the newest sample."""
        self.samples.append(sample)
        if len(self.samples) > MOST_SAMPLES:
            del self.samples[1::2]


class MemorySampler:
    """Looks at the memory of a cluster while a block of code runs; `Client.profile_memory` makes it.

    `with sampler:` and `with sampler.sample("a"):` each add a run under a label, to be compared.

    Attributes:
        runs: label -> what was found.
    """

    def __init__(self, connect: Callable[[], Store], interval: float = 0.5, label: str | None = None) -> None:
        check_interval(interval)
        self.runs: dict[str, Memory] = {}
        self._connect = connect
        self._interval = interval
        self._label = label
        self._open: list[Any] = []

    @contextmanager
    def sample(self, label: str | None = None, *, interval: float | None = None) -> Iterator[Self]:
        """Sample while the block runs; a label that was there before is replaced.

        Args:
            label: what the run is called; None counts: "run 1", "run 2".
            interval: seconds between two looks, if not the sampler's. Nodes tell of theirs twice a second.
        """
        if interval is not None:
            check_interval(interval)
        run = Memory()
        sampling = _Sampling(self._connect(), run, interval or self._interval)
        self.runs[label or self._label or self._next_label()] = run
        sampling.start()
        try:
            yield self
        finally:
            sampling.stop()

    def __enter__(self) -> Self:
        block = self.sample()
        block.__enter__()
        self._open.append(block)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._open.pop().__exit__(kind, error, where)

    def _next_label(self) -> str:
        return next(name for n in range(1, len(self.runs) + 2) if (name := f"run {n}") not in self.runs)

    def peak(self, label: str | None = None, measure: str = "memory") -> int:
        """Return the most bytes that a run found.

        Args:
            label: of the run; None means the last one.
            measure: see `to_pandas`.
        """
        _check_measure(measure)
        run = self.runs[label] if label is not None else list(self.runs.values())[-1]
        return max((s.total(measure) or 0 for s in run.samples), default=0)

    def to_pandas(
        self, measure: str = "memory", *, by_node: bool = False, align: bool = False
    ) -> pandas.DataFrame:
        """Return bytes over time, a column for each run.

        Args:
            measure: "memory" (of results), "spilled" (results on disk), "processes", "limit", or "redis".
            by_node: a column for each node of each run.
            align: count the time of each run from its begin, so that runs lie over each other.
        Raises:
            ImportError: pandas is not installed.
        """
        _check_measure(measure)
        if by_node and measure == "redis":
            raise ValueError('measure="redis" is of no node; leave by_node away')
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas() makes a pandas.DataFrame: pip install pandas") from error

        columns: dict[Any, Any] = {}
        for label, run in self.runs.items():
            times = [s.at for s in run.samples]
            index: Any
            if align:
                begin = times[0] if times else 0.0
                index = pd.to_timedelta([t - begin for t in times], unit="s")
            else:
                index = pd.to_datetime(times, unit="s")
            if by_node:
                for node in sorted({name for s in run.samples for name in s.nodes}):
                    values = [
                        getattr(s.nodes[node], measure) if node in s.nodes else None for s in run.samples
                    ]
                    columns[label, node] = pd.Series(values, index=index, dtype="float64")
            else:
                totals = [s.total(measure) for s in run.samples]
                columns[label] = pd.Series(totals, index=index, dtype="float64")
        frame = pd.DataFrame(columns)
        if len(self.runs) > 1 and not frame.empty:
            # Runs were looked at at different moments: between two looks the figure of the first one stands.
            ends = {name: column.last_valid_index() for name, column in frame.items()}
            frame = frame.ffill()
            for name, end in ends.items():
                frame.loc[frame.index > end, name] = float("nan")
        return frame

    def plot(self, measure: str = "memory", *, align: bool = True, ax: Any = None, **kwargs: Any) -> Any:
        """Draw `to_pandas` in MiB; returns the axes of matplotlib.

        Args:
            measure: see `to_pandas`.
            align: draw runs over each other, not one after the other.
            ax: axes to draw on; None makes new ones.
            kwargs: for `pandas.DataFrame.plot`.
        Raises:
            ImportError: matplotlib or pandas is not installed.
        """
        try:
            import matplotlib  # noqa: F401 (pandas draws with it)
        except ImportError as error:
            raise ImportError("plot() draws with matplotlib: pip install matplotlib") from error
        frame = self.to_pandas(measure, align=align) / 2**20
        if align:
            frame.index = frame.index.total_seconds()
        axes = frame.plot(
            ax=ax, **{"xlabel": "seconds" if align else "time", "ylabel": f"{measure}, MiB", **kwargs}
        )
        axes.set_ylim(bottom=0)
        return axes

    def __repr__(self) -> str:
        runs = ", ".join(f"{label!r}: {len(run.samples)} samples" for label, run in self.runs.items())
        return f"<MemorySampler {runs or 'without runs'}>"


class _Sampling(threading.Thread):
    """The thread of one run."""

    def __init__(self, store: Store, run: Memory, interval: float) -> None:
        super().__init__(name="celery-mem-memory", daemon=True)
        self._watch = Watch(store, records=False)
        self._memory = run
        self._interval = interval
        self._ends = threading.Event()

    def run(self) -> None:
        try:
            while True:
                is_last = self._ends.is_set()
                try:
                    self._watch.renew()
                    self._memory.add(look(self._watch.store))
                except (CeleryMemError, RedisError):
                    self._memory.missed += 1
                if is_last:
                    return
                self._ends.wait(self._interval)
        finally:
            self._watch.end()

    def stop(self) -> None:
        """Look once more, and end."""
        self._ends.set()
        self.join()


def check_interval(interval: Any) -> None:
    """Raise ValueError if there cannot be so many seconds between two looks."""
    if isinstance(interval, bool) or not isinstance(interval, int | float) or not interval >= MIN_INTERVAL_S:
        raise ValueError(f"interval: seconds between two looks, at least {MIN_INTERVAL_S}, not {interval!r}")


def _check_measure(measure: str) -> None:
    if measure not in MEASURES:
        raise ValueError(f"measure is one of {', '.join(MEASURES)}, not {measure!r}")
