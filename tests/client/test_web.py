"""A web server that forks its processes after the application has used a client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from celery_mem import LocalCluster
from tests.on_cluster import task_keys, until

APPLICATION = """
import functools, json, os
from celery_mem import Client
from celery_mem.errors import CeleryMemError

before_fork = Client(set_as_default=False)
future = before_fork.submit(abs, -1, key="of-the-parent")
assert future.result(timeout=60) == 1

@functools.cache
def client():
    return Client()

def application(environ, start_response):
    try:
        of_parent = future.result(timeout=60)
    except CeleryMemError as error:
        of_parent = str(error)
    result = client().submit(pow, os.getpid(), 2, pure=False).result(timeout=60)
    start_response("200 OK", [("Content-Type", "application/json")])
    told = {"pid": os.getpid(), "result": result, "client": client().session.id, "of_parent": of_parent}
    return [json.dumps(told).encode()]
"""


@pytest.fixture
def web(cluster: LocalCluster, tmp_path: Path) -> Iterator[str]:
    """The socket of a gunicorn that loads the application and then forks two processes."""
    (tmp_path / "shop.py").write_text(APPLICATION)
    path = str(tmp_path / "web.sock")
    command = ["-m", "gunicorn", "--preload", "--workers", "2", "--bind", f"unix:{path}", "shop:application"]
    path_of_python = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    env = {**os.environ, "CELERY_MEM_URL": cluster.url, "PYTHONPATH": path_of_python}
    server = subprocess.Popen([sys.executable, *command], env=env, cwd=tmp_path)
    try:
        assert until(lambda: listens(path) or server.poll() is not None, timeout=60)
        yield path
    finally:
        server.terminate()
        server.wait(60)
    assert server.returncode == 0
    assert until(lambda: not task_keys(cluster), timeout=20), task_keys(cluster)


def listens(path: str) -> bool:
    """Whether connections are taken; the socket is there a moment before."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def ask(path: str) -> dict[str, Any]:
    connection = HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(60)
    connection.sock.connect(path)
    connection.request("GET", "/")
    answer: dict[str, Any] = json.load(connection.getresponse())
    connection.close()
    return answer


def test_each_process_has_one_client_of_its_own_and_is_told_not_to_use_the_parents(web: str) -> None:
    answers: list[dict[str, Any]] = []

    def both_answered() -> bool:
        answers.append(ask(web))
        return len({a["pid"] for a in answers}) == 2 and len(answers) > 10

    assert until(both_answered, timeout=60)
    assert [a["result"] for a in answers] == [a["pid"] ** 2 for a in answers]
    assert len({(a["pid"], a["client"]) for a in answers}) == 2
    assert len({a["client"] for a in answers}) == 2
    assert all("belongs to the parent process; make a new one" in str(a["of_parent"]) for a in answers)
