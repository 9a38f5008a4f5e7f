"""Tasks that run are stopped: when they are cancelled, or out of time. On prefork; elsewhere they run on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from celery_mem import Client
from celery_mem.errors import FutureCancelledError, KilledWorkerError, TaskTimeoutError
from celery_mem.state.keys import TASK
from tests import tasks
from tests.deployment import Deployment


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A node of one process and a node of one thread."""
    with Deployment(ticket_lease=2.0, allowed_failures=1) as it:
        it.start_coordinator()
        it.start_worker("w0")
        it.start_worker("t0", pool="threads")
        yield it


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    deployment.forget_runs()
    with deployment.client() as client:
        yield client
    deployment.check_empty()


def start(deployment: Deployment, client: Client, func: Any, name: str, *args: Any, **options: Any) -> Any:
    """Submit a task to the node of processes, and wait until it runs."""
    options.setdefault("workers", deployment.node("w0"))
    future = client.submit(func, (deployment.url, name), *args, **options)
    deployment.wait_until(lambda: deployment.runs(name), f"{name} to run")
    return future


def pid_of_slot(deployment: Deployment, client: Client) -> int:
    """The process in which the slot runs tasks, once it is free."""
    future = client.submit(
        tasks.counted_here, (deployment.url, "after"), 0, workers=deployment.node("w0"), pure=False
    )
    return int(future.result(timeout=60))


def ended(deployment: Deployment, name: str) -> list[str]:
    return [text.decode() for text in deployment.redis.lrange(f"ended:{name}", 0, -1)]


def test_a_cancelled_task_gets_an_exception_and_its_process_goes_on(
    deployment: Deployment, client: Client
) -> None:
    before = pid_of_slot(deployment, client)
    future = start(deployment, client, tasks.spin, "polite")
    future.cancel(reason="enough")
    with pytest.raises(FutureCancelledError, match="enough"):
        future.result()
    assert pid_of_slot(deployment, client) == before
    assert ended(deployment, "polite") == ["TaskInterrupt cancelled"]


@pytest.mark.parametrize("how", ["holds the GIL", "catches the exception and goes on"])
def test_a_cancelled_task_that_does_not_end_loses_its_process(
    deployment: Deployment, client: Client, how: str
) -> None:
    before = pid_of_slot(deployment, client)
    if how == "holds the GIL":
        future = start(deployment, client, tasks.hold_the_gil, how)
    else:
        future = start(deployment, client, tasks.spin, how, swallows=True)
    future.cancel()
    assert pid_of_slot(deployment, client) != before


def test_what_another_client_holds_is_not_stopped_unless_by_force(
    deployment: Deployment, client: Client
) -> None:
    future = start(deployment, client, tasks.wait_for_word, "shared", "word")
    with deployment.client() as other:
        theirs = other.future(future.key)
        future.cancel()
        deployment.redis.rpush("go:shared", "x")
        assert theirs.result(timeout=60) == "word"
        assert deployment.runs() == {"shared": 1}
    again = start(deployment, client, tasks.spin, "forced")
    with deployment.client() as other:
        other.cancel(other.future(again.key), force=True)
        assert pid_of_slot(deployment, client)
    assert ended(deployment, "forced") == ["TaskInterrupt cancelled"]


def test_what_a_task_of_another_client_needs_is_not_stopped(deployment: Deployment, client: Client) -> None:
    future = start(deployment, client, tasks.wait_for_word, "needed", "word")
    with deployment.client() as other:
        theirs = other.submit(tasks.add, other.future(future.key), ".")
        other.session.flush()
        future.cancel()
        time.sleep(0.5)  # several times as long as an agent takes to have it end
        deployment.redis.rpush("go:needed", "x")
        assert theirs.result(timeout=60) == "word."
        assert deployment.runs() == {"needed": 1}


def test_what_runs_for_a_cancelled_input_is_stopped_too(deployment: Deployment, client: Client) -> None:
    data = client.scatter(list(range(100_000)), as_one=True)  # too large to become part of the task
    start(deployment, client, tasks.spin_on, "dependent", data)
    client.cancel(data)
    assert pid_of_slot(deployment, client)
    assert ended(deployment, "dependent") == ["TaskInterrupt cancelled"]


