"""Tasks of the graph in a plain Flower: each is a task of its own."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

import pytest

from celery_mem import Client, LocalCluster
from tests.monitor.test_flower import get, serving
from tests.on_cluster import Gate, state, until

pytest.importorskip("flower")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(1, silence=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        yield client


@pytest.fixture(scope="module")
def site(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of Flower as it comes, of which nobody asks for a login."""
    command = ["celery", "-A", "celery_mem.worker.app", "flower"]
    where = {"CELERY_MEM_URL": cluster.url, "CELERY_MEM_NAMESPACE": cluster.namespace}
    with serving(
        command, tmp_path_factory.mktemp("flower"), FLOWER_UNAUTHENTICATED_API="true", **where
    ) as address:
        yield address


class Secretive:
    def __repr__(self) -> str:
        raise AssertionError("nobody may ask for it: it could be long, slow, or a secret")


def add(x: int, y: int = 0, *, of: Any = None) -> int:
    return x + y


def fail(x: int) -> None:
    raise ValueError(f"no {x}")


def task(site: str, key: str) -> dict[str, Any]:
    """What Flower knows of a task, empty if nothing."""
    try:
        found: dict[str, Any] = json.loads(get(f"{site}/api/task/info/{quote(key)}"))
    except HTTPError:
        return {}
    return found


def shows(site: str, key: str, state: str) -> bool:
    return until(lambda: task(site, key).get("state") == state)


def revoke(site: str, key: str, *, terminate: bool) -> None:
    query = "?terminate=true" if terminate else ""
    request = urllib.request.Request(f"{site}/api/task/revoke/{quote(key)}{query}", data=b"", method="POST")
    with urllib.request.urlopen(request, timeout=20) as reply:
        assert reply.status == 200


def test_a_task_shows_with_name_call_result_runtime_and_where_it_ran(site: str, client: Client) -> None:
    first = client.submit(add, 1, y=2, of=Secretive(), pure=False)
    second = client.submit(add, first, pure=False)
    assert second.result() == 3
    assert shows(site, first.key, "SUCCESS")
    assert shows(site, second.key, "SUCCESS")

    row = task(site, first.key)
    assert row["name"] == "add"
    assert row["args"] == "(1,)"
    assert row["kwargs"] == "{'y': 2, 'of': <Secretive>}"
    assert row["result"] == "3"
    assert row["runtime"] >= 0
    assert row["received"] <= row["started"] <= row["succeeded"]
    [worker] = client.has_what()
    assert row["worker"] == worker
    assert row["root_id"] == first.key


def test_a_failed_task_shows_its_error_and_traceback(site: str, client: Client) -> None:
    future = client.submit(fail, 7, pure=False)
    assert isinstance(future.exception(), ValueError)
    assert shows(site, future.key, "FAILURE")
    row = task(site, future.key)
    assert row["exception"] == "ValueError('no 7')"
    assert "raise ValueError" in row["traceback"]


def test_terminate_ends_a_task_that_runs(site: str, client: Client, cluster: LocalCluster) -> None:
    gate = Gate(cluster.url)
    future = client.submit(gate.pass_, pure=False)
    gate.next_reached()
    assert shows(site, future.key, "STARTED")

    revoke(site, future.key, terminate=True)

    with pytest.raises(CancelledError):
        future.result(timeout=20)
    assert shows(site, future.key, "REVOKED")


def test_revoke_cancels_a_task_that_waits_and_what_depends_on_it(
    site: str, client: Client, cluster: LocalCluster
) -> None:
    gate = Gate(cluster.url)
    first = client.submit(gate.pass_, 1, pure=False)
    gate.next_reached()
    waiting = client.submit(add, first, pure=False)
    after = client.submit(add, waiting, pure=False)
    assert until(lambda: state(cluster, after.key) == "waiting")

    revoke(site, waiting.key, terminate=False)

    for future in (waiting, after):
        with pytest.raises(CancelledError):
            future.result(timeout=20)
    gate.open()
    assert first.result() == 1
