"""The commands, on namespaces that were brought into a known state."""

import json
import os
import signal
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from celery_mem.cli import mem
from celery_mem.memory.files import NodeFolder
from celery_mem.state.keys import TASK
from celery_mem.state.store import NewTask, Store
from tests.cli.conftest import Cli

ROOT = Path(__file__).parents[2]


def test_status_tells_all_that_is_counted(story: Store, cli: Cli) -> None:
    found = json.loads(cli("status", "--json").stdout)
    assert found["namespace"] == story.keys.namespace
    assert found["generation"] == story.generation
    assert found["leader"] is None
    assert found["queues"].pop("tickets") >= 0
    assert found["queues"] == {"ready": 0, "unsettled": 0, "idle": 0}
    assert found["tasks"] == {"erred": 2, "memory": 1, "processing": 1, "waiting": 1}
    assert found["nbytes"] == 28
    assert found["redis"]["version"].split(".") >= ["6", "2"]
    assert found["redis"]["used_memory"] > 100_000
    (node,) = found["nodes"].values()
    assert 0 < node.pop("lease") <= story.settings.node_lease
    assert node == {
        "slots": 2,
        "busy": 1,
        "pid": 77,
        "pool": "prefork",
        "hostname": "host",
        "keys": 0,
        "memory": {},
        "freed": 0,
        "limit": None,
        "resources": {},
        "status": "running",
    }
    assert (found["copies"], found["jobs"], found["unrunnable"]) == (0, {}, [])
    assert list(found["clients"]) == ["client-1"]
    assert found["clients"]["client-1"]["keys"] == 4


def test_status_reads_well(story: Store, cli: Cli) -> None:
    text = cli("status").stdout
    assert story.keys.namespace in text
    assert "2 erred, 1 memory, 1 processing, 1 waiting" in text
    assert "none leads" in text
    assert "worker-0@host" in text
    assert "client-1" in text


def test_status_counts_many_tasks(store: Store, cli: Cli) -> None:
    store.renew_client("client-1", join=True)
    for start in range(0, 2500, 500):
        tasks = [NewTask(f"inc-{i}", "inc", b"payload", order=i) for i in range(start, start + 500)]
        store.submit("client-1", 1, tasks, [("inc", b"code")])
    assert json.loads(cli("status", "--json").stdout)["tasks"] == {"ready": 2500}


def test_looking_at_a_namespace_does_not_begin_it(store: Store, cli: Cli) -> None:
    store.link.call("DEL", store.keys.fixed("meta"))
    assert "is empty" in cli("status").stdout
    assert cli("check").exit_code == 0
    assert cli("show", "x").exit_code == 1
    assert store.link.call("KEYS", store.keys.prefix + "*") == []


def test_show_tells_the_whole_record(story: Store, cli: Cli) -> None:
    found = json.loads(cli("show", "y", "--json").stdout)
    rank = found.pop("rank")
    assert len(rank) == 16
    assert found == {
        "key": "y",
        "state": "waiting",
        "priority": 2.0,
        "attempt": None,
        "owner": None,
        "waiting": 1,
        "needed": 0,
        "retries": 0,
        "deaths": 0,
        "function": "inc",
        "payload_nbytes": 7,
        "nbytes": None,
        "type": None,
        "blame": None,
        "error": None,
        "given": [],
        "dependencies": {"x": "memory", "z": "processing"},
        "dependents": {},
        "holders": {"client-1": 1},
        "contains": [],
        "places": [],
        "copies": 1,
        "copies_on": [],
    }


def test_show_reads_well(story: Store, cli: Cli) -> None:
    x = cli("show", "x").stdout
    assert "int, 28 B" in x
    assert "@redis" in x
    assert "client-1" in x
    assert "y  (waiting)" in x
    bad = cli("show", "bad").stdout
    assert "builtins.ValueError: no" in bad
    assert "raised by" not in bad
    assert "Traceback: here" in bad
    assert "none" in cli("show", "z").stdout.split("holders")[1].splitlines()[0]


def test_show_finds_the_error_where_it_was_raised(story: Store, cli: Cli) -> None:
    found = json.loads(cli("show", "worse", "--json").stdout)
    assert (found["state"], found["blame"]) == ("erred", "bad")
    assert found["error"] == {"type": "builtins.ValueError", "message": "no", "traceback": "Traceback: here"}


def test_show_of_an_unknown_key_says_so(store: Store, cli: Cli) -> None:
    result = cli("show", "nobody")
    assert result.exit_code == 1
    assert result.stderr == f"Error: no record of 'nobody' in namespace '{store.keys.namespace}'\n"


def test_check_is_content_with_a_sound_namespace(story: Store, cli: Cli) -> None:
    result = cli("check")
    assert result.output == f"namespace {story.keys.namespace}: every rule holds\n"
    assert result.exit_code == 0
    assert json.loads(cli("check", "--json").stdout) == {
        "ok": True,
        "violations": [],
        "warnings": [],
        "removed": [],
    }


def test_check_names_what_is_broken_and_fails(story: Store, cli: Cli) -> None:
    record = story.keys.of("task", "y")
    core = story.link.call("HGET", record, TASK["core"]).decode()
    assert core.startswith("waiting 0 1 ")
    story.link.call("HSET", record, TASK["core"], core.replace("waiting 0 1 ", "waiting 0 5 "))
    result = cli("check", "--patience", "1")
    assert result.exit_code == 1
    assert "waiting count: 'y' is waiting and counts 5, not 1" in result.output
    found = json.loads(cli("check", "--json", "--patience", "2").stdout)
    assert found["ok"] is False
    assert [(v["rule"], v["key"]) for v in found["violations"]] == [("waiting count", "y")]


