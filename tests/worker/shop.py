"""An app with tasks of its own, a result backend of its own, and celery-mem."""

from __future__ import annotations

import os
import time

from celery import Celery
from celery.concurrency.solo import TaskPool

import celery_mem
from celery_mem.graph.tickets import broker_url

url = os.environ["CELERY_MEM_URL"]
# Its own messages never go through a proxy that a test puts before the graph's Redis.
broker = broker_url(os.environ.get("SHOP_BROKER", url))

app = Celery(
    "shop", broker=broker, backend=os.environ.get("SHOP_BROKER", url).replace("unix://", "redis+socket://")
)
app.conf.update(
    task_default_queue="shop",
    worker_prefetch_multiplier=int(os.environ.get("SHOP_PREFETCH", "4")),
    broker_connection_retry_on_startup=True,
)
celery_mem.install(app)


@app.task
def price(n: int) -> int:
    return 3 * n


@app.task
def slow_price(n: int, seconds: float) -> int:
    time.sleep(seconds)
    return 3 * n


class OddPool(TaskPool):  # type: ignore[misc]
    """A pool built on a supported one."""
