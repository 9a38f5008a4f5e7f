"""Dask collections of every kind on a cluster: compute, persist, get."""

from __future__ import annotations

import dataclasses
import operator
import pickle

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask import delayed

from celery_mem import Future, futures_of, wait
from celery_mem.errors import (
    ForeignFutureError,
    FutureCancelledError,
    GraphCycleError,
    MissingKeyError,
)
from tests.on_cluster import add, count_call, fail, inc, task_keys, until


@pytest.fixture
def default(connect):
    """The client that Dask uses."""
    return connect(set_as_default=True)


def frame():
    return pd.DataFrame({"k": list("abcab") * 20, "x": range(100), "y": np.arange(100) / 7})


def frames():
    return dd.from_pandas(frame(), npartitions=5)


KINDS = {
    "array": lambda: da.arange(100, chunks=30) + 1,
    "rechunked": lambda: da.ones((40, 40), chunks=10).rechunk((40, 5)).T,
    "item": lambda: da.arange(100, chunks=30).sum(),
    "bag": lambda: db.from_sequence(range(20), npartitions=4).map(inc),
    "bag_item": lambda: db.from_sequence(range(20), npartitions=4).sum(),
    "bag_groupby": lambda: (
        db.from_sequence(range(20), npartitions=4).groupby(lambda x: x % 3).map(sorted_group)
    ),
    "delayed": lambda: delayed(add)(delayed(inc)(1), delayed(inc)(2)),
    "frame": frames,
    "series": lambda: frames().x * 2,
    "groupby": lambda: frames().groupby("k").y.mean(),  # noqa: PLW0108 (made anew each time)
    "merge": lambda: frames().merge(dd.from_pandas(frame()[:10], npartitions=2), on="x", how="inner"),
    "shuffle": lambda: frames().set_index("y"),
    "scalar": lambda: frames().x.max(),  # noqa: PLW0108
}


def sorted_group(group):
    return group[0], sorted(group[1])


def same(a, b):
    """Equal, as far as the order that a shuffle leaves open allows."""
    if isinstance(a, pd.DataFrame):
        a, b = (z.sort_values(list(z.columns)).reset_index(drop=True) for z in (a, b))
        pd.testing.assert_frame_equal(a, b)
        return True
    if isinstance(a, pd.Series):
        pd.testing.assert_series_equal(a.sort_index(), b.sort_index())
        return True
    if isinstance(a, list) and a and isinstance(a[0], tuple):
        return sorted(a) == sorted(b)
    return bool(np.all(np.asarray(a) == np.asarray(b))) and np.shape(a) == np.shape(b)


def local(collection):
    return collection.compute(scheduler="synchronous")


@pytest.fixture(params=KINDS)
def collection(request):
    return KINDS[request.param]()


class TestEveryKind:
    def test_computes_through_the_client(self, client, collection):
        future = client.compute(collection)
        assert isinstance(future, Future)
        assert same(future.result(timeout=60), local(collection))

    def test_computes_by_its_own_method(self, default, collection, cluster):
        assert same(collection.compute(), local(collection))
        assert until(lambda: not task_keys(cluster))

    def test_persists_as_a_shallow_copy_of_futures(self, client, collection):
        kept = client.persist(collection)
        assert type(kept) is type(collection)
        held = futures_of(kept)
        assert len(held) >= 1
        graph = dict(kept.__dask_graph__())
        assert len(graph) <= 2 * len(held)  # dataframes have an alias for each
        wait(kept)
        assert same(client.compute(kept).result(timeout=60), local(collection))

    def test_persists_by_its_own_method(self, default, collection):
        kept = collection.persist()
        assert {f.client for f in futures_of(kept)} == {default}
        assert same(kept.compute(), local(collection))


