"""submit and map: keys, arguments, and the futures among them."""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
import queue
import random
import threading

import pytest

from celery_mem.errors import FutureCancelledError, MissingKeyError, SerializationError
from tests.on_cluster import (
    Box,
    Gate,
    add,
    count_call,
    fail_until,
    identity,
    inc,
    server,
    task_keys,
    unbox,
    until,
)

Point = collections.namedtuple("Point", "x y")


def call_without_arguments():
    return "called"


def see_everything(*args, **kwargs):
    return args, kwargs


def results_of_parts(box):
    return [part.result(timeout=20) for part in box.content]


def unboxing(box):
    return lambda: box.content.result(timeout=20) + 1


async def inc_later(x):
    return x + 1


class TestSubmit:
    def test_runs_a_function_on_the_cluster(self, client):
        future = client.submit(inc, 1)
        assert future.result(timeout=20) == 2
        assert future.status == "finished"
        assert future.done()

    def test_passes_positional_and_named_arguments(self, client):
        assert client.submit(see_everything, 1, "b", c=[3]).result() == ((1, "b"), {"c": [3]})
        assert client.submit(call_without_arguments).result() == "called"

    def test_runs_whatever_can_be_called(self, client):
        factor = 3
        assert client.submit(lambda x: x * factor, 5).result() == 15
        assert client.submit(functools.partial(add, 1), 2).result() == 3
        assert client.submit(operator.attrgetter("real"), 4).result() == 4
        assert client.submit(" ".join, ["a", "b"]).result() == "a b"
        assert client.submit(Point, 1, 2).result() == Point(1, 2)
        assert client.submit(len, "abc").result() == 3
        assert client.submit(inc_later, 1).result() == 2

    def test_sees_the_function_as_it_is_at_the_call(self, client):
        factor = 2

        def scale(x):
            return x * factor

        doubled = client.submit(scale, 10)
        factor = 3
        assert (doubled.result(), client.submit(scale, 10).result()) == (20, 30)

        box = Box([1])
        method = functools.partial(operator.attrgetter("content"), box)
        first = client.submit(method, pure=False)
        box.content = [2]
        assert (first.result(), client.submit(method, pure=False).result()) == ([1], [2])

    @pytest.mark.parametrize("what", [3, "text", None])
    def test_what_cannot_be_called_is_refused(self, client, what):
        with pytest.raises(TypeError, match="submit wants a function"):
            client.submit(what, 1)


class TestKeys:
    def test_a_key_begins_with_the_name_of_the_function(self, client):
        future = client.submit(inc, 1)
        assert future.key.startswith("inc-")
        assert client.submit(functools.partial(add, 1), 2).key.startswith("add-")

    def test_equal_calls_run_once(self, client, gate):
        first = client.submit(count_call, gate, "equal")
        second = client.submit(count_call, gate, "equal")
        assert first.key == second.key
        assert client.gather([first, second]) == [1, 1]

    def test_equal_calls_of_two_clients_run_once_and_stay_while_either_holds(self, connect, gate):
        one, other = connect(), connect()
        mine = one.submit(count_call, gate, "shared")
        theirs = other.submit(count_call, gate, "shared")
        assert (mine.result(), theirs.result()) == (1, 1)
        del mine
        assert until(lambda: not one.session.states)
        assert theirs.result() == 1
        assert other.submit(count_call, gate, "shared").result() == 1

    def test_the_order_of_named_arguments_does_not_matter(self, client):
        assert client.submit(see_everything, a=1, b=2).key == client.submit(see_everything, b=2, a=1).key
        assert client.submit(see_everything, a=[1], b=2).key == client.submit(see_everything, b=2, a=[1]).key

    def test_arguments_of_different_types_give_different_keys(self, client):
        futures = [client.submit(identity, x) for x in (1, 1.0, True, "1", b"1", (1,), [1])]
        assert len({f.key for f in futures}) == 7
        assert client.gather(futures) == [1, 1.0, True, "1", b"1", (1,), [1]]

    def test_an_impure_call_runs_each_time(self, client, gate):
        futures = [client.submit(count_call, gate, "impure", pure=False) for _ in range(3)]
        assert sorted(client.gather(futures)) == [1, 2, 3]

    @pytest.mark.parametrize(
        "key", ["mine", "with space", "(1, 2)", "", 7, 1.5, -1, ("x", 0, ("y", 2.5)), "ünï"]
    )
    def test_a_key_of_ones_own_names_the_task(self, client, key):
        future = client.submit(inc, 1, key=key)
        assert future.key == key
        assert future.result() == 2
        assert client.who_has(future) == {key: ["@redis"]}

    @pytest.mark.parametrize("key", [b"bytes", None, 1j, ("x", None), [1], True, float("nan"), float("inf")])
    def test_a_key_of_a_bad_type_is_refused(self, client, key):
        if key is None:
            return  # means: make one
        with pytest.raises(TypeError, match="key"):
            client.submit(inc, 1, key=key)

    def test_the_first_call_under_a_key_counts(self, client):
        first = client.submit(inc, 1, key="given")
        second = client.submit(add, 100, 200, key="given")
        assert (first.result(), second.result()) == (2, 2)

    def test_a_key_that_nobody_holds_any_more_begins_anew(self, client):
        for n in range(20):  # at once, while the release is still under way
            assert client.submit(add, n, 1, key="again").result() == n + 1

    def test_a_future_in_the_arguments_counts_by_its_key(self, client):
        one, copy = client.submit(inc, 1), client.submit(inc, 1)
        assert client.submit(inc, one).key == client.submit(inc, copy).key
        assert client.submit(identity, [one]).key == client.submit(identity, [copy]).key


