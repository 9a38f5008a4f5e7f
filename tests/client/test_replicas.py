"""Copies of results: where they are, how many, and moving them."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from celery_mem.errors import DataLostError, FutureCancelledError, MissingKeyError, UnknownWorkerError
from celery_mem.state.store import REDIS
from tests.deployment import Deployment
from tests.on_cluster import inc, until

pytestmark = pytest.mark.node_memory


LARGE = 100_000  # doubles


def made(client, nodes, n=4, on=None):
    """Futures of large results on some node."""
    futures = client.map(np.full, [LARGE] * n, range(n), workers=on, pure=False)
    client.gather(futures)
    return futures


def places(client, futures):
    return [set(client.who_has(f)[f.key]) for f in futures]


class TestLooking:
    def test_results_stay_where_they_were_made(self, client, nodes):
        for node in nodes:
            assert places(client, made(client, nodes, on=node)) == [{node}] * 4

    def test_has_what_names_the_keys_of_each_node(self, client, nodes):
        futures = made(client, nodes, on=nodes[0])
        found = client.has_what()
        assert sorted(found) == list(nodes)
        assert {f.key for f in futures} <= set(found[nodes[0]])
        assert not {f.key for f in futures} & set(found[nodes[1]])
        assert list(client.has_what(nodes[1])) == [nodes[1]]

    def test_info_tells_what_takes_the_memory_of_each_node(self, client, nodes):
        def told():
            return [client.info()["nodes"][node]["memory"] for node in nodes]

        # With its next heartbeat, where it has just begun.
        assert until(lambda: all(told()))
        assert all(set(m) == {"files", "live", "spilled", "pool", "processes"} for m in told())
        assert all(m["processes"] > 0 for m in told())

    def test_small_results_are_in_redis(self, client):
        future = client.submit(inc, 1)
        future.result()
        assert client.who_has(future) == {future.key: [REDIS]}

    def test_bytes_count_once_however_many_copies_there_are(self, client, nodes):
        futures = made(client, nodes, n=2)
        client.replicate(futures)
        assert client.nbytes(futures)["full"] == pytest.approx(2 * LARGE * 8, rel=0.01)

    def test_a_cancelled_future_is_nowhere(self, client):
        future = client.submit(inc, 1)
        future.cancel()
        with pytest.raises(FutureCancelledError):
            client.who_has(future)


class TestReplicate:
    def test_makes_copies_on_all_nodes(self, client, nodes):
        futures = made(client, nodes)
        client.replicate(futures, timeout=60)
        assert places(client, futures) == [set(nodes)] * 4
        assert [f.result()[0] for f in futures] == [0, 1, 2, 3]

    def test_waits_for_results_that_are_being_made(self, client, nodes, gate):
        future = client.submit(gate.pass_, np.zeros(LARGE))
        gate.open()
        client.replicate(future, n=2, timeout=60)
        assert places(client, [future]) == [set(nodes)]

    def test_fewer_copies_than_before_are_left_of_those_that_are_not_wanted(self, client, nodes):
        futures = made(client, nodes)
        client.replicate(futures, n=2, timeout=60)
        client.replicate(futures, n=1, timeout=60)
        assert [len(p) for p in places(client, futures)] == [1] * 4
        assert client.info()["copies"] == 0

    def test_copies_go_to_the_workers_that_are_named(self, client, nodes):
        (future,) = made(client, nodes, n=1, on=nodes[0])
        client.replicate(future, workers=nodes[1], timeout=60)
        assert nodes[1] in places(client, [future])[0]

    def test_of_small_results_there_is_nothing_to_copy(self, client):
        future = client.submit(inc, 1)
        client.replicate(future, n=2, timeout=60)
        assert future.result() == 2

    @pytest.mark.parametrize("n", [0, -1, 1.5, True])
    def test_a_number_that_is_none_is_refused(self, client, n):
        with pytest.raises(ValueError, match="at least one"):
            client.replicate(client.submit(inc, 1), n=n)

    def test_a_worker_that_is_not_there_is_refused(self, client):
        with pytest.raises(UnknownWorkerError):
            client.replicate(client.submit(inc, 1), workers="nobody@nowhere")

    def test_it_is_forgotten_with_the_results(self, client, nodes):
        futures = made(client, nodes)
        client.replicate(futures, timeout=60)
        del futures
        assert until(lambda: client.info()["copies"] == 0)
        assert until(lambda: not any(client.has_what().values()))


class TestRebalance:
    def test_spreads_bytes_evenly(self, client, nodes):
        futures = made(client, nodes, n=8, on=nodes[0])
        client.rebalance(futures, timeout=60)
        assert sorted(len(keys) for keys in client.has_what().values()) == [4, 4]
        assert all(len(p) == 1 for p in places(client, futures))
        assert [f.result()[0] for f in futures] == list(range(8))

    def test_moves_only_what_it_is_given(self, client, nodes):
        futures = made(client, nodes, n=4, on=nodes[0])
        client.rebalance(futures[:1], timeout=60)
        assert places(client, futures) == [{nodes[1]}, *[{nodes[0]}] * 3]

    def test_everything_may_move_if_nothing_is_named(self, client, nodes):
        futures = made(client, nodes, n=4, on=nodes[1])
        client.rebalance(timeout=60)
        assert sorted(map(tuple, places(client, futures))) == [(nodes[0],)] * 2 + [(nodes[1],)] * 2

    def test_among_one_worker_there_is_nothing_to_do(self, client, nodes):
        futures = made(client, nodes, n=2, on=nodes[0])
        client.rebalance(workers=nodes[0], timeout=60)
        assert places(client, futures) == [{nodes[0]}] * 2

    def test_a_key_that_is_not_there_is_named(self, client):
        with pytest.raises(MissingKeyError, match="unknown"):
            client.rebalance(["unknown"])

    def test_inputs_are_read_wherever_they_were_moved(self, client, nodes):
        futures = made(client, nodes, n=4, on=nodes[0])
        sums = client.map(np.sum, futures)
        client.rebalance(futures, timeout=60)
        assert client.gather(sums) == [i * LARGE for i in range(4)]


# --- workers that go ----------------------------------------------------------------------------------------


@pytest.fixture
def deployment():
    with Deployment(node_lease=2.0) as deployment:
        deployment.start_coordinator("c0")
        for name in ("w0", "w1"):
            deployment.start_worker(name)
        yield deployment
        deployment.check_empty()


def test_a_retired_worker_leaves_all_that_it_had_and_ends(deployment: Deployment) -> None:
    with deployment.client() as client:
        w0, w1 = deployment.node("w0"), deployment.node("w1")
        scattered = client.scatter(np.arange(LARGE), workers=w0)
        made = client.submit(np.full, LARGE, 7, workers=w0)
        assert made.result(timeout=60)[0] == 7
        info = client.retire_workers(w0, timeout=60)
        assert list(info) == [w0]
        deployment.wait_gone("w0")
        assert list(client.ncores()) == [w1]
        assert client.who_has([made.key, scattered.key]) == {made.key: [w1], scattered.key: [w1]}
        assert scattered.result()[5] == 5
        assert made.result()[5] == 7


def test_the_last_worker_saves_to_redis_what_it_has(deployment: Deployment) -> None:
    with deployment.client() as client:
        nodes = [deployment.node("w0"), deployment.node("w1")]
        data = client.scatter(np.arange(LARGE), workers=nodes[0])
        client.retire_workers(nodes, timeout=60)
        assert client.ncores() == {}
        assert client.who_has(data) == {data.key: [REDIS]}
        assert data.result()[5] == 5


def test_copies_survive_the_death_of_a_node_and_their_number_is_restored(deployment: Deployment) -> None:
    with deployment.client() as client:
        data = client.scatter(np.arange(LARGE), broadcast=2)
        assert len(client.who_has(data)[data.key]) == 2
        deployment.start_worker("w2")
        deployment.kill("w0")
        deployment.wait_until(
            lambda: set(client.who_has(data)[data.key]) == {deployment.node("w1"), deployment.node("w2")},
            "two copies again",
        )
        assert data.result()[5] == 5


def test_what_is_lost_with_its_node_is_made_again_while_it_is_waited_for(deployment: Deployment) -> None:
    with deployment.client() as client:
        made = client.submit(np.full, LARGE, 7, workers=deployment.node("w0"), allow_other_workers=True)
        made.result(timeout=60)
        (where,) = client.who_has(made)[made.key]
        deployment.kill(where.partition("@")[0])
        assert made.result(timeout=60)[0] == 7
        assert client.gather([made], timeout=60)[0][-1] == 7


def test_data_that_is_lost_with_its_node_cannot_be_made_again(deployment: Deployment) -> None:
    with deployment.client() as client:
        data = client.scatter(np.arange(LARGE), workers=deployment.node("w0"))
        dependent = client.submit(inc, client.submit(time.sleep, 5), workers=deployment.node("w1"))
        del dependent
        deployment.kill("w0")
        deployment.wait_until(lambda: data.status == "error", "the loss to be noticed")
        with pytest.raises(DataLostError):
            data.result(timeout=60)
        with pytest.raises(DataLostError):
            client.submit(np.sum, data).result(timeout=60)


def test_another_coordinator_finishes_a_job(deployment: Deployment) -> None:
    with deployment.client() as client:
        w0 = deployment.node("w0")
        futures = client.map(np.full, [LARGE] * 6, range(6), workers=w0)
        client.gather(futures, timeout=60)
        os.kill(deployment.pid("c0"), signal.SIGSTOP)
        with pytest.raises(TimeoutError, match="goes on"):
            client.rebalance(futures, timeout=0.5)
        assert list(client.info()["jobs"].values()) == [{"kind": "rebalance", "done": 0, "total": 0}]
        deployment.kill("c0")
        deployment.start_coordinator("c1")
        deployment.wait_until(lambda: not client.info()["jobs"], "the job to be done")
        assert sorted(map(len, client.has_what().values())) == [3, 3]
