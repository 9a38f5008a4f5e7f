"""restart() ends everything and tells everybody; restart_workers() replaces processes and keeps the state."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import psutil
import pytest
from celery import Celery

from celery_mem import Client
from celery_mem.errors import FutureCancelledError, RestartedError, UnsupportedPoolError
from celery_mem.graph.tickets import broker_url
from celery_mem.state import store as states
from celery_mem.state.audit import read
from tests import tasks
from tests.deployment import Deployment, agents_of


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """Two nodes of two processes each, whose workers have tasks of an app of their own too."""
    with Deployment(ticket_lease=2.0) as it:
        it.start_coordinator()
        for name in ("w0", "w1"):
            it.start_worker(name, app="tests.worker.shop", slots=2)
        yield it


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    deployment.forget_runs()
    with deployment.client() as client:
        yield client
    deployment.check_empty()


def pids(deployment: Deployment, client: Client, n: int = 4) -> set[int]:
    """The processes of all slots."""
    where = (deployment.url, "pids")
    return set(client.gather(client.map(tasks.counted_here, [where] * n, [0.2] * n, pure=False), timeout=60))


def pool_children(deployment: Deployment) -> set[int]:
    """The processes that both workers run tasks in."""
    found = set()
    for pid in (deployment.pid("w0"), deployment.pid("w1")):
        agents = {agent.pid for agent in agents_of(pid)}
        found |= {child.pid for child in psutil.Process(pid).children()} - agents
    return found


@pytest.mark.parametrize("task", [tasks.spin, tasks.hold_the_gil])
def test_a_restart_ends_all_tasks_and_tells_every_client(
    deployment: Deployment, client: Client, task: object
) -> None:
    before = pids(deployment, client)
    with deployment.client() as other, deployment.client(name="somebody", lease=60) as third:
        stuck = [other.submit(task, (deployment.url, f"stuck{i}"), pure=False) for i in range(12)]
        done = third.submit(tasks.inc, 1)
        third.publish_dataset(one=third.scatter([1, 2]))
        deployment.wait_until(lambda: len(deployment.runs("stuck")) == 4, "all slots to be stuck")
        busy = pool_children(deployment)
        client.restart(timeout=60)
        for future in (*stuck, done):
            deployment.wait_until(future.cancelled, "its client to hear of it")
            with pytest.raises(FutureCancelledError, match=rf"restarted by client {client.id}"):
                future.result(timeout=10)
        store = deployment.store()
        contents = read(store)
        assert (contents.records, contents.held) == ({}, {})
        assert third.list_datasets() == ()
        store.link.close()
        # All of them go on with whom they know.
        assert other.submit(tasks.inc, 2).result(timeout=60) == 3
        assert third.submit(tasks.inc, 1).result(timeout=60) == 2
        assert third.scatter(5).result(timeout=60) == 5
        assert pids(deployment, client).isdisjoint(before)
        deployment.wait_until(lambda: pool_children(deployment).isdisjoint(busy), "what was stuck to be gone")


def test_what_no_agent_saw_of_a_restart_is_done_by_the_next(deployment: Deployment, client: Client) -> None:
    before = pids(deployment, client)
    stuck = [client.submit(tasks.spin, (deployment.url, f"stuck{i}"), pure=False) for i in range(4)]
    deployment.wait_until(lambda: len(deployment.runs("stuck")) == 4, "all slots to be stuck")
    busy = pool_children(deployment)
    for name in ("w0", "w1"):
        for agent in agents_of(deployment.pid(name)):
            agent.kill()
    client.restart(timeout=60)
    for future in stuck:
        deployment.wait_until(future.cancelled, "its client to hear of it")
    deployment.wait_until(lambda: pool_children(deployment).isdisjoint(busy), "what was stuck to be gone")
    assert pids(deployment, client).isdisjoint(before)


def test_a_call_that_meets_a_restart_says_so_and_leaves_nothing_behind(
    deployment: Deployment, client: Client
) -> None:
    with deployment.client() as other:
        kept = other.submit(tasks.inc, 1)
        kept.result(timeout=60)
        with other.session.order:  # it cannot look yet what became of the notice that it got
            client.restart(timeout=60)
            with pytest.raises(RestartedError, match="restarted by client"):
                other.map(tasks.add, [kept] * 100, range(100))
        assert kept.cancelled()
        assert other.submit(tasks.inc, 2).result(timeout=60) == 3


def test_a_restart_that_breaks_off_halfway_is_finished_by_whoever_comes(
    deployment: Deployment, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    futures = client.map(tasks.inc, range(3000))
    client.gather(futures, timeout=60)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with deployment.client() as other:
        monkeypatch.setattr(states, "clear", die)
        with pytest.raises(KeyboardInterrupt):
            other.restart()
        monkeypatch.undo()
        for future in futures[:3]:
            deployment.wait_until(future.cancelled, "its client to hear of it")
            with pytest.raises(FutureCancelledError, match=rf"restarted by client {other.id}"):
                future.result(timeout=30)
    assert client.gather(client.map(tasks.inc, range(10)), timeout=60) == list(range(1, 11))


def test_two_restarts_at_once_are_both_done(deployment: Deployment, client: Client) -> None:
    with deployment.client() as other:
        others = threading.Thread(target=other.restart)
        others.start()
        client.restart(timeout=60)
        others.join()
        assert client.submit(tasks.inc, 1).result(timeout=60) == 2
        assert other.submit(tasks.inc, 2).result(timeout=60) == 3


def test_another_task_of_celery_is_not_killed_by_a_restart(deployment: Deployment, client: Client) -> None:
    before = pids(deployment, client)
    url = broker_url(deployment.url)
    with Celery("shop", broker=url, backend=url) as app:
        where = [(deployment.url, f"price{n}") for n in range(4)]
        results = [
            app.send_task("tests.worker.shop.slow_price", (n, 2.0, where[n]), queue="shop") for n in range(4)
        ]
        try:
            deployment.wait_until(lambda: len(deployment.runs("price")) == 4, "they to run")
            client.restart(timeout=60)
            assert [result.get(timeout=60) for result in results] == [0, 3, 6, 9]
        finally:
            for result in results:
                result.forget()
    assert pids(deployment, client).isdisjoint(before)


def test_processes_are_replaced_and_the_state_stays(deployment: Deployment, client: Client) -> None:
    before = pids(deployment, client)
    done = client.submit(tasks.inc, 1)
    assert done.result(timeout=60) == 2
    running = client.submit(tasks.counted_here, (deployment.url, "again"), 2.0)
    deployment.wait_until(lambda: deployment.runs("again"), "it to run")
    nodes = sorted(deployment.node(name) for name in ("w0", "w1"))
    assert client.restart_workers(timeout=60) == dict.fromkeys(nodes, "OK")
    assert running.result(timeout=60) not in before
    assert deployment.runs("again")["again"] in (2, 3)  # it may have moved to the other node just before
    assert done.result(timeout=60) == 2


def test_only_processes_can_be_replaced(deployment: Deployment, client: Client) -> None:
    deployment.start_worker("t0", pool="threads")
    try:
        with pytest.raises(UnsupportedPoolError, match=rf"{deployment.node('t0')} run in its own process"):
            client.restart_workers([deployment.node("t0")])
    finally:
        deployment.signal("t0", 15)
        deployment.wait_gone("t0")