class TestFuturesInArguments:
    def test_results_arrive_in_builtin_containers(self, client):
        x, y = client.submit(inc, 1), client.submit(inc, 2)
        nested = [x, (y, {"k": x}), {x}, frozenset([y]), Point(x, [y]), collections.OrderedDict(a=y)]
        expected = [2, (3, {"k": 2}), {2}, frozenset([3]), Point(2, [3]), collections.OrderedDict(a=3)]
        assert client.submit(identity, nested).result() == expected
        assert client.submit(see_everything, x, named={"deep": [[[y]]]}).result() == (
            (2,),
            {"named": {"deep": [[[3]]]}},
        )

    def test_one_future_may_be_used_many_times(self, client):
        x = client.submit(inc, 1)
        assert client.submit(add, x, x).result() == 4
        assert client.submit(identity, [x] * 50).result() == [2] * 50

    def test_futures_in_other_objects_arrive_bound(self, client):
        x, y = client.submit(inc, 1), client.submit(inc, 2)
        assert client.submit(unbox, Box(x)).result(timeout=20) == 2
        assert client.submit(results_of_parts, Box([x, y])).result(timeout=20) == [2, 3]

    def test_futures_in_closures_and_partials_arrive_bound(self, client):
        x = client.submit(inc, 1)
        assert client.submit(lambda: x.result(timeout=20) + 1).result(timeout=20) == 3
        assert client.submit(functools.partial(unbox, Box(x))).result(timeout=20) == 2
        assert client.gather(client.map(lambda y: x.result(timeout=20) + y, [10, 20])) == [12, 22]

    def test_an_object_pins_the_futures_inside_until_the_task_is_done(self, client, gate):
        x = client.submit(gate.pass_, 5)
        task = client.submit(unbox, Box(x))
        closure = client.submit(unboxing(Box(x)))
        del x
        gate.next_reached()
        gate.open()
        assert (task.result(timeout=20), closure.result(timeout=20)) == (5, 6)

    def test_a_task_waits_for_futures_in_its_objects(self, client, gate):
        x = client.submit(gate.pass_, 5)
        task = client.submit(results_of_parts, Box([x]))
        gate.next_reached()
        assert task.status == "pending"
        gate.open()
        assert task.result(timeout=20) == [5]

    def test_thousands_of_futures_fit_in_one_call(self, client):
        futures = client.map(inc, range(8_500))  # more than Lua unpacks at once
        assert client.submit(sum, futures).result(timeout=60) == sum(range(1, 8_501))

    def test_a_chain_grows_from_its_end(self, client):
        x = client.submit(inc, 0)
        for _ in range(100):
            x = client.submit(inc, x)
        assert x.result() == 101

    def test_a_future_in_an_object_whose_key_is_gone_is_named_on_the_future_alone(self, client):
        x = client.submit(inc, 1)
        x.cancel()
        before, bad, after = client.submit(inc, 10), client.submit(unbox, Box(x)), client.submit(inc, 20)
        with pytest.raises(MissingKeyError, match=f"'{x.key}', needed by '{bad.key}'"):
            bad.result(timeout=20)
        assert client.gather([before, after], timeout=20) == [11, 21]

    def test_a_cancelled_future_is_refused(self, client):
        x = client.submit(inc, 1)
        x.cancel()
        with pytest.raises(FutureCancelledError, match="cancelled"):
            client.submit(inc, x)


