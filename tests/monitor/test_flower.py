"""`celery-mem flower` beside a cluster."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import pytest

from celery_mem import Client, LocalCluster
from celery_mem.monitor.reading import DRAWN
from tests.on_cluster import Gate, state, until

pytest.importorskip("flower")
RESULT = b"x" * 300_000


def inc(number: int) -> bytes:
    return RESULT + bytes(number)


def add(x: int, y: int) -> int:
    return x + y


def fail(number: int) -> None:
    raise ValueError(number)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(1, silence=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def site(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Flower of ours."""
    where = ["-u", cluster.url, "-n", cluster.namespace]
    with serving(["celery_mem.cli", "flower", *where], tmp_path_factory.mktemp("flower")) as address:
        yield address


@contextmanager
def serving(module: list[str], folder: Path, **environment: str) -> Iterator[str]:
    """Run a Flower until the end of the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "log"
    command = [sys.executable, "-m", *module, f"--port={port}", "--address=127.0.0.1"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, cwd=folder, env={**os.environ, **environment}
        )
    try:
        address = f"http://127.0.0.1:{port}"
        assert until(lambda: process.poll() is not None or answers(f"{address}/healthcheck")), log.read_text()
        assert process.poll() is None, log.read_text()
        yield address
    finally:
        process.terminate()
        process.wait(20)


def answers(address: str) -> bool:
    try:
        get(address)
    except URLError:
        return False
    return True


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=20) as reply:
        return str(reply.read().decode())


def figures(site: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(get(f"{site}/memory/json"))
    return found


def test_the_page_tells_who_keeps_how_much(cluster: LocalCluster, site: str) -> None:
    with Client(cluster) as client:
        futures = client.map(inc, range(3))
        client.gather(futures)
        size = sum(len(RESULT) + n for n in range(3))

        assert until(lambda: any(r["nbytes"] >= size for r in figures(site)["holders"]))
        picture = figures(site)
        [prefix] = [row for row in picture["prefixes"] if row["prefix"] == "inc"]
        [holder] = picture["holders"]
        assert prefix["tasks"] == holder["tasks"] == 3
        assert holder["holder"] in picture["clients"]
        assert holder["lease"] > 0
        [node] = picture["nodes"].values()
        assert node["slots"] >= 1
        del futures
    assert until(lambda: not figures(site)["holders"])
    assert until(lambda: all(node["freed"] >= 3 for node in figures(site)["nodes"].values()))


def test_the_graph_of_a_key_has_states_and_what_depends_on_what(cluster: LocalCluster, site: str) -> None:
    with Client(cluster) as client:
        first = client.submit(inc, 1, pure=False)
        second = client.submit(len, first, pure=False)
        third = client.submit(fail, second, pure=False)
        assert isinstance(third.exception(), ValueError)
        found = json.loads(get(f"{site}/memory/graph?key={second.key}"))
        assert found["states"][first.key] == found["states"][second.key] == "memory"
        assert [first.key, second.key] in found["edges"]
        if third.key in found["states"]:
            assert found["states"][third.key] == "erred"


def test_the_graph_of_a_wide_key_is_cut(cluster: LocalCluster, site: str) -> None:
    gate = Gate(cluster.url)
    with Client(cluster) as client:
        root = client.submit(gate.pass_, 0, pure=False)
        leaves = client.map(add, [root] * (DRAWN + 40), range(DRAWN + 40))
        assert until(lambda: state(cluster, leaves[-1].key) == "waiting")
        found = json.loads(get(f"{site}/memory/graph?key={root.key}"))
        assert len(found["states"]) == DRAWN
        assert found["is_cut"]
        assert len(found["edges"]) == DRAWN - 1

        [node] = figures(site)["nodes"]
        expected = [{"queue": node, "ready": 0, "processing": 1, "erred": 0}]
        assert until(lambda: figures(site)["at_work"] == expected)
        gate.open()
        client.gather(leaves)


def test_of_a_key_that_nobody_knows_the_graph_is_not_found(site: str) -> None:
    with pytest.raises(HTTPError, match="404"):
        get(f"{site}/memory/graph?key=nothing")


def test_every_page_has_the_tab(site: str) -> None:
    for page in ("/", "/memory"):
        assert 'href="/memory"' in get(site + page)


def test_prometheus_finds_the_gauges(site: str) -> None:
    assert until(lambda: "celery_mem_node_bytes{" in get(f"{site}/metrics"))
    text = get(f"{site}/metrics")
    assert "celery_mem_up 1.0" in text
    assert "celery_mem_slots{" in text


def test_prometheus_finds_what_happened(cluster: LocalCluster, site: str) -> None:
    with Client(cluster) as client:
        assert client.submit(inc, 1, pure=False).result() == inc(1)

    def counted(*names: str) -> bool:
        found = dict(line.rsplit(" ", 1) for line in get(f"{site}/metrics").splitlines() if line[0] != "#")
        return all(float(found[f"celery_mem_{name}"]) > 0 for name in names)

    assert until(lambda: counted("ticket_seconds_count", "step_seconds_count", "freed_total"))
    assert counted('ticket_seconds_bucket{le="+Inf"}', "step_seconds_sum")


def test_a_coordinator_serves_the_metrics_to_those_without_flower(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "celery_mem.cli", "coordinator", "-u", cluster.url]
    command += ["-n", cluster.namespace, f"--metrics-port={port}"]
    address = f"http://127.0.0.1:{port}/metrics"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        assert until(lambda: answers(address)), (tmp_path / "log").read_text()
        text = get(address)
        assert "celery_mem_up 1.0" in text
        assert "celery_mem_node_freed_total{" in text
        assert 'celery_mem_duty_total{duty="nodes"} 0.0' in text
    finally:
        process.terminate()
        process.wait(20)


def test_flowers_login_guards_the_page_of_an_app_too(cluster: LocalCluster, tmp_path: Path) -> None:
    command = ["celery", "-A", "celery_mem.worker.app", "mem", "flower", "--basic_auth=me:secret"]
    place = {"CELERY_MEM_URL": cluster.url, "CELERY_MEM_NAMESPACE": cluster.namespace}
    with serving(command, tmp_path, **place) as site:
        for page in ("/memory", "/memory/json"):
            with pytest.raises(HTTPError, match="401"):
                get(site + page)
            known = urllib.request.Request(site + page, headers={"Authorization": "Basic bWU6c2VjcmV0"})
            with urllib.request.urlopen(known, timeout=20) as reply:
                assert reply.status == 200


def test_an_unknown_page_stays_unknown(site: str) -> None:
    with pytest.raises(HTTPError, match="404"):
        get(f"{site}/memory/nothing")


def test_a_browser_shows_the_figures(cluster: LocalCluster, site: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    # With $CELERY_MEM_SCREENSHOT, the picture goes where that says.
    picture = Path(os.environ.get("CELERY_MEM_SCREENSHOT") or tmp_path / "memory.png").absolute()
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--virtual-time-budget=3000"]
    with Client(cluster) as client:
        futures = client.map(inc, range(3))
        lengths = client.map(len, futures)
        total = client.submit(sum, lengths, key="total")
        bad = client.submit(fail, total, pure=False)
        client.gather(futures)
        assert isinstance(bad.exception(), ValueError)

        def held() -> bool:
            # A node says what it holds in its next heartbeat.
            found = figures(site)
            in_memory = sum(node["memory"].get("files", 0) for node in found["nodes"].values())
            return bool(found["holders"]) and in_memory > len(RESULT)

        assert until(held)
        shot = [f"--screenshot={picture}", f"--window-size={os.environ.get('CELERY_MEM_WINDOW', '1000,680')}"]
        address = f"{site}/memory?key={bad.key}"
        for options in (["--dump-dom"], shot):
            done = subprocess.run(
                [*command, *options, address],
                capture_output=True,
                timeout=60,
                check=True,
            )
            if options == ["--dump-dom"]:
                page = done.stdout.decode()
                assert f"Namespace {cluster.namespace}" in page
                assert "<td>inc</td>" in page
                assert f"{bad.key}: erred</title>" in page
    assert picture.stat().st_size > 10_000
