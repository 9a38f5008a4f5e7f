"""Tasks and signatures of the user's Celery app in a graph, a graph in the user's tasks, and queues."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any
from unittest import mock

import pytest
from celery import chain, chord, group

from celery_mem import Client
from celery_mem.errors import SerializationError, UnknownAppTaskError
from celery_mem.graph.tickets import broker_url
from tests import tasks
from tests.deployment import Deployment


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A worker of the app, and one that consumes a queue of its own."""
    with Deployment(ticket_lease=2.0) as it:
        it.start_coordinator()
        it.start_worker("w0", app="tests.worker.shop", slots=2)
        it.start_worker("w1", "-Q", "reports", app="tests.worker.shop")
        yield it


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    deployment.forget_runs()
    with deployment.client() as client:
        yield client
    deployment.check_empty()


@pytest.fixture(scope="module")
def shop(deployment: Deployment) -> Any:
    """The module of the app, as a client has it."""
    with mock.patch.dict(os.environ, {"CELERY_MEM_URL": deployment.url}):
        import tests.worker.shop as module
    module.app.conf.broker_url = module.app.conf.result_backend = broker_url(deployment.url)
    return module


class TestATask:
    def test_takes_futures_and_is_called_once_for_equal_calls(self, client: Client, shop: Any) -> None:
        first = client.submit(shop.price, 2)
        again = client.submit(shop.price, 2)
        assert client.submit(shop.price, first).result(timeout=60) == 18
        assert first.key == again.key
        assert first.key.startswith("price-")

    def test_is_mapped(self, client: Client, shop: Any) -> None:
        assert client.gather(client.map(shop.price, range(5)), timeout=60) == [0, 3, 6, 9, 12]

    def test_has_a_request_with_the_key_as_its_id(self, client: Client, shop: Any) -> None:
        future = client.submit(shop.about_request)
        assert future.result(timeout=60) == (future.key, "tests.worker.shop.about_request")

    def test_is_retried_as_it_says(self, client: Client, shop: Any, deployment: Deployment) -> None:
        assert client.submit(shop.fails_at_first, "counter:a", 3).result(timeout=60) == 4
        with pytest.raises(ConnectionError):
            client.submit(shop.fails_at_first, "counter:b", 4).result(timeout=60)
        deployment.redis.delete("counter:a", "counter:b")

    def test_is_retried_as_its_retry_kwargs_say(
        self, client: Client, shop: Any, deployment: Deployment
    ) -> None:
        assert client.submit(shop.fails_five_times, "counter:d").result(timeout=60) == 6
        deployment.redis.delete("counter:d")

    @pytest.mark.parametrize(
        ("kinds", "error", "runs"),
        [
            ("os os os os os", None, 6),  # no limit
            ("os value os", ValueError, 2),
            ("os timeout os", TimeoutError, 2),
        ],
    )
    def test_is_retried_for_what_it_says(
        self, client: Client, shop: Any, deployment: Deployment, kinds: str, error: Any, runs: int
    ) -> None:
        future = client.submit(chain(shop.fails_with.s("counter:e", kinds)))
        assert future.exception(timeout=60) is None if error is None else type(future.exception()) is error
        assert int(deployment.redis.getdel("counter:e")) == runs
        assert client.submit(shop.fails_with, "counter:e", kinds, retries=2).exception(timeout=60) is not None
        assert int(deployment.redis.getdel("counter:e")) == 3, "then after any error"

    def test_that_the_worker_does_not_have_is_named(self, client: Client, shop: Any) -> None:
        @shop.app.task(name="only.here")
        def only_here() -> None:
            """Registered in the client's process alone."""

        with pytest.raises(UnknownAppTaskError, match=r"has no task 'only.here'; it has .*shop\.price"):
            client.submit(only_here).result(timeout=60)


