from collections.abc import Iterator

import pytest

from celery_mem.testing import InProcessCluster


@pytest.fixture(scope="module")
def mem_cluster() -> Iterator[InProcessCluster]:
    """A cluster for one module: what comes after it runs in a process that is no worker any more."""
    with InProcessCluster() as cluster:
        yield cluster