class TestCompute:
    def test_returns_a_future_for_one_and_a_list_for_several(self, client):
        x, y = KINDS["array"](), KINDS["delayed"]()
        assert isinstance(client.compute(x), Future)
        for several in ([x, y], (x, y)):
            futures = client.compute(several)
            assert type(futures) is list
            assert [type(f) for f in futures] == [Future, Future]
        assert len(client.compute({y, delayed(inc)(7)})) == 2
        assert [type(f) for f in client.compute(x, y)] == [Future, Future]
        assert client.compute([]) == []

    def test_returns_results_where_asked_to(self, client):
        assert client.compute(KINDS["delayed"](), sync=True) == 5
        assert client.compute([KINDS["delayed"](), KINDS["item"]()], sync=True) == [5, 4950]

    def test_returns_plain_values_as_they_are(self, client):
        assert client.compute(7) == 7
        assert client.compute([1, "a", [2]]) == [1, "a", [2]]
        assert client.compute([1, KINDS["delayed"]()], sync=True) == [1, 5]

    def test_of_a_container_is_one_future(self, client):
        x, y = KINDS["delayed"](), KINDS["item"]()

        @dataclasses.dataclass
        class Pair:
            a: object
            b: object

        assert client.compute({"x": x, "more": [y, (x, 1)]}).result() == {"x": 5, "more": [4950, (5, 1)]}
        assert client.compute([[x, y], 3], sync=True) == [[5, 4950], 3]
        assert client.compute(Pair(x, [y])).result() == Pair(5, [4950])
        assert client.compute({"x": [1]}) == {"x": [1]}
        nested = {"x": [x]}
        assert client.compute(nested, traverse=False) is nested

    def test_keeps_the_order_of_mixed_kinds(self, client):
        collections = [KINDS[name]() for name in KINDS] + [
            KINDS["item"](),
            KINDS["bag_item"](),
            KINDS["scalar"](),
        ]
        results = client.compute(collections, sync=True)
        for result, collection in zip(results, collections, strict=True):
            assert same(result, local(collection))

    def test_gives_the_same_collection_twice_the_same_result(self, client):
        x = KINDS["item"]()
        assert client.compute([x, x, KINDS["bag_item"](), x], sync=True) == [4950, 4950, 190, 4950]

    def test_of_dask_itself_goes_through_the_client(self, default, gate):
        count = delayed(count_call)(gate, "dask")
        assert dask.compute(count, {"again": [count]}, 5) == (1, {"again": [1]}, 5)
        x, y = da.arange(10, chunks=5), da.ones(10, chunks=5)
        assert dask.compute(x.sum(), y.sum()) == (45, 10)

    def test_refuses_arguments_it_does_not_know(self, client):
        with pytest.raises(TypeError, match=r"compute\(\) got unexpected arguments: wrokers"):
            client.compute(KINDS["item"](), wrokers=2)
        with pytest.raises(TypeError, match=r"persist\(\) got unexpected arguments: wrokers"):
            client.persist(KINDS["item"](), wrokers=2)

    def test_takes_retries_for_all_tasks(self, client, gate):
        from tests.on_cluster import fail_until

        x = delayed(fail_until)(gate, "compute", 3)
        assert client.compute(x, retries=2).result(timeout=20) == 3

    def test_takes_annotations_of_delayed_objects(self, client, gate):
        from tests.on_cluster import fail_until

        with dask.annotate(retries=2, priority=5):
            x = delayed(fail_until)(gate, "annotated", 3)
        assert client.compute(x).result(timeout=20) == 3

    def test_raises_the_error_of_a_task(self, default):
        with pytest.raises(ValueError, match="in a chunk"):
            da.ones(10, chunks=5).map_blocks(lambda b: fail("in a chunk"), dtype=float).sum().compute()
        with pytest.raises(ValueError, match="as asked"):
            dask.compute(delayed(fail)())

    def test_of_a_graph_larger_than_a_chunk(self, client):
        leaves = [delayed(inc)(i) for i in range(1_500)]
        pairs = [delayed(add)(a, b) for a, b in zip(leaves[::2], leaves[1::2], strict=True)]
        assert client.compute(delayed(sum)(pairs)).result(timeout=60) == sum(range(1, 1_501))

    def test_of_a_graph_with_large_literals(self, client):
        data = np.random.default_rng(0).random(400_000)
        x = da.from_array(data, chunks=200_000)
        assert client.compute(x.sum()).result(timeout=60) == pytest.approx(data.sum())


