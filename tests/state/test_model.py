"""The model itself: each test states one rule of the state machine."""

from __future__ import annotations

import pytest

from celery_mem.errors import UnknownDependencyError
from celery_mem.state.model import Back, Data, Done, Failed, Missing, Model, Notice, Task
from celery_mem.state.store import REDIS

SMALL = Data(3, "bytes", b"abc")
MEDIUM = Data(1000, "bytes", bytes(1000))  # too large to become part of tasks that need it
LARGE = Data(1 << 20, "ndarray")


def task(key: str, *deps: str, function: str | None = "f", **fields: object) -> Task:
    return Task(key, function, b"call", deps, **fields)  # type: ignore[arg-type]


@pytest.fixture
def model():
    model = Model()
    yield model
    model.check()


def states(model: Model) -> dict[str, str]:
    return {key: record.state for key, record in model.records.items()}


def run(model: Model, *keys: str, data: Data = SMALL) -> None:
    """Let one slot run `keys`, which are ready, and nothing else."""
    claimed = claim_all(model)
    back = [Back(key, attempt) for key, attempt in claimed.items() if key not in keys]
    done = [Done(key, claimed[key], data) for key in keys]
    assert model.step("runner", done=done, back=back).stale == []


def claim_all(model: Model, slot: str = "runner") -> dict[str, int]:
    model.slots = {s: node for s, node in model.slots.items() if s == slot}
    return dict(model.step(slot, want=10_000).claimed)


def fail(model: Model, key: str, error: bytes = b"boom", retryable: bool = False) -> None:
    claimed = claim_all(model)
    back = [Back(k, attempt) for k, attempt in claimed.items() if k != key]
    assert model.step("runner", failed=[Failed(key, claimed[key], error, retryable)], back=back).stale == []


# --- submit -------------------------------------------------------------------------------------------------


def test_a_task_without_dependencies_is_ready_at_once(model):
    model.submit("alice", 1, 7, [task("x", order=9)])

    assert model.snapshot()["records"]["x"] == {
        "state": "ready",
        "function": "f",
        "payload": b"call",
        "deps": [],
        "given": {},
        "priority": 0,
        "rank": "0000000007000009",
        "retries": 0,
        "deaths": 0,
        "waiting": 0,
        "needed": 0,
        "attempt": 0,
        "owner": None,
        "nbytes": None,
        "type": None,
        "value": None,
        "token": "",
        "maker": "",
        "places": [],
        "copies": 1,
        "copies_on": [],
        "constraint": "",
        "prefer": [],
        "home": "",
        "contains": [],
        "error": None,
        "blame": None,
        "durable": False,
    }


def test_a_task_waits_for_its_dependencies(model):
    model.submit("alice", 1, 1, [task("a"), task("b"), task("c", "a", "b")])

    assert states(model) == {"a": "ready", "b": "ready", "c": "waiting"}
    assert model.waiting("c") == 2
    run(model, "a")
    assert model.waiting("c") == 1
    run(model, "b")
    assert states(model)["c"] == "ready"


def test_a_task_on_an_unknown_dependency_is_refused_and_nothing_is_written(model):
    with pytest.raises(UnknownDependencyError):
        model.submit("alice", 1, 1, [task("a"), task("b", "c"), task("c")])

    assert model.records == {}


def test_a_task_that_depends_on_itself_is_refused(model):
    with pytest.raises(UnknownDependencyError):
        model.submit("alice", 1, 1, [task("a", "a")])


def test_the_first_submission_of_a_key_wins(model):
    model.submit("alice", 1, 1, [task("a"), task("x", "a", retries=2)])
    before = model.snapshot()
    model.submit("alice", 1, 2, [task("x", function="g", retries=9)])

    assert model.snapshot() == before


def test_tasks_that_nobody_holds_or_needs_are_forgotten_at_once(model):
    model.submit("alice", 1, 1, [task("a", hold=False), task("b", hold=False), task("c", "a")])

    assert states(model) == {"a": "ready", "c": "waiting"}


