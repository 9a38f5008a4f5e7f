"""Which client a future or a bare call belongs to."""

from __future__ import annotations

import os
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import dask.config

from celery_mem.errors import UnboundFutureError
from celery_mem.graph import inside
from celery_mem.graph.collections import TASK_SHUFFLES

if TYPE_CHECKING:
    from celery_mem.client.client import Client

_context: ContextVar[Client | None] = ContextVar("celery_mem_client", default=None)
_lock = threading.Lock()
_defaults: list[Client] = []
_before: dict[str, Any] = {}
_told: dict[str, Any] = {}
_of_worker: Client | None = None


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
    """Make the newest default client Dask's scheduler; without any, restore what was set before the first.

    What somebody else has set meanwhile stays.
    """
    global _told
    _defaults[:] = [c for c in _defaults if not c.closed]  # those of a parent process are closed here
    if _defaults:
        if not _told:
            _before.update({name: dask.config.get(name, None) for name in ("scheduler", *TASK_SHUFFLES)})
        _told = {"scheduler": _defaults[-1].get, **TASK_SHUFFLES}
        dask.config.set(_told)
    else:
        mine = [name for name, value in _told.items() if dask.config.get(name, None) == value]
        dask.config.set({name: _before[name] for name in mine})
        _told = {}


def find_client() -> Client | None:
    """Return the client of this context, else the default, else a worker's own; None if there is none."""
    client = _context.get()
    if client is not None and not client.closed:
        return client
    for client in reversed(tuple(_defaults)):
        if not client.closed:
            return client
    return _find_in_worker()


def get_client() -> Client:
    """Return the client of this context; in a worker, also in a plain task of Celery, the process's own.

    What such a task holds is kept for as long as its futures live: a graph task that it started goes on
    when it ends without them only with `fire_and_forget`.

    Raises:
        UnboundFutureError: there is none.
    """
    client = find_client()
    if client is None:
        raise UnboundFutureError("there is no client in this process; make one: Client(url)")
    return client


def _find_in_worker() -> Client | None:
    """Return the client of a worker's process, made when a task first needs it; None elsewhere."""
    global _of_worker
    if inside.worker is None:
        return None
    if _of_worker is None or _of_worker.closed:
        with _lock:
            if _of_worker is None or _of_worker.closed:
                from celery_mem.client.client import Client

                app, node = inside.worker.app, inside.worker.node
                _of_worker = Client(app, set_as_default=False, name=f"{node}-{os.getpid()}")
                inside.worker.at_exit(_of_worker.close)
    return _of_worker


def close_of_worker(url: str) -> None:
    """Close the client that tasks of this process use, if it is one of the Redis at `url`."""
    client = _of_worker
    if client is not None and client.settings.url == url:
        client.close()
