"""What a client tells of the cluster: info, who_has, nbytes, processing; who is the current client."""

from __future__ import annotations

import threading

import dask
import dask.array as da
import numpy as np
import pytest

from celery_mem import Client, wait
from celery_mem.errors import UnboundFutureError
from celery_mem.graph.collections import TASK_SHUFFLES
from tests.on_cluster import fail, inc, until


def id_of_current():
    return Client.current().id


def submit_more(n):
    return Client.current().submit(inc, n).result(timeout=20)


class TestInfo:
    def test_describes_redis_nodes_tasks_and_clients(self, client):
        futures = client.map(inc, range(5))
        bad = client.submit(fail)
        wait([*futures, bad])
        info = client.info()
        assert info["namespace"] == "mem"
        assert info["redis"]["version"]
        assert info["redis"]["used_memory"] > 0
        assert {name.partition("@")[0] for name in info["nodes"]} == {"worker-0", "worker-1"}
        assert {node["slots"] for node in info["nodes"].values()} == {1}
        assert info["tasks"] == {"erred": 1, "memory": 5}
        assert info["nbytes"] > 0
        assert info["clients"][client.id]["keys"] == 6

    def test_counts_slots(self, client):
        assert sorted(client.ncores().values()) == [1, 1]

    def test_waits_for_nodes(self, client):
        client.wait_for_workers(2, timeout=20)
        with pytest.raises(TimeoutError, match="2 of 3 nodes"):
            client.wait_for_workers(3, timeout=0.1)


class TestWhoHas:
    def test_names_the_place_of_each_result(self, client, gate):
        done, pending = client.submit(inc, 1), client.submit(gate.pass_, 1)
        done.result()
        places = {done.key: ["@redis"], pending.key: []}
        assert client.who_has([done, pending]) == places
        assert client.who_has((done, pending)) == places
        assert client.who_has() == places
        assert client.who_has(done) == {done.key: ["@redis"]}
        assert client.who_has(done.key) == {done.key: ["@redis"]}
        assert client.who_has([done.key]) == {done.key: ["@redis"]}
        assert client.who_has("never-was") == {"never-was": []}
        assert client.who_has([]) == {}
        gate.open()

    def test_takes_collections_and_tuples_as_keys(self, client):
        x = client.persist(da.ones(4, chunks=2))
        wait(x)
        assert sorted(client.who_has(x).values()) == [["@redis"], ["@redis"]]
        [key, _] = client.who_has(x)
        assert client.who_has(key) == {key: ["@redis"]}


class TestNbytes:
    def test_adds_up_by_prefix_or_not(self, client):
        futures = client.map(np.zeros, [1_000, 2_000])
        wait(futures)
        by_prefix = client.nbytes(futures)
        assert list(by_prefix) == ["zeros"]
        assert by_prefix["zeros"] == pytest.approx(24_000, rel=0.1)
        by_key = client.nbytes(futures, summary=False)
        assert [round(by_key[f.key], -3) for f in futures] == [8_000, 16_000]
        assert client.nbytes() == by_prefix
        assert client.nbytes("never-was") == {}

    def test_what_was_just_dropped_is_not_held(self, client):
        futures = client.map(inc, range(20))
        client.gather(futures)
        del futures[3:]
        assert len(client.nbytes(summary=False)) == len(client.who_has()) == 3


class TestProcessing:
    def test_names_what_each_node_runs(self, client, gate):
        futures = client.map(gate.pass_, ["a", "b"])
        for _ in futures:
            gate.next_reached()
        running = client.processing()
        assert {node.partition("@")[0] for node in running} == {"worker-0", "worker-1"}
        assert sorted(key for keys in running.values() for key in keys) == sorted(f.key for f in futures)
        gate.open()
        wait(futures)
        assert until(lambda: set(map(tuple, client.processing().values())) == {()})


class TestCurrent:
    def test_there_is_none_without_a_client(self, cluster):
        with pytest.raises(UnboundFutureError, match="no client in this process"):
            Client.current()

    def test_is_the_newest_default(self, connect):
        one = connect(set_as_default=True)
        assert Client.current() is one
        other = connect(set_as_default=True)
        connect()
        assert Client.current() is other
        other.close()
        assert Client.current() is one

    def test_is_the_one_of_the_block(self, connect, cluster):
        default, other = connect(set_as_default=True), connect()
        with other.as_current() as same:
            assert Client.current() is same is other
            with default.as_current():
                assert Client.current() is default
            assert Client.current() is other
        assert Client.current() is default
        with Client(cluster, set_as_default=False) as own:
            assert Client.current() is own
        assert own.closed
        assert Client.current() is default

    def test_of_a_block_is_that_thread_s_own(self, connect):
        default, other = connect(set_as_default=True), connect()
        seen = []
        with other.as_current():
            thread = threading.Thread(target=lambda: seen.append(Client.current()))
            thread.start()
            thread.join()
        assert seen == [default]

    def test_inside_a_task_is_the_workers_own(self, client):
        assert client.submit(id_of_current).result(timeout=20).startswith("worker-")
        assert client.submit(submit_more, 1).result(timeout=20) == 2


class TestDaskScheduler:
    @pytest.fixture(autouse=True)
    def settings_stay(self):
        names = ("scheduler", *TASK_SHUFFLES)
        before = {name: dask.config.get(name, None) for name in names}
        yield
        assert {name: dask.config.get(name, None) for name in names} == before

    def test_is_the_newest_default_client(self, connect):
        one = connect(set_as_default=True)
        other = connect(set_as_default=True)
        connect()
        assert dask.config.get("scheduler") == other.get
        assert dask.config.get("dataframe.shuffle.method") == "tasks"
        one.close()
        assert dask.config.get("scheduler") == other.get
        other.close()
        assert dask.config.get("scheduler", None) is None

    def test_is_what_it_was_when_the_last_default_closes(self, connect):
        with dask.config.set(scheduler="synchronous"):
            one, other = connect(set_as_default=True), connect(set_as_default=True)
            one.close()
            other.close()
            assert dask.config.get("scheduler") == "synchronous"

    def test_that_somebody_set_meanwhile_stays(self, connect):
        with dask.config.set(scheduler="synchronous"):
            client = connect(set_as_default=True)
            dask.config.set(scheduler="threads")
            client.close()
            assert dask.config.get("scheduler") == "threads"

    def test_set_in_a_block_is_not_put_back_after_it(self, connect):
        with dask.config.set(scheduler="synchronous"):
            client = connect(set_as_default=True)
        client.close()
        assert dask.config.get("scheduler", None) is None

    def test_is_left_alone_by_other_clients(self, connect):
        connect()
        assert dask.config.get("scheduler", None) is None

    def test_can_be_any_client_for_one_call(self, connect):
        connect(set_as_default=True)
        client = connect()
        x = da.ones(10, chunks=5).sum()
        assert x.compute(scheduler=client) == 10
        assert x.compute(scheduler="synchronous") == 10
