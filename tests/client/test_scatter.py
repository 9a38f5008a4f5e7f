"""scatter: data that the client brings."""

from __future__ import annotations

import threading
from collections import OrderedDict, namedtuple

import numpy as np
import pytest

from celery_mem.errors import SerializationError, UnknownWorkerError
from celery_mem.state.store import REDIS
from tests.on_cluster import Box, add, identity, inc, server, task_keys, unbox, until

Point = namedtuple("Point", "x y")


class TestScatter:
    def test_one_object_gives_one_future(self, client):
        future = client.scatter(41)
        assert future.result(timeout=20) == 41
        assert client.submit(inc, future).result() == 42

    @pytest.mark.parametrize("kind", [list, tuple, set, frozenset])
    def test_a_container_gives_the_same_of_futures(self, client, kind):
        futures = client.scatter(kind([1, 2, 3]))
        assert type(futures) is kind
        assert client.gather(futures) == kind([1, 2, 3])

    def test_a_named_tuple_gives_one_of_futures(self, client):
        futures = client.scatter(Point(1, "b"))
        assert type(futures) is Point
        assert client.gather(futures) == Point(1, "b")

    def test_a_dict_gives_futures_under_its_own_keys(self, client):
        futures = client.scatter({"x": 1, ("y", 0): 2})
        assert {k: f.key for k, f in futures.items()} == {"x": "x", ("y", 0): ("y", 0)}
        assert client.gather(futures) == {"x": 1, ("y", 0): 2}
        assert client.get({"z": (add, futures["x"], 10)}, "z") == 11

    def test_anything_else_is_one_object(self, client):
        for data in ("text", OrderedDict(a=1), range(3), Box([1])):
            assert client.scatter(data).result() == data

    def test_a_container_can_be_one_object_too(self, client):
        assert client.scatter([1, 2], as_one=True).result() == [1, 2]

    @pytest.mark.parametrize("empty", [[], (), set(), {}])
    def test_of_nothing_is_nothing(self, client, empty):
        assert client.scatter(empty) == empty

    def test_equal_objects_share_a_key_and_each_has_a_future(self, client):
        one, other, third = client.scatter([5, 5, 6])
        assert one.key == other.key != third.key
        assert client.gather([one, other, third]) == [5, 5, 6]
        assert client.scatter(5).key == one.key

    def test_without_hash_each_object_has_a_key_of_its_own(self, client):
        one, other = client.scatter([5, 5], hash=False)
        assert one.key != other.key
        assert client.gather([one, other]) == [5, 5]

    def test_large_data_is_stored_in_pieces_where_it_goes_through_redis(self, connect, cluster):
        client = connect(piece_bytes=10_000, node_memory=False)
        data = np.random.default_rng(0).random(50_000)
        future = client.scatter(data)
        with server(cluster) as r:
            [blob] = r.keys("{mem}:b:*")
            assert r.hlen(blob) >= 40
            assert r.ttl(blob) == -1
        assert (future.result() == data).all()
        assert client.submit(np.sum, future).result() == pytest.approx(data.sum())
        del future
        with server(cluster) as r:
            assert until(lambda: not r.keys("{mem}:b:*"))

    def test_more_than_one_chunk(self, client):
        assert client.gather(client.scatter(list(range(1_200)))) == list(range(1_200))

    def test_is_known_to_other_clients(self, connect):
        one, other = connect(), connect()
        mine = one.scatter({"shared": [1]})["shared"]
        assert other.future("shared").result() == [1]
        assert mine.status in ("pending", "finished")

    def test_data_of_a_key_that_exists_is_not_replaced(self, client):
        first = client.scatter({"name": 1})["name"]
        second = client.scatter({"name": 2})["name"]
        assert (first.result(), second.result()) == (1, 1)

    def test_futures_inside_are_pinned(self, client):
        x = client.submit(inc, 1)
        box = client.scatter(Box(x))
        del x
        assert client.submit(unbox, box).result(timeout=20) == 2
        assert box.result().content.result() == 2

    def test_data_survives_as_input_of_what_waits(self, client, gate):
        x = client.scatter([1, 2, 3], as_one=True)
        y = client.submit(add, x, client.submit(gate.pass_, [4]))
        del x
        gate.open()
        assert y.result() == [1, 2, 3, 4]

    def test_data_goes_when_its_last_future_goes(self, client, cluster):
        future = client.scatter(b"x" * 100)
        assert task_keys(cluster) == [future.key]
        del future
        assert until(lambda: not task_keys(cluster))

    def test_takes_the_place_of_a_task_of_another_client_that_was_to_make_it(self, connect, gate):
        one, other = connect(), connect()
        waiting = one.submit(gate.pass_, 1, key="soon")
        dependent = one.submit(identity, waiting)
        brought = other.scatter({"soon": 5})["soon"]
        assert brought.result(timeout=20) == 5
        assert one.gather([waiting, dependent], timeout=20) == [5, 5]
        gate.open()

    @pytest.mark.parametrize("as_one", [True, False])
    def test_what_cannot_be_pickled_is_refused_and_leaves_nothing(self, client, cluster, as_one):
        with pytest.raises(SerializationError, match="lock"):
            client.scatter([1, 2, threading.Lock()], as_one=as_one)
        assert until(lambda: not task_keys(cluster))

    def test_a_key_of_a_bad_type_is_refused(self, client):
        with pytest.raises(TypeError, match="key"):
            client.scatter({None: 1})