def test_a_submission_may_depend_on_a_result_of_an_earlier_one(model):
    model.submit("alice", 1, 1, [task("a")])
    run(model, "a")
    model.submit("alice", 2, 2, [task("b", "a")])

    assert states(model) == {"a": "memory", "b": "ready"}


def test_who_submits_a_finished_key_is_told_at_once(model):
    model.submit("alice", 1, 1, [task("small"), task("large")])
    run(model, "small")
    run(model, "large", data=LARGE)
    model.take_notices()
    model.submit("bob", 5, 2, [task("small"), task("large")])

    assert model.take_notices() == [Notice("bob", "small", 5, "m"), Notice("bob", "large", 5, "M")]


def test_an_error_that_is_held_is_kept_when_its_key_is_submitted_again(model):
    model.submit("alice", 1, 1, [task("x")])
    fail(model, "x")
    model.take_notices()
    model.submit("bob", 2, 2, [task("x")])

    assert states(model) == {"x": "erred"}
    assert model.take_notices() == [Notice("bob", "x", 2, "e")]


def test_an_error_that_nobody_holds_or_inherited_is_forgotten_when_its_key_is_submitted_again(model):
    model.submit("alice", 1, 1, [task("e"), task("x", "e"), task("y", "x")])
    fail(model, "e")
    model.put("alice", 2, "x", SMALL)  # x has its data from elsewhere, y still inherits e's error
    model.retry("alice", ["y"])
    model.release("alice", ["e"])
    assert states(model) == {"e": "erred", "x": "memory", "y": "ready"}
    model.submit("bob", 3, 2, [task("e")])

    assert states(model) == {"e": "ready", "x": "memory", "y": "ready"}


# --- completions --------------------------------------------------------------------------------------------


def test_a_completion_tells_every_holder_under_the_epoch_of_its_hold(model):
    model.submit("alice", 1, 1, [task("x")])
    model.hold("bob", 7, ["x"])
    run(model, "x", data=LARGE)

    assert model.take_notices() == [Notice("alice", "x", 1, "M"), Notice("bob", "x", 7, "M")]


def test_an_intermediate_result_is_dropped_when_the_last_task_that_needs_it_is_done(model):
    model.submit("alice", 1, 1, [task("a", hold=False), task("b", "a"), task("c", "a")])
    run(model, "a")
    run(model, "b")
    assert states(model) == {"a": "memory", "b": "memory", "c": "ready"}
    run(model, "c")

    assert states(model) == {"a": "released", "b": "memory", "c": "memory"}
    assert model.snapshot()["records"]["a"]["nbytes"] is None


def test_a_completion_under_an_old_attempt_is_stale_and_writes_nothing(model):
    model.submit("alice", 1, 1, [task("x")])
    first = claim_all(model)["x"]
    model.step("runner", back=[Back("x", first)])
    claim_all(model)
    before = model.snapshot()

    assert model.step("runner", done=[Done("x", first, SMALL)]).stale == ["x"]
    assert model.snapshot() == before


def test_a_completion_that_is_repeated_is_harmless_and_not_reported(model):
    model.submit("alice", 1, 1, [task("x")])
    done = Done("x", claim_all(model)["x"], SMALL)
    model.step("runner", done=[done])
    before = model.snapshot()

    assert model.step("runner", done=[done]).stale == []
    assert model.snapshot() == before


def test_a_completion_of_a_key_that_was_released_meanwhile_is_stale(model):
    model.submit("alice", 1, 1, [task("x")])
    attempt = claim_all(model)["x"]
    model.release("alice", ["x"])

    assert model.step("runner", done=[Done("x", attempt, SMALL)]).stale == ["x"]
    assert model.records == {}