class TestMap:
    def test_runs_side_by_side_and_keeps_the_order(self, client):
        assert client.gather(client.map(inc, range(100))) == list(range(1, 101))

    def test_takes_several_iterables_to_the_end_of_the_shortest(self, client):
        assert client.gather(client.map(add, [1, 2, 3], (10, 20))) == [11, 22]

    @pytest.mark.parametrize("iterables", [(), ([],), ([1, 2], [])])
    def test_of_nothing_is_an_empty_list(self, client, iterables):
        assert client.map(inc, *iterables) == []

    def test_takes_dicts_strings_and_sets_as_the_builtin_does(self, client):
        assert client.gather(client.map(identity, {"a": 1, "b": 2})) == ["a", "b"]
        assert client.gather(client.map(identity, "ab")) == ["a", "b"]
        assert set(client.gather(client.map(identity, {1, 2}))) == {1, 2}

    @pytest.mark.parametrize("endless", [iter([1]), (x for x in [1]), queue.Queue()])
    def test_refuses_iterators_and_queues(self, client, endless):
        with pytest.raises(TypeError, match="list"):
            client.map(inc, endless)

    def test_equal_items_run_once_and_give_each_a_future(self, client, gate):
        futures = client.map(count_call, [gate] * 3, ["same"] * 3)
        assert client.gather(futures) == [1, 1, 1]
        assert len({f.key for f in futures}) == 1
        assert len(set(futures)) == 3

    def test_impure_calls_all_run(self, client, gate):
        futures = client.map(count_call, [gate] * 3, ["same"] * 3, pure=False)
        assert sorted(client.gather(futures)) == [1, 2, 3]

    def test_takes_a_prefix_or_a_key_for_each_call(self, client):
        assert all(f.key.startswith("step-") for f in client.map(inc, [1, 2], key="step"))
        futures = client.map(inc, [1, 2], key=[("x", 0), ("x", 1)])
        assert [f.key for f in futures] == [("x", 0), ("x", 1)]
        assert client.gather(futures) == [2, 3]
        with pytest.raises(ValueError, match="1 keys were given for 2 calls"):
            client.map(inc, [1, 2], key=["only-one"])

    def test_gives_named_arguments_to_every_call(self, client):
        one = client.submit(inc, 0)
        assert client.gather(client.map(add, [1, 2], y=10)) == [11, 12]
        assert client.gather(client.map(add, [1, 2], y=one)) == [2, 3]

    def test_stores_a_large_named_argument_once(self, client, cluster):
        large = bytes(1_000_000)
        with server(cluster) as r:
            before = r.info("memory")["used_memory"]
            futures = client.map(lambda i, data: i + len(data), range(20), data=large)
            assert client.gather(futures) == [i + 1_000_000 for i in range(20)]
            assert r.info("memory")["used_memory"] - before < 5_000_000

    def test_maps_over_futures(self, client):
        assert client.gather(client.map(inc, client.map(inc, range(5)))) == [2, 3, 4, 5, 6]

    def test_of_more_than_one_chunk_depends_across_chunks(self, client):
        leaves = client.map(inc, range(1_200))
        pairs = client.map(add, leaves[::2], leaves[1::2])
        assert sum(client.gather(pairs)) == sum(range(1, 1_201))

    @pytest.mark.parametrize("n_good", [2, 1_700], ids=["few", "more than chunks that are sent by then"])
    def test_that_cannot_pickle_one_argument_leaves_nothing(self, client, cluster, n_good):
        with pytest.raises(SerializationError, match="lock"):
            client.map(identity, [*range(n_good), threading.Lock()])
        assert until(lambda: not task_keys(cluster))
        assert client.submit(identity, n_good).result() == n_good


class TestArguments:
    def test_large_arguments_travel_apart_from_the_task(self, client):
        data = random.Random(0).randbytes(3_000_000)
        future = client.submit(len, data)
        assert future.result() == 3_000_000
        assert client.submit(identity, data).result() == data

    def test_an_argument_that_cannot_be_pickled_is_named_at_the_call(self, client):
        with pytest.raises(SerializationError, match=r"arguments.*lock"):
            client.submit(identity, threading.Lock())

    def test_a_function_that_cannot_be_pickled_is_named_at_the_call(self, client):
        lock = threading.Lock()
        with pytest.raises(SerializationError, match=r"function <?lambda.*lock"):
            client.submit(lambda: lock)

    def test_a_frozen_dataclass_arrives_as_it_was(self, client):
        @dataclasses.dataclass(frozen=True)
        class Frozen:
            x: int

        assert client.submit(dataclasses.asdict, Frozen(3)).result() == {"x": 3}


class TestRetries:
    def test_a_task_is_tried_again_as_often_as_asked(self, client, gate):
        assert client.submit(fail_until, gate, "retries", 3, retries=2).result() == 3

    def test_a_task_that_fails_more_often_fails(self, client, gate):
        future = client.submit(fail_until, gate, "too-often", 4, retries=2)
        with pytest.raises(ValueError, match="call 3"):
            future.result()

    def test_map_takes_retries_too(self, client, gate):
        futures = client.map(fail_until, [gate] * 2, ["a", "b"], [2, 2], retries=1)
        assert client.gather(futures) == [2, 2]


class TestPriority:
    def test_higher_priorities_run_first_and_equal_ones_in_order_of_submission(self, client, gate):
        first, second = Gate(gate.url), Gate(gate.url)
        blockers = [client.submit(first.pass_, "b0"), client.submit(second.pass_, "b1")]
        assert (first.next_reached(), second.next_reached()) == ("b0", "b1")
        futures = [
            client.submit(gate.pass_, name, priority=p)
            for name, p in [("mid1", 0), ("low", -1), ("mid2", 0), ("high", 10), ("mid3", 0)]
        ]
        first.open()  # one slot goes on; the other stays blocked, so that the order is that of one slot
        order = []
        for _ in futures:
            order.append(gate.next_reached())
            gate.open(1) if len(order) < len(futures) else gate.open()
        assert client.gather(futures) == ["mid1", "low", "mid2", "high", "mid3"]
        second.open()
        assert client.gather(blockers) == ["b0", "b1"]
        assert order == ["high", "mid1", "mid2", "mid3", "low"]
