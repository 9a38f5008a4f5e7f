"""An app with tasks of its own, a result backend of its own, and celery-mem."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from typing import Any

from celery import Celery, current_task, signals
from celery.concurrency.solo import TaskPool
from celery.utils.log import get_task_logger
from redis import Redis

import celery_mem
from celery_mem.graph.tickets import broker_url
from tests import tasks
from tests.on_cluster import node_of_task

url = os.environ["CELERY_MEM_URL"]
# Its own messages never go through a proxy that a test puts before the graph's Redis.
broker = broker_url(os.environ.get("SHOP_BROKER", url))
backend = broker_url(os.environ.get("SHOP_BACKEND") or os.environ.get("SHOP_BROKER", url))

app = Celery("shop", broker=broker, backend=backend)
app.conf.update(
    task_default_queue="shop",
    worker_prefetch_multiplier=int(os.environ.get("SHOP_PREFETCH", "4")),
    broker_connection_retry_on_startup=True,
    worker_soft_shutdown_timeout=float(os.environ.get("SHOP_SOFT_SHUTDOWN", "0")),
)
celery_mem.install(app)


@app.task
def price(n: int) -> int:
    return 3 * n


@app.task
def slow_price(n: int, seconds: float, where: tasks.Where | None = None) -> int:
    if where is not None:
        tasks.note(where)
    time.sleep(seconds)
    return 3 * n


@app.task
def now() -> float:
    """When this began, seconds since the epoch."""
    return time.time()


@app.task(bind=True)
def about_request(self: Any) -> tuple[str, str]:
    """The id of the request and the name of the current task, as libraries ask for them."""
    return self.request.id, current_task.name


@app.task(bind=True, autoretry_for=(ConnectionError,), max_retries=3, retry_backoff=False)
def fails_at_first(self: Any, name: str, times: int) -> int:
    with Redis.from_url(url) as redis:
        n = int(redis.incr(name))
    if n <= times:
        raise ConnectionError(n)
    return n


@app.task(autoretry_for=(ConnectionError,), max_retries=1, retry_kwargs={"max_retries": 5})
def fails_five_times(name: str) -> int:
    return int(fails_at_first.run(name, 5))


@app.task(autoretry_for=(OSError,), dont_autoretry_for=(TimeoutError,), max_retries=None)
def fails_with(name: str, kinds: str) -> str:
    """Fail with one kind of error after the other, and return how often."""
    with Redis.from_url(url) as redis:
        n = int(redis.incr(name))
    if n <= len(kinds.split()):
        raise {"os": OSError, "timeout": TimeoutError, "value": ValueError}[kinds.split()[n - 1]](n)
    return kinds


@app.task
def options_of(n: int, *, key: int = 0, timeout: int = 0) -> tuple[int, int, int]:
    """Has parameters that are named like options of `submit`."""
    return n, key, timeout


@app.task
def unpacked(values: tuple[int, ...]) -> list[int]:
    return list(values)


@app.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task
def fan_out(n: int) -> int:
    """A plain task of Celery that has a graph computed, and waits for it."""
    client = celery_mem.get_client()
    return int(client.submit(sum, client.map(price.run, range(n))).result(timeout=30))


# --- what is logged ---

log = get_task_logger(__name__)
plain = logging.getLogger("shop.plain")


@signals.after_setup_logger.connect
def log_plainly(**_: Any) -> None:
    """Log in a format of the standard library, as somebody who knows nothing of Celery's own."""
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(logging.Formatter("plain %(task_name)s[%(task_id)s] %(message)s"))
    handler.addFilter(celery_mem.TaskKeyFilter())
    plain.addHandler(handler)
    plain.propagate = False


@app.task
def say_as_task(text: str) -> None:
    log.info(text)


def say(text: str) -> None:
    log.info(text)
    plain.info(text)


def say_around(text: str, inner: str) -> None:
    """Have another task run in this slot, and wait for it."""
    say(f"{text} before")
    celery_mem.get_client().submit(say, text, key=inner, workers=node_of_task()).result(timeout=30)
    say(f"{text} after")


def say_and_fail(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("it failed")
        raise


async def say_beside(text: str) -> None:
    """Log in an event loop, and in a thread that it starts."""
    await asyncio.sleep(0)
    log.info(text)
    await asyncio.to_thread(plain.info, text)


def say_by(text: str) -> tuple[str, str, bool]:
    """Log in a thread of one's own, and return what the current task says of itself."""
    from threading import Thread

    thread = Thread(target=plain.info, args=(text,))
    thread.start()
    thread.join()
    return current_task.name, current_task.request.id, current_task.app is app


class OddPool(TaskPool):  # type: ignore[misc]
    """A pool built on a supported one."""
