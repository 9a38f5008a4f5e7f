"""Jobs with known answers: what clients do while things break."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd

from celery_mem import Client, Future
from celery_mem.errors import DataLostError
from examples.flights import COLUMNS, load_month, mean_delays, sum_delays
from tests import tasks
from tests.faults.graphs import Graph


class WrongValueError(AssertionError):
    """A result is not what it must be."""


@dataclass
class Stage:
    """What a job works with.

    Attributes:
        url: where tasks count their runs, under names that begin with `name`.
        patience_s: a result that takes longer counts as a hang.
        folder: has the flights as CSV files.
        notes: what a job has to say that is no fault.
    """

    client: Client
    url: str
    name: str
    chance: random.Random
    patience_s: float
    folder: Path
    notes: list[str] = field(default_factory=list)

    def gather(self, futures: Any) -> Any:
        """Return the values of futures."""
        return self.client.gather(futures, timeout=self.patience_s)

    def compute(self, collection: Any) -> Any:
        """Return the value of a collection."""
        return self.client.compute(collection).result(timeout=self.patience_s)

    def where(self, name: object) -> tuple[str, str]:
        """Return where the task of this name counts its runs."""
        return self.url, f"{self.name}-{name}"


def check(what: str, got: object, expected: object) -> None:
    """Compare, and raise if they differ."""
    if got != expected:
        raise WrongValueError(f"{what}: got {got!r}, expected {expected!r}")


def random_graph(stage: Stage) -> None:
    """Layers of sums, some through large results."""
    seed = stage.chance.randrange(1 << 30)
    graph = Graph(stage.client, stage.url, stage.name, seed=seed, layers=4, width=25)
    check("sums", stage.gather(graph.futures), graph.values)


def sums(stage: Stage) -> None:
    """Many short tasks, all held."""
    numbers = [stage.chance.randrange(1 << 40) for _ in range(200)]
    futures = stage.client.map(tasks.inc, numbers)
    total = stage.client.submit(sum, futures)
    check("a sum", total.result(timeout=stage.patience_s), sum(numbers) + len(numbers))
    check("its parts", stage.gather(futures), [n + 1 for n in numbers])


def tree(stage: Stage) -> None:
    """Large arrays, added pair by pair in the memory of the nodes."""
    n = stage.chance.choice([100_000, 300_000, 900_000])
    fills = [stage.chance.randrange(16) for _ in range(16)]
    level = [stage.client.submit(tasks.large, stage.where(i), n, fill) for i, fill in enumerate(fills)]
    depth = 0
    while len(level) > 1:
        depth += 1
        level = [
            stage.client.submit(tasks.add_slowly, stage.where(f"{depth}-{i}"), *level[i : i + 2])
            for i in range(0, len(level), 2)
        ]
    (top,) = stage.gather(level)
    check("the top of a tree", (top.shape, set(top.tolist())), ((n,), {sum(fills)}))


def chain(stage: Stage) -> None:
    """Arrays, each made of the one before; the one in the middle stays, and is used again."""
    n, steps = 200_000, 24
    link = stage.client.submit(tasks.large, stage.where("first"), n, 1)
    for i in range(steps):
        link = stage.client.submit(tasks.step, stage.where(i), link)
        if i == steps // 2:
            middle = link
    check("the end of a chain", int(stage.gather(link).sum(dtype="u8")), n * (1 + steps))
    again = stage.client.submit(tasks.total, stage.where("again"), middle)
    check("its middle", again.result(timeout=stage.patience_s), n * (2 + steps // 2))


def shuffle(stage: Stage) -> None:
    """A dataframe whose rows all change places."""
    seed = stage.chance.randrange(1 << 30)
    numbers = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "id": numbers.integers(0, 97, 40_000),
            "x": numbers.integers(0, 1000, 40_000),
            "n": np.arange(40_000),
        }
    )
    frame = dd.from_pandas(table, npartitions=6).shuffle("id")
    held = stage.client.persist(frame)
    by_id = stage.compute(held.groupby("id").x.sum()).sort_index()
    check("sums of a shuffled frame", by_id.tolist(), table.groupby("id").x.sum().tolist())
    whole = stage.compute(held).sort_values("n")
    check("rows of a shuffled frame", whole.x.tolist(), table.x.tolist())


def flights(stage: Stage) -> None:
    """The flights of a smaller year, as in examples/flights.py."""
    paths = sorted(stage.folder.glob("flights-*.csv"))
    table = pd.concat([load_month(path) for path in paths])
    expected = table.groupby("carrier").arr_delay.mean()
    months = stage.client.map(load_month, paths, pure=False)
    parts = stage.client.map(sum_delays, months)
    delays = stage.client.submit(mean_delays, parts).result(timeout=stage.patience_s)
    check("carriers", sorted(delays.index), sorted(expected.index))
    pd.testing.assert_series_equal(delays.sort_index(), expected.sort_index(), check_names=False)
    frame = dd.read_csv([str(path) for path in paths], usecols=list(COLUMNS), dtype=COLUMNS)
    late = stage.client.persist(frame[frame.arr_delay.notnull()])
    by_month = stage.compute(late.groupby("month").arr_delay.sum()).sort_index()
    pd.testing.assert_series_equal(by_month, table.groupby("month").arr_delay.sum(), check_names=False)


def brought(stage: Stage) -> None:
    """Data that the client brought, which cannot be made again: right, or lost and named."""
    n = 150_000
    data = stage.client.scatter(np.full(n, 3, dtype="u1"), hash=False)
    totals = [stage.client.submit(tasks.total_and, stage.where(i), data, i) for i in range(20)]
    apart = stage.client.map(tasks.inc, range(20), pure=False)
    try:
        check("sums of what was brought", stage.gather(totals), [3 * n + i for i in range(20)])
    except DataLostError as error:
        check("the key that is lost", error.key, data.key)
        stage.notes.append("lost what was scattered, and said so")
    check("what does not need it", stage.gather(apart), list(range(1, 21)))


def errors(stage: Stage) -> None:
    """Tasks that fail, once or always, and what depends on them."""
    good = stage.client.submit(tasks.counted, stage.where("good"), 1, 2, seconds=0.05)
    bad = stage.client.submit(tasks.fail_with, "as asked", good)
    after = stage.client.submit(tasks.inc, bad)
    some = [
        stage.client.submit(tasks.fail_at_first, (stage.url, f"{stage.name}+{i}"), i, retries=50)
        for i in range(5)
    ]
    try:
        after.result(timeout=stage.patience_s)
    except ValueError as error:
        check("an error", str(error), "as asked")
    else:
        raise WrongValueError("a failed task has a result")
    check("what was retried", stage.gather(some), list(range(5)))
    check("what it failed after", stage.gather(good), 3)


def nested(stage: Stage) -> None:
    """Tasks that submit tasks and wait for them."""
    found = stage.client.submit(tasks.fibonacci, 7, pure=False)
    check("a number", found.result(timeout=stage.patience_s), 13)


def cancelled(stage: Stage) -> None:
    """Tasks that are dropped or cancelled in the middle, among others that are not."""
    roots = [stage.client.submit(tasks.large, stage.where(i), 80_000, i) for i in range(12)]
    totals = [stage.client.submit(tasks.total, stage.where(f"t{i}"), root) for i, root in enumerate(roots)]
    stage.client.cancel(totals[::3])
    keep = {i: total for i, total in enumerate(totals) if i % 3}
    del roots, totals
    check("what was not cancelled", stage.gather(list(keep.values())), [80_000 * i for i in keep])


def durable(stage: Stage) -> None:
    """A chain of results that are to outlive all nodes."""
    link: Future = stage.client.submit(tasks.large, stage.where("first"), 60_000, 1, durable=True)
    for i in range(8):
        link = stage.client.submit(tasks.step, stage.where(i), link, durable=True)
    check("the end of a durable chain", int(stage.gather(link).sum(dtype="u8")), 60_000 * 9)


JOBS: tuple[Callable[[Stage], None], ...] = (
    *(random_graph, sums, tree, chain, shuffle, flights, brought, errors, nested, cancelled, durable),
)


def write_flights(folder: Path) -> None:
    """Write a year of flights, small and made up."""
    numbers = np.random.default_rng(0)
    for month in range(1, 7):
        n = 4000
        delays = numbers.integers(-60, 300, n).astype("float64")
        delays[numbers.random(n) < 0.02] = np.nan
        table = pd.DataFrame(
            {
                "month": month,
                "carrier": numbers.choice(["AA", "B6", "DL", "UA"], n),
                "origin": numbers.choice(["EWR", "JFK", "LGA"], n),
                "dest": numbers.choice(["BOS", "LAX", "MIA", "ORD", "SFO"], n),
                "dep_delay": numbers.integers(-20, 200, n).astype("float64"),
                "arr_delay": delays,
                "distance": numbers.integers(100, 3000, n),
            }
        )
        table.to_csv(folder / f"flights-{month:02}.csv", index=False)
