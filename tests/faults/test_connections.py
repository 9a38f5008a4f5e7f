"""Connections that break in the middle of a call: right values, nothing twice, nothing left."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError
from redis.retry import Retry

from tests import tasks
from tests.deployment import Deployment
from tests.faults.graphs import Graph
from tests.faults.proxy import Proxy

SEEDS = [1, 2, 3]


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with Deployment(inline_limit=1000, slice=0.5, ticket_lease=1.0) as it:
        yield it


@pytest.mark.parametrize("seed", SEEDS)
def test_a_graph_is_computed_once_and_right_over_connections_that_break(
    deployment: Deployment, seed: int
) -> None:
    deployment.forget_runs()
    with Proxy(deployment.url.removeprefix("unix://"), seed=seed, mean=12_000) as proxy:
        broken = {"CELERY_MEM_URL": proxy.url}
        env = broken | {"SHOP_BROKER": deployment.url}  # the broker's own troubles are another test's
        deployment.start_coordinator("c0", env=broken)
        deployment.start_worker("w0", app="tests.worker.shop", slots=2, env=env)
        with deployment.client(url=proxy.url) as client:
            graph = Graph(client, deployment.url, f"g{seed}", seed=seed)
            assert client.gather(graph.futures, timeout=100) == graph.values
            futures = [client.submit(tasks.inc, i) for i in range(100)]
            assert client.gather(futures, timeout=100) == list(range(1, 101))
            del graph, futures
        assert set(deployment.runs().values()) == {1}
        assert proxy.n_cuts > 5
        deployment.check_empty()
        proxy.calm()
        for name in ("w0", "c0"):
            deployment.signal(name, 15)
            deployment.wait_gone(name)


def test_the_proxy_cuts_where_it_is_told_to(deployment: Deployment) -> None:
    path = deployment.url.removeprefix("unix://")
    with Proxy(path, seed=0, mean=1e9) as proxy, Redis.from_url(proxy.url) as whole:
        whole.set("x", "y" * 100_000)
        assert whole.get("x") == b"y" * 100_000
        assert proxy.n_cuts == 0
    with Proxy(path, seed=0, mean=50) as proxy:
        once = Redis.from_url(proxy.url, retry=Retry(NoBackoff(), 0))
        with pytest.raises(ConnectionError):
            [once.get("x") for _ in range(100)]
        assert proxy.n_cuts > 0
        proxy.calm()
        assert Redis.from_url(proxy.url).get("x") == b"y" * 100_000
        address = ("127.0.0.1", int(proxy.url.rpartition(":")[2].partition("/")[0]))
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(address, timeout=1)
    deployment.redis.unlink("x")
