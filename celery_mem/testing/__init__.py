"""For the tests of your own code: a cluster inside the test's process, and fixtures for pytest.

It needs no server and starts no process: `pip install celery-mem[testing]`; docs/testing.md has examples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery_mem.testing.cluster import InProcessCluster as InProcessCluster
    from celery_mem.testing.cluster import LeftoverError as LeftoverError

__all__ = ["InProcessCluster", "LeftoverError"]


def __getattr__(name: str) -> Any:
    # Lazily: pytest loads the plugin beside this in every run, also where nobody asks for a cluster.
    if name in __all__:
        from celery_mem.testing import cluster

        return getattr(cluster, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
