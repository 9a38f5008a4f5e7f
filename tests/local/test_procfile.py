"""The Procfile, run as Heroku or any other process manager would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
from redis import Redis

from celery_mem import Client, LocalCluster
from tests.deployment import wait_until
from tests.local.conftest import all_gone

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.skipif(
    not (BIN / "celery-mem").exists() or not (BIN / "honcho").exists(), reason="not installed here"
)


class Dynos(NamedTuple):
    """The processes of a Procfile, and where they are.

    Attributes:
        url: of their Redis, which has nobody else.
        port: of the web process, if it runs.
        environ: what they are told.
    """

    url: str
    port: int
    environ: dict[str, str]


@contextmanager
def start(url: str, *names: str) -> Iterator[Dynos]:
    """Run some processes of the Procfile; at the end all get the signal that Heroku sends, and are gone."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environ = os.environ | {
        "REDIS_URL": url,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PORT": str(port),
        "WEB_CONCURRENCY": "2",
        "DYNO": "worker.1",
    }
    command = [str(BIN / "honcho"), "-f", str(ROOT / "Procfile"), "start", *names]
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    ) as honcho:
        family: list[psutil.Process] = []
        try:
            # Honcho gives each process a port of its own, 100 apart for each kind, from the first one on.
            yield Dynos(url, port, environ)
            family = psutil.Process(honcho.pid).children(recursive=True)
        finally:
            honcho.send_signal(signal.SIGTERM)
    assert all_gone(family, timeout=30)


@pytest.fixture
def url() -> Iterator[str]:
    with LocalCluster(0, coordinators=0) as redis_only:
        yield redis_only.url


def connections(url: str) -> list[str]:
    """What Redis says of its connections, without this one's."""
    with Redis.from_url(url, protocol=2) as redis:
        own = str(redis.client_id())
        return [str(client["cmd"]) for client in redis.client_list() if client["id"] != own]


def most_connections(url: str, client: Client) -> list[str]:
    """The most connections that there were after each part of a job that needs all kinds of them."""
    found = []
    client.gather(client.map(pow, range(100), [3] * 100), timeout=60)
    found.append(connections(url))
    arrays = client.map(np.arange, range(3_000_000, 3_000_006))
    client.gather(client.map(np.sum, arrays), timeout=60)
    found.append(connections(url))
    client.gather(client.scatter([np.ones(1_000_000)]), timeout=60)
    found.append(connections(url))
    client.cancel(client.submit(time.sleep, 60))
    client.submit(pow, 7, 7).result(timeout=60)
    found.append(connections(url))
    return max(found, key=len)


def doctor(dynos: Dynos) -> dict[str, Any]:
    """What the release phase finds; it must not fail."""
    command = [str(BIN / "celery-mem"), "doctor", "--json"]
    done = subprocess.run(command, env=dynos.environ, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.node_memory  # without it, a client has one connection more, for transfers
def test_worker_and_coordinator_do_a_job_over_few_connections(url: str) -> None:
    with start(url, "worker", "coordinator") as dynos:
        with Client(url, set_as_default=False) as client:
            client.wait_for_workers(1, timeout=60)
            assert client.gather(client.map(pow, range(100), [2] * 100), timeout=60)[9] == 81
            assert [name.partition("@")[0] for name in client.info()["nodes"]] == ["worker-worker.1"]
            wait_until(lambda: client.info()["leader"], "a coordinator to lead")
            found = most_connections(url, client)
            assert len(found) <= 16, found  # the smallest plans have 20
        rules = {finding["rule"] for finding in doctor(dynos)["findings"]}
        assert rules <= {"persistence", "hash seed"}, rules


@pytest.mark.node_memory  # the figure is that of the defaults
def test_with_the_web_process_all_stays_within_25_connections(url: str) -> None:
    with start(url, "web", "worker", "coordinator") as dynos, Client(url, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=60)
        assert client.submit(sum, [1, 2]).result(timeout=60) == 3

        def page() -> str:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{dynos.port}/memory", timeout=5) as answer:
                    return str(answer.read().decode())
            except OSError:
                return ""

        wait_until(lambda: "worker" in page().lower(), "Flower to answer")
        found = most_connections(url, client)
        assert len(found) <= 25, found