class TestPersist:
    def test_takes_and_returns_lists(self, client):
        x, y = KINDS["array"](), KINDS["delayed"]()
        kept = client.persist([x, y])
        assert type(kept) is list
        assert [type(k) for k in kept] == [type(x), type(y)]
        assert [type(k) for k in client.persist(x, y)] == [type(x), type(y)]
        assert client.persist([]) == []

    def test_keeps_the_order_of_mixed_kinds(self, client):
        collections = [KINDS[name]() for name in ("item", "bag", "frame", "array", "delayed", "series")]
        for kept, collection in zip(client.persist(collections), collections, strict=True):
            assert type(kept) is type(collection)
            assert same(client.compute(kept).result(timeout=60), local(collection))

    @pytest.mark.parametrize("what", [1, "text", [1], {"a": KINDS["item"]()}])
    def test_of_what_is_no_collection_is_refused(self, client, what):
        with pytest.raises(AssertionError, match="persist wants Dask collections"):
            client.persist(what)

    def test_of_dask_itself_goes_through_the_client(self, default):
        x, y = dask.persist(KINDS["array"](), KINDS["delayed"]())
        assert all(f.client is default for f in futures_of([x, y]))
        assert (x.sum().compute(), y.compute()) == (5050, 5)

    def test_derived_collections_keep_the_data(self, client, cluster):
        first = client.persist(da.arange(100, chunks=25))
        wait(first)
        keys = {f.key for f in futures_of(first)}
        derived = (first + 1).sum()
        del first
        client.session.flush_releases()
        assert {f.key for f in futures_of(derived)} == keys
        assert client.info()["tasks"]["memory"] == 4
        assert client.compute(derived).result() == 5050
        del derived
        assert until(lambda: not task_keys(cluster))

    def test_runs_each_task_once_whatever_is_derived_from_it(self, client, gate):
        x = client.persist(delayed(count_call)(gate, "persisted"))
        results = client.compute([x + 0, x * 10, delayed(add)(x, 5)], sync=True)
        assert results == [1, 10, 6]

    def test_of_what_is_persisted_changes_nothing(self, client):
        x = client.persist(KINDS["frame"]())
        y = client.persist(x)
        wait(y)
        del x
        assert same(client.compute(y).result(), local(KINDS["frame"]()))

    def test_goes_to_another_client_by_pickle(self, connect):
        one, other = connect(), connect()
        x = one.persist(da.arange(10, chunks=5))
        with other.as_current():
            y = pickle.loads(pickle.dumps(x))
        del x
        assert until(lambda: not one.session.states)
        assert {f.client for f in futures_of(y)} == {other}
        assert other.compute(y.sum()).result() == 45

    def test_of_another_client_is_refused(self, connect):
        one, other = connect(), connect()
        x = one.persist(da.arange(10, chunks=5))
        for use in (other.compute, other.persist):
            with pytest.raises(ForeignFutureError, match="belongs to another client"):
                use(x.sum())

    def test_that_is_cancelled_is_refused_as_input(self, client):
        x = client.persist(delayed(inc)(1))
        wait(x)
        client.cancel(x)
        with pytest.raises(FutureCancelledError):
            client.compute(delayed(inc)(x))

    def test_with_an_error_raises_it_where_it_is_used(self, client):
        x = client.persist(delayed(fail)("persisted"))
        with pytest.raises(ValueError, match="persisted"):
            client.compute(delayed(inc)(x)).result(timeout=20)


class TestFuturesInGraphs:
    def test_are_inputs_of_delayed_calls(self, client):
        x = client.submit(inc, 1)
        assert client.compute(delayed(add)(x, [x, {"k": x}][0])).result() == 4
        assert client.compute(delayed(sum)([x, x])).result() == 4

    def test_are_inputs_of_blocks_bags_and_partitions(self, client):
        one = client.submit(inc, 0)
        assert client.compute(da.ones(4, chunks=2).map_blocks(add, one, dtype=float).sum()).result() == 8
        assert client.compute(db.from_sequence([1, 2]).map(add, one)).result() == [2, 3]
        shifted = frames().map_partitions(shift_y, one, meta=frame())
        assert client.compute(shifted.y.sum()).result(timeout=60) == pytest.approx(frame().y.sum() + 100)

    def test_make_a_collection(self, client):
        blocks = client.map(np.ones, [3, 3])
        x = da.concatenate([da.from_delayed(delayed(b), (3,), float) for b in blocks])
        del blocks
        assert client.compute(x.sum()).result() == 6


