"""Lowering of collections, checked by running the lowered graph in this process: no server, no worker."""

import dataclasses
import itertools
import operator
import subprocess
import sys
import textwrap
import threading
from collections import OrderedDict, namedtuple
from functools import partial

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from dask import delayed
from dask._task_spec import Alias, DataNode, List, Task, TaskRef, execute_graph
from dask.base import unpack_collections
from dask.highlevelgraph import HighLevelGraph
from hypothesis import given
from hypothesis import strategies as st

from celery_mem.errors import GraphCycleError, MissingKeyError
from celery_mem.graph.collections import (
    TASK_SHUFFLES,
    call_of,
    futures_of,
    identity,
    is_dask_collection,
    lower,
    lower_graph,
    nest,
    rebuild_persisted,
    unpack,
)


class Future(TaskRef):
    """Stands in for the client's future: a reference, equal to itself only."""

    __celery_mem_future__ = True
    __dask_future__ = True

    def __reduce__(self):
        return Future, (self.key,)

    def __dask_tokenize__(self):
        return ("Future", self.key)

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


class ForeignFuture(TaskRef):
    """A future of another library."""


class Cluster:
    """Runs lowered graphs by their calls, one node after the other, and keeps persisted results."""

    def __init__(self, **values):
        self.values = dict(values)

    def run(self, lowered):
        values = dict(self.values)

        def evaluated(arg):
            if isinstance(arg, TaskRef):
                return values[arg.key]
            if type(arg).__module__ == "dask._task_spec":
                return arg({key: values[key] for key in arg.dependencies})
            return arg

        for key, node in lowered.nodes.items():
            func, args, kwargs = call_of(node)
            values[key] = func(*map(evaluated, args), **{k: evaluated(v) for k, v in kwargs.items()})
        return values

    def compute(self, *collections, **kwargs):
        lowered = lower(collections, finalize=True, **kwargs)
        values = self.run(lowered)
        return [values[key] for key in lowered.final_keys]

    def persist(self, *collections, **kwargs):
        lowered = lower(collections, finalize=False, **kwargs)
        values = self.run(lowered)
        self.values |= {key: values[key] for output in lowered.outputs for key in output}
        return [
            rebuild_persisted(collection, {key: Future(key) for key in output})
            for collection, output in zip(lowered.optimized, lowered.outputs, strict=True)
        ]

    def get(self, dsk, keys, **kwargs):
        return nest(keys, self.run(lower_graph(dsk, keys, live=self.values)))


def inc(x):
    return x + 1


def total(*xs):
    return sum(xs)


def plus(x, y):
    return x + y


def same(actual, expected):
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(actual.sort_index(), expected.sort_index())
    elif isinstance(expected, pd.Series):
        pd.testing.assert_series_equal(actual.sort_index(), expected.sort_index())
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(actual, expected)
    else:
        assert type(actual) is type(expected)
        assert actual == expected
    return True


def small_array():
    return da.arange(12, chunks=5)


def small_bag():
    return db.from_sequence(range(8), npartitions=3)


def small_frame():
    return dd.from_pandas(pd.DataFrame({"x": range(12), "y": [1, 2, 3] * 4}), npartitions=4)


def small_scalar():
    return small_frame().x.sum()


def small_delayed():
    return delayed(total)(*[delayed(inc)(i) for i in range(4)])


