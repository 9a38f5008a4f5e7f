"""The node agent: whom it gives up, when it goes, how small it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from celery_mem.errors import KilledWorkerError
from celery_mem.memory.process import _started, is_alive, own_identity
from celery_mem.state.audit import read
from celery_mem.state.keys import NODE, TASK, process_of
from celery_mem.state.records import read_deaths
from celery_mem.worker.agent import Agent
from tests.deployment import wait_until
from tests.tasks import inc
from tests.worker.conftest import Space

NEWS = {"queue": "queue", "slots": "2", "pid": str(os.getpid()), "pool": "prefork", "hostname": "host"}


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands in for a pool child."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def agent(space: Space) -> Iterator[Agent]:
    agent = Agent("node", os.getpid(), NEWS, space.store)
    agent.renew()
    yield agent
    space.store.leave_node("node")


def slot_of(process: subprocess.Popen[bytes]) -> str:
    return f"node|{process.pid}-{_started(process.pid)}.1"


def claim(space: Space, slot: str, **kwargs: Any) -> Any:
    """Submit a task and have `slot` take it."""
    future = space.submit(inc, len(read(space.store).records), **kwargs)
    assert space.store.step(slot, "node").taken
    return future


def deaths(space: Space, future: Any) -> int:
    return len(
        read_deaths(space.store.link.call("HGET", space.store.keys.of("task", future.key), TASK["deaths"]))
    )


def test_a_process_is_known_by_its_pid_and_its_start(sleeper: subprocess.Popen[bytes]) -> None:
    identity = process_of(slot_of(sleeper))
    assert is_alive(own_identity())
    assert is_alive(identity)
    assert not is_alive(f"{sleeper.pid}-1")
    sleeper.kill()
    wait_until(lambda: not is_alive(identity), "the zombie to count as ended")
    sleeper.wait()
    assert not is_alive(identity)


def test_what_a_dead_process_was_running_is_ready_again_and_the_living_are_left_alone(
    space: Space, agent: Agent, sleeper: subprocess.Popen[bytes]
) -> None:
    lost = claim(space, slot_of(sleeper))
    own = f"node|{own_identity()}.1"
    kept = claim(space, own)
    assert sorted(agent.bury()) == sorted([slot_of(sleeper), own])
    sleeper.kill()
    wait_until(lambda: agent.bury() == [own], "the dead process to be noticed")
    states = {key: row.state for key, row in read(space.store).records.items()}
    assert states == {lost.key: "ready", kept.key: "processing"}
    assert deaths(space, lost) == 1
    space.store.abandon_slot(own, "node", "", {})


def test_a_slot_of_an_earlier_process_with_the_same_pid_is_given_up(space: Space, agent: Agent) -> None:
    future = claim(space, f"node|{os.getpid()}-1.1")
    assert agent.bury() == []
    assert read(space.store).records[future.key].state == "ready"


def test_a_task_that_ends_too_many_processes_errs_and_is_named(space: Space, agent: Agent) -> None:
    allowed = space.settings.allowed_failures
    future = space.submit(inc, 1, key="poison")
    for i in range(allowed + 1):
        assert space.store.step(f"node|{os.getpid()}-1.{i}", "node").taken
        agent.bury()
    with pytest.raises(KilledWorkerError) as info:
        future.result(timeout=10)
    deaths = ("on node: its worker ended",) * (allowed + 1)
    assert info.value.args == ("poison", "inc", deaths, ())
    assert f"task poison (inc) was running when its process died, {allowed + 1} times" in str(info.value)
    assert f"mem_allowed_failures is {allowed}" in str(info.value)


def test_of_several_tasks_that_died_together_all_are_named(space: Space, agent: Agent) -> None:
    futures = space.map(inc, [1, 2], key=["a", "b"])
    for i in range(space.settings.allowed_failures + 1):
        slot = f"node|{os.getpid()}-1.{i}"
        while space.store.step(slot, "node", want=2).taken:
            pass
        agent.bury()
    for future, other in zip(futures, ("b", "a"), strict=True):
        with pytest.raises(KilledWorkerError, match=rf"task {future.key} .* beside {other} the last time"):
            future.result(timeout=10)


@pytest.mark.parametrize("how", ["the worker announced its end", "the deployment is told to stop"])
def test_a_process_that_is_stopped_on_purpose_was_not_killed_by_its_tasks(
    space: Space, agent: Agent, how: str
) -> None:
    future = claim(space, f"node|{os.getpid()}-1.1")
    if how == "the worker announced its end":
        space.store.heartbeat("node", slots="0")
    else:
        agent.is_stopping = True
    agent.bury()
    assert read(space.store).records[future.key].state == "ready"
    assert deaths(space, future) == 0


def test_a_node_that_was_given_up_in_error_announces_itself_again(space: Space, agent: Agent) -> None:
    space.store.leave_node("node")
    agent.renew()
    field = space.store.link.call("HGET", space.store.keys.of("node", "node"), NODE["slots"])
    assert field == b"2"


def test_a_node_that_is_watched_tells_of_its_memory_more_often(
    space: Space, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, told = 1_000.0, []
    monkeypatch.setattr("celery_mem.worker.agent.time.monotonic", lambda: clock)
    monkeypatch.setattr(agent, "renew", lambda: told.append(clock))

    def told_in(seconds: float) -> int:
        nonlocal clock
        before, end = len(told), clock + seconds
        while clock < end:
            agent._is_watched = space.store.check_generation()
            agent._renew_when_due()
            clock += 0.25
        return len(told) - before

    pause = space.settings.node_lease / 4
    assert told_in(4 * pause) == 4
    space.store.watch("somebody", records=False)
    assert told_in(10) == 20
    space.store.end_watch("somebody")
    assert told_in(4 * pause) <= 5


def test_the_agent_signs_the_node_off_when_the_last_of_its_slots_has_ended(
    space: Space, agent: Agent, sleeper: subprocess.Popen[bytes]
) -> None:
    claim(space, slot_of(sleeper))
    assert not agent._sign_off()
    field = space.store.link.call("HGET", space.store.keys.of("node", "node"), NODE["slots"])
    assert field == b"0"  # meanwhile it gets no tickets
    sleeper.kill()
    wait_until(agent._sign_off, "the node to be signed off")
    assert space.store.link.call("ZCARD", space.store.keys.fixed("nodes")) == 0


def test_the_agent_of_a_worker_that_was_replaced_leaves_the_new_ones_node_alone(
    space: Space, agent: Agent
) -> None:
    space.store.heartbeat("node", **(NEWS | {"pid": "1"}))
    assert agent._sign_off()
    assert space.store.link.call("ZCARD", space.store.keys.fixed("nodes")) == 1


def test_an_agent_needs_neither_celery_nor_dask_nor_numpy() -> None:
    heavy = ["celery", "kombu", "dask", "numpy", "pandas", "cloudpickle"]
    code = f"import sys, celery_mem.worker.agent; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
