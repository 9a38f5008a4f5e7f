"""Inside a Celery worker: the ticket task, the slot loop, the node agent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_mem.worker.install import install as install


def __getattr__(name: str) -> Any:
    if name == "install":  # lazily: the node agent imports this package and must stay small
        from celery_mem.worker.install import install

        return install
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