COLLECTIONS = {
    "array": lambda: small_array() + 1,
    "array sum": lambda: small_array().sum(),
    "array 2d": lambda: da.ones((6, 6), chunks=(2, 3)).dot(da.arange(36, chunks=7).reshape(6, 6)),
    "array from numpy": lambda: da.from_array(np.arange(10), chunks=3)[::2] * 2,
    "rechunk": lambda: da.arange(64, chunks=8).reshape(8, 8).rechunk((3, 5)).T.rechunk(2),
    "bag": lambda: small_bag().map(inc).filter(lambda x: x % 2),
    "bag item": lambda: small_bag().sum(),
    "bag groupby": lambda: (
        small_bag().groupby(lambda x: x % 3, shuffle="tasks").map(lambda kv: sum(kv[1])).sum()
    ),
    "delayed": small_delayed,
    "delayed leaf": lambda: delayed([1, 2]),
    "delayed attribute": lambda: delayed(3 + 4j).imag,
    "delayed method": lambda: delayed("a b").split(),
    "delayed containers": lambda: delayed(identity)({"a": [small_delayed(), (1, delayed(inc)(2))], "b": {3}}),
    "delayed keywords": lambda: delayed(plus)(x=delayed(inc)(1), y=2),
    "delayed of array": lambda: delayed(plus)(small_array().sum(), small_bag().sum()),
    "delayed parts": lambda: small_array().to_delayed()[0],
    "array from delayed": lambda: da.from_delayed(delayed(np.arange)(5), (5,), dtype=int) + 1,
    "frame": lambda: small_frame()[small_frame().x > 3],
    "frame one partition": lambda: small_frame().repartition(npartitions=1),
    "series": lambda: small_frame().x * 2,
    "scalar": small_scalar,
    "groupby": lambda: small_frame().groupby("y").agg({"x": ["mean", "max"]}),
    "groupby apply": lambda: small_frame().groupby("y").x.apply(sum, meta=("x", "int64")),
    "merge": lambda: small_frame().merge(small_frame(), on="x", how="inner").set_index("x"),
    "shuffle": lambda: small_frame().shuffle("y").sort_values("x"),
}
collection = pytest.mark.parametrize("make", COLLECTIONS.values(), ids=COLLECTIONS)


@pytest.fixture(autouse=True)
def _tasks_where_dask_chooses_early():
    """As the default client does for as long as it is the default."""
    with dask.config.set(TASK_SHUFFLES):
        yield


# --- compute, persist, get


@collection
@pytest.mark.parametrize("optimize_graph", [True, False])
def test_computed_value_is_that_of_dask(make, optimize_graph):
    made = make()
    [expected] = dask.compute(made, scheduler="sync")
    [actual] = Cluster().compute(made, optimize_graph=optimize_graph)
    assert same(actual, expected)


@collection
def test_get_serves_as_the_scheduler_of_dask_compute(make):
    made = make()
    [expected] = dask.compute(made, scheduler="sync")
    [actual] = dask.compute(made, scheduler=Cluster().get)
    assert same(actual, expected)


@collection
def test_persisted_collection_has_one_future_per_output_and_the_same_value(make):
    made = make()
    [expected] = dask.compute(made, scheduler="sync")
    cluster = Cluster()
    [persisted] = cluster.persist(made)
    assert is_dask_collection(persisted)
    assert {future.key for future in futures_of(persisted)} == set(cluster.values)
    again = lower([persisted], finalize=False)
    assert all(isinstance(node, Alias) for node in again.nodes.values())
    assert again.external == set(cluster.values)
    assert again.futures.keys() == again.external
    [actual] = cluster.compute(persisted)
    assert same(actual, expected)
    [twice] = cluster.persist(persisted)
    [actual] = cluster.compute(twice)
    assert same(actual, expected)


@collection
def test_persisting_keeps_the_type_of_the_collection(make):
    made = make()
    [persisted] = Cluster().persist(made)
    assert isinstance(persisted, type(made)) or type(made).__name__.startswith("Delayed")


DERIVED = {
    "array": (small_array, lambda p: (p + 1).sum()),
    "bag": (small_bag, lambda p: p.map(inc).sum()),
    "frame": (small_frame, lambda p: p.groupby("y").x.sum()),
    "series": (lambda: small_frame().x, lambda p: p.max() - p.min()),
    "scalar": (small_scalar, lambda p: p + 1),
    "delayed": (small_delayed, delayed(inc)),
}


