"""The fixtures `mem_cluster` and `mem_client`, which pytest finds by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest loads this file in every run, also where nobody asks for a cluster
    from celery_mem.client.client import Client
    from celery_mem.testing.cluster import InProcessCluster


@pytest.fixture(scope="session")
def mem_cluster() -> Iterator[InProcessCluster]:
    """A cluster inside this process, for all tests of the run; override it to have it otherwise."""
    try:
        from celery_mem.testing import InProcessCluster
    except ModuleNotFoundError as error:
        if error.name not in ("fakeredis", "lupa"):
            raise
        pytest.fail("mem_cluster needs fakeredis with Lua: pip install celery-mem[testing]", pytrace=False)
    with InProcessCluster() as cluster:
        yield cluster


@pytest.fixture
def mem_client(mem_cluster: InProcessCluster) -> Iterator[Client]:
    """A client of `mem_cluster`, the default one; when the test is over, nothing may be left."""
    with mem_cluster.client() as client:
        yield client
    mem_cluster.check_empty()
