"""Which client a future or a bare call belongs to."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import dask.config

from celery_mem.graph.collections import TASK_SHUFFLES

if TYPE_CHECKING:
    from celery_mem.client.client import Client

_context: ContextVar[Client | None] = ContextVar("celery_mem_client", default=None)
_lock = threading.Lock()
_defaults: list[Client] = []
_in_worker: Callable[[], Client] | None = None
_before: dict[str, Any] | None = None


def set_default(client: Client) -> None:
    """Make `client` the one that is used where none is named, by Dask too."""
    with _lock:
        _defaults.append(client)
        _tell_dask()


def remove(client: Client) -> None:
    """Forget a client that closes; the default before it is the default again."""
    with _lock:
        if client in _defaults:
            _defaults.remove(client)
            _tell_dask()
    if _context.get() is client:
        _context.set(None)


def _tell_dask() -> None:
    """Make the newest default client Dask's scheduler; without any, restore what was set before the first."""
    global _before
    if _defaults:
        if _before is None:
            _before = {name: dask.config.get(name, None) for name in ("scheduler", *TASK_SHUFFLES)}
        dask.config.set({"scheduler": _defaults[-1].get, **TASK_SHUFFLES})
    elif _before is not None:
        dask.config.set(_before)
        _before = None


def set_worker_factory(factory: Callable[[], Client]) -> None:
    """Say how a task's process gets its client, made when the first task asks."""
    global _in_worker
    _in_worker = factory


def find_client() -> Client | None:
    """Return the client of this context, else the default one, else the worker's own; None if there is none."""
    client = _context.get()
    if client is not None and not client.closed:
        return client
    with _lock:
        for client in reversed(_defaults):
            if not client.closed and client.pid == os.getpid():
                return client
    return _in_worker() if _in_worker is not None else None