@pytest.mark.parametrize(("make", "derive"), DERIVED.values(), ids=DERIVED)
def test_collection_derived_from_a_persisted_one_needs_its_futures_and_not_its_tasks(make, derive):
    made = make()
    [expected] = dask.compute(derive(made), scheduler="sync")
    cluster = Cluster()
    [persisted] = cluster.persist(made)
    derived = derive(persisted)
    lowered = lower([derived], finalize=True)
    assert lowered.external == set(cluster.values)
    assert lowered.futures.keys() == lowered.external
    assert not lowered.nodes.keys() & cluster.values.keys()
    [actual] = cluster.compute(derived)
    assert same(actual, expected)


def test_results_keep_the_order_of_the_collections_across_families():
    makes = [
        lambda: small_array().sum(),
        lambda: small_bag().sum(),
        small_delayed,
        lambda: small_array().max(),
        small_scalar,
        lambda: small_bag().max(),
        lambda: small_frame().y.min(split_every=2),
        lambda: delayed(inc)(41),
    ]
    made = [make() for make in makes]
    expected = [one.compute(scheduler="sync") for one in made]
    cluster = Cluster()
    assert cluster.compute(*made) == expected
    persisted = cluster.persist(*made)
    assert [type(one) for one in persisted] == [type(one) for one in made]
    assert cluster.compute(*persisted) == expected
    assert cluster.compute(*made, *persisted) == expected + expected


def test_a_collection_given_twice_has_the_same_outputs_twice():
    made = small_delayed()
    lowered = lower([made, made], finalize=True)
    assert lowered.outputs == [[made.key], [made.key]]
    assert Cluster().compute(made, small_array().sum(), made, small_frame().x.sum()) == [10, 66, 10, 66]
    frame = small_frame()
    first, second = Cluster().persist(frame, frame)
    assert [f.key for f in futures_of(first)] == [f.key for f in futures_of(second)]


def test_nothing_lowers_to_nothing():
    lowered = lower([], finalize=True)
    assert (lowered.nodes, lowered.outputs, lowered.final_keys) == ({}, [], [])


def test_final_keys_are_refused_for_a_collection_that_was_not_finalized():
    with pytest.raises(ValueError, match="collection 1 has 3 outputs"):
        _ = lower([small_delayed(), small_array()], finalize=False).final_keys


def test_an_external_key_can_be_the_output_of_an_empty_graph():
    future = Future("elsewhere")
    lowered = lower([delayed(future)], finalize=True)
    assert (lowered.nodes, lowered.outputs) == ({}, [["elsewhere"]])
    assert (lowered.external, lowered.futures) == ({"elsewhere"}, {"elsewhere": future})


def test_a_frame_whose_partitions_are_joined_by_the_optimizer_persists_as_many_as_are_left(tmp_path):
    table = pd.DataFrame({f"c{i}": range(64) for i in range(8)})
    for i in range(16):
        table[4 * i : 4 * i + 4].to_parquet(tmp_path / f"{i:02}.parquet")
    read = dd.read_parquet(tmp_path)[["c1"]]
    for made in (read, read + 1):
        cluster = Cluster()
        [persisted] = cluster.persist(made)
        assert persisted.npartitions == len(cluster.values) < made.npartitions
        [actual] = cluster.compute(persisted)
        assert same(actual.reset_index(drop=True), made.compute(scheduler="sync").reset_index(drop=True))


class Pair:
    """A wrapper of two frames, after the protocol that xarray follows."""

    def __init__(self, *frames):
        self.frames = frames

    def __dask_graph__(self):
        raise AssertionError("not to be materialized")

    def __dask_exprs__(self):
        return [frame.expr for frame in self.frames]

    def __dask_postcompute__(self):
        return Pair._joined, ()

    @staticmethod
    def _joined(parts):
        return [pd.concat(part) for part in parts]

    def __dask_rebuild_from_exprs__(self, exprs):
        return Pair(*map(dd.dask_expr._collection.new_collection, exprs))


def test_a_wrapper_of_expressions_is_computed_and_persisted_as_a_whole():
    frame = small_frame()
    pair = Pair(frame, frame[frame.x > 3])
    expected = [one.compute(scheduler="sync") for one in pair.frames]
    cluster = Cluster()
    [persisted] = cluster.persist(pair)
    assert {future.key for future in futures_of(persisted)} == set(cluster.values)
    for made in (pair, persisted):
        [actual, number] = cluster.compute(made, frame.x.sum())
        assert number == 66
        assert all(map(same, actual, expected))