def test_check_names_what_a_dead_worker_left_and_removes_it_if_it_is_told_to(
    story: Store, cli: Cli, tmp_path: Path
) -> None:
    left = NodeFolder.create(str(tmp_path), "test", "gone", "1-1")  # process 1 began at another time
    found = cli("check")
    assert found.exit_code == 1
    assert f"dead folder: {left.path!r}" in found.output
    assert os.path.exists(left.path)
    fixed = cli("check", "--fix")
    assert fixed.exit_code == 0
    assert f"removed {left.path}" in fixed.output
    assert not os.path.exists(left.path)


def test_check_warns_of_a_redis_that_drops_records(store: Store, cli: Cli) -> None:
    before = {name: store.link.call("CONFIG", "GET", name)[1] for name in ("maxmemory", "maxmemory-policy")}
    store.link.call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    store.link.call("CONFIG", "SET", "maxmemory", "100mb")
    try:
        result = cli("check")
        assert "Warning: Redis has maxmemory-policy allkeys-lru" in result.stderr
        assert result.exit_code == 0
    finally:
        for name, value in before.items():
            store.link.call("CONFIG", "SET", name, value)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("-u", "redis://127.0.0.1:1"), "no Redis at redis://127.0.0.1:1"),
        (("-u", "http://x"), "not a Redis address"),
        ((), "set mem_url in the Celery configuration, or CELERY_MEM_URL or REDIS_URL"),
        (("-u", "redis://127.0.0.1:1", "-n", "a:b"), "mem_namespace"),
    ],
)
def test_a_bad_address_is_one_line(args: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELERY_MEM_URL", raising=False)
    monkeypatch.delenv("REDIS_URL", raising=False)
    result = CliRunner().invoke(mem, ["status", *args])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert text in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_address_may_come_from_the_environment(store: Store) -> None:
    env = {"CELERY_MEM_URL": store.settings.url, "CELERY_MEM_NAMESPACE": store.settings.namespace}
    result = CliRunner().invoke(mem, ["status", "--json"], env=env)
    assert json.loads(result.stdout)["namespace"] == store.settings.namespace


def test_watch_shows_it_again_until_interrupted(store: Store) -> None:
    address = ["-u", store.settings.url, "-n", store.settings.namespace]
    command = [sys.executable, "-m", "celery_mem.cli", "status", "--json", "--watch", "--interval", "0.1"]
    with subprocess.Popen([*command, *address], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert json.loads(process.stdout.readline())["namespace"] == store.settings.namespace
        process.send_signal(signal.SIGINT)
    assert process.returncode == 0


def test_celery_has_it_as_a_command_of_its_own(store: Store, tmp_path: Path) -> None:
    # What Celery does with the entry point, without asking whether this checkout is installed.
    code = (
        "from celery.bin.celery import celery, main; from celery_mem.cli import mem; "
        "celery.add_command(mem); main()"
    )
    (tmp_path / "shop.py").write_text(
        f"from celery import Celery\napp = Celery(broker='memory://')\n"
        f"app.conf.update(mem_url={store.settings.url!r}, mem_namespace={store.settings.namespace!r})\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("CELERY_") and k != "REDIS_URL"}
    output = subprocess.check_output(
        [sys.executable, "-c", code, "-A", "shop", "mem", "status", "--json"],
        text=True,
        env=env | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    assert json.loads(output)["namespace"] == store.settings.namespace


def test_the_project_file_names_entry_points_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = [*project["scripts"].values(), *project["entry-points"]["celery.commands"].values()]
    for target in targets:
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from celery_mem.cli import mem; mem(['--help'], standalone_mode=False); "
        "print('heavy', {'celery', 'dask', 'numpy', 'redis', 'rich'} & set(sys.modules))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.splitlines()[-1] == "heavy set()"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_local_runs_until_it_is_told_to_stop(end: signal.Signals) -> None:
    command = [sys.executable, "-m", "celery_mem.cli", "local", "-w", "0", "-c", "0", "--json", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        news = json.loads(process.stdout.readline())
        path = news["url"].removeprefix("unix://")
        assert os.path.exists(path)
        assert list(news["pids"]) == ["redis"]
        process.send_signal(end)
    assert process.returncode == 0
    assert not os.path.exists(os.path.dirname(path))


def test_local_ends_when_its_redis_does() -> None:
    command = [sys.executable, "-m", "celery_mem.cli", "local", "-w", "0", "-c", "0", "--json", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        os.kill(json.loads(process.stdout.readline())["pids"]["redis"], signal.SIGKILL)
        assert "ended: killed by SIGKILL" in process.stderr.read()
    assert process.returncode == 1


def test_local_says_how_to_use_it() -> None:
    command = [sys.executable, "-m", "celery_mem.cli", "local", "-w", "0", "-c", "0", "-n", "mine", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(7)]
        process.terminate()
    assert any(line.startswith("export CELERY_MEM_URL=unix://") for line in lines)
    assert "export CELERY_MEM_NAMESPACE=mine" in lines
