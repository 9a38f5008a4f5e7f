"""What workers tell of the tasks that they run: log lines with their keys, and Celery events."""

from __future__ import annotations

import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from celery import Celery
from kombu import Consumer
from redis import Redis

from celery_mem import Client
from celery_mem.graph import inside
from celery_mem.graph.tickets import broker_url
from tests import tasks
from tests.deployment import Deployment
from tests.on_cluster import LIMIT_S, add, fail, inc

POOLS = {"w0": "prefork", "w1": "threads", "w2": "solo"}
EVENTS = {"w0": "all", "w1": "sampled", "w2": "off"}


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A worker of each pool. Those of them that send events differ in that too."""
    with Deployment(ticket_lease=2.0) as it:
        it.start_coordinator()
        for name, pool in POOLS.items():
            env = {"CELERY_MEM_EVENTS": EVENTS[name]}
            it.start_worker(name, app="tests.worker.shop", pool=pool, env=env, wait=False)
        with it.client() as client:
            client.wait_for_workers(3, timeout=60)
        yield it


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with deployment.client() as client:
        yield client
    deployment.check_empty()


@pytest.fixture(scope="module")
def shop(deployment: Deployment) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELERY_MEM_URL", deployment.url)
        import tests.worker.shop as module
    return module


@pytest.fixture(params=POOLS)
def worker(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def run(client: Client, deployment: Deployment, worker: str) -> Callable[..., Any]:
    """Run a function on the worker, under a key; returns its result, or error."""

    def run(key: str, func: Callable[..., Any], *args: Any) -> Any:
        future = client.submit(func, *args, key=key, workers=deployment.node(worker))
        return future.exception(timeout=60) or future.result()

    return run


def said(deployment: Deployment, worker: str, text: str) -> list[str]:
    """Who logged lines with a text: name and id, as the formats have them."""
    lines = [line for line in deployment.log(worker, 1000).splitlines() if text in line]
    return [found[1] for line in lines if (found := re.search(r"(plain \S+\]|\S+\]):? " + text, line))]


class TestLogLines:
    def test_carry_key_and_name(
        self, run: Callable[..., Any], deployment: Deployment, worker: str, shop: Any
    ) -> None:
        text = uuid.uuid4().hex
        run(f"k-{text}", shop.say, text)
        assert said(deployment, worker, text) == [f"say[k-{text}]", f"plain say[k-{text}]"]

    def test_of_a_task_of_the_app_have_its_full_name(
        self, run: Callable[..., Any], deployment: Deployment, worker: str, shop: Any
    ) -> None:
        text = uuid.uuid4().hex
        run(f"k-{text}", shop.say_as_task, text)
        assert said(deployment, worker, text) == [f"tests.worker.shop.say_as_task[k-{text}]"]

    def test_of_a_task_that_waits_and_of_the_one_it_waits_for_differ(
        self, run: Callable[..., Any], deployment: Deployment, worker: str, shop: Any
    ) -> None:
        text = uuid.uuid4().hex
        run(f"k-{text}", shop.say_around, text, f"in-{text}")
        outer, inner = f"say_around[k-{text}]", f"say[in-{text}]"
        each = [outer, inner, outer]
        assert said(deployment, worker, text) == [x for who in each for x in (who, f"plain {who}")]

    def test_carry_the_key_when_it_fails_and_that_of_the_next_task_then(
        self, run: Callable[..., Any], deployment: Deployment, worker: str, shop: Any
    ) -> None:
        text = uuid.uuid4().hex
        assert isinstance(run(f"k-{text}", shop.say_and_fail, text), ValueError)
        assert f"say_and_fail[k-{text}]" in said(deployment, worker, "it failed")
        run(f"l-{text}", shop.say, text)
        assert said(deployment, worker, text) == [f"say[l-{text}]", f"plain say[l-{text}]"]

    def test_of_a_coroutine_and_of_its_threads_carry_the_key(
        self, run: Callable[..., Any], deployment: Deployment, worker: str, shop: Any
    ) -> None:
        text = uuid.uuid4().hex
        run(f"k-{text}", shop.say_beside, text)
        assert said(deployment, worker, text) == [f"say_beside[k-{text}]", f"plain say_beside[k-{text}]"]

    def test_of_a_thread_of_ones_own_belong_to_nobody(
        self, run: Callable[..., Any], deployment: Deployment, worker: str, shop: Any
    ) -> None:
        text = uuid.uuid4().hex
        assert run(f"k-{text}", shop.say_by, text) == ("say_by", f"k-{text}", True)
        assert said(deployment, worker, text) == ["plain -[-]"]


# --- events ---


class Heard:
    """Events that workers send from now on."""

    def __init__(self, url: str) -> None:
        self.app = Celery(broker=broker_url(url), set_as_current=False)
        self.connection = self.app.connection_for_read()
        self.events: list[dict[str, Any]] = []
        receiver = self.app.events.Receiver(self.connection, handlers={"*": self.events.append})
        channel = self.connection.channel()
        [self.consumer] = receiver.get_consumers(partial(Consumer, channel), channel)
        self.consumer.consume()
        with Redis.from_url(url) as redis:
            before = redis.pubsub_numpat()
            while redis.pubsub_numpat() <= before:  # it subscribes when it is drained for the first time
                with suppress(TimeoutError):
                    self.connection.drain_events(timeout=0.01)

    def of(self, key: str, kind: str) -> dict[str, Any]:
        """Wait for an event of a task."""
        return self.until(lambda e: e.get("uuid") == key and e["type"] == kind)

    def until(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + LIMIT_S
        while not (found := [event for event in self.events if is_it(event)]):
            assert time.monotonic() < deadline, [(e["type"], e.get("uuid")) for e in self.events]
            self.connection.drain_events(timeout=LIMIT_S)
        return found[0]

    def close(self) -> None:
        self.consumer.cancel()
        self.connection.release()
        self.app.close()


@pytest.fixture
def heard(deployment: Deployment) -> Iterator[Heard]:
    heard = Heard(deployment.url)
    yield heard
    heard.close()


class Slow:
    """Neither a dict nor quick, whatever it says."""

    def __repr__(self) -> str:
        time.sleep(3600)
        return ""

    __str__ = __len__ = __iter__ = __repr__


class OddDict(dict):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        raise AssertionError("not to be looked at")

    items = keys = values = __repr__ = __len__ = __iter__

    def __reduce__(self) -> Any:
        return OddDict, ()


class OddError(Exception):
    def __str__(self) -> str:
        raise AssertionError("it has no text")

    __repr__ = __str__


class Anonymous:
    """A function whose name is a trap on a worker."""

    @property
    def __name__(self) -> str:
        assert inside.worker is None
        return "unlike"

    def __call__(self, *args: Any) -> int:
        return len(args)


def odd_things(*_: Any) -> Any:
    return [Slow(), OddDict(), 7]


def odd_error() -> None:
    raise OddError


class TestEvents:
    def test_name_parent_and_root(self, heard: Heard, client: Client, deployment: Deployment) -> None:
        where = deployment.node("w0")
        first = client.submit(inc, 1, pure=False, workers=where)
        assert first.result(timeout=60) == 2
        second = client.submit(wait_then_add, deployment.url, first, pure=False, workers=where)
        third = client.submit(inc, second, pure=False, workers=where)
        deployment.redis.rpush(f"go:{second.key}", 1)
        assert third.result(timeout=60) == 4

        for future in (second, third):
            heard.of(future.key, "task-succeeded")
        found = [heard.of(future.key, "task-received") for future in (second, third)]
        assert [event["parent_id"] for event in found] == [first.key, second.key]
        assert [event["root_id"] for event in found] == [first.key, first.key]
        assert heard.of(first.key, "task-received")["parent_id"] is None
        assert {event["hostname"] for event in found} == {where}

    @pytest.mark.parametrize("name", ["w0", "w1"])
    def test_of_odd_things_do_no_harm(
        self, heard: Heard, client: Client, deployment: Deployment, name: str
    ) -> None:
        where = deployment.node(name)
        args = (Slow(), {"a": OddDict()}, 10**10_000)
        returned = client.submit(odd_things, *args, key=f"returned-{name}", workers=where)
        failed = client.submit(odd_error, key=f"failed-{name}", workers=where)
        called = client.submit(Anonymous(), 1, key=f"called-{name}", workers=where)
        client.gather(returned, timeout=60)
        assert type(failed.exception(timeout=60)) is OddError
        assert called.result(timeout=60) == 1

        event = heard.of(returned.key, "task-received")
        assert event["args"] == "(<Slow>, {'a': <OddDict>}, <int of 33220 bits>)"
        assert heard.of(returned.key, "task-succeeded")["result"] == "[<Slow>, <OddDict>, 7]"
        assert heard.of(failed.key, "task-failed")["exception"] == "OddError('(its text cannot be made)')"
        assert heard.of(called.key, "task-received")["name"] == "Anonymous"

    def test_that_are_off_are_not_sent(self, heard: Heard, client: Client, deployment: Deployment) -> None:
        """A worker that stops in good order sends what it has left, and then that it goes."""
        where = deployment.node("w2")
        assert client.gather(client.map(add, range(5), range(5), workers=where), timeout=60)[-1] == 8
        assert client.submit(fail, workers=where).exception(timeout=60) is not None
        deployment.signal("w2", signal.SIGTERM)
        deployment.wait_gone("w2")
        heard.until(lambda event: event["type"] == "worker-offline" and event["hostname"] == where)
        assert {event["type"] for event in heard.events if event["hostname"] == where} <= {
            "worker-heartbeat",
            "worker-offline",
        }


def wait_then_add(url: str, x: int) -> int:
    from celery import current_task

    tasks.redis_of(url).blpop([f"go:{current_task.request.id}"], 60)
    return x + 1