def shift_y(part, n):
    return part.assign(y=part.y + n)


class TestGet:
    def test_computes_keys_in_their_nesting(self, client):
        graph = {"a": 1, "b": (inc, "a"), ("c", 0): (add, "a", "b")}
        assert client.get(graph, "b") == 2
        assert client.get(graph, ["b", ["a", [("c", 0)]]]) == [2, [1, [3]]]
        assert client.get(graph, []) == []

    def test_returns_futures_where_asked_to(self, client):
        future = client.get({"a": (inc, 1)}, "a", sync=False)
        assert (future.key, future.result()) == ("a", 2)
        [[one]] = client.get({"a": (inc, 1)}, [["a"]], sync=False)
        assert one.result() == 2

    def test_keeps_nothing(self, client, cluster):
        for n in range(10):  # the same keys, other tasks
            assert client.get({"a": n, "b": (inc, "a")}, "b") == n + 1
            assert client.get({"a": n + 100, "c": (inc, "a")}, "c") == n + 101
        assert task_keys(cluster) == []

    def test_keeps_nothing_after_an_error_either(self, client, cluster):
        with pytest.raises(ValueError, match="as asked"):
            client.get({"a": (fail,), "b": (inc, "a")}, "b")
        assert client.get({"a": 1, "b": (inc, "a")}, "b") == 2

    def test_takes_futures_as_values_and_arguments(self, client):
        x = client.submit(inc, 1)
        assert client.get({"a": x, "b": (add, "a", x)}, ["a", "b"]) == [2, 4]

    def test_takes_graphs_of_collections(self, client):
        x = da.arange(10, chunks=5).sum()
        assert client.get(x.dask, list(x.__dask_keys__())) == [45]
        y = KINDS["scalar"]().optimize()
        assert client.get(dict(y.dask), y.__dask_keys__()) == [99]

    def test_runs_aliases_and_nested_calls(self, client):
        graph = {
            "a": 1,
            "same": "a",
            "nested": (add, (inc, "a"), (inc, (inc, "same"))),
            "list": ["a", "nested"],
        }
        assert client.get(graph, ["same", "nested", "list"]) == [1, 5, [1, 5]]

    def test_of_a_cycle_names_it(self, client):
        with pytest.raises(GraphCycleError, match=r"'a' -> 'b' -> 'a'|'b' -> 'a' -> 'b'"):
            client.get({"a": (inc, "b"), "b": (inc, "a")}, "a")

    def test_of_a_missing_key_names_it(self, client):
        with pytest.raises(MissingKeyError, match="'nowhere'"):
            client.get({"a": 1}, "nowhere")
        from dask._task_spec import Task, TaskRef

        with pytest.raises(MissingKeyError, match="'nowhere', needed by 'a'"):
            client.get({"a": Task("a", inc, TaskRef("nowhere"))}, "a")

    def test_of_a_key_of_a_bad_type_is_refused(self, client):
        with pytest.raises(TypeError, match="key"):
            client.get({None: (inc, 1)}, None)

    def test_takes_long_chains(self, client):
        graph = {("x", 0): 0} | {("x", i): (inc, ("x", i - 1)) for i in range(1, 1_201)}
        assert client.get(graph, ("x", 1_200)) == 1_200

    def test_shares_work_with_itself_only_while_it_is_held(self, client, gate):
        graph = {"n": (count_call, gate, "graph")}
        kept = client.get(graph, "n", sync=False)
        assert kept.result() == 1
        assert client.get(graph, "n") == 1
        del kept
        client.session.flush_releases()
        assert client.get(graph, "n") == 2


def test_operators_of_dask_reach_functions_without_pickle_by_value(client):
    x = db.from_sequence(range(10), npartitions=2)
    assert client.compute(x.fold(operator.add)).result() == 45
