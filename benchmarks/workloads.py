"""What is measured: task functions, workloads, units and targets.

A workload is a function of a contender and a size. It times itself (so that building its input is
not part of the figure), checks every value it gets back, and returns one number. Arguments are
never used twice in a process, so a repetition cannot be answered by the results of an earlier one.

The task functions live here, in a module that the workers of every contender can import.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks import data
from benchmarks.checks import check_equal, fresh_numbers

if TYPE_CHECKING:
    from benchmarks.contenders import Contender

# --- task functions -------------------------------------------------------------------------------


def inc(x: int) -> int:
    return x + 1


def add(x: int, y: int) -> int:
    return x + y


def total(values: list[int]) -> int:
    return sum(values)


def nap(x: int) -> int:
    time.sleep(0.02)
    return x


# --- what a workload is ---------------------------------------------------------------------------


DISTRIBUTED = ("distributed", "distributed-tuned")
PEERS = (*DISTRIBUTED, "ray")


@dataclass(frozen=True)
class Target:
    """A bound on the median: as a factor of the best of the peers, or, if `absolute`, by itself."""

    limit: float
    absolute: bool = False


@dataclass(frozen=True)
class Workload:
    """One line of the table.

    Attributes:
        measure: runs the workload once at a size and returns the figure in `unit`; None for
            `startup` and for peaks, which the child process measures around something else.
        warm_up: the size of a run before the timed one, as a fraction of `size`; 0 for none.
        only: the one contender that the workload is about; None compares all of them.
        peers: the contenders whose best median is what ratios are to.
        peak_of: the workload whose peak memory, in a third run of it, is the figure; `measure` is None.
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool
    size: int
    measure: Callable[[Contender, int], float] | None
    target: Target | None = None
    warm_up: float = 0.05
    only: str | None = None
    peers: tuple[str, ...] = DISTRIBUTED
    peak_of: str | None = None

    def scaled(self, scale: float) -> int:
        """The size of a run at `scale`, never below what the workload needs to mean something."""
        return max(16, round(self.size * scale))


# --- the workloads --------------------------------------------------------------------------------


def map_noop(contender: Contender, n: int) -> float:
    """Tasks per second of one map and one gather of tasks that do nothing to speak of."""
    numbers = fresh_numbers(n)
    started = time.perf_counter()
    values = contender.gather(contender.map(inc, numbers))
    seconds = time.perf_counter() - started
    check_equal(values, [x + 1 for x in numbers])
    return n / seconds


def tree(contender: Contender, n: int) -> float:
    """Tasks per second of a sum over `n` leaves, pair by pair, with futures as arguments."""
    leaves = 2 ** int(math.log2(n))
    numbers = fresh_numbers(leaves)
    started = time.perf_counter()
    level = contender.map(inc, numbers)
    while len(level) > 1:
        level = contender.map(add, level[::2], level[1::2])
    value = contender.result(level[0])
    seconds = time.perf_counter() - started
    check_equal(value, sum(numbers) + leaves)
    return (2 * leaves - 1) / seconds


def chain(contender: Contender, n: int) -> float:
    """Tasks per second of `n` submits, each on the future of the one before, awaiting the last."""
    first = fresh_numbers(1)[0]
    started = time.perf_counter()
    link = contender.submit(inc, first)
    for _ in range(n - 1):
        link = contender.submit(inc, link)
    value = contender.result(link)
    seconds = time.perf_counter() - started
    check_equal(value, first + n)
    return n / seconds