def test_a_task_handed_back_is_ready_and_its_attempt_is_void(model):
    model.submit("alice", 1, 1, [task("x")])
    attempt = claim_all(model)["x"]
    model.step("runner", back=[Back("x", attempt)])

    assert states(model) == {"x": "ready"}
    assert model.step("runner", back=[Back("x", attempt)]).stale == ["x"]


# --- claims -------------------------------------------------------------------------------------------------


def test_claims_follow_priority_then_the_order_of_submission_then_the_order_in_it(model):
    model.submit("alice", 1, 1, [task("late", order=2), task("early", order=1)])
    model.submit("alice", 1, 2, [task("second", order=0), task("urgent", order=9, priority=1)])

    assert [key for key, _ in model.step("s", want=4).claimed] == ["urgent", "early", "late", "second"]


def test_a_claim_takes_no_more_than_a_fair_share_of_what_is_ready(model):
    model.submit("alice", 1, 1, [task(f"x{i}") for i in range(7)])
    for slot in ("one", "two", "three"):
        model.step(slot)

    assert [len(model.step(slot, want=100).claimed) for slot in ("one", "two", "three")] == [3, 2, 1]
    assert [len(model.step(slot, want=100).claimed) for slot in ("one", "two")] == [1, 0]


def test_an_attempt_number_is_never_given_twice(model):
    model.submit("alice", 1, 1, [task("x")])
    first = claim_all(model)["x"]
    model.release("alice", ["x"])
    model.submit("alice", 2, 2, [task("x")])

    assert claim_all(model)["x"] > first


def test_a_step_that_is_repeated_gives_what_the_slot_owns_already(model):
    model.submit("alice", 1, 1, [task(f"x{i}", order=i) for i in range(3)])
    first = model.step("s", want=2)

    assert model.step("s", want=2, mode="r") == first


def test_a_slot_that_leaves_counts_no_longer_in_fair_shares(model):
    model.submit("alice", 1, 1, [task(f"x{i}") for i in range(4)])
    model.step("other")
    model.step("other", mode="q")

    assert len(model.step("s", want=10).claimed) == 4


def test_a_completion_whose_blob_has_vanished_runs_again(model):
    model.submit("alice", 1, 1, [task("x")])
    attempt = claim_all(model)["x"]

    assert model.step("runner", done=[Done("x", attempt, None)]).stale == []
    assert states(model) == {"x": "ready"}


# --- failures -----------------------------------------------------------------------------------------------


def test_an_error_goes_down_the_graph_at_once_and_names_its_origin(model):
    model.submit("alice", 1, 1, [task("a"), task("b", "a"), task("c", "b"), task("d")])
    fail(model, "a")

    assert states(model) == {"a": "erred", "b": "erred", "c": "erred", "d": "ready"}
    assert {r.blame for r in model.in_state("erred")} == {"a"}
    assert [r.error for r in model.in_state("erred")] == [b"boom", None, None]
    assert {(n.key, n.code) for n in model.take_notices()} == {("a", "e"), ("b", "e"), ("c", "e")}


def test_an_error_frees_what_only_its_victims_needed(model):
    model.submit("alice", 1, 1, [task("a", hold=False), task("e", hold=False), task("x", "a", "e")])
    run(model, "a")
    fail(model, "e")

    assert states(model) == {"a": "released", "e": "erred", "x": "erred"}


def test_a_task_submitted_on_an_error_errs_at_once(model):
    model.submit("alice", 1, 1, [task("a"), task("b", "a")])
    fail(model, "a")
    model.submit("alice", 2, 2, [task("c", "b")])

    assert states(model)["c"] == "erred"
    assert model.records["c"].blame == "a"


def test_a_failure_is_tried_again_as_often_as_retries_allow(model):
    model.submit("alice", 1, 1, [task("x", retries=1)])
    fail(model, "x", retryable=True)
    assert states(model) == {"x": "ready"}
    fail(model, "x", retryable=True)

    assert states(model) == {"x": "erred"}


