"""Scripts that are sent ahead: others may use the link meanwhile, and what breaks loses nothing."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable

import pytest

from celery_mem.errors import UnknownClientError, UnknownDependencyError
from celery_mem.state.store import NewTask, Store


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    store = make_store()
    store.renew_client("alice", join=True)
    launch(store, "first")()  # Redis knows the script
    return store


def launch(store: Store, *keys: str, deps: tuple[str, ...] = (), client: str = "alice"):
    tasks = [NewTask(key, "f", b"call", deps=deps) for key in keys]
    return store.launch_submit(client, 1, tasks, [("f", b"code")])


def known(store: Store) -> list[str]:
    locations = zip("abc", store.locate(["a", "b", "c"]), strict=True)
    return [key for key, location in locations if location is not None]


def test_a_launched_script_gives_its_reply_when_it_is_asked_for(store):
    land = launch(store, "a")
    assert known(store) == ["a"]
    assert land()[0] == 2
    assert land()[0] == 2


def test_one_after_the_other_each_gets_its_own_reply(store):
    lands = [launch(store, "a"), launch(store, "b"), launch(store, "c")]
    assert [land()[0] for land in reversed(lands)] == [4, 3, 2]
    assert known(store) == ["a", "b", "c"]


def test_what_a_script_refuses_is_raised_when_it_lands_and_harms_no_other_call(store):
    bad, good = launch(store, "a", deps=("ghost",)), launch(store, "b")
    assert known(store) == ["b"]
    with pytest.raises(UnknownDependencyError):
        bad()
    assert good()[0] == 2
    with pytest.raises(UnknownClientError):
        launch(store, "c", client="nobody")()


def test_what_its_callers_have_in_hand_is_not_kept_alive_by_an_error(store):
    class Thing:
        pass

    def call_with_a_thing():
        thing = Thing()
        with pytest.raises(UnknownDependencyError):
            launch(store, "a", deps=("ghost",))()
        return weakref.ref(thing)

    gc.collect()
    gc.disable()
    try:
        assert call_with_a_thing()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_connection_that_breaks_is_replaced_and_nothing_is_lost(store, when):
    store.link.call("PING")
    if when == "before":
        store.link.connection().disconnect()
    land = launch(store, "a")
    if when == "between":
        store.link.connection().disconnect()
    assert store.link.call("PING") == b"PONG"
    assert land()[0] in {2, 3}  # a repeat is a submission of its own, and finds the task made
    assert known(store) == ["a"]


def test_a_script_that_redis_forgot_is_sent_again(store):
    store.link.call("SCRIPT", "FLUSH")
    assert launch(store, "a")()[0] == 2


def test_a_forked_child_does_not_read_what_its_parent_waits_for(store):
    land = launch(store, "a")
    pid = os.fork()
    if pid == 0:
        os._exit(0 if store.link.call("PING") == b"PONG" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert land()[0] == 2
