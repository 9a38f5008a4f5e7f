"""Results stay on the host where they were made, and go where they are wanted."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Sequence

import pytest

from celery_mem import wait
from tests.hosts import tasks
from tests.hosts.remote import At
from tests.hosts.site import Site, node, runs, worker
from tests.hosts.tasks import MIB
from tests.on_cluster import until

B, C = node("b"), node("c")

pytestmark = pytest.mark.node_memory


# --- what the process on d runs ----------------------------------------------------------------------------


def make(at: At, host: str, names: Sequence[str], nbytes: int) -> list[set[str]]:
    """Keep `at.results`: arrays full of 1, 2, ... made on one host under these names; return their places."""
    at.results = []
    for fill, name in enumerate(names, 1):
        # Other hosts may make it, too, when it is lost; they do not now, while this one has an idle slot.
        options = {"workers": [node(host)], "allow_other_workers": True, "key": name}
        at.results.append(at.client.submit(tasks.produce, name, nbytes, fill, **options))
        wait(at.results, timeout=30)
    return places(at)


def places(at: At) -> list[set[str]]:
    """Return the nodes that have a copy, for each of `at.results`."""
    who_has = at.client.who_has(at.results)
    return [{place for place in who_has[future.key] if "@" in place} for future in at.results]


def come_to_be_at(at: At, wanted: Sequence[set[str]]) -> list[set[str]]:
    """Wait until the results are at such nodes; returns where they are."""
    until(lambda: places(at) == list(wanted))
    return places(at)


def sums(at: At) -> list[int]:
    """Return what a client reads."""
    return [int(array.sum(dtype="u8")) for array in at.client.gather(at.results, timeout=60)]


def sums_on(at: At, host: str) -> list[tuple[str, int]]:
    """Return what tasks on one host read."""
    futures = [
        at.client.submit(tasks.consume, future, workers=[node(host)], pure=False) for future in at.results
    ]
    return at.client.gather(futures, timeout=60)


def blobs(at: At) -> list[str]:
    """Return the names of all blobs in Redis."""
    return [name.decode() for name in at.redis.scan_iter("{mem}:b:*", count=1000)]


def folder(at: At, name: str) -> str:
    return str(at.store.node_infos()[name]["dir"])


# --- the tests ---------------------------------------------------------------------------------------------


def test_a_result_is_read_on_another_host_through_redis_and_kept_there(site: Site) -> None:
    d, names = site.client, ["crossing"]
    assert d(make, "b", names, 32 * MIB) == [{B}]
    theirs = d(folder, B)
    assert site.hosts["b"].path(theirs).is_dir()
    assert not site.hosts["c"].path(theirs).exists()
    assert d(sums_on, "c") == [("c", 32 * MIB)]
    assert d(come_to_be_at, [{B, C}]) == [{B, C}]
    assert d(sums_on, "c") == [("c", 32 * MIB)]
    assert d(sums) == [32 * MIB]
    # The transit copies are gone.
    site.hosts.wait_until(lambda: d(blobs) == [], "no blob in Redis", 20)
    assert d(runs, names) == [1]


def test_replicate_makes_copies_on_both_hosts(site: Site) -> None:
    d, names = site.client, [f"copied-{i}" for i in range(3)]
    assert d(make, "c", names, 4 * MIB) == [{C}] * 3
    d(lambda at: at.client.replicate(at.results, n=2) and None)
    assert d(come_to_be_at, [{B, C}] * 3) == [{B, C}] * 3
    assert d(sums) == [4 * MIB, 8 * MIB, 12 * MIB]
    assert d(runs, names) == [1] * 3


def test_rebalance_evens_out_the_bytes(site: Site) -> None:
    d, names = site.client, [f"even-{i}" for i in range(8)]
    assert d(make, "b", names, 4 * MIB) == [{B}] * 8
    d(lambda at: at.client.rebalance(at.results) and None)

    def count() -> Counter[str]:
        return Counter(place for found in d(places) for place in found)

    site.hosts.wait_until(lambda: count() == {B: 4, C: 4}, f"an even share: {count()}", 20)
    assert d(sums) == [4 * MIB * i for i in range(1, 9)]
    assert d(runs, names) == [1] * 8


def test_retiring_a_worker_keeps_what_only_it_has(site: Site) -> None:
    d, names = site.client, [f"retired-{i}" for i in range(4)]
    assert d(make, "b", names, 4 * MIB) == [{B}] * 4
    d(lambda at: at.client.retire_workers([B]) and None)
    site.end_worker("b")
    assert d(sums) == [4 * MIB * i for i in range(1, 5)]
    assert d(sums_on, "c") == [("c", 4 * MIB * i) for i in range(1, 5)]
    assert d(runs, names) == [1] * 4
    assert site.hosts["b"].files() == []
    site.start_workers("b")


def test_a_worker_that_is_told_to_stop_saves_what_only_it_has(site: Site) -> None:
    d, names = site.client, [f"saved-{i}" for i in range(4)]
    assert d(make, "c", names, 4 * MIB) == [{C}] * 4
    site.end_worker("c", signal.SIGTERM)
    assert d(sums) == [4 * MIB * i for i in range(1, 5)]
    assert d(sums_on, "b") == [("b", 4 * MIB * i) for i in range(1, 5)]
    assert d(runs, names) == [1] * 4
    assert site.hosts["c"].files() == []
    site.start_workers("c")


def test_what_a_lost_host_alone_had_is_made_again_and_the_host_comes_back(site: Site) -> None:
    d, names = site.client, [f"lost-{i}" for i in range(4)]
    assert d(make, "b", names, 4 * MIB) == [{B}] * 4
    d(lambda at: at.client.replicate(at.results[:2], n=2) and None)
    assert d(come_to_be_at, [{B, C}] * 2 + [{B}] * 2) == [{B, C}] * 2 + [{B}] * 2
    site.hosts.cut("b")
    try:
        site.hosts.wait_until(lambda: site.nodes() == {C}, "node b to be given up", 20)
        assert d(sums) == [4 * MIB * i for i in range(1, 5)]
        assert d(places) == [{C}] * 4
        assert d(runs, names) == [1, 1, 2, 2]
    finally:
        site.hosts.heal("b")
    site.hosts.wait_until(lambda: site.nodes() == {B, C}, "node b to be back", 30)
    assert d(sums_on, "b") == [("b", 4 * MIB * i) for i in range(1, 5)]
    # What is wanted twice is on both again.
    assert d(come_to_be_at, [{B, C}] * 4) == [{B, C}] * 4
    assert d(runs, names) == [1, 1, 2, 2]


def test_nothing_is_left_on_any_host_when_the_workers_are_gone(site: Site) -> None:
    d, names = site.client, ["left"]
    assert d(make, "b", names, 4 * MIB) == [{B}]
    site.end_worker("b", signal.SIGKILL)
    site.start_workers("b")
    assert d(sums) == [4 * MIB]
    d(lambda at: delattr(at, "results"))
    for host in "bc":
        site.hosts.send(worker(host), signal.SIGTERM)
    for host in "bc":
        site.end_worker(host)
    try:
        for host in site.hosts:
            assert host.files("/dev/shm") == [], host.name
            assert [str(p) for p in host.path("/tmp").glob("celery-mem*")] == []
    finally:
        site.start_workers("b", "c")
