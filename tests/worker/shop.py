"""An app with tasks of its own, a result backend of its own, and celery-mem."""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery, current_task
from celery.concurrency.solo import TaskPool
from redis import Redis

import celery_mem
from celery_mem.graph.tickets import broker_url

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
def slow_price(n: int, seconds: float) -> int:
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


@app.task
def total(numbers: list[int]) -> int:
    return sum(numbers)


@app.task
def fan_out(n: int) -> int:
    """A plain task of Celery that has a graph computed, and waits for it."""
    client = celery_mem.get_client()
    return int(client.submit(sum, client.map(price.run, range(n))).result(timeout=30))


class OddPool(TaskPool):  # type: ignore[misc]
    """A pool built on a supported one."""