LARGE = 50_000  # doubles


def places(client, futures):
    return [client.who_has(f)[f.key] for f in futures]


@pytest.mark.node_memory
class TestScatterIntoNodeMemory:
    def test_large_data_goes_to_the_nodes_in_turns_and_not_through_redis(self, client, cluster, nodes):
        futures = client.scatter([np.full(LARGE, i) for i in range(4)])
        assert sorted(places(client, futures)) == [[nodes[0]], [nodes[0]], [nodes[1]], [nodes[1]]]
        with server(cluster) as r:
            assert r.keys("{mem}:b:*") == []
        assert [x[-1] for x in client.gather(futures)] == [0, 1, 2, 3]

    def test_single_objects_take_turns_too(self, client, nodes):
        futures = [client.scatter(np.full(LARGE, i)) for i in range(4)]
        assert len({tuple(p) for p in places(client, futures)}) == 2

    def test_workers_say_who_is_to_have_it(self, client, nodes):
        for node in nodes:
            futures = client.scatter([np.full(LARGE, i) for i in range(3)], workers=[node], hash=False)
            assert places(client, futures) == [[node]] * 3

    def test_a_worker_that_is_not_there_is_refused_and_nothing_is_left(self, client, cluster):
        with pytest.raises(UnknownWorkerError, match="there are: worker-0@"):
            client.scatter(np.zeros(LARGE), workers="nobody@nowhere")
        assert until(lambda: not task_keys(cluster))

    def test_broadcast_makes_a_copy_on_every_node(self, client, nodes):
        futures = client.scatter([np.full(LARGE, i) for i in range(2)], broadcast=True, timeout=60)
        assert places(client, futures) == [nodes, nodes]

    def test_broadcast_of_small_data_needs_no_copies(self, client):
        assert client.scatter({"small": 5}, broadcast=True, timeout=60)["small"].result() == 5

    @pytest.mark.parametrize("broadcast", [0, -1, "all"])
    def test_broadcast_is_yes_or_a_number(self, client, broadcast):
        with pytest.raises((TypeError, ValueError), match="broadcast"):
            client.scatter(1, broadcast=broadcast)

    def test_what_a_client_changes_afterwards_changes_nothing(self, client):
        data = np.zeros(LARGE)
        future = client.scatter(data)
        data[:] = 1
        assert future.result().sum() == 0

    def test_what_was_read_may_be_written_into_and_outlives_its_future(self, client):
        future = client.scatter(np.zeros(LARGE))
        mine, other = future.result(), future.result()
        mine[:] = 7
        assert other.sum() == 0
        assert client.submit(np.sum, future).result() == 0
        del future
        assert until(lambda: not client.has_what() or not any(client.has_what().values()))
        assert mine.sum() == 7 * LARGE

    def test_without_node_memory_it_goes_to_redis(self, connect):
        client = connect(node_memory=False)
        future = client.scatter(np.zeros(LARGE))
        assert client.who_has(future) == {future.key: [REDIS]}
        assert client.submit(np.sum, future).result() == 0

    def test_large_objects_without_buffers_work_the_same(self, client, nodes):
        data = {str(i): [i] * 10 for i in range(5_000)}
        future = client.scatter({"numbers": data})["numbers"]
        assert client.who_has(future)["numbers"][0] in nodes
        assert future.result() == data

    def test_thousands_of_objects(self, client):
        futures = client.scatter([np.full(9_000, i) for i in range(300)])
        assert [x[0] for x in client.gather(futures)] == list(range(300))