def test_delayed_objects_are_fused_where_the_user_asked_for_it():
    chain = delayed(inc)(delayed(inc)(delayed(inc)(1)))
    with dask.config.set({"optimization.fuse.delayed": True}):
        assert len([n for n in lower([chain], finalize=True).nodes.values() if isinstance(n, Task)]) == 1
        assert Cluster().compute(chain) == [4]
        assert len(lower([chain], finalize=True, optimize_graph=False).nodes) == 3
    assert len(lower([chain], finalize=True).nodes) == 3


# --- shuffles


def functions(lowered):
    """Names of all functions in a graph, those inside fused tasks too."""
    return " ".join(map(repr, (call_of(node) for node in lowered.nodes.values())))


SHUFFLES = {
    "setting": lambda method: small_frame().shuffle("y"),
    "argument": lambda method: small_frame().shuffle("y", shuffle_method=method),
    "several": lambda method: (
        small_frame().shuffle("y", shuffle_method=method).merge(small_frame(), on="x", shuffle_method=method)
    ),
    "groupby": lambda method: small_frame().groupby("y").apply(len, meta=(None, "int64")),
}


@pytest.mark.parametrize("method", ["disk", "p2p", None])
@pytest.mark.parametrize("make", SHUFFLES.values(), ids=SHUFFLES)
def test_shuffles_are_tasks_whatever_was_chosen_before(make, method):
    expected = make("tasks").compute(scheduler="sync")
    with dask.config.set({"dataframe.shuffle.method": method, "array.rechunk.method": method}):
        made = make(method)
        for finalize in (True, False):
            names = functions(lower([made], finalize=finalize))
            assert "shuffle_group" in names
            assert not any(word in names for word in ("partd", "p2p", "P2P", "collect"))
        [actual] = Cluster().compute(made)
        assert dask.config.get("dataframe.shuffle.method") == method
        assert dask.config.get("array.rechunk.method") == method
    order = list(expected.columns) if isinstance(expected, pd.DataFrame) else None
    rows = (one.sort_values(order) if order else one for one in (actual, expected))
    assert same(*(one.reset_index(drop=True) for one in rows))


def test_a_thread_that_lowers_keeps_its_settings_while_others_come_and_go():
    seen = []
    inside, go_on = threading.Event(), threading.Event()

    def slow_optimizer(dsk, keys, **_):
        inside.set()
        go_on.wait(30)
        seen.append(dask.config.get("dataframe.shuffle.method"))
        return dsk

    with dask.config.set({"dataframe.shuffle.method": "disk", "array_optimize": slow_optimizer}):
        array, frame = small_array(), small_frame()
        thread = threading.Thread(target=lower, args=[[array]], kwargs={"finalize": False})
        thread.start()
        assert inside.wait(30)
        lower([frame], finalize=False)
        go_on.set()
        thread.join()
        assert seen == ["tasks"]
        assert dask.config.get("dataframe.shuffle.method") == "disk"


def test_settings_are_restored_when_an_optimizer_fails():
    def failing(dsk, keys, **_):
        raise ArithmeticError

    with dask.config.set({"dataframe.shuffle.method": "disk", "array_optimize": failing}):
        with pytest.raises(ArithmeticError):
            lower([small_array()], finalize=False)
        assert dask.config.get("dataframe.shuffle.method") == "disk"


# --- futures in arguments


