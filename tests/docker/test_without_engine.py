"""What docker/ says, checked and run without a container engine."""

from __future__ import annotations

import json
import os
import shutil
import socket as socket_module
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from celery_mem import Client
from celery_mem.local.processes import Processes
from celery_mem.local.redis import find_redis_server
from tests.deployment import PATIENCE_S, ROOT, wait_until

BIN = Path(sys.executable).parent
FOLDER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def instructions() -> list[tuple[str, str]]:
    """The lines of the Dockerfile: instruction and the rest."""
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    words = (line.split(maxsplit=1) for line in lines if line and not line.startswith("#"))
    return [(word, rest) for word, rest in words]


def told(instruction: str) -> list[str]:
    return [rest for word, rest in instructions() if word == instruction]


def command(service: str) -> list[str]:
    """What a container of a service runs."""
    return SERVICES[service].get("command") or json.loads(told("CMD")[-1])


def is_sent_to_the_engine(path: str) -> bool:
    """Whether .dockerignore lets a path of the repository through; the last pattern that fits decides."""
    sent = True
    for pattern in (ROOT / ".dockerignore").read_text().split():
        if fnmatch(path, pattern.removeprefix("!")):
            sent = pattern.startswith("!")
    return sent


# --- what is written ---------------------------------------------------------------------------------------


def test_all_that_the_image_copies_is_there_and_sent() -> None:
    own = [rest for rest in told("COPY") if not rest.startswith("--from=")]
    sources = [source for rest in own for source in rest.split()[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert is_sent_to_the_engine(source), source


def test_the_image_has_a_python_that_the_package_takes() -> None:
    build, base = told("FROM")
    assert build == f"{base} AS build"
    version = base.removeprefix("python:").partition("-")[0]
    required = next(
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if "requires-python" in line
    )
    assert version in SpecifierSet(required.split('"')[1])


def test_the_image_and_the_services_agree_on_the_address() -> None:
    environ = dict(word.split("=", 1) for rest in told("ENV") for word in rest.split())
    assert environ["CELERY_MEM_URL"] == "redis://redis:6379/0"
    assert "6379" in SERVICES["redis"]["ports"][0]
    for name in ("worker", "coordinator", "flower"):
        assert SERVICES[name]["depends_on"] == {"redis": {"condition": "service_healthy"}}
        assert SERVICES[name]["image"] == SERVICES["worker"]["image"]
    assert SERVICES["worker"]["build"] == {"context": "..", "dockerfile": "docker/Dockerfile"}


def test_what_the_services_mount_is_there() -> None:
    for mount in SERVICES["redis"]["volumes"]:
        source = mount.split(":")[0]
        assert source in COMPOSE["volumes"] or (FOLDER / source).exists(), mount


def test_workers_have_shared_memory_for_large_results() -> None:
    assert SERVICES["worker"]["shm_size"] == "2gb"


def test_a_container_is_no_root_and_has_an_init_and_a_worker_time_to_end() -> None:
    assert told("USER") == ["celery"]
    assert json.loads(told("ENTRYPOINT")[-1]) == ["tini", "--"]
    assert int(SERVICES["worker"]["stop_grace_period"].removesuffix("s")) >= 30


# --- what is run -------------------------------------------------------------------------------------------


@pytest.fixture
def containers(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Every service started with its own command, outside of containers; yields the environment."""
    socket = tmp_path / "r.sock"
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("CELERY", "REDIS"))}
    path = os.pathsep.join([str(BIN), str(Path(find_redis_server().path).parent), environ["PATH"]])
    if None in (shutil.which("redis-server", path=path), shutil.which("redis-cli", path=path)):
        pytest.skip("no redis-server and redis-cli by these names")
    environ |= {"CELERY_MEM_URL": f"unix://{socket}", "PATH": path, "HOME": str(tmp_path)}
    mounted = [volume.split(":") for volume in SERVICES["redis"]["volumes"]]
    places = {target: str(FOLDER / source) for source, target, *_ in mounted if "/" in source}
    places |= {target: str(tmp_path) for source, target, *_ in mounted if "/" not in source}
    redis = [places.get(word, word) for word in command("redis")]
    processes = Processes(str(tmp_path / "logs"), environ, grace_s=0.5)
    (tmp_path / "logs").mkdir()
    try:
        # A socket in place of the port, which others may use here.
        processes.start("redis", [*redis, "--port", "0", "--unixsocket", str(socket)], stage=0)
        test = SERVICES["redis"]["healthcheck"]["test"]
        assert test[0] == "CMD"
        ping = [test[1], "-s", str(socket), *test[2:]]
        wait_until(lambda: subprocess.run(ping, env=environ, check=False).returncode == 0, "a healthy redis")
        for name in ("worker", "coordinator"):
            processes.start(name, command(name))
        with socket_module.create_server(("127.0.0.1", 0)) as probe:
            environ["FLOWER_TEST_PORT"] = str(probe.getsockname()[1])
        flower = [word.replace("5555", environ["FLOWER_TEST_PORT"]) for word in command("flower")]
        processes.start("flower", flower)
        processes.wait_until_started()
        yield environ
        assert processes.troubles() == []
    finally:
        processes.close()


def page(environ: dict[str, str]) -> str:
    """The Memory page, empty while nobody answers."""
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{environ['FLOWER_TEST_PORT']}/memory", timeout=5
        ) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


@pytest.mark.skipif(not (BIN / "celery-mem").exists(), reason="the package is not installed here")
def test_the_commands_of_the_services_are_a_deployment(containers: dict[str, str]) -> None:
    with Client(containers["CELERY_MEM_URL"], set_as_default=False) as client:
        client.wait_for_workers(1, timeout=PATIENCE_S)
        assert client.submit(sum, [1, 2]).result(timeout=PATIENCE_S) == 3
        wait_until(lambda: client.info()["leader"], "a coordinator to lead")
        wait_until(lambda: "memory" in page(containers).lower(), "Flower to show its page")
    test = COMPOSE["x-celery-mem"]["healthcheck"]["test"]
    assert test[0] == "CMD"
    subprocess.run(test[1:], env=containers, check=True, stdout=subprocess.DEVNULL)
    shown = subprocess.check_output(["celery-mem", "status", "--json"], env=containers, text=True)
    assert len(json.loads(shown)["nodes"]) == 1