class TestASignature:
    def test_is_one_task(self, client: Client, shop: Any) -> None:
        assert client.submit(shop.price.s(7)).result(timeout=60) == 21

    def test_of_a_chain_hands_results_on(self, client: Client, shop: Any) -> None:
        sig = chain(shop.price.s(1), shop.price.s(), shop.price.s())
        assert client.submit(sig).result(timeout=60) == 27
        assert client.submit(chain(shop.price.s(1), shop.price.si(5))).result(timeout=60) == 15

    def test_that_is_immutable_comes_after_what_it_does_not_take(
        self, client: Client, shop: Any, deployment: Deployment
    ) -> None:
        """It finds what the one before it counted."""
        deployment.redis.delete("counter:c")
        sig = chain(shop.fails_at_first.s("counter:c", 0), shop.fails_at_first.si("counter:c", 0))
        assert client.submit(sig).result(timeout=60) == 2
        assert client.submit(chord([shop.price.s(1)], shop.price.si(4)), key="body").result(timeout=60) == 12
        deployment.redis.delete("counter:c")

    def test_says_what_it_cannot_mean(self, client: Client, shop: Any) -> None:
        with pytest.raises(ValueError, match="set the option countdown=9 on its tasks"):
            client.submit(chain(shop.price.s(1), shop.price.s()).set(countdown=9))
        with pytest.raises(ValueError, match="a group has no key"):
            client.submit(group([shop.price.s(1), shop.price.s(2)]), key="x")
        with pytest.raises(TypeError, match="a part of a signature is no signature"):
            client.submit(group([shop.price.s(1)], shop.price.s(2)))
        with pytest.raises(ValueError, match="a chain of no tasks"):
            client.submit(chain(app=shop.app))
        with pytest.raises(ValueError, match="another task of this signature has the key 'x' too"):
            client.submit(chain(shop.price.s(1).set(task_id="x"), shop.price.s()), key="x")
        with pytest.raises(ValueError, match="give its arguments to `submit`"):
            client.submit(chord([shop.price.s()], shop.total.s()).clone(args=(1,)))
        with pytest.raises(ValueError, match="timeout: the seconds"):
            client.submit(group(shop.price.s(1), shop.price.s(2).set(time_limit=-1)))

    def test_that_has_a_fault_somewhere_submits_nothing(
        self, client: Client, shop: Any, deployment: Deployment
    ) -> None:
        """The fault is in the last of its tasks."""

        def n_submissions() -> Any:
            client.session.flush()
            return deployment.redis.hget(deployment.key("meta"), "submissions")

        client.submit(shop.price, 1).result(timeout=60)
        before = n_submissions()
        good = [shop.price.s(n) for n in (1, 2)]
        unknown, unpicklable = shop.total.s().set(link=shop.price.s()), shop.total.s(threading.Lock())
        for last, error in ((unknown, ValueError), (unpicklable, SerializationError)):
            for sig in (
                chord(good, last),
                chain(*good[:1], last),
                group(*good, last),
                chain(group(good), last),
            ):
                with pytest.raises(error):
                    client.submit(sig)
        assert n_submissions() == before

    def test_may_give_arguments_of_any_name(self, client: Client, shop: Any) -> None:
        assert client.submit(shop.options_of.s(3, timeout=3, key=4)).result(timeout=60) == (3, 4, 3)

    def test_takes_what_is_given_where_celery_does(self, client: Client, shop: Any) -> None:
        """The first of a chain, all of a group; one that is immutable only comes after it."""
        sig = chain(shop.options_of.s(), shop.unpacked.s())
        assert client.submit(sig, 5, queue="shop").result(timeout=60) == [5, 0, 0]
        both = group(shop.price.s(), shop.price.si(4))
        assert client.gather(client.submit(both, client.submit(tasks.inc, 1)), timeout=60) == [6, 12]
        after = chain(shop.price.s(2), group(shop.price.si(1), shop.price.s()), shop.total.s())
        assert client.submit(after).result(timeout=60) == 3 + 18

    def test_that_has_its_ids_already_keeps_them_as_keys(self, client: Client, shop: Any) -> None:
        sig = chain(shop.price.s(1), shop.price.s())
        made = sig.freeze()
        future = client.submit(sig)
        assert (future.key, future.result(timeout=60)) == (made.id, 9)
        ends_in_group = chain(shop.price.s(2), group(shop.price.s(), shop.price.s()))
        ends_in_group.freeze()
        assert client.gather(client.submit(ends_in_group), timeout=60) == [18, 18]

    def test_of_chunks_and_maps_runs(self, client: Client, shop: Any) -> None:
        chunks = client.submit(shop.price.chunks(zip(range(4), strict=True), 2))
        assert client.gather(chunks, timeout=60) == [[0, 3], [6, 9]]
        assert client.submit(shop.price.map(range(3))).result(timeout=60) == [0, 3, 6]

    def test_of_a_group_is_a_list(self, client: Client, shop: Any) -> None:
        futures = client.submit(group(shop.price.s(n) for n in range(4)))
        assert client.gather(futures, timeout=60) == [0, 3, 6, 9]

    def test_of_a_chord_gives_the_body_all(self, client: Client, shop: Any) -> None:
        assert (
            client.submit(chord((shop.price.s(n) for n in range(4)), shop.total.s())).result(timeout=60) == 18
        )
        upgraded = chain(group(shop.price.s(n) for n in range(3)), shop.total.s(), shop.price.s())
        assert client.submit(upgraded).result(timeout=60) == 27

    def test_takes_futures_as_arguments(self, client: Client, shop: Any) -> None:
        made = client.submit(tasks.inc, 9)
        assert client.submit(shop.price.s(made)).result(timeout=60) == 30
        assert client.submit(shop.price.s(), made).result(timeout=60) == 30

    def test_with_an_option_that_means_nothing_here_is_refused(self, client: Client, shop: Any) -> None:
        with pytest.raises(ValueError, match=r"shop\.price: the option countdown=10"):
            client.submit(shop.price.s(1).set(countdown=10))