ARGUMENTS = {
    "delayed": lambda f: delayed(plus)(f, 1),
    "delayed keyword": lambda f: delayed(plus)(1, y=f),
    "delayed list": lambda f: delayed(sum)([f, 1]),
    "delayed nested": lambda f: delayed(lambda d: d["a"][0][0] + 1)({"a": [(f,)]}),
    "delayed leaf": lambda f: delayed(inc)(delayed(f)),
    "delayed list leaf": lambda f: delayed(sum)(delayed([f, 1])),
    "map_blocks": lambda f: da.ones(4, chunks=2).map_blocks(plus, f, dtype=float).sum(),
    "map_blocks keyword": lambda f: da.ones(4, chunks=2).map_blocks(plus, y=f, dtype=float).sum(),
    "array from delayed": lambda f: da.from_delayed(delayed(f), (), dtype=int) + 1,
    "bag map": lambda f: db.from_sequence([1, 2], npartitions=2).map(plus, f).sum(),
    "bag map keyword": lambda f: db.from_sequence([1, 2], npartitions=2).map(plus, y=f).sum(),
    "bag from delayed": lambda f: db.from_delayed([delayed(lambda x: [x])(f)]).sum(),
    "map_partitions": lambda f: small_frame().map_partitions(plus, f, meta=small_frame()._meta).x.sum(),
    "map_partitions keyword": lambda f: (
        small_frame().map_partitions(plus, y=f, meta=small_frame()._meta).x.sum()
    ),
    "from_map": lambda f: dd.from_map(
        lambda x: pd.DataFrame({"x": [x]}), [f, f], meta=pd.DataFrame({"x": [1]})
    ).x.sum(),
}
argument = pytest.mark.parametrize("make", ARGUMENTS.values(), ids=ARGUMENTS)


@argument
def test_a_future_in_an_argument_is_an_external_dependency(make):
    future = Future("f")
    lowered = lower([make(future)], finalize=True)
    assert lowered.external == {"f"}
    assert lowered.futures == {"f": future}
    assert any("f" in needs for needs in lowered.dependencies.values())


@argument
def test_a_future_in_an_argument_arrives_as_its_value(make):
    [expected] = dask.compute(make(10), scheduler="sync")
    cluster = Cluster(f=10)
    assert cluster.compute(make(Future("f"))) == [expected]
    assert dask.compute(make(Future("f")), scheduler=cluster.get) == (expected,)


@argument
def test_futures_of_a_collection_are_found_in_the_arguments_of_its_tasks(make):
    future = Future("f")
    assert futures_of(make(future)) == [future]


def test_futures_are_found_in_containers_once_each_in_the_order_met():
    a, b, c = Future("a"), Future("b"), Future("a")
    assert futures_of([a, {"k": (b, a)}, {c}, 5, "text", None]) == [a, b, c]
    assert futures_of(a) == [a]
    assert futures_of({"x": ForeignFuture("x"), "y": TaskRef("y")}) == []
    assert futures_of([delayed(plus)(b, a), 1]) == [b, a]


def test_a_foreign_future_is_reported_so_that_the_client_can_refuse_it():
    foreign = ForeignFuture("theirs")
    assert lower([delayed(inc)(foreign)], finalize=True).futures == {"theirs": foreign}


def test_a_future_of_a_key_that_the_graph_can_make_is_not_external():
    made = delayed(inc)(1)
    both = delayed(plus)(made, Future(made.key))
    lowered = lower([both], finalize=True)
    assert (lowered.external, lowered.futures) == (set(), {})
    assert Cluster().compute(both) == [4]


# --- raw graphs


OLD_STYLE = {
    "x": 1,
    "y": (inc, "x"),
    "z": (total, "y", [1, 2][0], (inc, "y")),
    ("t", 0): ["x", "y", {"n": 1}],
    "alias": "z",
    "unused": (inc, "nothing"),
}


@pytest.mark.parametrize("keys", ["z", ["z"], [["x", ["y"]], [], "alias"], [("t", 0)], ("t", 0)])
def test_results_come_in_the_nesting_of_the_keys(keys):
    def listed(x):
        return [listed(y) for y in x] if isinstance(x, tuple) else x

    assert Cluster().get(OLD_STYLE, keys) == listed(dask.get(OLD_STYLE, keys))


def test_only_what_the_keys_need_is_kept():
    assert lower_graph(OLD_STYLE, "y").nodes.keys() == {"x", "y"}