def test_a_failure_that_cannot_be_retried_errs_in_spite_of_retries(model):
    model.submit("alice", 1, 1, [task("x", retries=1)])
    fail(model, "x", retryable=False)

    assert states(model) == {"x": "erred"}


def test_an_error_stays_while_a_victim_is_known(model):
    model.submit("alice", 1, 1, [task("a", hold=False), task("b", "a")])
    fail(model, "a")
    assert states(model) == {"a": "erred", "b": "erred"}
    model.release("alice", ["b"])

    assert model.records == {}


def test_retry_of_a_victim_resets_the_origin_and_all_its_victims(model):
    model.submit("alice", 1, 1, [task("a", hold=False), task("b", "a"), task("c", "a")])
    fail(model, "a")
    model.take_notices()
    model.retry("alice", ["b"])

    assert states(model) == {"a": "ready", "b": "waiting", "c": "waiting"}
    assert set(model.take_notices()) == {Notice("alice", "b", 1, "p"), Notice("alice", "c", 1, "p")}


def test_retry_makes_again_the_inputs_that_were_dropped(model):
    model.submit("alice", 1, 1, [task("a", hold=False), task("x", "a")])
    run(model, "a")
    fail(model, "x")
    assert states(model) == {"a": "released", "x": "erred"}
    model.retry("alice", ["x"])

    assert states(model) == {"a": "ready", "x": "waiting"}


def test_retry_of_what_has_not_failed_changes_nothing(model):
    model.submit("alice", 1, 1, [task("x")])
    before = model.snapshot()
    model.retry("alice", ["x", "nobody"])

    assert model.snapshot() == before


def test_a_task_survives_the_death_of_its_slot_as_often_as_is_allowed(model):
    model.submit("alice", 1, 1, [task("x"), task("y", "x")])
    claim_all(model)
    assert model.abandon_slot("runner", 1, b"killed") == (["x"], [])
    assert states(model) == {"x": "ready", "y": "waiting"}
    claim_all(model)

    assert model.abandon_slot("runner", 1, b"killed") == (["x"], ["x"])
    assert states(model) == {"x": "erred", "y": "erred"}


# --- hold, release, cancel ----------------------------------------------------------------------------------


def test_release_by_the_last_holder_drops_data_and_record(model):
    model.submit("alice", 1, 1, [task("x")])
    model.hold("bob", 1, ["x"])
    run(model, "x")
    model.release("alice", ["x"])
    assert states(model) == {"x": "memory"}
    model.release("bob", ["x"])

    assert model.snapshot() == Model().snapshot() | {"last_attempt": 1}


def test_release_of_a_result_keeps_the_record_as_lineage_of_what_was_made_from_it(model):
    model.submit("alice", 1, 1, [task("a"), task("b", "a")])
    run(model, "a")
    run(model, "b")
    model.release("alice", ["a"])
    assert states(model) == {"a": "released", "b": "memory"}
    model.release("alice", ["b"])

    assert model.records == {}


def test_release_stops_work_that_nobody_wants_any_more(model):
    model.submit("alice", 1, 1, [task("a", hold=False), task("b", "a")])
    claim_all(model)
    model.release("alice", ["b"])

    assert model.records == {}
    assert model.snapshot()["owned"] == {}


def test_release_of_strange_keys_changes_nothing(model):
    model.submit("alice", 1, 1, [task("x")])
    before = model.snapshot()
    model.release("bob", ["x", "nobody"])

    assert model.snapshot() == before


def test_hold_on_a_dropped_result_makes_it_again(model):
    model.submit("alice", 1, 1, [task("a", hold=False), task("b", "a", hold=False), task("c", "b")])
    for key in "abc":
        run(model, key)
    assert states(model) == {"a": "released", "b": "released", "c": "memory"}
    assert model.hold("bob", 3, ["b", "nobody"]) == ["nobody"]

    assert states(model) == {"a": "ready", "b": "waiting", "c": "memory"}


