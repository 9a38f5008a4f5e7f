"""A ready Celery app that runs graph tasks only: `celery -A celery_mem.worker.app worker`.

Its broker and state are the Redis at `CELERY_MEM_URL`, or else `REDIS_URL`.
"""

from __future__ import annotations

import os

from celery import Celery

from celery_mem.config import Settings
from celery_mem.graph.tickets import broker_options, broker_url
from celery_mem.worker.install import install

settings = Settings.load()

app = Celery("celery_mem", broker=broker_url(settings.url))
app.conf.update(
    task_default_queue=settings.queue or f"celery-mem.{settings.namespace}",
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    broker_pool_limit=None,  # tickets and events have a connection of their own; to keep others is of no use
    broker_connection_retry_on_startup=True,
    broker_channel_error_retry=True,  # else a broker that refuses writes for a moment ends the worker
    # A lost ticket is replaced, so nobody keeps books of what was received. They would be one more thing to
    # write to a full Redis, which ends a Celery worker when it refuses.
    broker_transport_options={"ack_emulation": False, **broker_options(settings.url)},
    worker_hijack_root_logger=True,
)
if config := os.environ.get("CELERY_MEM_CONFIG"):
    app.config_from_object(config)
install(app)