def test_a_high_level_graph_is_taken_whole():
    made = small_array() + 1
    dsk = made.__dask_graph__()
    assert isinstance(dsk, HighLevelGraph)
    parts = Cluster().get(dsk, made.__dask_keys__())
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(12) + 1)


@pytest.mark.parametrize(
    ("dsk", "keys", "cycle"),
    [
        ({"a": "a"}, "a", {"a"}),
        ({"a": (inc, "a")}, "a", {"a"}),
        ({"a": (inc, "b"), "b": (inc, "c"), "c": (inc, "a"), "out": (inc, "a")}, "out", {"a", "b", "c"}),
        ({"a": Task("a", inc, TaskRef("b")), "b": Alias("b", "a")}, ["a", "b"], {"a", "b"}),
        ({"a": [1, ["b"]], "b": (total, "c", "a"), "c": 1}, "b", {"a", "b"}),
    ],
)
def test_a_cycle_is_refused_and_named(dsk, keys, cycle):
    with pytest.raises(GraphCycleError) as caught:
        lower_graph(dsk, keys)
    path = caught.value.path
    assert path[0] == path[-1]
    assert set(path) == cycle
    assert len(path) == len(cycle) + 1


def test_a_cycle_among_collections_is_refused():
    bad = delayed(inc)(1)
    bad.dask.layers[bad.key].mapping[bad.key] = Task(bad.key, inc, TaskRef(bad.key))
    with pytest.raises(GraphCycleError):
        lower([bad, small_array()], finalize=True)


def test_a_cycle_that_nothing_wanted_needs_does_no_harm():
    assert Cluster().get({"a": (inc, "b"), "b": (inc, "a"), "c": 3}, "c") == 3


@pytest.mark.parametrize(
    ("dsk", "keys", "missing", "needed_by"),
    [
        ({"a": 1}, ["a", "b"], "b", None),
        ({}, ("b", 0), ("b", 0), None),
        ({"a": Task("a", inc, TaskRef("b"))}, "a", "b", "a"),
        ({"a": Task("a", total, List(1, TaskRef("b")))}, "a", "b", "a"),
        ({"a": Alias("a", "b")}, "a", "b", "a"),
        ({"a": Alias("a")}, "a", "a", None),
    ],
)
def test_a_missing_key_is_refused_with_who_needs_it(dsk, keys, missing, needed_by):
    with pytest.raises(MissingKeyError) as caught:
        lower_graph(dsk, keys)
    assert (caught.value.key, caught.value.needed_by) == (missing, needed_by)
    assert lower_graph(dsk, keys, live={missing}).external == {missing}


@pytest.mark.parametrize(
    "value", [(inc, Future("f")), Task("a", inc, Future("f")), [Future("f")], (sum, [1, (inc, Future("f"))])]
)
def test_a_future_in_a_raw_graph_is_no_missing_key(value):
    lowered = lower_graph({"a": value}, "a")
    assert lowered.futures.keys() == lowered.external == {"f"}


def test_a_future_under_its_own_key_stands_for_its_value():
    dsk = {"f": Future("f"), "g": Future("f"), "out": (plus, "f", "g")}
    assert lower_graph(dsk, ["out", "f"]).external == {"f"}
    assert Cluster(f=20).get(dsk, ["out", "f", "g"]) == [40, 20, 20]


def test_a_text_in_one_graph_is_no_key_of_another():
    named = delayed(inc)(1, dask_key_name="text")
    array = da.Array({("a", 0): (np.array, ["text"])}, "a", ((1,),), dtype="<U4")
    number, text = Cluster().compute(named, array, optimize_graph=False)
    assert number == 2
    assert text.tolist() == ["text"]


# --- the order


def graph_of(needs):
    return {key: Task(key, total, *map(TaskRef, sorted(of))) for key, of in needs.items()}


dags = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*[st.sets(st.integers(0, max(0, i - 1)), max_size=min(i, 3)) for i in range(n)])
)