def test_a_plain_task_may_have_a_graph_computed(client: Client, shop: Any) -> None:
    result = shop.fan_out.apply_async((10,), queue="shop")
    try:
        assert result.get(timeout=60) == sum(3 * n for n in range(10))
    finally:
        result.forget()


def control_revoke(app: Any, key: str, **options: Any) -> Any:
    return app.control.revoke([key, "unknown"], **options)


def control_terminate(app: Any, key: str, **options: Any) -> Any:
    return app.control.terminate(key, **options)


def command_terminate(app: Any, key: str, **options: Any) -> Any:
    """What `celery control terminate TERM <key>` sends."""
    return app.control.broadcast("terminate", arguments={"signal": "TERM", "task_id": [key]}, **options)


@pytest.mark.parametrize("command", [control_revoke, control_terminate, command_terminate])
def test_celerys_commands_cancel_a_task_and_leave_its_result_backend_alone(
    client: Client, deployment: Deployment, shop: Any, command: Any
) -> None:
    """All workers hear them, and most of them when the task is gone already."""
    where = (deployment.url, "revoked")
    future = client.submit(tasks.wait_for_word, where, pure=False)
    deployment.wait_until(lambda: deployment.runs("revoked"), "the task to run")
    replies = command(shop.app, future.key, reply=True, timeout=30, limit=2)
    assert {node for reply in replies for node in reply} == {deployment.node("w0"), deployment.node("w1")}
    with pytest.raises(CancelledError):
        future.result(timeout=60)
    assert not deployment.redis.exists(f"celery-task-meta-{future.key}")
    if command is control_revoke:
        assert deployment.redis.delete("celery-task-meta-unknown"), "with others Celery does what it does"
    deployment.forget_runs()


def test_what_is_revoked_by_stamps_concerns_no_task_of_the_graph(
    client: Client, deployment: Deployment, shop: Any
) -> None:
    where = (deployment.url, "stamped")
    future = client.submit(tasks.wait_for_word, where, "done", pure=False)
    deployment.wait_until(lambda: deployment.runs("stamped"), "the task to run")
    replies = shop.app.control.revoke_by_stamped_headers(
        {"some": ["stamp"]}, terminate=True, reply=True, timeout=30, limit=2
    )
    assert len(replies) == 2
    deployment.redis.rpush("go:stamped", 1)
    assert future.result(timeout=60) == "done"
    assert deployment.runs() == {"stamped": 1}


def test_a_queue_says_whose_workers_may_run_a_task(client: Client, deployment: Deployment, shop: Any) -> None:
    nodes = client.map(tasks.node_name, range(10), queue="reports")
    assert set(client.gather(nodes, timeout=60)) == {deployment.node("w1")}
    nodes = client.map(tasks.node_name, range(10, 20), queue="shop")
    assert set(client.gather(nodes, timeout=60)) == {deployment.node("w0")}
    routed = client.submit(shop.price.s(3).set(queue="reports"))
    assert routed.result(timeout=60) == 9
    with pytest.raises(ValueError, match="queue"):
        client.submit(tasks.inc, 1, queue="")