def test_cancel_drops_the_holds_of_the_client_on_all_that_follows(model):
    model.submit("alice", 1, 1, [task("a"), task("b", "a"), task("c", "b")])

    assert model.cancel("alice", ["a", "nobody"]) == ["a", "b", "c"]
    assert model.records == {}


def test_cancel_stops_where_another_client_holds(model):
    model.submit("alice", 1, 1, [task("a"), task("b", "a"), task("c", "b")])
    model.hold("bob", 1, ["b"])

    assert model.cancel("alice", ["a"]) == ["a", "b"]
    assert states(model) == {"a": "ready", "b": "waiting", "c": "waiting"}
    assert model.take_notices() == []


def test_cancel_with_force_takes_the_holds_of_others_and_tells_them(model):
    model.submit("alice", 1, 1, [task("a"), task("b", "a")])
    model.hold("bob", 4, ["b"])

    assert model.cancel("alice", ["a"], force=True) == ["a", "b"]
    assert model.records == {}
    assert model.take_notices() == [Notice("bob", "b", 4, "c")]


def test_expiry_of_a_client_releases_all_it_holds(model):
    model.submit("alice", 1, 1, [task("a"), task("b", "a")])
    model.hold("bob", 1, ["a"])
    model.expire_client("alice")

    assert model.snapshot()["holders"] == {"a": {"bob": 1}}
    assert states(model) == {"a": "ready"}


# --- scattered data -----------------------------------------------------------------------------------------


def test_scattered_data_is_in_memory_while_held(model):
    model.put("alice", 1, "x", SMALL)
    assert states(model) == {"x": "memory"}
    assert model.take_notices() == [Notice("alice", "x", 1, "m")]
    model.release("alice", ["x"])

    assert model.records == {}


def test_scattered_data_that_is_dropped_is_lost_and_errs_what_needs_it_again(model):
    model.put("alice", 1, "x", MEDIUM)
    model.submit("alice", 2, 2, [task("y", "x")])
    run(model, "y")
    model.release("alice", ["x"])
    assert states(model) == {"x": "lost", "y": "memory"}
    model.submit("alice", 3, 3, [task("z", "x")])

    assert states(model)["z"] == "erred"
    assert model.records["z"].blame == "x"


def test_hold_on_lost_data_is_told_that_it_is_lost(model):
    model.put("alice", 1, "x", MEDIUM)
    model.submit("alice", 2, 2, [task("y", "x")])
    run(model, "y")
    model.release("alice", ["x"])
    model.take_notices()
    model.hold("bob", 3, ["x"])

    assert model.take_notices() == [Notice("bob", "x", 3, "l")]


def test_put_keeps_the_data_that_is_there(model):
    model.put("alice", 1, "x", SMALL)
    model.put("bob", 2, "x", LARGE)

    assert model.records["x"].data == SMALL
    assert model.records["x"].holders == {"alice": 1, "bob": 2}


def test_put_finishes_a_task_in_place_of_its_attempt(model):
    model.submit("alice", 1, 1, [task("a"), task("b", "a")])
    attempt = claim_all(model)["a"]
    model.put("bob", 2, "a", SMALL)

    assert states(model) == {"a": "memory", "b": "ready"}
    assert set(model.take_notices()) == {Notice("alice", "a", 1, "m"), Notice("bob", "a", 2, "m")}
    assert model.step("runner", done=[Done("a", attempt, LARGE)]).stale == ["a"]
    assert model.records["a"].data == SMALL


def test_a_future_inside_a_result_is_held_as_long_as_the_result_is_there(model):
    model.put("alice", 1, "inner", SMALL)
    model.put("alice", 2, "outer", SMALL._replace(contains=("inner",)))
    model.release("alice", ["inner"])
    assert states(model) == {"inner": "memory", "outer": "memory"}
    model.release("alice", ["outer"])

    assert model.records == {}


