"""Results cross from host to host."""

from __future__ import annotations

from typing import Any

from celery_mem import Client
from tests.hosts import tasks
from tests.hosts.remote import At
from tests.hosts.site import Site, node, runs
from tests.hosts.tasks import MIB

ALL_SLOTS = 4


def on_all_slots(client: Client, name: str, function: Any, *columns: Any) -> list[Any]:
    """Submit one call for each slot of the site; they wait for one another, so that each slot has one."""
    return [
        client.submit(function, *(column[i] for column in columns), name, ALL_SLOTS, pure=False)
        for i in range(ALL_SLOTS)
    ]


def make_on_each(client: Client, name: str, nbytes: int) -> list[Any]:
    """Submit one array for each slot; the values are 1, 2, 3, 4."""
    return on_all_slots(client, name, tasks.make, [nbytes] * ALL_SLOTS, range(1, ALL_SLOTS + 1))


def gather_of_each(at: At) -> list[tuple[str, int, int]]:
    made = at.client.gather(make_on_each(at.client, "gather", 3 * MIB), timeout=60)
    return [(host, array.nbytes, int(array.sum(dtype="u8"))) for host, array in made]


def test_the_client_gets_the_results_of_all_workers(site: Site) -> None:
    made = site.client(gather_of_each)
    assert sorted(host for host, _, _ in made) == ["b", "b", "c", "c"]
    assert [rest for _, *rest in made] == [[3 * MIB, 3 * MIB * i] for i in range(1, ALL_SLOTS + 1)]


def all_read_all(at: At) -> Any:
    made = make_on_each(at.client, "make", 8 * MIB)
    return at.client.gather(on_all_slots(at.client, "total", tasks.total, [made] * ALL_SLOTS), timeout=60)


def test_tasks_use_large_results_of_other_hosts(site: Site) -> None:
    read = site.client(all_read_all)
    assert sorted(host for host, _ in read) == ["b", "b", "c", "c"]
    sums = [8 * MIB * i for i in range(1, ALL_SLOTS + 1)]
    for _, inputs in read:
        assert sorted(host for host, _ in inputs) == ["b", "b", "c", "c"]
        assert [total for _, total in inputs] == sums


def spoil_everywhere(at: At, scattered: bool) -> Any:
    if scattered:
        made = at.client.scatter(tasks.make(4 * MIB, 5), as_one=True)
    else:
        made = at.client.submit(tasks.make, 4 * MIB, 5)
    first = at.client.gather(on_all_slots(at.client, "first", tasks.spoil, [made] * ALL_SLOTS), timeout=60)
    again = at.client.gather(on_all_slots(at.client, "again", tasks.spoil, [made] * ALL_SLOTS), timeout=60)
    _, array = made.result(timeout=60)
    array += 1
    return first + again, int(made.result(timeout=60)[1].sum(dtype="u8"))


def test_a_task_that_writes_into_its_input_spoils_nobodys_on_any_host(site: Site) -> None:
    seen, left = site.client(spoil_everywhere, scattered=False)
    assert sorted(seen) == [(host, 20 * MIB) for host in "bbbbcccc"]
    assert left == 20 * MIB


def test_tasks_on_all_hosts_use_what_the_client_scattered(site: Site) -> None:
    seen, left = site.client(spoil_everywhere, scattered=True)
    assert sorted(seen) == [(host, 20 * MIB) for host in "bbbbcccc"]
    assert left == 20 * MIB


def linger_on_all(at: At) -> None:
    at.futures = [at.client.submit(tasks.linger, "lingering", pure=False) for _ in range(ALL_SLOTS)]


def let_go(at: At) -> None:
    at.redis.set("go:lingering", "1", ex=60)


def test_what_runs_on_a_host_that_is_cut_off_runs_again_on_another_and_counts_once(site: Site) -> None:
    d = site.client
    d(linger_on_all)
    site.hosts.wait_until(lambda: d(runs, ["lingering"]) == [ALL_SLOTS], "all slots to be busy")
    site.hosts.cut("b")
    try:
        site.hosts.wait_until(lambda: site.nodes() == {node("c")}, "the node of b to be given up", 20)
        d(let_go)
        assert d(lambda at: at.client.gather(at.futures, timeout=30)) == ["c"] * ALL_SLOTS
    finally:
        site.hosts.heal("b")
    site.hosts.wait_until(lambda: site.nodes() == {node("b"), node("c")}, "the node of b to be back")
    made = d(gather_of_each)
    assert sorted(host for host, _, _ in made) == ["b", "b", "c", "c"]
    assert d(runs, ["lingering"]) == [ALL_SLOTS + 2]
