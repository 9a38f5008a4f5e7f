"""LocalCluster with real Celery workers and a real coordinator."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from celery import Celery
from redis import Redis

from celery_mem import Client, LocalCluster
from celery_mem.config import Settings
from tests.local.conftest import all_gone, members

Parent = Callable[[str], subprocess.Popen[str]]
ROOT = Path(__file__).parents[2]

BUSY_CLUSTER = """
import json, os, sys, time
from celery_mem import Client, LocalCluster
cluster = LocalCluster(2, 2, pool={pool!r})
client = Client(cluster)
def work(n):
    open(f"{folder}/{{n}}", "w").close()
    time.sleep(1000)
futures = client.map(work, range(4))
while len(os.listdir({folder!r})) < 4: time.sleep(0.01)
found = dict(cluster.pids(), supervisor=cluster._processes._supervisor.pid, folder=cluster._processes.folder)
print(json.dumps(found), flush=True)
sys.stdin.read()
"""


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(2) as local:
        yield local


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster, set_as_default=False) as connected:
        yield connected


def test_both_workers_run_tasks_in_children_of_theirs(cluster: LocalCluster, client: Client) -> None:
    client.wait_for_workers(2, timeout=30)
    pids = set(client.gather(client.map(pid_after, [0.2, 0.21, 0.22, 0.23])))
    workers = {cluster.pids()[name] for name in ("worker-0", "worker-1")}
    assert {psutil.Process(pid).ppid() for pid in pids} == workers


def test_the_cluster_names_its_processes(cluster: LocalCluster) -> None:
    pids = cluster.pids()
    assert sorted(pids) == ["coordinator-0", "redis", "worker-0", "worker-1"]
    worker = psutil.Process(pids["worker-1"]).cmdline()
    assert worker[1:6] == ["-m", "celery", "-A", "celery_mem.worker.app", "worker"]
    coordinator = psutil.Process(pids["coordinator-0"]).cmdline()
    assert coordinator[1:] == ["-m", "celery_mem.cli", "coordinator"]


def test_the_command_line_shows_a_cluster_at_work(cluster: LocalCluster, client: Client) -> None:
    client.wait_for_workers(2, timeout=30)
    future = client.submit(pid_after, 0, key="the-pid")
    future.result(timeout=30)

    def run(*command: str) -> str:
        program = [sys.executable, "-m", "celery_mem.cli"]
        environ = os.environ | {"CELERY_MEM_URL": cluster.url}
        return subprocess.check_output([*program, *command], text=True, env=environ)

    status = json.loads(run("status", "--json"))
    assert sorted(name.partition("@")[0] for name in status["nodes"]) == ["worker-0", "worker-1"]
    assert status["leader"]
    assert json.loads(run("show", "the-pid", "--json"))["state"] == "memory"
    assert json.loads(run("check", "--json"))["ok"]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
@pytest.mark.parametrize("victim", ["parent", "supervisor"])
def test_a_kill_in_the_middle_of_work_leaves_no_orphan(
    parent: Parent, tmp_path: Path, pool: str, victim: str
) -> None:
    process = parent(BUSY_CLUSTER.format(pool=pool, folder=str(tmp_path)))
    assert process.stdout is not None
    report = json.loads(process.stdout.readline())
    supervisor = psutil.Process(report["supervisor"])
    left = {supervisor, *supervisor.children()}
    for name in ("redis", "worker-0", "worker-1", "coordinator-0"):
        left.update(members(report[name]))
    keeper, agents, children = 1, 2, 4 if pool == "prefork" else 0
    assert len(left) == 1 + keeper + 4 + agents + children
    os.kill(process.pid if victim == "parent" else report["supervisor"], signal.SIGKILL)
    assert all_gone(left)
    assert not os.path.exists(report["folder"])


def test_a_worker_that_is_killed_comes_back_on_request() -> None:
    with LocalCluster(1, restart=True) as local, Client(local, set_as_default=False) as client:
        client.wait_for_workers(1, timeout=30)
        first = local.pids()["worker-0"]
        os.kill(first, signal.SIGKILL)
        child = client.submit(pid_after, 0).result(timeout=60)
        assert psutil.Process(child).ppid() == local.pids()["worker-0"] != first


def test_an_app_with_the_shipped_configuration_runs_its_tasks_and_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\n"
        "from redis import Redis\n"
        "import celery_mem\n"
        "app = Celery('shop')\n"
        "app.config_from_object('worker_config.celeryconfig')\n"
        "celery_mem.install(app)\n"
        "@app.task\n"
        "def sell(url, what):\n"
        "    Redis.from_url(url).rpush('sold', what)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))
    with (
        LocalCluster(1, app="shop") as local,
        Client(local, set_as_default=False) as client,
        Celery(broker=local.url.replace("unix://", "redis+socket://")) as shop,
        Redis.from_url(local.url, socket_timeout=60) as redis,
    ):
        shop.send_task("shop.sell", (local.url, "apple"))
        assert redis.blpop(["sold"], timeout=30) == (b"sold", b"apple")
        assert client.submit(sum, [1, 2]).result(timeout=30) == 3
        local.check()


def test_the_shipped_configuration_states_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELERY_MEM_URL", raising=False)
    monkeypatch.delenv("CELERY_MEM_NAMESPACE", raising=False)
    shipped = runpy.run_path(str(ROOT / "worker_config" / "celeryconfig.py"))
    stated = {name[4:]: value for name, value in shipped.items() if name.startswith("mem_")}
    assert len(stated) > 5
    default = Settings(url=stated["url"])
    assert stated == {name: getattr(default, name) for name in stated}