def graph(contender: Contender, n: int) -> float:
    """Tasks per second of one compute of a delayed graph: leaves, sums of ten leaves, one sum.

    At the full size these are 9,090 leaves, 909 sums and one more: 10,000 nodes. Building the
    graph is Dask's work, the same for all, and not timed.
    """
    from dask import delayed

    sums = max(1, (n - 1) // 11)
    numbers = fresh_numbers(10 * sums)
    leaves = [delayed(inc)(x) for x in numbers]
    middle = [delayed(total)(leaves[i : i + 10]) for i in range(0, len(leaves), 10)]
    top = delayed(total)(middle)
    started = time.perf_counter()
    value = contender.compute(top)
    seconds = time.perf_counter() - started
    check_equal(value, sum(numbers) + len(numbers))
    return (len(leaves) + len(middle) + 1) / seconds


def roundtrip(contender: Contender, n: int) -> float:
    """Median milliseconds from submit to result, one task at a time on a system with no other work."""
    return _median_latency_ms(contender, n, pause_s=0.0)


def roundtrip_paused(contender: Contender, n: int) -> float:
    """The same with half a second of silence before each task, when slots have gone to sleep."""
    return _median_latency_ms(contender, n, pause_s=0.5)


def _median_latency_ms(contender: Contender, n: int, pause_s: float) -> float:
    latencies = []
    for x in fresh_numbers(n):
        time.sleep(pause_s)
        started = time.perf_counter()
        value = contender.result(contender.submit(inc, x))
        latencies.append(time.perf_counter() - started)
        check_equal(value, x + 1)
    return statistics.median(latencies) * 1e3


def recover(contender: Contender, n: int) -> float:
    """Seconds that `n` tasks of 20 ms take longer if a worker is killed when a second has passed."""
    return _extra_seconds(contender, n, contender.kill_worker)


def recover_child(contender: Contender, n: int) -> float:
    """The same if only the process is killed that runs a worker's tasks."""
    return _extra_seconds(contender, n, contender.kill_child)


def _extra_seconds(contender: Contender, n: int, kill: Callable[[], None]) -> float:
    undisturbed = _seconds_of_naps(contender, n, lambda: None)
    disturbed = _seconds_of_naps(contender, n, kill)
    contender.wait_ready()
    return disturbed - undisturbed


def _seconds_of_naps(contender: Contender, n: int, kill: Callable[[], None]) -> float:
    numbers = fresh_numbers(n)
    started = time.perf_counter()
    naps = contender.map(nap, numbers)
    time.sleep(1.0)
    kill()
    check_equal(contender.gather(naps), list(numbers))
    return time.perf_counter() - started


def cost_growth(contender: Contender, n: int) -> float:
    """Time per task of map_noop at `n` tasks against the same at `n / 50`."""
    small = max(16, n // 50)
    map_noop(contender, small)
    speeds_small, speeds_large = [], []
    for _ in range(3):
        for _ in range(3):
            contender.drain()
            gc.collect()
            speeds_small.append(map_noop(contender, small))
        contender.drain()
        gc.collect()
        speeds_large.append(map_noop(contender, n))
    return statistics.median(speeds_small) / statistics.median(speeds_large)


def held_bytes(contender: Contender, n: int) -> float:
    """Bytes of Redis memory per task whose small result a client holds.

    The growth of `used_memory` over `n` held tasks: it counts all that Redis keeps for them (the
    records, values, holders, indexes and the tables that these sit in), not values alone. What the
    connections have for buffers at the moment is left out, before and after.
    """
    contender.gather(contender.map(inc, fresh_numbers(16)))
    contender.drain()
    before = _settled_memory(contender)
    futures = contender.map(inc, fresh_numbers(n))
    contender.gather(futures)
    held = _settled_memory(contender)
    del futures
    contender.drain()
    return (held - before) / n


def _settled_memory(contender: Contender) -> int:
    """Redis' memory in use, once notices and queues of the work just done have been read and trimmed."""
    lowest, unchanged = contender.redis_used_memory(), 0
    while unchanged < 5:
        time.sleep(0.1)
        now = contender.redis_used_memory()
        unchanged = 0 if now < lowest - 4096 else unchanged + 1
        lowest = min(lowest, now)
    return lowest


def _of_data(
    name: str,
    title: str,
    unit: str,
    size: int,
    measure: Callable[[Contender, int], float],
    limit: float,
) -> Workload:
    """A workload of large results: warmed up by a whole run, which fills the pools of all systems."""
    return Workload(
        *(name, title, unit, unit == "GB/s", size, measure, Target(limit)), warm_up=1.0, peers=PEERS
    )


def _peak(of: Workload) -> Workload:
    return Workload(
        f"{of.name}_peak",
        f"peak memory of {of.name}",
        "MiB",
        False,
        of.size,
        None,
        Target(1.0),
        peak_of=of.name,
    )


_ARRAY_16_MIB = (16 << 20) // 8  # numbers
_PIPELINES = (
    _of_data("array_pipeline", "(x + x.T).mean(axis=0).sum(), 3.2 GB", "s", 20_000, data.array_pipeline, 0.7),
    _of_data("df_pipeline", "2,000,000 rows: read to groupby mean", "s", 2_000_000, data.df_pipeline, 0.9),
)
_DATA = (
    _of_data("bytes_local", "64 arrays made and summed", "GB/s", _ARRAY_16_MIB, data.bytes_local, 1.0),
    _of_data("bytes_move", "32 arrays, each added to another", "GB/s", _ARRAY_16_MIB, data.bytes_move, 2.0),
    _of_data("gather_big", "16 arrays gathered", "GB/s", _ARRAY_16_MIB, data.gather_big, 3.0),
    _of_data("scatter_big", "16 arrays scattered", "GB/s", _ARRAY_16_MIB, data.scatter_big, 1.0),
    *(line for pipeline in _PIPELINES for line in (pipeline, _peak(pipeline))),
    _of_data("release", "2,000 results of 100 KB let go", "ms", 2_000, data.release, 1.0),
)
_ALL = (
    Workload("map_noop", "gather(map(inc, range(10_000)))", "tasks/s", True, 10_000, map_noop, Target(8.0)),
    Workload(
        "tree", "sum over 4,096 leaves, futures as arguments", "tasks/s", True, 4_096, tree, Target(8.0)
    ),
    Workload("chain", "1,000 dependent submits, one by one", "tasks/s", True, 1_000, chain, Target(10.0)),
    Workload("graph", "10,000-node delayed graph, one compute", "tasks/s", True, 10_000, graph, Target(6.0)),
    Workload("roundtrip", "submit(inc, i).result(), idle", "ms", False, 200, roundtrip, Target(1 / 8)),
    Workload("startup", "Client() to first result, new process", "s", False, 1, None, Target(2.0)),
    Workload(
        "cost_growth",
        "cost per task at 50,000 / at 1,000",
        "x",
        False,
        50_000,
        cost_growth,
        Target(1.3, absolute=True),
        warm_up=0,
        only="celery-mem",
    ),
    Workload(
        "held_bytes",
        "Redis memory per held small task",
        "bytes",
        False,
        10_000,
        held_bytes,
        Target(1024, absolute=True),
        warm_up=0,
        only="celery-mem",
    ),
    *_DATA,
    Workload(
        "recover",
        "200 tasks of 20 ms, a worker killed after 1 s: time lost",
        "s",
        False,
        200,
        recover,
        Target(1.0),
        warm_up=0,
    ),
    Workload(
        "recover_child",
        "the same, one pool child killed",
        "s",
        False,
        200,
        recover_child,
        Target(1.5, absolute=True),
        warm_up=0,
        only="celery-mem",
    ),
    # No target, and only when asked for by name: what the first task after a quiet while costs.
    Workload(
        "roundtrip_paused", "the same after 0.5 s of silence", "ms", False, 10, roundtrip_paused, warm_up=0
    ),
)
WORKLOADS = {workload.name: workload for workload in _ALL}
DEFAULT = tuple(workload.name for workload in _ALL if workload.target is not None)
