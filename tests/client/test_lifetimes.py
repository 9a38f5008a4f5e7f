"""Results that live longer than the process that asked for them: names, datasets, fire_and_forget."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import dask.array as da
import dask.bag as db
import pytest

from celery_mem import Client, Future, fire_and_forget, wait
from celery_mem.errors import (
    ClosedClientError,
    ConfigError,
    DatasetError,
    FutureCancelledError,
    MissingKeyError,
)
from celery_mem.state.audit import read
from celery_mem.state.store import Store
from tests.deployment import ROOT, Deployment
from tests.on_cluster import Gate, add, fail, identity, inc


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with Deployment(client_lease=4) as deployment:  # the coordinator soon judges
        deployment.start_worker(slots=2)
        deployment.start_coordinator()
        yield deployment


@pytest.fixture
def connect(deployment: Deployment) -> Iterator[Callable[..., Client]]:
    """A function that makes clients; when the test ends, they are closed and nothing may be left."""
    clients: list[Client] = []

    def make(name: str | None = None, **settings: Any) -> Client:
        clients.append(deployment.client(name=name, **settings))
        return clients[-1]

    yield make
    for client in clients:
        client.close(release=True)
    deployment.check_empty()


@pytest.fixture
def store(deployment: Deployment) -> Iterator[Store]:
    store = deployment.store()
    yield store
    store.link.close()


@pytest.fixture
def gate(deployment: Deployment) -> Iterator[Gate]:
    gate = Gate(deployment.url)
    yield gate
    gate.open()


# --- names --------------------------------------------------------------------------------------------------


def test_a_client_that_comes_back_finds_what_is_pending_finished_or_erred(connect, gate):
    first = connect("job", lease="10m")
    kept = [
        first.submit(inc, 1, key="two"),
        first.submit(fail, "as asked", key="bad"),
        first.submit(gate.pass_, "late", key="late"),
    ]
    wait(kept[:2])
    assert gate.next_reached() == "late"
    first.close()

    again = connect("job", lease="10m")
    found = again.futures
    assert {key: f.status for key, f in found.items()} == {
        "two": "finished",
        "bad": "error",
        "late": "pending",
    }
    assert found["two"].result() == 2
    with pytest.raises(ValueError, match="as asked"):
        again.future("bad").result()
    gate.open()
    assert found["late"].result(timeout=60) == "late"


CRASH = """
import os, sys
from celery_mem import Client
from tests.on_cluster import inc
client = Client(sys.argv[1], name="crashes", lease=600)
one = client.submit(inc, 0, key="one")
two = client.submit(inc, one, key=("two", 2))
assert two.result(timeout=60) == 2
os._exit(1)
"""


def test_a_client_that_comes_back_after_a_crash_finds_its_futures(deployment, connect):
    command = [sys.executable, "-c", CRASH, deployment.url]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode == 1
    again = connect("crashes", lease=600)
    assert {key: f.result() for key, f in again.futures.items()} == {"one": 1, ("two", 2): 2}


def test_what_was_found_is_held_until_it_is_let_go(connect, store):
    first = connect("keeper", lease=600)
    kept = first.map(inc, range(4), key=["k0", "k1", "k2", "k3"])
    wait(kept)
    first.close()

    again = connect("keeper", lease=600)
    assert again.futures["k0"].result() == 1
    assert again.future("k1").result() == 2
    again.session.flush_releases()
    assert set(read(store).records) == {"k0", "k1", "k2", "k3"}
    held = again.future("k3")
    again.forget(["k0", "k1"])
    again.forget()
    again.session.flush_releases()
    assert set(read(store).records) == {"k3"}
    assert held.result() == 4


def test_futures_that_were_dropped_before_the_end_are_not_found(connect):
    first = connect("dropper", lease=600)
    stays, goes = first.map(inc, [1, 2], key=["stays", "goes"])
    wait([stays, goes])
    del goes
    first.close()
    assert list(connect("dropper", lease=600).futures) == ["stays"]


def test_a_second_process_takes_the_name_over_and_the_first_is_told(connect, gate):
    first = connect("single", lease=600, client_lease=600)  # it would renew its lease in 150 s
    future = first.submit(gate.pass_, 1, key="one")
    gate.next_reached()
    second = connect("single", lease=600)
    with pytest.raises(FutureCancelledError, match="another process has become the client 'single'"):
        future.result(timeout=60)
    with pytest.raises(ClosedClientError, match="another process has become"):
        first.submit(inc, 1)
    first.close()
    gate.open()
    assert second.future("one").result(timeout=60) == 1


def test_a_session_that_does_not_hear_that_it_lost_its_name_finds_out_when_it_calls(connect, monkeypatch):
    first = connect("deaf", lease=600)
    monkeypatch.setattr(first.session.legacy, "hear", lambda notice: None)
    future = first.submit(inc, 1, key="two")
    assert future.result() == 2
    second = connect("deaf", lease=600)
    with pytest.raises(FutureCancelledError, match="another process has become"):
        first.submit(inc, 5).result()
    with pytest.raises(ClosedClientError, match="another process has become"):
        first.future("two")
    assert future.status == "cancelled"
    assert second.future("two").result() == 2


def test_the_results_of_a_client_that_stays_away_are_freed_with_its_lease(deployment, connect, store):
    client = connect("away", lease="50ms")
    future = client.submit(inc, 1, key="two")
    assert future.result() == 2
    client.close()
    deployment.check_empty()
    assert read(store).names == {}
    assert connect("away", lease=600).futures == {}


def test_a_client_that_is_cut_off_for_longer_than_its_lease_takes_its_name_and_its_keys_again(
    deployment, connect, store
):
    client = connect("cut off", lease=600)
    future = client.submit(inc, 1)
    assert future.result() == 2
    deployment.redis.zadd(deployment.key("clients"), {client.id: 0})
    deployment.wait_until(lambda: client.id not in read(store).clients, "the coordinator to end the client")
    other = client.submit(inc, 2)
    assert (other.result(), future.result()) == (3, 2)
    assert read(store).names == {"cut off": client.id}
    assert read(store).held[client.id] == {future.key, other.key}


def test_close_can_let_go_of_all(connect, store):
    client = connect("done", lease=600)
    future = client.submit(inc, 1)
    assert future.result() == 2
    client.close(release=True)
    assert (read(store).records, read(store).names) == ({}, {})


def test_a_client_without_a_lease_leaves_nothing(deployment, connect):
    client = connect("a label")
    future = client.submit(inc, 1)
    assert list(client.futures) == [future.key]
    client.close()
    deployment.check_empty()
    assert connect("a label").futures == {}


@pytest.mark.parametrize(
    ("name", "lease"), [(None, 60), ("x", "soon"), ("x", 0), ("x", -1), ("@x", 60), ("", 60), ("a\nb", 60)]
)
def test_a_lease_is_a_time_and_belongs_to_a_name(deployment, name, lease):
    with pytest.raises(ConfigError):
        deployment.client(name=name, lease=lease)


# --- datasets -----------------------------------------------------------------------------------------------


def test_a_dataset_survives_its_publisher_and_belongs_to_whoever_gets_it(connect, store):
    first = connect()
    x = first.persist(da.arange(100, chunks=10))
    total = first.submit(add, 1, 2, key="total")
    first.publish_dataset(x=x, both={"x": x, "total": [total]})
    first.publish_dataset(total, name=("a", 1))
    first.close()

    other = connect()
    assert other.list_datasets() == (("a", 1), "both", "x")
    y = other.get_dataset("x")
    assert other.compute(y.sum()).result() == 4950
    assert isinstance(other.datasets["a", 1], Future)
    assert other.gather(other.datasets["both"]["total"]) == [3]
    for name in list(other.datasets):
        other.unpublish_dataset(name)
    assert len(read(store).held) == 1  # by the client, who has y
    assert other.compute(y.max()).result() == 99


def test_a_name_is_published_once_unless_it_is_overridden(connect, store):
    client = connect()
    one, two = client.submit(inc, 0, key="one"), client.submit(inc, 1, key="two")
    client.publish_dataset(n=one)
    with pytest.raises(KeyError, match="dataset 'n' is published already"):
        client.publish_dataset(n=two)
    client.publish_dataset(two, name="n", override=True)
    del one, two
    client.session.flush_releases()
    assert client.get_dataset("n").result() == 2
    client.session.flush_releases()
    assert set(read(store).records) == {"two"}
    del client.datasets["n"]
    assert client.list_datasets() == ()


def test_what_is_not_published_is_a_key_error_or_the_default(connect):
    client = connect()
    with pytest.raises(DatasetError, match="dataset 'nothing' is not published"):
        client.get_dataset("nothing")
    with pytest.raises(KeyError):
        client.datasets["nothing"]
    assert client.get_dataset("nothing", default=3) == 3
    assert "nothing" not in client.datasets
    client.unpublish_dataset("nothing")


def test_a_dataset_may_be_plain_data_or_a_collection_that_is_not_computed(connect):
    client = connect()
    client.publish_dataset(settings={"a": 1}, lazy=db.from_sequence(range(4), npartitions=2))
    assert client.get_dataset("settings") == {"a": 1}
    assert client.compute(client.datasets["lazy"].sum()).result() == 6
    client.datasets["more"] = 7
    assert sorted(client.datasets) == ["lazy", "more", "settings"]
    assert len(client.datasets) == 3
    for name in client.list_datasets():
        client.unpublish_dataset(name)


def test_a_dataset_whose_results_were_cancelled_by_force_says_so(connect):
    client, other = connect(), connect()
    client.publish_dataset(x=client.submit(inc, 1, key="two"))
    client.cancel(client.future("two"), force=True)
    with pytest.raises(DatasetError, match="dataset 'x'"):
        other.get_dataset("x")
    client.unpublish_dataset("x")


def test_a_cancelled_future_cannot_be_published(connect):
    client = connect()
    future = client.submit(inc, 1)
    future.cancel()
    with pytest.raises(FutureCancelledError):
        client.publish_dataset(x=future)
    assert client.list_datasets() == ()


def test_a_dataset_of_many_keys_takes_few_calls(connect, monkeypatch):
    client, other = connect(), connect()
    futures = client.map(inc, range(700))
    client.publish_dataset(many=futures)
    calls = []
    hold = other.session.store.hold
    monkeypatch.setattr(
        other.session.store, "hold", lambda c, e, keys: (calls.append(len(keys)), hold(c, e, keys))[1]
    )
    found = other.get_dataset("many")
    assert other.gather(found) == [*range(1, 701)]
    assert calls == [500, 200]
    other.unpublish_dataset("many")


# --- fire and forget ----------------------------------------------------------------------------------------


def test_a_task_runs_to_its_end_though_nobody_holds_it(deployment, connect, store, gate):
    client = connect()
    first = client.submit(gate.pass_, 1)
    second = client.submit(add, first, 1)
    marks = client.submit(deployment_mark, deployment.url, "ran", second)
    fire_and_forget([marks])
    gate.next_reached()
    del first, second, marks
    client.close()
    assert len(read(store).records) == 3
    gate.open()
    deployment.wait_until(lambda: deployment.redis.get("mark:ran") == b"2", "the task to run for nobody")
    deployment.check_empty()


def deployment_mark(url: str, name: str, value: Any) -> None:
    import redis

    with redis.Redis.from_url(url) as r:
        r.set(f"mark:{name}", str(value))


def test_an_error_that_nobody_holds_is_logged_with_its_key(deployment, connect):
    client = connect()
    bad = client.submit(fail, "nobody is here", key="bad one")
    fire_and_forget(client.submit(identity, bad, key="after"))  # it may have failed already
    done = client.submit(fail, "too early", key="early")
    assert isinstance(done.exception(), ValueError)
    fire_and_forget(done)
    del bad, done
    client.close()
    deployment.check_empty()
    for wanted in (
        "task after, which nobody waited for, failed, because of bad one: ValueError: nobody is here",
        "task early, which nobody waited for, failed: ValueError: too early",
    ):
        deployment.wait_until(lambda w=wanted: w in deployment.log("c0"), "the error in the log")


def test_what_has_ended_is_not_kept_and_what_is_held_stays(connect, store):
    client = connect()
    future = client.submit(inc, 1)
    assert future.result() == 2
    fire_and_forget(future)
    assert "!" not in read(store).held
    other = client.submit(inc, 2)
    fire_and_forget(client.persist(db.from_sequence([1, 2], npartitions=2)))
    fire_and_forget(other)
    assert other.result() == 3
    client.session.flush_releases()
    assert other.key in read(store).records


def test_without_futures_there_is_nothing_to_forget(connect):
    client = connect()
    with pytest.raises(TypeError, match="persisted"):
        fire_and_forget(db.from_sequence([1, 2]))
    with pytest.raises(MissingKeyError):
        client.future("no such key")
