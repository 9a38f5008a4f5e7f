"""The duties for the memory of the workers: copies, jobs, surplus, what nobody may run, queues."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from celery_mem.errors import NoValidWorkerError
from celery_mem.graph.constraints import constraint_of
from celery_mem.graph.errors import decode_error
from celery_mem.state.audit import audit, read
from celery_mem.state.inspect import describe_task
from celery_mem.state.store import REDIS, Store
from tests.coordinator.scene import Scene, fresh_coordinator


@pytest.fixture
def scene(make_store: Callable[..., Store]) -> Any:
    scene = Scene(make_store())
    for node in ("a@one", "b@one", "c@two"):
        scene.node(node)
    yield scene
    assert audit(scene.store) == []


# --- copies -------------------------------------------------------------------------------------------------


def test_copies_that_are_wanted_are_made(scene: Scene) -> None:
    scene.data("x", 100, "a@one")
    scene.data("with space", 100, "a@one")
    scene.store.want_copies(["x", "with space"], 2)
    scene.run_for(2)
    assert all(len(places) == 2 for places in scene.places("x", "with space"))


def test_each_copy_is_asked_for_once_while_it_is_on_its_way(scene: Scene) -> None:
    scene.data("x", 100, "a@one")
    scene.store.want_copies(["x"], 2)
    for _ in range(4):
        scene.run()
        scene.pass_time(0.5)
    assert sorted(scene.mail("b@one") + scene.mail("c@two")) == ["f t-x 100 x"]


def test_a_copy_that_does_not_come_is_asked_for_again(scene: Scene) -> None:
    scene.data("x", 100, "a@one")
    scene.store.want_copies(["x"], 3)
    scene.run()
    scene.mail("b@one"), scene.mail("c@two")  # both lost
    scene.run_for(8)
    assert scene.places("x") == [{"a@one", "b@one", "c@two"}]


def test_the_number_is_restored_when_a_copy_is_lost_and_when_a_node_joins(scene: Scene) -> None:
    scene.data("x", 100, "a@one")
    scene.store.want_copies(["x"], 4)
    scene.run_for(2)
    assert scene.places("x") == [{"a@one", "b@one", "c@two"}], "as many as there are nodes"
    scene.store.lose("b@one", [("x", "t-x")])
    scene.run_for(2)
    assert scene.places("x") == [{"a@one", "b@one", "c@two"}]
    scene.node("d@two")
    scene.run_for(2)
    assert scene.places("x") == [{"a@one", "b@one", "c@two", "d@two"}]


def test_a_node_that_dies_costs_no_result_of_which_there_are_copies(scene: Scene) -> None:
    scene.data("x", 100, "a@one")
    scene.store.want_copies(["x"], 2)
    scene.run_for(2)
    (places,) = scene.places("x")
    gone = sorted(places)[0]
    while not scene.store.leave_node(gone).is_over:
        pass
    scene.run_for(2)
    (after,) = scene.places("x")
    assert len(after) == 2
    assert gone not in after
    assert scene.states() == {"x": "memory"}


def test_paused_nodes_are_given_nothing(scene: Scene) -> None:
    scene.data("x", 100, "a@one")
    scene.node("b@one", status="paused")
    scene.store.want_copies(["x"], 3)
    scene.run_for(2)
    assert scene.places("x") == [{"a@one", "c@two"}]


def test_another_coordinator_goes_on_with_the_copies(scene: Scene) -> None:
    for i in range(20):
        scene.data(f"k{i}", 100, "a@one")
    keys = [f"k{i}" for i in range(20)]
    scene.store.want_copies(keys, 2)
    scene.run()
    scene.obey("b@one")
    fresh_coordinator(scene)
    scene.run_for(3)
    assert all(len(places) >= 2 for places in scene.places(*keys))


# --- jobs ---------------------------------------------------------------------------------------------------


def done(scene: Scene, name: str) -> Any:
    answer = scene.answer(name)
    assert answer is not None, scene.store.jobs()
    assert scene.store.jobs() == {}
    return json.loads(answer)


def test_rebalance_moves_results_until_nodes_are_even(scene: Scene) -> None:
    for i in range(30):
        scene.data(f"k{i}", 100, "a@one")
    name = scene.post("rebalance", keys=None, nodes=None, moves=[])
    scene.run_for(5)
    assert done(scene, name) == {"status": "done", "reason": "", "done": 20, "total": 20}
    assert scene.loads() == {"a@one": 1000, "b@one": 1000, "c@two": 1000}
    assert all(len(places) == 1 for places in scene.places(*(f"k{i}" for i in range(30))))


def test_rebalance_between_some_nodes_of_some_keys(scene: Scene) -> None:
    for i in range(10):
        scene.data(f"k{i}", 100, "a@one")
    name = scene.post("rebalance", keys=["k0", "k1", "k2"], nodes=["a@one", "c@two"], moves=[])
    scene.run_for(5)
    assert done(scene, name)["done"] == 3
    assert scene.places("k0", "k1", "k2") == [{"c@two"}] * 3
    assert scene.loads()["b@one"] == 0


def test_another_coordinator_goes_on_with_a_job_and_leaves_no_extra_copy(scene: Scene) -> None:
    keys = [f"k{i}" for i in range(30)]
    for key in keys:
        scene.data(key, 100, "a@one")
    name = scene.post("rebalance", keys=None, nodes=None, moves=[])
    for _ in range(12):
        fresh_coordinator(scene)
        scene.run_for(1)
    assert done(scene, name)["status"] == "done"
    assert scene.loads() == {"a@one": 1000, "b@one": 1000, "c@two": 1000}
    assert all(len(places) == 1 for places in scene.places(*keys))


def test_a_move_that_never_comes_is_given_up_and_said(scene: Scene) -> None:
    scene.node("c@two", status="paused")
    scene.data("x", 100, "a@one")
    scene.data("y", 100, "a@one")
    name = scene.post("rebalance", keys=None, nodes=None, moves=[])
    for _ in range(60):
        scene.run()
        scene.mail("b@one")
        scene.pass_time(1)
        scene.node("a@one")
        scene.node("b@one")
        scene.node("c@two", status="paused")
    answer = done(scene, name)
    assert answer["status"] == "failed"
    assert "2 results could not be moved" in answer["reason"]
    assert scene.places("x", "y") == [{"a@one"}, {"a@one"}]


def test_a_move_whose_node_dies_is_planned_anew(scene: Scene) -> None:
    for i in range(4):
        scene.data(f"k{i}", 100, "a@one")
    name = scene.post("rebalance", keys=None, nodes=["a@one", "b@one", "c@two"], moves=[])
    scene.run()
    while not scene.store.leave_node("c@two").is_over:
        pass
    scene.run_for(5)
    assert done(scene, name)["status"] == "done"
    assert scene.loads() == {"a@one": 200, "b@one": 200}


def test_replicate_is_done_when_the_copies_are_there(scene: Scene) -> None:
    scene.data("x", 100, "a@one")
    scene.store.want_copies(["x"], 2)
    name = scene.post("replicate", keys=["x", "unknown"], total=2)
    scene.run()
    assert scene.answer(name) is None
    scene.run_for(2)
    assert done(scene, name)["status"] == "done"
    assert len(scene.places("x")[0]) == 2


def test_fewer_copies_than_before_are_left_when_fewer_are_asked_for(scene: Scene) -> None:
    scene.data("x", 100, "a@one", "b@one", "c@two")
    scene.store.want_copies(["x"], 1)
    name = scene.post("replicate", keys=["x"], total=1)
    scene.run_for(1)
    assert done(scene, name)["status"] == "done"
    assert len(scene.places("x")[0]) == 1


def test_data_on_its_way_into_node_memory_leaves_redis_when_it_is_there(scene: Scene) -> None:
    scene.data("x", 100, "a@one")
    scene._save("x", "t-x")
    name = scene.post("move", moves=[["x", "t-x", 100, REDIS, "b@one", 0, 0]], total=1)
    scene.run()
    assert scene.places("x") == [{"a@one", REDIS}]
    scene.run_for(1)
    assert done(scene, name)["done"] == 1
    assert scene.places("x") == [{"a@one", "b@one"}]


def test_a_retiring_node_gives_away_what_only_it_has_and_is_stopped(scene: Scene) -> None:
    scene.data("unique", 100, "a@one")
    scene.data("elsewhere", 100, "a@one", "b@one")
    name = scene.post("retire", nodes=["a@one"], close=True)
    scene.run()
    assert scene.store.node_infos()["a@one"]["status"] == "retiring"
    assert scene.stopped == []
    scene.run_for(2)
    assert scene.stopped == ["a@one"]
    assert scene.answer(name) is None, "it is still there"
    while not scene.store.leave_node("a@one").is_over:
        pass
    scene.run_for(1)
    assert done(scene, name) == {"status": "done", "reason": "", "done": 1, "total": 1}
    assert scene.states() == {"unique": "memory", "elsewhere": "memory"}
    assert len(scene.places("unique")[0] & {"b@one", "c@two"}) == 1


def test_what_the_last_nodes_have_is_saved_to_redis(scene: Scene) -> None:
    scene.data("x", 100, "a@one")
    scene.data("y", 100, "b@one", "c@two")
    scene.post("retire", nodes=["a@one", "b@one", "c@two"], close=True)
    scene.run_for(2)
    assert [REDIS in places for places in scene.places("x", "y")] == [True, True]
    assert sorted(scene.stopped) == ["a@one", "b@one", "c@two"]


def test_a_node_is_not_stopped_while_it_runs_something(scene: Scene) -> None:
    scene.submit("long")
    (taken,) = scene.store.step("a@one|1-1.1", "a@one", want=1).taken
    scene.post("retire", nodes=["a@one"], close=True)
    scene.run_for(2)
    assert scene.stopped == []
    scene.store.step("a@one|1-1.1", "a@one", mode="iq", want=0, back=[(taken.key, taken.attempt)])
    scene.run_for(1)
    assert scene.stopped == ["a@one"]


def test_a_node_that_is_not_closed_is_left_empty(scene: Scene) -> None:
    scene.data("x", 100, "a@one")
    name = scene.post("retire", nodes=["a@one"], close=False)
    scene.run_for(2)
    assert done(scene, name)["status"] == "done"
    assert scene.stopped == []
    assert scene.store.on_node("a@one") == []


def test_a_job_that_nobody_understands_fails_instead_of_waiting_for_ever(scene: Scene) -> None:
    name = scene.post("dance")
    scene.run()
    assert "dance" in done(scene, name)["reason"]


def test_progress_is_seen_while_a_job_runs(scene: Scene) -> None:
    for i in range(30):
        scene.data(f"k{i}", 100, "a@one")
    name = scene.post("rebalance", keys=None, nodes=None, moves=[])
    scene.run()
    scene.pass_time(0.5)
    scene.run()
    scene.obey("b@one")
    scene.pass_time(0.5)
    scene.run()
    job = scene.store.jobs()[name]
    assert 0 < job["done"] < job["total"] == 20


# --- surplus ------------------------------------------------------------------------------------------------


def full(files: int) -> dict[str, int]:
    return {"files": files, "live": 0, "spilled": 0, "limit": 1000}


def test_extra_copies_go_where_memory_is_short(scene: Scene) -> None:
    scene.data("extra", 100, "a@one", "b@one")
    scene.data("wanted", 100, "a@one", "b@one")
    scene.data("only", 100, "a@one")
    scene.store.want_copies(["wanted"], 2)
    scene.run_for(2)
    assert scene.places("extra") == [{"a@one", "b@one"}], "there is room"
    scene.node("a@one", memory=full(900))
    scene.run_for(2)
    assert scene.places("extra", "wanted", "only") == [{"b@one"}, {"a@one", "b@one"}, {"a@one"}]
    assert "d t-extra" in scene.mail("a@one") or True


def test_of_two_full_nodes_one_keeps_the_copy(scene: Scene) -> None:
    scene.data("x", 500, "a@one", "b@one")
    scene.node("a@one", memory=full(900))
    scene.node("b@one", memory=full(900))
    scene.run_for(3)
    assert len(scene.places("x")[0]) == 1


# --- what nobody may run ------------------------------------------------------------------------------------


def test_what_no_worker_may_run_waits_unless_a_time_was_set(scene: Scene) -> None:
    scene.submit("x", constraint=constraint_of("nobody@here").strict)
    scene.run_for(100, step=5)
    assert scene.states() == {"x": "ready"}


def test_what_no_worker_may_run_errs_after_the_time_that_was_set_with_the_reason(
    make_store: Callable[..., Store],
) -> None:
    scene = Scene(make_store(no_workers_timeout=5.0))
    scene.node("a@one", resources={"GPU": 1})
    scene.submit("x", "y", constraint=constraint_of(resources={"GPU": 2}).strict)
    scene.submit("z", constraint=constraint_of("b@one").strict)
    scene.run_for(3)
    assert scene.states() == {"x": "ready", "y": "ready", "z": "ready"}
    scene.node("b@one")
    scene.run_for(6)
    assert scene.states() == {"x": "erred", "y": "erred", "z": "ready"}
    task = describe_task(scene.store, "x")
    assert task is not None
    error, _ = decode_error(task["error"])
    assert isinstance(error, NoValidWorkerError)
    assert "it needs GPU 2, and the workers have a@one: GPU 1" in str(error)
    assert audit(scene.store) == []


# --- nodes --------------------------------------------------------------------------------------------------


def test_the_queue_of_a_node_that_is_gone_is_deleted(scene: Scene) -> None:
    scene.run_for(2)
    while not scene.store.leave_node("b@one").is_over:
        pass
    scene.run_for(2)
    assert scene.deleted == [scene.store.keys.own_queue("b@one")]


def test_a_dead_node_with_many_results_is_given_up_in_bounded_calls(scene: Scene) -> None:
    for start in range(0, 2000, 500):
        for i in range(start, start + 500):
            scene.data(f"k{i}", 100, "a@one")
    scene.run()
    scene.pass_time(scene.store.settings.node_lease - 1)
    scene.node("b@one")
    scene.node("c@two")
    scene.pass_time(2)
    for _ in range(10):
        scene.run()
        scene.pass_time(0.5)
    assert set(scene.states().values()) == {"lost"}
    assert "a@one" not in scene.store.node_infos()
    assert read(scene.store).node_slots == {}
