"""Real Celery workers: our tasks beside an app's own, and every way in which a worker ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from celery import Celery
from celery.concurrency.prefork import TaskPool as PreforkPool

from celery_mem import Client
from celery_mem.errors import KilledWorkerError, UnsupportedPoolError
from celery_mem.graph.tickets import broker_url
from celery_mem.state.keys import NODE
from celery_mem.worker.node import supported_pool
from tests import tasks
from tests.deployment import Deployment, agents_of, wait_until, wait_until_ended

APP = "tests.worker.shop"
SLICE_S = 0.5


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """Workers of an app with tasks of its own, whose children end after every few tickets."""
    with Deployment(slice=SLICE_S, node_lease=2.0, ticket_lease=2.0, allowed_failures=1) as it:
        it.start_coordinator()
        it.start_worker("w0", "--max-tasks-per-child", "2", app=APP, slots=2)
        yield it


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    deployment.forget_runs()
    with deployment.client() as client:
        yield client
    deployment.check_empty()


@pytest.fixture(scope="module")
def shop(deployment: Deployment) -> Iterator[Celery]:
    """The app as its other processes see it."""
    url = broker_url(deployment.url)
    with Celery("shop", broker=url, backend=url) as app:
        app.conf.task_default_queue = "shop"
        yield app


def children_of(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children()


def ran_once(deployment: Deployment, names: list[str]) -> bool:
    return deployment.runs() == dict.fromkeys(names, 1)


# --- beside an app's own tasks ------------------------------------------------------------------------------


def test_an_apps_own_tasks_work_beside_ours(deployment: Deployment, client: Client, shop: Celery) -> None:
    futures = client.map(tasks.inc, range(50))
    answers = [shop.send_task("tests.worker.shop.price", (i,)) for i in range(10)]
    assert [a.get(timeout=60) for a in answers] == [3 * i for i in range(10)]
    assert client.gather(futures) == list(range(1, 51))


def test_own_tasks_get_their_turn_while_the_graph_would_keep_all_slots_busy(
    deployment: Deployment, client: Client, shop: Celery
) -> None:
    # More than a busy machine gets done in the time of this test; what is left is released at its end.
    futures = client.map(tasks.counted, [(deployment.url, f"n{i}") for i in range(2000)], seconds=0.02)
    wait_until(deployment.runs, "the graph to run")
    waits = []
    for i in range(3):
        started = time.monotonic()
        assert shop.send_task("tests.worker.shop.price", (i,)).get(timeout=60) == 3 * i
        waits.append(time.monotonic() - started)
    assert not all(f.done() for f in futures)
    assert min(waits) < 3 * SLICE_S
    del futures
    assert set(deployment.runs().values()) == {1}


def test_children_that_end_after_a_few_tickets_lose_nothing(deployment: Deployment, client: Client) -> None:
    futures = client.map(tasks.counted_here, [(deployment.url, f"n{i}") for i in range(400)], seconds=0.01)
    assert len(set(client.gather(futures))) > 3
    assert ran_once(deployment, [f"n{i}" for i in range(400)])


def test_tickets_that_wait_behind_long_tasks_of_the_app_are_replaced_and_do_no_harm(
    deployment: Deployment, client: Client, shop: Celery
) -> None:
    answers = [shop.send_task("tests.worker.shop.slow_price", (i, 3.0)) for i in range(2)]
    futures = client.map(tasks.counted, [(deployment.url, f"n{i}") for i in range(100)])
    assert client.gather(futures) == [0] * 100
    assert [a.get(timeout=60) for a in answers] == [0, 3]
    assert ran_once(deployment, [f"n{i}" for i in range(100)])


# --- ends ---------------------------------------------------------------------------------------------------


def test_a_child_that_is_killed_has_its_task_run_again(deployment: Deployment, client: Client) -> None:
    assert client.submit(tasks.die, (deployment.url, "victim"), 1).result(timeout=60) == "alive"
    assert deployment.runs() == {"victim": 2}


def test_a_task_that_kills_too_many_children_errs_and_is_named(
    deployment: Deployment, client: Client
) -> None:
    future = client.submit(tasks.die, (deployment.url, "poison"), 1000, key="the-poison")
    with pytest.raises(KilledWorkerError, match=r"the-poison \(die\) .* 2 times: on w0@.*: SIGKILL;"):
        future.result(timeout=60)
    assert deployment.runs() == {"poison": 2}


def test_an_agent_is_small_and_a_new_one_is_started_if_it_is_killed(
    deployment: Deployment, client: Client
) -> None:
    pid = deployment.pid("w0")
    (first,) = agents_of(pid)
    assert first.memory_info().rss < 40e6
    first.kill()
    wait_until(lambda: [p for p in agents_of(pid) if p != first], "another agent")
    assert client.submit(tasks.inc, 1).result(timeout=60) == 2


def test_connections_of_every_kind_that_are_cut_under_load_come_back(
    deployment: Deployment, client: Client
) -> None:
    where = [(deployment.url, f"n{i}") for i in range(300)]
    futures = client.map(tasks.counted, where, range(300), seconds=0.01)
    for _ in range(3):
        n = len(deployment.runs())
        deployment.redis.execute_command("CLIENT", "KILL", "SKIPME", "yes", "TYPE", "normal")
        deployment.redis.execute_command("CLIENT", "KILL", "SKIPME", "yes", "TYPE", "pubsub")
        deployment.wait_until(lambda n=n: len(deployment.runs()) > n, "the graph to go on")
    assert client.gather(futures, timeout=60) == list(range(300))
    assert ran_once(deployment, [f"n{i}" for i in range(300)])
    assert client.submit(tasks.inc, 1).result(timeout=60) == 2


def test_a_warm_shutdown_ends_after_what_runs_and_loses_nothing(
    deployment: Deployment, client: Client
) -> None:
    deployment.start_worker("w1", app=APP, slots=2)
    pid = deployment.pid("w1")
    left = [*children_of(pid), psutil.Process(pid)]
    where = [(deployment.url, f"n{i}") for i in range(300)]
    futures = client.map(tasks.counted, where, range(300), seconds=0.02)
    wait_until(lambda: len(deployment.runs()) > 20, "the graph to run")
    started = time.monotonic()
    deployment.signal("w1", signal.SIGTERM)
    deployment.wait_gone("w1")
    assert time.monotonic() - started < SLICE_S + 10
    assert client.gather(futures, timeout=60) == list(range(300))
    assert ran_once(deployment, [f"n{i}" for i in range(300)])
    assert all(wait_until_ended(p.pid) for p in left), "an orphan"
    deployment.wait_until(
        lambda: list(client.info()["nodes"]) == [deployment.node("w0")], "the node to leave"
    )


def test_a_worker_whose_main_process_is_killed_is_replaced_by_one_of_the_same_name(
    deployment: Deployment, client: Client
) -> None:
    deployment.start_worker("w1", app=APP, slots=1)
    where = [(deployment.url, f"n{i}") for i in range(200)]
    futures = client.map(tasks.counted, where, range(200), seconds=0.02)
    wait_until(lambda: len(deployment.runs()) > 20, "the graph to run")
    left = children_of(deployment.pid("w1"))
    deployment.kill("w1")
    deployment.start_worker("w1", app=APP, slots=1)
    assert client.gather(futures, timeout=60) == list(range(200))
    assert all(wait_until_ended(p.pid) for p in left), "an orphan"
    slots = deployment.redis.hget(deployment.key(f"node:{deployment.node('w1')}"), NODE["slots"])
    assert slots == b"1"
    deployment.signal("w1", signal.SIGTERM)
    deployment.wait_gone("w1")


def test_what_a_node_that_vanished_whole_was_running_runs_elsewhere_after_its_lease(
    deployment: Deployment, client: Client
) -> None:
    deployment.start_worker("w1", app=APP, slots=2)
    futures = [client.submit(tasks.wait_for_word, (deployment.url, f"n{i}"), i) for i in range(4)]
    wait_until(lambda: len(deployment.runs()) == 4, "all slots to be busy")
    parent = psutil.Process(deployment.pid("w1"))
    whole = [parent, *parent.children()]
    for process in whole:
        process.suspend()  # so that none sees another's end
    for process in whole:
        with suppress(psutil.NoSuchProcess):  # children go with their parent
            process.kill()
    deployment.wait_gone("w1")
    deployment.redis.rpush("go:n0", *"words")
    for i in range(4):
        deployment.redis.rpush(f"go:n{i}", *"words")
    assert client.gather(futures, timeout=60) == [0, 1, 2, 3]
    assert sum(deployment.runs().values()) == 6
    for i in range(4):
        deployment.redis.unlink(f"go:n{i}")


# --- pools --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gevent", "eventlet"])
def test_a_pool_of_green_threads_is_refused(name: str) -> None:
    green: Any = type("TaskPool", (), {"__module__": f"celery.concurrency.{name}"})
    with pytest.raises(
        UnsupportedPoolError, match=rf"prefork, threads and solo, not on {name}; .*--pool=prefork"
    ):
        supported_pool(green)


def test_a_pool_that_is_built_on_a_supported_one_is_taken() -> None:
    assert supported_pool(type("Mine", (PreforkPool,), {})) == "prefork"


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"CELERY_CUSTOM_WORKER_POOL": "celery.concurrency.base:BasePool"}, "not on base"),
        ({"CELERY_MEM_SLICE": "soon"}, "CELERY_MEM_SLICE"),
    ],
)
def test_a_worker_that_cannot_be_a_node_says_why_and_ends(
    deployment: Deployment, told: dict[str, str], reason: str
) -> None:
    env = os.environ | {"CELERY_MEM_URL": deployment.url} | told
    pool = "custom" if "CELERY_CUSTOM_WORKER_POOL" in told else "solo"
    command = [sys.executable, "-m", "celery", "-A", APP, "worker", "-P", pool, "-n", "odd@%h"]
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert reason in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.fixture(scope="module", params=["prefork", "threads", "solo"])
def single(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """A cluster of one slot on each kind of pool."""
    with Deployment() as it:
        it.start_coordinator()
        it.start_worker("w0", pool=request.param)
        with it.client() as client:
            yield SimpleNamespace(deployment=it, client=client, pool=request.param)
        it.check_empty()
        pid = it.pid("w0")
        left = children_of(pid)
        it.signal("w0", signal.SIGTERM)
        it.wait_gone("w0")
        assert all(wait_until_ended(p.pid) for p in left), "an orphan"
        assert it.redis.zrange(it.key("clients"), 0, -1) == [], "a client of tasks that did not sign off"


def test_every_pool_runs_graph_tasks(single: SimpleNamespace) -> None:
    client = single.client
    futures = client.map(tasks.inc, range(500))
    assert client.submit(tasks.add, *futures[:100]).result(timeout=60) == sum(range(1, 101))
    assert client.gather(futures) == list(range(1, 501))
    pid = client.submit(tasks.here).result(timeout=60)
    main = single.deployment.pid("w0")
    assert pid != main if single.pool == "prefork" else pid == main


def test_on_every_pool_a_task_may_wait_for_tasks(single: SimpleNamespace) -> None:
    assert single.client.submit(tasks.fibonacci, 8).result(timeout=60) == 21


def test_large_results_travel_on_every_pool(single: SimpleNamespace) -> None:
    url = single.deployment.url
    large = [single.client.submit(tasks.large, (url, "large"), 1_000_000, i) for i in range(3)]
    sums = [single.client.submit(tasks.total, (url, "total"), x) for x in large]
    assert single.client.gather(sums, timeout=60) == [0, 1_000_000, 2_000_000]


def test_a_module_that_only_the_client_has_is_named(
    single: SimpleNamespace, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no_worker_has_it.py").write_text("def f(): return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import no_worker_has_it

    from celery_mem.errors import DeserializationError

    with pytest.raises(DeserializationError, match=r"'no_worker_has_it'.*install it on every worker"):
        single.client.submit(no_worker_has_it.f).result(timeout=60)