def test_what_only_waits_behind_a_cancelled_task_is_not_to_blame(
    deployment: Deployment, client: Client
) -> None:
    """The slot took many short tasks at once, and one of them keeps the others from being handed back."""
    here = {"workers": deployment.node("w0")}
    before = client.map(tasks.inc, range(300), **here)
    stuck = client.submit(tasks.hold_the_gil, (deployment.url, "stuck"), **here)
    behind = client.map(tasks.inc, range(300, 600), **here)
    deployment.wait_until(lambda: deployment.runs("stuck"), "it to run")
    stuck.cancel()
    assert client.gather([*before, *behind], timeout=60) == list(range(1, 601))
    names = [deployment.key(f"t:{future.key}") for future in behind]
    assert [name for name in names if deployment.redis.hget(name, TASK["deaths"])] == []


def test_a_task_that_takes_too_long_fails_and_says_where(deployment: Deployment, client: Client) -> None:
    before = pid_of_slot(deployment, client)
    future = start(deployment, client, tasks.spin, "slow", timeout=0.3)
    with pytest.raises(TaskTimeoutError) as info:
        future.result(timeout=60)
    assert info.value.args == (future.key, 0.3, deployment.node("w0"))
    assert pid_of_slot(deployment, client) == before
    assert ended(deployment, "slow") == ["TaskInterrupt timeout"]


def test_a_task_that_takes_too_long_and_does_not_end_loses_its_process(
    deployment: Deployment, client: Client
) -> None:
    before = pid_of_slot(deployment, client)
    future = start(deployment, client, tasks.hold_the_gil, "slower", timeout=0.3)
    with pytest.raises(TaskTimeoutError, match=rf"{future.key} ran for longer than its timeout of 0\.3 s"):
        future.result(timeout=60)
    assert pid_of_slot(deployment, client) != before
    assert deployment.runs()["slower"] == 1, deployment.log("w0")


def test_a_task_that_takes_too_long_is_tried_again_as_often_as_it_may(
    deployment: Deployment, client: Client
) -> None:
    future = start(deployment, client, tasks.spin_at_first, "retried", 2, timeout=0.3, retries=2)
    assert future.result(timeout=60) == "done"
    assert deployment.runs()["retried"] == 3


def test_a_task_that_ends_in_time_is_left_alone(deployment: Deployment, client: Client) -> None:
    where = (deployment.url, "quick")
    futures = client.map(tasks.counted, [where] * 50, range(50), timeout=30)
    assert client.gather(futures, timeout=60) == list(range(50))


def test_a_time_limit_holds_under_an_agent_that_was_killed_meanwhile(
    deployment: Deployment, client: Client
) -> None:
    import psutil

    future = start(deployment, client, tasks.spin, "orphan", timeout=3.0)
    (agent,) = [
        p for p in psutil.Process(deployment.pid("w0")).children() if "agent" in " ".join(p.cmdline())
    ]
    agent.kill()
    with pytest.raises(TaskTimeoutError):
        future.result(timeout=60)


def test_in_threads_the_future_fails_in_time_and_the_task_runs_on(
    deployment: Deployment, client: Client
) -> None:
    node = deployment.node("t0")
    future = start(deployment, client, tasks.wait_for_word, "thread", workers=node, timeout=0.3)
    with pytest.raises(TaskTimeoutError):
        future.result(timeout=60)
    deployment.redis.rpush("go:thread", "x")
    again = start(deployment, client, tasks.wait_for_word, "thread2", workers=node)
    again.cancel()
    deployment.redis.rpush("go:thread2", "x")
    assert client.submit(tasks.inc, 1, workers=node).result(timeout=60) == 2


def test_a_task_that_waits_for_what_cannot_be_stopped_does_not_make_it_again_for_ever(
    deployment: Deployment, client: Client
) -> None:
    """Both are in the one process of the node: to stop the inner one, both must be killed."""
    future = start(deployment, client, tasks.wait_for_inner, "outer", deployment.node("w0"))
    for n in (1, 2):
        deployment.wait_until(
            lambda n=n: deployment.runs("inner").get("inner") == n, f"run {n} of the inner task"
        )
        client.cancel(client.future("inner"), force=True)
    with pytest.raises(KilledWorkerError, match=r"2 times: on .*: it was killed to stop task inner;"):
        future.result(timeout=60)
    assert deployment.runs("outer") == {"outer": 2}


@pytest.mark.parametrize("timeout", [0, -1, "long"])
def test_a_timeout_that_is_none_is_refused(client: Client, timeout: Any) -> None:
    with pytest.raises(ValueError, match="timeout: the seconds that the task may run"):
        client.submit(time.sleep, 1, timeout=timeout)
