"""Workloads of large results: made, moved, gathered, scattered, reduced, dropped.

The arrays are filled with one number each, a different one in every array of a run: filling is as
fast as memory, and a sum or a mean shows whether it is the right array. No contender compresses.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.checks import check_close, check_equal, fresh_numbers

if TYPE_CHECKING:
    import numpy as np

    from benchmarks.contenders import Contender

MADE, MOVED, WHOLE = 64, 32, 16  # arrays of bytes_local, of bytes_move, of gather_big and scatter_big
STEP = 7  # odd, so that a partner is often on the other worker
RESULT_100_KB = 12_800  # numbers; a few bytes more than what Ray keeps outside of its object store
PARTITIONS = 20

# --- task functions -------------------------------------------------------------------------------


def filled(n: int, value: float) -> np.ndarray:
    import numpy as np

    return np.full(n, float(value))


def array_sum(array: np.ndarray) -> float:
    return float(array.sum())


def array_add(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x + y


# --- bytes ----------------------------------------------------------------------------------------


def bytes_local(contender: Contender, n: int) -> float:
    """GB/s of arrays of `n` numbers that tasks make and dependents sum, all of them held."""
    values = fresh_numbers(MADE)
    started = time.perf_counter()
    arrays = contender.map(filled, [n] * MADE, values)
    sums = contender.gather(contender.map(array_sum, arrays))
    seconds = time.perf_counter() - started
    check_equal(sums, [float(n * value) for value in values])
    return _gigabytes(MADE * n) / seconds


def bytes_move(contender: Contender, n: int) -> float:
    """GB/s of input: each of 32 finished arrays is added to the one seven further on."""
    arrays, values = _finished(contender, MOVED, n)
    partners = [(i + STEP) % MOVED for i in range(MOVED)]
    started = time.perf_counter()
    added = contender.map(array_add, arrays, [arrays[i] for i in partners])
    contender.wait(added)
    seconds = time.perf_counter() - started
    sums = contender.gather(contender.map(array_sum, added))
    check_equal(sums, [float(n * (value + values[i])) for value, i in zip(values, partners, strict=True)])
    return _gigabytes(2 * MOVED * n) / seconds


def gather_big(contender: Contender, n: int) -> float:
    """GB/s of 16 finished arrays that the client, on the workers' host, gets back and reads once.

    The reading counts: who maps shared memory has moved nothing until a byte is looked at.
    """
    references, values = _finished(contender, WHOLE, n)
    started = time.perf_counter()
    arrays = contender.gather(references)
    sums = [float(array.sum()) for array in arrays]
    seconds = time.perf_counter() - started
    check_equal(sums, [float(n * value) for value in values])
    return _gigabytes(WHOLE * n) / seconds


def scatter_big(contender: Contender, n: int) -> float:
    """GB/s of 16 arrays that the client, on the workers' host, puts on the cluster."""
    values = fresh_numbers(WHOLE)
    arrays = [filled(n, value) for value in values]
    started = time.perf_counter()
    references = contender.scatter(arrays)
    seconds = time.perf_counter() - started
    sums = contender.gather(contender.map(array_sum, references))
    check_equal(sums, [float(n * value) for value in values])
    return _gigabytes(WHOLE * n) / seconds


def release(contender: Contender, n: int) -> float:
    """Milliseconds from letting go of `n` results of 100 KB until the system says that nothing is left."""
    references = contender.map(filled, [RESULT_100_KB] * n, fresh_numbers(n))
    contender.wait(references)
    started = time.perf_counter()
    references.clear()
    contender.drain()  # an error if something is left in the end
    return (time.perf_counter() - started) * 1e3


def _finished(contender: Contender, count: int, n: int) -> tuple[list[Any], range]:
    values = fresh_numbers(count)
    references = contender.map(filled, [n] * count, values)
    contender.wait(references)
    return references, values


def _gigabytes(numbers: int) -> float:
    return numbers * 8 / 1e9


# --- Dask collections -----------------------------------------------------------------------------


def array_pipeline(contender: Contender, n: int) -> float:
    """Seconds for `(x + x.T).mean(axis=0).sum()` of `n` times `n` random numbers in 100 chunks."""
    import dask.array as da

    chunk = max(1, n // 10)
    side = 10 * chunk
    x = da.random.default_rng(fresh_numbers(1)[0]).random((side, side), chunks=(chunk, chunk))
    with contender.memory:
        started = time.perf_counter()
        value = contender.compute((x + x.T).mean(axis=0).sum())
        seconds = time.perf_counter() - started
    check_close(float(value), 2 * float(x.sum().compute(scheduler="sync")) / side)
    return seconds


def df_pipeline(contender: Contender, n: int) -> float:
    """Seconds to read `n` rows of parquet, filter, add a column, persist, and take means by group."""
    import dask.dataframe as dd

    with tempfile.TemporaryDirectory(prefix="celery-mem-bench-") as folder:
        # In a process that ends: what pandas leaves behind in a heap is not the contender's.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            expected = pool.submit(_write_rows, folder, n, fresh_numbers(1)[0]).result()
        with contender.memory:
            started = time.perf_counter()
            kept = contender.persist(_with_revenue(dd.read_parquet(folder)))
            means = contender.compute(_mean_by_shop(kept))
            seconds = time.perf_counter() - started
        del kept
    got = means.to_dict()
    check_equal(sorted(got), sorted(expected))
    for shop, mean in expected.items():
        check_close(got[shop], mean)
    return seconds


def _with_revenue(frame: Any) -> Any:
    """The same steps for pandas and for Dask."""
    kept = frame[frame["price"] > 10]
    return kept.assign(revenue=kept["price"] * kept["count"])


def _mean_by_shop(frame: Any) -> Any:
    return frame.groupby("shop")["revenue"].mean()


def _write_rows(folder: str, n: int, seed: int) -> dict[int, float]:
    """Write the table; the result that is to come out."""
    import numpy as np
    import pandas as pd

    random = np.random.default_rng(seed)
    rows = pd.DataFrame(
        {
            "shop": random.integers(0, 100, n),
            "article": [f"article {i}" for i in random.integers(0, 10_000, n)],
            "price": random.random(n) * 100,
            "count": random.integers(1, 10, n),
        }
    )
    size = -(-n // PARTITIONS)
    for i in range(0, n, size):
        rows.iloc[i : i + size].to_parquet(Path(folder, f"part-{i // size:03}.parquet"))
    return _mean_by_shop(_with_revenue(rows)).to_dict()