@given(dags, st.data())
def test_nodes_come_after_what_they_need_and_are_those_reachable(needs, data):
    dsk = {
        i: DataNode(i, i) if not of and i % 3 == 0 else Task(i, total, 1, *map(TaskRef, of))
        for i, of in enumerate(needs)
    }
    wanted = data.draw(st.lists(st.sampled_from(range(len(needs))), min_size=1))
    lowered = lower_graph(dsk, wanted)
    reachable = set()
    todo = list(wanted)
    while todo:
        reachable.add(key := todo.pop())
        todo += needs[key]
    assert lowered.nodes.keys() == lowered.dependencies.keys() == reachable
    assert lowered.order == {key: i for i, key in enumerate(lowered.nodes)}
    for key, of in lowered.dependencies.items():
        assert of == set(needs[key])
        assert all(lowered.order[k] < lowered.order[key] for k in of)
    assert nest(wanted, Cluster().run(lowered)) == [execute_graph(dsk)[key] for key in wanted]


@given(dags, st.data())
def test_a_random_graph_with_an_edge_back_is_refused(needs, data):
    low, high = sorted(data.draw(st.lists(st.sampled_from(range(len(needs))), min_size=2, max_size=2)))
    dsk = graph_of(
        {i: set(of) for i, of in enumerate(needs)} | {low: {*needs[low], high}, high: {*needs[high], low}}
    )
    with pytest.raises(GraphCycleError) as caught:
        lower_graph(dsk, list(dsk))
    path = caught.value.path
    assert path[0] == path[-1]
    steps = set(itertools.pairwise(path))
    forth = all(after in dsk[before].dependencies for before, after in steps)
    back = all(before in dsk[after].dependencies for before, after in steps)
    assert forth or back


def peak_of(order, needs):
    """The most results alive at once when a tree is run in this order."""
    peak, alive = 0, 0
    for key in order:
        alive += 1
        peak = max(peak, alive)
        alive -= len(needs[key])
    return peak


def least_peak(needs):
    """The same for the best of all orders, by search over what has been run."""
    best = {frozenset(): 0}
    for _ in needs:
        reached = {}
        for done, peak in best.items():
            alive = len(done) - sum(len(needs[key]) for key in done)
            for key in needs:
                if key not in done and needs[key] <= done:
                    now = frozenset({*done, key})
                    reached[now] = min(reached.get(now, 99), max(peak, alive + 1))
        best = reached
    return best[frozenset(needs)]


trees = st.integers(1, 9).flatmap(lambda n: st.tuples(*[st.integers(0, max(0, i - 1)) for i in range(n)]))


@given(trees)
def test_a_tree_is_run_with_the_fewest_results_alive(parents):
    needs = {key: set() for key in range(len(parents))}
    for key, parent in enumerate(parents):
        if key:
            needs[parent].add(key)
    lowered = lower_graph(graph_of(needs), 0)
    assert peak_of(lowered.nodes, needs) == least_peak(needs)


def test_outputs_are_made_one_after_the_other_in_the_order_asked_for():
    chains = [delayed(inc)(delayed(inc)(i)) for i in range(5)]
    lowered = lower(chains, finalize=True)
    assert [lowered.order[key] for key in lowered.final_keys] == [1, 3, 5, 7, 9]


def test_data_used_by_many_comes_first_and_leaves_the_rest_in_branches():
    source = delayed([0])
    branches = [
        delayed(total)(*[delayed(lambda s, i: s[0] + i)(source, i) for i in range(3)]) for _ in range(4)
    ]
    lowered = lower([delayed(total)(*branches)], finalize=True)
    assert next(iter(lowered.nodes)) == source.key
    assert sorted(lowered.order[branch.key] for branch in branches) == [4, 8, 12, 16]


# --- annotations


def test_annotations_are_those_of_the_nodes_kept():
    with dask.annotate(priority=3, retries=lambda key: 7):
        loud = delayed(inc)(1)
        unused = delayed(inc)(2)
    with dask.annotate(priority=1):
        out = delayed(inc)(loud)
    assert unused.key not in lower([out], finalize=True).nodes
    expected = {"priority": {loud.key: 3, out.key: 1}, "retries": {loud.key: 7}}
    assert lower([out], finalize=True).annotations == expected
    assert lower([out, small_frame()], finalize=True).annotations == expected
    seen = []
    dask.compute(out, scheduler=lambda dsk, keys, **_: seen.append(lower_graph(dsk, keys)) or [0])
    assert seen[0].annotations == expected