@pytest.mark.parametrize("operation", ["submit", "put", "hold", "release", "cancel", "retry", "expire"])
def test_every_operation_can_be_repeated_without_harm(model, operation):
    model.submit("alice", 1, 1, [task("a", hold=False), task("b", "a"), task("e"), task("x", "e", "b")])
    run(model, "a")
    fail(model, "e")
    call = {
        "submit": lambda: model.submit("bob", 2, 2, [task("n", "b"), task("m", "n", "x")]),
        "put": lambda: model.put("bob", 2, "b", SMALL),
        "hold": lambda: model.hold("bob", 2, ["a", "e"]),
        "release": lambda: model.release("alice", ["b", "x"]),
        "cancel": lambda: model.cancel("alice", ["b"]),
        "retry": lambda: model.retry("alice", ["x"]),
        "expire": lambda: model.expire_client("alice"),
    }[operation]
    call()
    model.check()
    once = model.snapshot()
    call()

    assert model.snapshot() == once


# --- copies -------------------------------------------------------------------------------------------------


@pytest.fixture
def places(model):
    """The model, with two nodes that have two slots each."""
    for node in ("a@one", "b@two"):
        model.heartbeat(node, slots=2)
    return model


def at(place: str, token: str = "7", nbytes: int = 1000) -> Data:
    return Data(nbytes, "ndarray", token=token, place=place)


def queues(model: Model) -> dict[str, list[str]]:
    """Node, or "" for the shared queue -> keys that are ready there."""
    found: dict[str, list[str]] = {}
    for record in model.in_state("ready"):
        found.setdefault(record.home, []).append(record.key)
    return found


def test_a_copy_counts_only_of_the_version_that_the_record_names_and_on_a_live_node(places):
    places.put("alice", 1, "x", at("a@one"))

    assert places.gain("b@two", [("x", "7"), ("x", "6"), ("nobody", "7")]) == ["x", "nobody"]
    assert places.gain("gone", [("x", "7")]) == ["x"]
    assert places.gain(REDIS, [("x", "7")], is_there=False) == ["x"]
    assert places.records["x"].places == {"a@one", "b@two"}


def test_with_the_last_copy_the_result_is_made_again_from_as_deep_as_inputs_are_gone_too(places):
    places.submit("alice", 1, 1, [task("a", hold=False), task("b", "a"), task("c", "b")])
    run(places, "a")
    run(places, "b", data=at("a@one"))
    places.gain("b@two", [("b", "7")])
    places.take_notices()
    places.lose("a@one", [("b", "7")])
    assert states(places) == {"a": "released", "b": "memory", "c": "ready"}
    places.lose("b@two", [("b", "7")])

    assert states(places) == {"a": "ready", "b": "waiting", "c": "waiting"}
    assert places.take_notices() == [Notice("alice", "b", 1, "p")]


def test_a_running_task_goes_on_when_its_input_is_lost_and_says_so_if_it_had_not_read_it(places):
    places.submit("alice", 1, 1, [task("a", hold=False), task("b", "a", retries=1)])
    run(places, "a", data=at("a@one"))
    attempt = claim_all(places)["b"]
    places.lose("a@one", [("a", "7")])
    assert states(places) == {"a": "ready", "b": "processing"}
    places.step("runner", missing=[Missing("b", attempt, (("a", "7", "a@one"),))])

    assert states(places) == {"a": "ready", "b": "waiting"}
    assert places.records["b"].retries == 1


def test_scattered_data_without_copies_is_lost_and_errs_what_waits_for_it(places):
    places.put("alice", 1, "x", at("a@one"))
    places.submit("alice", 2, 1, [task("y", "x")])
    places.take_notices()
    places.lose("a@one", [("x", "7")])

    assert states(places) == {"x": "lost", "y": "erred"}
    assert set(places.take_notices()) == {Notice("alice", "x", 1, "l"), Notice("alice", "y", 2, "l")}


