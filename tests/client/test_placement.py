"""workers=, allow_other_workers=, resources=: where tasks run."""

from __future__ import annotations

import dask
import dask.bag
import pytest
from dask import delayed

from celery_mem.client.placing import Placing
from celery_mem.errors import UnknownWorkerError
from celery_mem.graph import collections as lowering
from celery_mem.graph.constraints import ANYWHERE, constraint_of
from tests.on_cluster import add, inc, node_of_task, until


def on(*names: str) -> tuple[str, str]:
    return constraint_of(names)


class TestPlacing:
    """What the arguments of a call mean for each of its tasks."""

    def lowered(self, *members):
        return lowering.lower(members, finalize=True)

    def test_without_arguments_tasks_run_anywhere(self):
        assert Placing().of("x") == ANYWHERE
        assert Placing().default == ANYWHERE

    def test_arguments_count_for_all_tasks(self):
        placing = Placing("a@h", resources={"GPU": 1})
        assert placing.of("x") == placing.default == constraint_of("a@h", False, {"GPU": 1})

    def test_a_dict_counts_for_the_collections_it_names(self):
        x, y = delayed(inc)(1), delayed(inc)(2)
        z = delayed(add)(x, y)
        lowered = self.lowered(x, y, z)
        placing = Placing({x: "a@h", (y, z): ["b@h", "c@h"]}, members=[x, y, z], lowered=lowered)
        assert placing.of(x.key) == on("a@h")
        assert placing.of(y.key) == placing.of(z.key) == on("b@h", "c@h")
        assert placing.of("other") == ANYWHERE

    def test_a_dict_may_name_keys(self):
        dsk = {"x": (inc, 1), ("y", 0): (inc, "x")}
        lowered = lowering.lower_graph(dsk, [("y", 0)])
        placing = Placing({"x": "a@h", ("y", 0): "b@h"}, lowered=lowered)
        assert (placing.of("x"), placing.of(("y", 0))) == (on("a@h"), on("b@h"))

    def test_resources_may_be_a_dict_of_dicts(self):
        lowered = lowering.lower_graph({"x": (inc, 1)}, ["x"])
        placing = Placing(resources={"x": {"GPU": 1}}, lowered=lowered)
        assert placing.of("x") == constraint_of(resources={"GPU": 1})
        assert placing.default == ANYWHERE

    def test_a_dict_that_names_what_is_not_computed_is_refused(self):
        x, y = delayed(inc)(1), delayed(inc)(2)
        with pytest.raises(ValueError, match="does not compute"):
            Placing({y: "a@h"}, members=[x], lowered=self.lowered(x))
        with pytest.raises(TypeError, match="no dict here"):
            Placing({"x": "a@h"})

    def test_annotations_of_a_task_go_before_arguments(self):
        with dask.annotate(workers="a@h", resources={"GPU": 1}):
            x = delayed(inc)(1)
        y = delayed(inc)(x)
        lowered = self.lowered(y)
        placing = Placing("b@h", members=[y], lowered=lowered)
        assert placing.of(x.key) == constraint_of("a@h", False, {"GPU": 1})
        assert placing.of(y.key) == on("b@h")

    def test_annotations_around_the_call_count_for_all_of_it(self):
        with dask.annotate(workers=["a@h"], allow_other_workers=True):
            placing = Placing()
        assert placing.of("x") == ("", "a@h")

    def test_a_bad_annotation_is_refused_before_anything_is_sent(self):
        with dask.annotate(workers=[7]):
            x = delayed(inc)(1)
        with pytest.raises(TypeError, match="workers"):
            Placing(members=[x], lowered=self.lowered(x))


class TestWorkers:
    def test_a_task_runs_where_it_must(self, client, nodes):
        for node in nodes:
            futures = client.map(node_of_task, range(10), workers=node, pure=False)
            assert set(client.gather(futures, timeout=60)) == {node}

    def test_a_host_means_all_its_nodes(self, client, nodes):
        host = nodes[0].partition("@")[2]
        assert client.submit(node_of_task, workers=host, pure=False).result(timeout=60) in nodes

    def test_a_list_means_any_of_these(self, client, nodes):
        found = client.gather(
            client.map(node_of_task, range(10), workers=list(nodes), pure=False), timeout=60
        )
        assert set(found) <= set(nodes)

    def test_others_may_help_where_that_is_allowed(self, client, nodes, gate):
        busy = client.submit(gate.pass_, 1, workers=nodes[0])
        gate.next_reached()
        helped = client.submit(node_of_task, workers=nodes[0], allow_other_workers=True, pure=False)
        assert helped.result(timeout=60) == nodes[1]
        gate.open()
        assert busy.result(timeout=60) == 1

    def test_what_no_worker_may_run_waits_and_status_says_why(self, client):
        future = client.submit(inc, 1, workers="nobody@nowhere")
        found = client.info
        assert until(lambda: found()["unrunnable"])
        (row,) = client.info()["unrunnable"]
        assert row["tasks"] == 1
        assert "no worker is called nobody@nowhere; there are: worker-0@" in row["reason"]
        assert future.status == "pending"
        del future
        assert until(lambda: not client.info()["unrunnable"])

    def test_resources_that_no_worker_declares_are_named(self, client):
        future = client.submit(inc, 1, resources={"GPU": 1})
        assert until(lambda: client.info()["unrunnable"])
        assert "it needs GPU 1" in client.info()["unrunnable"][0]["reason"]
        del future

    @pytest.mark.parametrize("bad", [7, [7], {"a": 1}])
    def test_what_is_no_name_is_refused_at_once(self, client, bad):
        with pytest.raises(TypeError, match="workers"):
            client.submit(inc, 1, workers=bad)


class TestCollections:
    def test_all_tasks_of_a_collection_run_where_it_is_said(self, client, nodes):
        bag = dask.bag.from_sequence(range(6), npartitions=3).map(node_of_task)
        assert set(client.compute(bag, workers=nodes[1], sync=True)) == {nodes[1]}

    def test_persisted_values_are_made_where_it_is_said(self, client, nodes):
        values = [delayed(node_of_task, pure=False)() for _ in nodes]
        kept = client.persist(values, workers=dict(zip(values, nodes, strict=True)))
        assert client.gather(client.compute(kept)) == nodes

    def test_annotated_delayed_values_run_where_it_is_said(self, client, nodes):
        values = []
        for node in nodes:
            with dask.annotate(workers=node):
                values.append(delayed(node_of_task, pure=False)())
        assert client.gather(client.compute(values)) == list(nodes)

    def test_get_takes_keys(self, client, nodes):
        dsk = {"x": (node_of_task,), "y": (node_of_task, 1)}
        found = client.get(dsk, ["x", "y"], workers={"x": nodes[0], "y": nodes[1]})
        assert found == list(nodes)


class TestNames:
    def test_calls_that_need_a_worker_now_name_those_that_are_there(self, client, nodes):
        for call in (client.has_what, client.ncores, lambda w: client.rebalance(workers=w)):
            with pytest.raises(UnknownWorkerError, match=nodes[0]):
                call("nobody@nowhere")

    def test_cores_of_some_workers(self, client, nodes):
        assert client.ncores() == dict.fromkeys(nodes, 1)
        assert client.ncores(nodes[:1]) == {nodes[0]: 1}