# --- calls


def test_the_function_of_a_plain_task_is_the_users_own_object():
    closure = partial(plus, 1)
    assert call_of(Task("k", closure, TaskRef("a"), x=2)) == (closure, (TaskRef("a"),), {"x": 2})
    assert call_of(Task("k", closure))[0] is closure


@pytest.mark.parametrize(
    ("node", "call"),
    [
        (DataNode("k", [1]), (identity, ([1],), {})),
        (Alias("k", "a"), (identity, (TaskRef("a"),), {})),
        (Task("k", plus, Alias("a"), DataNode(None, 2)), (plus, (TaskRef("a"), 2), {})),
        (Task("k", plus, 1, y=DataNode(None, 2)), (plus, (1,), {"y": 2})),
    ],
)
def test_data_and_aliases_are_written_plainly(node, call):
    assert call_of(node) == call


@pytest.mark.parametrize(
    "node",
    [
        Task("k", plus, TaskRef("a"), TaskRef("b")),
        Task("k", plus, List(1, TaskRef("a")), y=List(TaskRef("b"))),
        Task("k", plus, Task(None, inc, TaskRef("a")), Alias("b")),
        Task("k", dict, x=TaskRef("a"), y={"z": 1}),
        List(TaskRef("a"), List(2, TaskRef("b"))),
        Alias("k", "a"),
        DataNode("k", "text"),
        Task.fuse(Task("i", inc, TaskRef("a")), Task("k", plus, TaskRef("i"), TaskRef("b"))),
    ],
)
def test_a_call_returns_what_its_node_returns(node):
    cluster = Cluster(a=5, b=7)
    assert cluster.get({"k": node}, "k") == node({key: cluster.values[key] for key in node.dependencies})


def test_data_that_is_a_reference_itself_is_not_resolved():
    reference = TaskRef("a")
    assert Cluster(a=5).get({"k": DataNode("k", reference)}, "k") is reference


# --- nested containers


@dataclasses.dataclass
class Box:
    content: object
    label: str = "box"


Point = namedtuple("Point", "x y")


def nested(a, b):
    return (
        [a, (b, 1), [2]],
        {"k": a, b: {"deep": [b]}},
        OrderedDict(z=1, a=a),
        Box(content=[a]),
        Box(content=5),
        Point(a, Point(1, b)),
        iter([a, 1]),
        {a, 3},
        b,
        4,
    )


def test_collections_come_out_of_containers_and_results_go_back_in():
    a, b = delayed(inc)(1), small_delayed()
    collections, repack = unpack(nested(a, b))
    theirs, their_repack = unpack_collections(*nested(a, b))
    assert list(map(id, collections)) == list(map(id, theirs)) == [id(a), id(b)]
    actual = repack([10, 20])
    assert actual == their_repack([10, 20])
    assert list(map(type, actual)) == list(map(type, their_repack([10, 20])))
    assert actual == (*nested(10, 20)[:6], [10, 1], {10, 3}, 20, 4)


def test_containers_are_not_looked_into_unless_traversed():
    a = delayed(inc)(1)
    collections, repack = unpack([[a], a], traverse=False)
    assert collections == [a]
    assert repack([2]) == ([a], 2)


def test_what_holds_no_collection_comes_back_as_it_is():
    plain = ([1, [2]], {"k": Box(1)}, Box, "text")
    collections, repack = unpack(plain)
    assert collections == []
    assert all(map(operator.is_, repack([]), plain))


# --- imports


def test_importing_loads_neither_numpy_nor_pandas():
    code = """
        import sys
        import celery_mem.graph.collections as collections
        from dask import delayed
        collections.lower([delayed(sum)([delayed(abs)(-1)])], finalize=True)
        heavy = {"numpy", "pandas", "distributed", "dask.array", "dask.dataframe"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