def test_a_copy_is_shed_only_where_as_many_as_are_wanted_are_left(places):
    places.put("alice", 1, "x", at("a@one"))
    assert places.shed("a@one", [("x", "7")]) == []
    places.gain("b@two", [("x", "7")])
    places.gain(REDIS, [("x", "7")])
    places.want_copies(["x"], 2)
    assert places.shed("a@one", [("x", "7")]) == []
    assert places.shed(REDIS, [("x", "7")]) == ["x"]
    places.want_copies(["x"], 1, ["a@one"])
    assert places.shed("a@one", [("x", "7")]) == []

    assert places.shed("b@two", [("x", "7")]) == ["x"]
    assert places.take_mail() == [("b@two", "d 7")]


def test_wanted_copies_are_forgotten_with_the_last_that_wants_the_key(places):
    places.submit("alice", 1, 1, [task("a"), task("b", "a")])
    assert places.want_copies(["a", "nobody"], 2) == ["nobody"]
    run(places, "a", data=at("a@one"))
    run(places, "b")
    assert places.snapshot()["copies"] == ["a"]
    places.release("alice", ["a"])

    assert places.snapshot()["copies"] == []
    assert places.take_mail() == [("a@one", "d 7")]


def test_a_node_that_is_gone_takes_its_copies_along_and_leaves_its_queue_to_others(places):
    places.put("alice", 1, "only", at("a@one"))
    places.put("alice", 1, "both", at("a@one", "8"))
    places.gain("b@two", [("both", "8")])
    places.submit("alice", 2, 1, [task("x", "both", prefer=("a@one",))])
    assert queues(places) == {"a@one": ["x"]}
    places.leave_node("a@one")

    assert states(places) == {"only": "lost", "both": "memory", "x": "ready"}
    assert queues(places) == {"b@two": ["x"]}


def test_a_copy_that_a_node_reports_after_it_was_given_up_is_refused_and_the_task_runs_again(places):
    places.submit("alice", 1, 1, [task("x")])
    ((_, attempt),) = places.step("slot", want=1, node="a@one").claimed
    places.leave_node("a@one")

    assert places.step("slot", done=[Done("x", attempt, at("a@one"))], node="a@one").stale == ["x"]
    assert states(places) == {"x": "ready"}


# --- which node runs it -------------------------------------------------------------------------------------


def test_a_ready_task_goes_to_the_node_that_has_most_bytes_of_its_inputs(places):
    places.put("alice", 1, "small", at("a@one", "1", 1000))
    places.put("alice", 1, "large", at("b@two", "2", 1001))
    places.put("alice", 1, "empty", at("a@one", "3", 0))
    tasks = [task("x", "small", "large"), task("y", "small"), task("z", "empty"), task("w")]
    places.submit("alice", 2, 1, tasks)

    assert queues(places) == {"b@two": ["x"], "a@one": ["y"], "": ["z", "w"]}


def test_a_node_that_takes_no_tasks_is_no_home(places):
    places.put("alice", 1, "x", at("a@one"))
    places.heartbeat("a@one", status="paused")
    places.submit("alice", 2, 1, [task("y", "x"), task("z", prefer=("a@one",))])

    assert queues(places) == {"": ["y", "z"]}


def test_a_slot_takes_from_the_queue_of_its_node_before_the_shared_one_unless_priorities_differ(places):
    places.put("alice", 1, "x", at("a@one"))
    tasks = [task("early"), task("near", "x", order=1), task("urgent", order=2, priority=1)]
    places.submit("alice", 2, 1, tasks)

    claimed = places.step("slot", want=3, node="a@one").claimed
    assert [key for key, _ in claimed] == ["urgent", "near", "early"]


def test_what_a_report_makes_ready_at_its_node_is_taken_before_what_waited_there(places):
    places.put("alice", 1, "x", at("a@one"))
    places.submit("alice", 2, 1, [task("made")])
    ((_, attempt),) = places.step("slot", want=1, node="a@one").claimed
    places.submit("alice", 3, 2, [task("waited", "x"), task("next", "made", order=1)])
    reply = places.step("slot", [Done("made", attempt, at("a@one", "9"))], want=1, node="a@one")

    assert [key for key, _ in reply.claimed] == ["next"]


