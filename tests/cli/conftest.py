from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result

from celery_mem.cli import mem
from celery_mem.config import Settings
from celery_mem.local import LocalCluster
from celery_mem.state.store import Done, Failed, NewTask, Store

Cli = Callable[..., Result]


@pytest.fixture(scope="package")
def redis_url() -> Iterator[str]:
    with LocalCluster(0, coordinators=0) as cluster:
        yield cluster.url


@pytest.fixture
def store(redis_url: str) -> Iterator[Store]:
    """A namespace of its own for each test."""
    store = Store.connect(Settings(url=redis_url, namespace=f"test-{uuid4().hex[:8]}"))
    yield store
    store.link.close()


@pytest.fixture
def cli(store: Store, tmp_path: Path) -> Cli:
    """Run a command on the namespace of `store`, on a host whose shared memory is `tmp_path`."""
    host = {"CELERY_MEM_SHM_FOLDER": str(tmp_path)}

    def run(command: str, *args: str, **options: Any) -> Result:
        address = ("-u", store.settings.url, "-n", store.settings.namespace)
        result = CliRunner(env=host).invoke(mem, [command, *args, *address], **options)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def story(store: Store) -> Store:
    """A namespace in the middle of work: x is in memory, y waits for z, z runs, bad has failed."""
    store.renew_client("client-1", join=True)
    code = [("inc", b"code")]
    tasks = [
        NewTask("x", "inc", b"payload", order=0),
        NewTask("bad", "inc", b"payload", order=1),
        NewTask("z", "inc", b"payload", order=2, hold=False),
        NewTask("worse", "inc", b"payload", deps=("bad",), order=4),
        NewTask("y", "inc", b"payload", deps=("x", "z"), order=3, priority=2),
    ]
    store.submit("client-1", 1, tasks, code)
    store.heartbeat("worker-0@host", slots="2", pid="77", pool="prefork", hostname="host")
    taken = {t.key: t for t in store.step("worker-0@host/1", "worker-0@host", want=3).taken}
    while len(taken) < 3:
        more = store.step("worker-0@host/1", "worker-0@host", want=3).taken
        taken |= {t.key: t for t in more}
    error = b'{"type": "builtins.ValueError", "message": "no", "traceback": "Traceback: here"}\npickle'
    store.step(
        "worker-0@host/1",
        "worker-0@host",
        want=0,
        done=[Done("x", taken["x"].attempt, 28, "int", "v", b"value")],
        failed=[Failed("bad", taken["bad"].attempt, error)],
    )
    return store
