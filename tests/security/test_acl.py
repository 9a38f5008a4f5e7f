"""worker_config/users.acl: each role can do its work, and is refused the rest."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import NoPermissionError

from celery_mem import Client
from celery_mem.local.redis import find_redis_server
from tests.deployment import ROOT, wait_until

ROLES = ("client", "worker", "coordinator", "monitor")


class Deployment:
    """A Redis with these users, and a worker and a coordinator that are two of them."""

    def __init__(self, folder: Path) -> None:
        server = find_redis_server()
        if server.version < (7,):
            pytest.skip("rules for reading and writing apart came with Redis 7")
        self.socket = folder / "redis.sock"
        acl = folder / "users.acl"
        acl.write_text((ROOT / "worker_config" / "users.acl").read_text())
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "aclfile": str(acl),
            "save": "",
            "dir": str(folder),
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        self.log = folder / "log"
        self.processes = [self._start([server.path, *words], {})]
        wait_until(self.socket.exists, "Redis to listen")
        celery = [
            "-m",
            "celery",
            "-A",
            "celery_mem.worker.app",
            "worker",
            "-c",
            "1",
            "-l",
            "INFO",
            "-n",
            "w0@%h",
        ]
        self.processes.append(self._start([sys.executable, *celery], {"CELERY_MEM_URL": self.url("worker")}))
        coordinator = ["-m", "celery_mem.cli", "coordinator"]
        self.processes.append(
            self._start([sys.executable, *coordinator], {"CELERY_MEM_URL": self.url("coordinator")})
        )

    def url(self, role: str) -> str:
        return f"unix://mem-{role}:change-me-{role}@{self.socket}"

    def _start(self, command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("CELERY", "REDIS"))}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                env=clean | {"PYTHONPATH": str(ROOT)} | env,
                stdout=log,
                stderr=log,
                cwd=self.log.parent,
            )

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    it = Deployment(tmp_path_factory.mktemp("acl"))
    try:
        yield it
    finally:
        it.close()


def connect(deployment: Deployment, role: str) -> Redis:
    return Redis.from_url(deployment.url(role), protocol=2)


def test_every_role_does_its_work(deployment: Deployment) -> None:
    with Client(deployment.url("client"), set_as_default=False) as client, client.record() as recording:
        total = client.submit(sum, client.map(pow, range(50), [2] * 50))
        wait_until(total.done, f"a job: {deployment.log.read_text()[-3000:]}")
        assert total.result() == sum(n * n for n in range(50))
        large = client.submit(bytes, 300_000)
        assert len(large.result(timeout=30)) == 300_000
        assert len(recording.stop()) == 52
        shown = subprocess.run(
            [sys.executable, "-m", "celery_mem.cli", "status", "--json", "--url", deployment.url("monitor")],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert shown.returncode == 0, shown.stderr
        assert "w0@" in shown.stdout
    with connect(deployment, "coordinator") as redis:
        assert redis.get("{mem}:leader")
        wait_until(lambda: not list(redis.scan_iter("{mem}:t:*")), "all to be freed")
    log = deployment.log.read_text()
    assert "NOPERM" not in log, log[-3000:]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    "command", [("FLUSHALL",), ("CONFIG", "GET", "*"), ("ACL", "LIST"), ("GET", "elsewhere")]
)
def test_what_no_role_needs_is_refused(deployment: Deployment, role: str, command: tuple[str, ...]) -> None:
    with connect(deployment, role) as redis, pytest.raises(NoPermissionError):
        redis.execute_command(*command)


@pytest.mark.parametrize(
    "command",
    [
        ("HSET", "{mem}:meta", "x", "1"),
        ("DEL", "{mem}:meta"),
        ("EVAL", "return 1", "0"),
        ("PUBLISH", "a", "b"),
    ],
)
def test_a_monitor_changes_nothing(deployment: Deployment, command: tuple[str, ...]) -> None:
    with connect(deployment, "monitor") as redis, pytest.raises(NoPermissionError):
        redis.execute_command(*command)


def test_a_client_sends_tickets_and_reads_none(deployment: Deployment) -> None:
    with connect(deployment, "client") as redis:
        with pytest.raises(NoPermissionError):
            redis.lpop("celery-mem.mem")
        with pytest.raises(NoPermissionError):
            redis.lrange("celery-mem.mem", 0, -1)


def test_nobody_comes_in_without_a_name(deployment: Deployment) -> None:
    started = time.monotonic()
    with pytest.raises(Exception, match=r"NOAUTH|Authentication|refuses the password"):
        Client(f"unix://{deployment.socket}", set_as_default=False, timeout=2)
    assert time.monotonic() - started < 30
