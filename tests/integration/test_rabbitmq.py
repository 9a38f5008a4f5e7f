"""RabbitMQ carries the tickets, Redis has the graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import dask.array as da
import numpy as np
import pytest
from celery import Celery

from celery_mem import Client
from celery_mem.graph.doctor import examine, gather_facts
from celery_mem.graph.tickets import broker_url
from celery_mem.state.audit import read
from tests import rabbitmq, tasks
from tests.deployment import Deployment
from tests.rabbitmq import RabbitMQ

pytestmark = pytest.mark.skipif(bool(rabbitmq.lacks()), reason=rabbitmq.lacks())

APP = "tests.worker.shop"
SLICE_S = 0.3


class Site(Deployment):
    """Workers of an app with tasks of its own, whose broker is RabbitMQ."""

    def __init__(self) -> None:
        super().__init__(ticket_lease=2.0, node_lease=2.0, slice=SLICE_S)
        try:
            self.rabbitmq = RabbitMQ(self.processes)
            self.env = {"SHOP_BROKER": self.rabbitmq.url, "SHOP_BACKEND": self.url}
            self.app = Celery(
                "shop", broker=self.rabbitmq.url, backend=broker_url(self.url), set_as_current=False
            )
            self.app.conf.update(task_default_queue="shop", broker_connection_timeout=2)
            self.start("c0", [sys.executable, "-m", "celery", "-A", APP, "mem", "coordinator"], self.env)
            self.start_worker("w0", app=APP, slots=2, env=self.env, wait=False)
            self.start_worker("w1", "-Q", "shop,reports", app=APP, env=self.env)
        except BaseException:
            self.close()
            raise

    def client(self, **settings: Any) -> Client:
        """Connect a client that can call workers."""
        return super().client(app=self.app, **settings)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as it:
        yield it
        it.app.close()


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    site.forget_runs()
    with site.client() as client:
        client.wait_for_workers(1, timeout=60)
        yield client
    site.check_empty()


def test_a_job_is_done_and_the_broker_of_tickets_is_rabbitmq(site: Site, client: Client) -> None:
    client.wait_for_workers(2, timeout=60)
    assert client.submit(tasks.inc, 1).result(timeout=60) == 2
    assert client.gather(client.map(tasks.inc, range(300)), timeout=60) == list(range(1, 301))
    x = client.persist(da.arange(400_000, chunks=100_000) * 2)
    assert client.compute(x.sum()).result(timeout=60) == 2 * np.arange(400_000).sum()
    assert client.info()["leader"]
    assert not list(site.redis.scan_iter("_kombu*")), "kombu has been in Redis"
    assert not site.redis.exists("shop")
    assert site.rabbitmq.waiting("shop") is not None
    assert site.rabbitmq.waiting(f"celery-mem.mem@{site.node('w0')}") is not None


def test_a_queue_says_who_may_run_a_task(site: Site, client: Client) -> None:
    nodes = client.map(tasks.node_name, range(10), queue="reports")
    assert set(client.gather(nodes, timeout=60)) == {site.node("w1")}


def test_a_task_that_runs_is_cancelled(site: Site, client: Client) -> None:
    future = client.submit(tasks.spin, (site.url, "spinning"))
    site.wait_until(lambda: site.runs("spinning"), "the task to run")
    future.cancel()
    assert b"TaskInterrupt" in site.redis.blpop(["ended:spinning"], 60)[1]


def test_own_tasks_get_their_turn_and_their_results_are_in_their_backend(site: Site, client: Client) -> None:
    futures = client.map(tasks.counted, [(site.url, f"n{i}") for i in range(2000)], seconds=0.02)
    site.wait_until(site.runs, "the graph to run")
    answers = [site.app.send_task(f"{APP}.price", (i,), queue="shop") for i in range(5)]
    assert [answer.get(timeout=60) for answer in answers] == [0, 3, 6, 9, 12]
    assert not all(future.done() for future in futures)


def test_a_killed_worker_is_recovered_from(site: Site, client: Client) -> None:
    """Its tickets come again by RabbitMQ, its task and what it had in memory by the coordinator."""
    kept = client.submit(tasks.large, (site.url, "kept"), 1_000_000)
    waiting = client.submit(tasks.wait_for_word, (site.url, "run"), "done")
    site.wait_until(lambda: site.runs("run") and kept.done(), "both to run")
    store = site.store()
    (slot,) = (slot for slot, keys in read(store).owned.items() if waiting.key in keys)
    store.link.close()
    site.kill(slot.partition("@")[0])
    site.wait_until(lambda: site.runs("run") == {"run": 2}, "the task to run again")
    site.redis.rpush("go:run", "word", "word")
    assert waiting.result(timeout=60) == "done"
    assert client.submit(tasks.total, (site.url, "total"), kept).result(timeout=60) == 1_000_000
    site.redis.delete("go:run")


def test_a_client_without_the_app_says_so_and_is_served_all_the_same(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with Deployment.client(site) as client:

        def had_to_call() -> bool:
            """A slot that is there takes the task without being called; soon its slice is over."""
            assert client.submit(tasks.inc, 10, pure=False).result(timeout=60) == 11
            return "the broker of the workers is amqp, so their Celery app is needed" in caplog.text

        site.wait_until(had_to_call, "a task for which a slot had to be called")
        assert client.submit(tasks.inc, 20).result(timeout=60) == 21
    assert not list(site.redis.scan_iter("_kombu*"))
    site.check_empty()


def test_the_doctor_has_no_word_about_what_only_a_redis_broker_has(site: Site) -> None:
    store = site.store()
    facts = gather_facts(store, site.settings)
    store.link.close()
    assert {info["broker"] for info in facts.nodes.values()} == {"amqp"}
    assert not any("visibility" in info for info in facts.nodes.values())
    rules = {finding.rule for finding in examine(facts)}
    assert rules <= {"persistence", "hash seed", "shared memory", "signatures"}, rules


def test_work_goes_on_while_rabbitmq_is_away_and_new_work_when_it_is_back(site: Site, client: Client) -> None:
    """A slot that has work needs no broker; what is submitted meanwhile waits for tickets."""
    future = client.submit(tasks.wait_for_word, (site.url, "away"), "done")
    site.wait_until(lambda: site.runs("away"), "the task to run")
    site.kill("rabbitmq")
    site.redis.rpush("go:away", "word")
    assert future.result(timeout=60) == "done"
    later = client.map(tasks.counted, [(site.url, f"m{i}") for i in range(20)], range(20))
    site.rabbitmq.start()
    assert client.gather(later, timeout=60) == list(range(20))
    assert site.runs("m") == {f"m{i}": 1 for i in range(20)}
    site.redis.delete("go:away")
