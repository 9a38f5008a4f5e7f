"""durable=True: results that survive the loss of every worker, and whose lineage is given up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest

from celery_mem import Client
from celery_mem.errors import DataLostError, RedisUnavailableError
from celery_mem.memory.audit_files import audit_files, remove_unknown_durable
from celery_mem.state.audit import audit, read
from celery_mem.state.store import Store
from tests.deployment import Deployment
from tests.on_cluster import add, inc

N = 100_000


def add_one(x: np.ndarray) -> np.ndarray:
    return x + 1


class Site:
    """A deployment whose workers are killed and replaced."""

    def __init__(self, url: str) -> None:
        self.deployment = Deployment(durable_url=url, node_lease=2)
        self.folder = Path(url.removeprefix("file://")) / "mem" if url else None
        self.place = "@durable" if url else "@redis"
        self.workers = 0
        self.deployment.start_coordinator()
        self.start_worker()

    def start_worker(self) -> None:
        self.workers += 1
        self.deployment.start_worker(f"w{self.workers}", slots=2)

    def kill_workers(self) -> None:
        """Kill all workers there are, and wait until they are given up."""
        self.deployment.kill(f"w{self.workers}")
        node = self.deployment.node(f"w{self.workers}")
        self.deployment.wait_until(
            lambda: node not in read(self.store).nodes, "the coordinator to give up the node"
        )

    def wait_durable(self, client: Client, *futures: Any) -> None:
        """Wait until results are where they outlive the workers."""
        self.deployment.wait_until(
            lambda: all(self.place in places for places in client.who_has(futures).values()), "durable copies"
        )

    def files(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir()) if self.folder else []

    @property
    def store(self) -> Store:
        if not hasattr(self, "_store"):
            self._store = self.deployment.store()
        return self._store


@pytest.fixture(scope="module", params=["redis", pytest.param("files", marks=pytest.mark.node_memory)])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    url = f"file://{tmp_path_factory.mktemp('durable')}" if request.param == "files" else ""
    site = Site(url)
    try:
        yield site
    finally:
        site.store.link.close()
        site.deployment.close()


@pytest.fixture
def client(site: Site) -> Iterator[Client]:
    """A client; when the test ends, nothing may be left, no file either."""
    client = site.deployment.client()
    yield client
    client.close()
    site.deployment.check_empty()
    site.deployment.wait_until(lambda: site.files() == [], "no durable files")
    assert [v for v in audit_files(site.store) if v.rule != "dead folder"] == []


def test_durable_results_survive_the_loss_of_all_workers(site, client):
    small = client.submit(inc, 1, durable=True)
    large = client.submit(np.ones, N, durable=True)
    parts = client.map(np.full, [N, N], [1, 2], durable=True)
    x = client.persist(da.full(2 * N, 3, chunks=N), durable=True)
    total = client.compute(x.sum(), durable=True)
    total.result(), small.result()
    site.wait_durable(client, large, *parts, x)
    assert {row.function for row in read(site.store).records.values()} == {""}
    site.kill_workers()
    assert [small.result(), large.result().sum(), total.result()] == [2, N, 6 * N]
    assert [p.sum() for p in client.gather(parts)] == [N, 2 * N]
    site.start_worker()
    assert client.submit(add, large, parts[1]).result().sum() == 3 * N
    assert client.compute(x.max()).result() == 3


def test_a_chain_of_durable_steps_does_not_grow(site, client):
    steps = 2_000 if site.folder is None else 200
    x = client.submit(inc, -1, key="step 0", durable=True)
    most = 0
    for i in range(1, steps):
        x = client.submit(inc, x, key=f"step {i}", durable=True)
        if i % 50 == 0:
            assert x.result() == i
            client.session.flush_releases()
            keys = int(site.deployment.redis.dbsize())
            most = max(most, len(read(site.store).records))
            assert keys < 200
    assert x.result() == steps - 1
    assert most <= 24
    client.session.flush_releases()
    assert set(read(site.store).records) == {f"step {steps - 1}"}


def test_a_chain_of_durable_arrays_keeps_the_last(site, client):
    x = client.submit(np.zeros, N, durable=True)
    for _ in range(5):
        x = client.submit(add_one, x, durable=True)
    site.wait_durable(client, x)
    site.deployment.wait_until(lambda: len(read(site.store).records) == 1, "the lineage to be given up")
    assert audit(site.store) == []
    site.kill_workers()
    assert x.result().sum() == 5 * N
    site.start_worker()


def test_what_was_made_from_a_durable_result_is_made_again_from_it(site, client):
    base = client.submit(np.ones, N, durable=True, key="base")
    site.wait_durable(client, base)
    derived = client.submit(add_one, base, key="derived")
    assert derived.result().sum() == 2 * N
    del base
    client.session.flush_releases()
    assert read(site.store).records["base"].places == [site.place]  # on no node any more
    site.kill_workers()
    site.start_worker()
    assert derived.result().sum() == 2 * N


def test_a_published_dataset_can_be_durable(site, client):
    x = client.persist(da.ones(2 * N, chunks=N))
    client.publish_dataset(x=x, durable=True)
    site.wait_durable(client, x)
    del x
    client.close()
    site.kill_workers()
    site.start_worker()
    with site.deployment.client() as other:
        assert other.compute(other.get_dataset("x").sum()).result() == 2 * N
        other.unpublish_dataset("x")


def test_a_durable_copy_that_is_lost_is_an_error_that_names_the_key(site, client):
    large = client.submit(np.ones, N, durable=True, key="large")
    site.wait_durable(client, large)
    site.kill_workers()
    if site.folder is None:
        for name in site.deployment.redis.scan_iter(site.deployment.key("b:*")):
            site.deployment.redis.unlink(name)
    else:
        (site.folder / site.files()[0]).write_bytes(b"something else")
    with pytest.raises(DataLostError, match="the data of 'large' is lost: its durable copy is gone"):
        large.result()
    site.start_worker()
    with pytest.raises(DataLostError, match="'large'"):
        client.submit(np.sum, large).result()


@pytest.mark.node_memory
def test_a_durable_copy_that_is_lost_is_made_again_from_one_on_a_node(site, client):
    large = client.submit(np.ones, N, durable=True)
    site.wait_durable(client, large)
    (location,) = site.store.locate([large.key])
    site.store.lose(site.place, [(large.key, location.token)])
    site.wait_durable(client, large)
    site.kill_workers()
    assert large.result().sum() == N
    site.start_worker()


@pytest.mark.parametrize("site", [pytest.param("files", marks=pytest.mark.node_memory)], indirect=True)
def test_files_that_no_record_names_are_found_and_a_place_that_is_away_is_no_loss(site, client):
    assert site.folder is not None
    large = client.submit(np.ones, N, durable=True)
    site.wait_durable(client, large)
    orphan = site.folder / "orphan-1"
    orphan.write_bytes(b"")
    assert "orphan-1" not in {v.key for v in audit_files(site.store)}  # Redis may be told of it yet
    os.utime(orphan, (1, 1))
    assert ("durable file without key", "orphan-1") in {(v.rule, v.key) for v in audit_files(site.store)}
    assert remove_unknown_durable(site.store) == ["orphan-1"]
    site.kill_workers()
    away = site.folder.with_name("away")
    site.folder.rename(away)
    with pytest.raises(RedisUnavailableError, match="is it mounted here"):
        large.result()
    away.rename(site.folder)
    assert large.result().sum() == N
    site.start_worker()
