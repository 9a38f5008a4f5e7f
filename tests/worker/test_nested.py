"""Tasks that submit tasks and wait for them, on one slot: it runs them inside the one that waits."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_mem import Client, as_completed, wait
from celery_mem.client import current
from celery_mem.graph import inside
from celery_mem.graph.tickets import make_app
from celery_mem.state.audit import read
from celery_mem.worker import slot as slot_module
from celery_mem.worker import tickets
from tests.deployment import wait_until
from tests.tasks import inc, nap
from tests.worker.conftest import Space

RunTicket = Callable[[], int]
ran: list[Any] = []
here: contextvars.ContextVar[str] = contextvars.ContextVar("here", default="nobody's")
depth = 0


@pytest.fixture
def run_ticket(space: Space) -> Iterator[RunTicket]:
    """Run a ticket as a worker in this process does, on one slot in this thread."""
    app = make_app(space.settings)
    app.mem_settings = lambda: space.settings
    ran.clear()
    yield lambda: tickets.run_ticket(app, space.settings, "node", "1")
    if tickets._local.slot is not None:
        tickets._local.slot.close()
        tickets._local.slot = None
    if current._of_worker is not None:
        current._of_worker.close()
        current._of_worker = None
    inside.worker = None
    app.close()


def submit_and_wait(x: int) -> int:
    return int(Client.current().submit(inc, x).result())


def gather_some(n: int) -> int:
    client = Client.current()
    return sum(client.gather(client.map(inc, range(n))))


def iterate_some(n: int) -> int:
    return sum(future.result() for future in as_completed(Client.current().map(inc, range(n))))


def wait_for_some(n: int) -> int:
    futures = Client.current().map(inc, range(n))
    return len(wait(futures).done)


async def await_one(x: int) -> int:
    return int(await Client.current().submit(inc, x))


async def await_some(n: int) -> int:
    futures = Client.current().map(inc, range(n))
    return sum([future.result() async for future in as_completed(futures)])


async def wait_in_a_coroutine(x: int) -> int:
    return int(Client.current().submit(await_one, x).result())


async def await_two(x: int) -> list[int]:
    client = Client.current()
    return list(await asyncio.gather(client.submit(inc, x), client.submit(submit_and_wait, x)))


def fibonacci(n: int) -> int:
    if n < 2:
        return n
    client = Client.current()
    left, right = client.submit(fibonacci, n - 1), client.submit(fibonacci, n - 2)
    return int(left.result() + right.result())


@pytest.mark.parametrize(
    ("func", "arg", "expected"),
    [
        (submit_and_wait, 1, 2),
        (gather_some, 300, 45150),
        (iterate_some, 10, 55),
        (wait_for_some, 10, 10),
        (await_one, 1, 2),
        (await_some, 10, 55),
        (wait_in_a_coroutine, 1, 2),
        (await_two, 1, [2, 2]),
        (fibonacci, 7, 13),
    ],
)
def test_a_task_may_wait_for_tasks_on_the_only_slot(
    space: Space, run_ticket: RunTicket, func: Callable[[Any], Any], arg: int, expected: Any
) -> None:
    future = space.submit(func, arg)
    assert run_ticket() == 1
    assert future.result(timeout=10) == expected


def test_the_client_of_a_task_is_named_after_its_node(space: Space, run_ticket: RunTicket) -> None:
    future = space.submit(lambda: Client.current().id)
    run_ticket()
    assert future.result(timeout=10).startswith("node-")


def count_depth(x: int) -> int:
    global depth
    depth += 1
    ran.append(depth)
    try:
        return int(Client.current().submit(inc, x, pure=False).result())
    finally:
        depth -= 1


def test_what_a_task_submits_runs_before_what_waited_already(space: Space, run_ticket: RunTicket) -> None:
    """Else all of them would begin, and wait for something that is ready behind all others."""
    futures = space.map(count_depth, range(100))
    run_ticket()
    assert space.client.gather(futures, timeout=10) == list(range(1, 101))
    assert max(ran) <= 20


def test_what_is_behind_a_waiting_task_in_its_batch_is_not_held_up(
    space: Space, run_ticket: RunTicket
) -> None:
    run_ticket()
    slot = tickets._local.slot
    slot.seconds_per_task = 1e-6
    wanted = space.submit(inc, 1, key="wanted")  # in the same batch, behind the one that waits for it
    first = space.submit(lambda: Client.current().future("wanted").result(), priority=1)
    run_ticket()
    assert (first.result(timeout=10), wanted.result(timeout=10)) == (2, 2)


def wait_in_my_context(_: Any) -> str:
    here.set("mine")
    return str(Client.current().submit(whose_context).result())


def whose_context() -> str:
    return here.get()


def test_a_task_that_runs_while_another_waits_does_not_see_its_context(
    space: Space, run_ticket: RunTicket
) -> None:
    future = space.submit(wait_in_my_context, 1)
    run_ticket()
    assert future.result(timeout=10) == "nobody's"


def wait_shortly(key: str) -> str:
    try:
        Client.current().future(key).result(timeout=0.2)
    except TimeoutError:
        return "gave up"
    return "got it"


def test_a_wait_with_a_timeout_ends_in_time(space: Space, run_ticket: RunTicket) -> None:
    elsewhere = space.submit(inc, 1, key="elsewhere")
    other = space.slot()
    other.batch.begin(other._step("", 1))  # which does not go on
    future = space.submit(wait_shortly, "elsewhere")
    run_ticket()
    assert future.result(timeout=10) == "gave up"
    other._step("iq", 0)
    run_ticket()
    assert elsewhere.result(timeout=10) == 2


def test_a_waiting_slot_takes_up_what_becomes_ready_meanwhile(space: Space, run_ticket: RunTicket) -> None:
    first = space.submit(inc, 1, key="first")
    other = space.slot()
    other.batch.begin(other._step("", 1))
    second = space.submit(inc, first, key="second")
    future = space.submit(lambda: Client.current().future("second").result())
    ticket = space.in_thread(run_ticket)
    wait_until(lambda: read(space.store).records[future.key].state == "processing", "the task to wait")
    other._step("iq", 0)  # handed back: the waiting slot is the only one left
    assert future.result(timeout=10) == second.result(timeout=10) == 3
    ticket.join()


def test_below_a_certain_depth_a_task_waits_without_helping(
    space: Space, run_ticket: RunTicket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot_module, "MOST_HELPERS", 0)
    future = space.submit(submit_and_wait, 1)
    space.in_thread(run_ticket)
    child = wait_until(
        lambda: [k for k, r in read(space.store).records.items() if r.state == "ready" and k != future.key],
        "the inner task to be ready",
    )
    assert len(child) == 1
    space.slot().run_ticket("2")
    assert future.result(timeout=10) == 2


def test_a_slot_goes_home_after_its_slice_though_its_tasks_waited_for_others(
    space: Space, run_ticket: RunTicket
) -> None:
    run_ticket()
    slot = tickets._local.slot
    slot.settings = slot.settings.replace(slice=0.2)
    futures = space.map(submit_and_nap, range(1000))
    assert 0 < run_ticket() < 1000
    assert not slot._helpers
    assert not slot._turns._owner
    for future in futures:
        future.release()


def submit_and_nap(x: int) -> int:
    return int(Client.current().submit(nap, 0.002, x).result())


def test_a_future_inside_an_object_arrives_bound_to_the_workers_client(
    space: Space, run_ticket: RunTicket
) -> None:
    class Box:
        def __init__(self, future: Any) -> None:
            self.future = future

    inner = space.submit(inc, 1)
    outer = space.submit(lambda box: (box.future.client.id, box.future.result()), Box(inner))
    run_ticket()
    name, value = outer.result(timeout=10)
    assert name.startswith("node-")
    assert value == 2


def test_outside_of_tasks_there_is_no_help_and_no_extra_priority(space: Space, run_ticket: RunTicket) -> None:
    run_ticket()
    assert inside.inherited_priority() == 0
    event = threading.Event()
    event.set()
    assert inside.wait_for(event.wait, 1)
