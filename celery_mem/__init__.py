"""Distributed futures in the memory of Celery workers: held results, lineage, Dask graphs, over Redis."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_mem.client.client import Client as Client
    from celery_mem.client.current import get_client as get_client
    from celery_mem.client.future import Future as Future
    from celery_mem.client.lifetimes import fire_and_forget as fire_and_forget
    from celery_mem.client.progress import progress as progress
    from celery_mem.client.waiting import as_completed as as_completed
    from celery_mem.client.waiting import wait as wait
    from celery_mem.graph.collections import futures_of as futures_of
    from celery_mem.graph.logs import TaskKeyFilter as TaskKeyFilter
    from celery_mem.local import LocalCluster as LocalCluster
    from celery_mem.worker.install import install as install

__version__ = "0.1.0"

_HOMES = {
    "Client": "celery_mem.client.client",
    "Future": "celery_mem.client.future",
    "LocalCluster": "celery_mem.local",
    "TaskKeyFilter": "celery_mem.graph.logs",
    "as_completed": "celery_mem.client.waiting",
    "fire_and_forget": "celery_mem.client.lifetimes",
    "futures_of": "celery_mem.graph.collections",
    "get_client": "celery_mem.client.current",
    "install": "celery_mem.worker.install",
    "progress": "celery_mem.client.progress",
    "wait": "celery_mem.client.waiting",
}
__all__ = [
    "Client",
    "Future",
    "LocalCluster",
    "TaskKeyFilter",
    "__version__",
    "as_completed",
    "fire_and_forget",
    "futures_of",
    "get_client",
    "install",
    "progress",
    "wait",
]


def __getattr__(name: str) -> Any:
    # Lazily: node agents and coordinators import this package and need none of these.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