def test_an_idle_slot_steals_where_to_wait_costs_more_than_to_move_the_inputs(places):
    places.put("alice", 1, "x", at("a@one"))
    places.submit("alice", 2, 1, [task("y", "x")])

    assert places.step("thief", want=1, node="b@two", idle=["slot"]).claimed != []


def test_nobody_steals_from_a_node_with_an_idle_slot(places):
    places.put("alice", 1, "x", at("a@one"))
    places.step("slot", want=1, node="a@one")
    places.submit("alice", 2, 1, [task("y", "x")])

    assert places.step("thief", want=1, node="b@two", idle=["slot"]).claimed == []


def test_tasks_of_a_node_never_use_more_resources_than_it_has(places):
    places.heartbeat("b@two", resources={"GPU": 1})
    constraint = '{"resources":{"GPU":1}}'
    places.submit("alice", 1, 1, [task("x", constraint=constraint), task("y", constraint=constraint)])
    assert places.step("one", want=9, node="a@one").claimed == []
    ((key, attempt),) = places.step("two", want=9, node="b@two").claimed
    assert places.step("three", want=9, node="b@two").claimed == []
    places.step("two", [Done(key, attempt, SMALL)], node="b@two")

    assert [k for k, _ in places.step("three", want=9, node="b@two").claimed] == ["y"]


def test_what_no_live_node_may_run_is_unrunnable_and_can_be_refused(places):
    elsewhere = '{"workers":["c@three"]}'
    places.submit("alice", 1, 1, [task("x", constraint=elsewhere), task("y", "x"), task("z")])
    assert places.unrunnable() == {elsewhere: 1}
    places.refuse(elsewhere, b"refused")

    assert states(places) == {"x": "erred", "y": "erred", "z": "ready"}


def test_a_paused_node_will_take_tasks_again_and_a_retiring_one_will_not(places):
    places.submit("alice", 1, 1, [task("x")])
    for node in ("a@one", "b@two"):
        places.heartbeat(node, status="paused")
    assert places.unrunnable() == {}
    for node in ("a@one", "b@two"):
        places.heartbeat(node, status="retiring")

    assert places.unrunnable() == {"": 1}


# --- given inputs -------------------------------------------------------------------------------------------


def test_an_input_that_is_there_and_small_becomes_part_of_the_task(model):
    model.put("alice", 1, "x", SMALL)
    model.submit("alice", 2, 2, [task("y", "x")])
    assert model.records["y"].given == {1: ("x", b"abc")}
    assert model.records["y"].deps == ()

    model.release("alice", ["x"])
    assert states(model) == {"y": "ready"}


def test_inputs_that_are_large_hold_others_or_are_not_there_are_depended_on(model):
    model.put("alice", 1, "inner", SMALL)
    model.put("alice", 2, "outer", SMALL._replace(contains=("inner",)))
    model.put("alice", 3, "large", LARGE)
    model.put("alice", 4, "medium", MEDIUM)
    inputs = ("outer", "large", "inner", "medium", "new")
    model.submit("alice", 5, 1, [task("new"), task("y", *inputs)])
    assert model.records["y"].deps == ("outer", "large", "medium", "new")
    assert model.records["y"].given == {3: ("inner", b"abc")}


def test_a_task_is_given_no_more_than_it_has_room_for(model):
    value = Data(500, "bytes", bytes(500))
    inputs = [f"x{i}" for i in range(10)]
    for i, key in enumerate(inputs):
        model.put("alice", i, key, value)
    model.submit("alice", 10, 1, [task("y", *inputs)])
    assert len(model.records["y"].given) == 8
    assert model.records["y"].deps == ("x8", "x9")
