"""LocalCluster with a real Redis: where it listens, what its processes inherit, how it ends."""

import gc
import os
import stat
import sys
import tempfile
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError

from celery_mem.errors import ConfigError
from celery_mem.local import LocalCluster, LocalClusterError, cluster

ROOT = Path(__file__).parents[2]


def redis_only(**options: object) -> LocalCluster:
    return LocalCluster(0, coordinators=0, **options)  # type: ignore[arg-type]


def connect(url: str) -> Redis:
    return Redis.from_url(url, protocol=2)


def test_redis_answers_once_the_cluster_is_made() -> None:
    with redis_only() as local, connect(local.url) as redis:
        assert redis.ping()
        assert list(local.pids()) == ["redis"]
        assert redis.info("server")["process_id"] == local.pids()["redis"]
        local.check()


def test_only_this_user_reaches_the_socket() -> None:
    with redis_only() as local:
        path = local.url.removeprefix("unix://")
        assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700


def test_a_folder_with_a_long_name_gives_a_loopback_port_behind_a_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with redis_only() as local:
        assert local.url.startswith("redis://:")
        assert local.url.split("@")[0] not in repr(local)
        assert local.url.split("@")[0] not in local._repr_html_()
        with connect(local.url) as redis:
            assert redis.ping()
        with connect("redis://" + local.url.split("@")[1]) as stranger, pytest.raises(AuthenticationError):
            stranger.ping()
        (folder,) = long.iterdir()
        assert stat.S_IMODE((folder / "redis.conf").stat().st_mode) == 0o600
    assert list(long.iterdir()) == []


def test_nothing_is_written_to_disk_by_default() -> None:
    with redis_only() as local, connect(local.url) as redis:
        assert redis.config_get("save") == {"save": ""}
        assert redis.config_get("appendonly") == {"appendonly": "no"}


def test_the_shipped_redis_configuration_is_accepted() -> None:
    with (
        redis_only(redis_args=("--include", str(ROOT / "worker_config" / "redis.conf"))) as local,
        connect(local.url) as redis,
    ):
        stated = {"appendonly": "yes", "maxmemory-policy": "noeviction", "hash-max-ziplist-value": "1024"}
        for name, value in stated.items():
            assert redis.config_get(name) == {name: value}


def test_an_argument_that_redis_refuses_is_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(LocalClusterError, match="bogus"):
        redis_only(redis_args=("--bogus",))
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == [], "said once, by the error"


def test_a_cluster_that_nobody_holds_is_closed() -> None:
    local = redis_only()
    path = local.url.removeprefix("unix://")
    del local
    gc.collect()
    assert not os.path.exists(path)


def test_close_can_be_repeated_and_is_seen() -> None:
    local = redis_only()
    assert repr(local).startswith(f"<LocalCluster '{local.url}': 0 workers")
    assert not local.wait(timeout=0)
    local.close()
    local.close()
    assert local.closed
    assert local.wait(timeout=0)
    assert repr(local) == "<LocalCluster: closed>"


def test_a_worker_that_cannot_start_is_reported() -> None:
    with LocalCluster(1, coordinators=0, app="no_such_module_anywhere") as local:
        assert local._processes.wait_for(lambda: bool(local._processes._troubles), 30)
        with pytest.raises(LocalClusterError, match=r"(?s)worker-0 .*exit code 2.*no_such_module_anywhere"):
            local.check()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pool": "gevent"}, "pool must be one of prefork, threads, solo, not 'gevent'"),
        ({"pool": "solo", "threads_per_worker": 2}, "does not go with the solo pool"),
        ({"threads_per_worker": 0}, "threads_per_worker=0"),
        ({"n_workers": -1}, "must not be negative"),
        ({"namespace": "a{b}"}, "mem_namespace"),
    ],
)
def test_a_bad_argument_is_refused_before_anything_starts(options: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        LocalCluster(**options)  # type: ignore[arg-type]


def test_every_processor_gets_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(7), raising=False)
    assert cluster._default_workers(1) == 7
    assert cluster._default_workers(2) == 3
    assert cluster._default_workers(8) == 1


def test_the_processes_inherit_the_environment_but_no_other_celery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKER_URL", "amqp://elsewhere")
    monkeypatch.setenv("CELERY_BROKER_URL", "amqp://elsewhere")
    monkeypatch.setenv("CELERY_MEM_URL", "redis://elsewhere")
    monkeypatch.setenv("CELERY_MEM_LINGER", "0.5")
    monkeypatch.setenv("MINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    env = cluster._environment("unix:///here", "ns", {"MINE": "2"}, 2)
    assert env["CELERY_MEM_URL"] == "unix:///here"
    assert env["CELERY_MEM_NAMESPACE"] == "ns"
    assert env["CELERY_MEM_LINGER"] == "0.5"
    assert env["MINE"] == "2"
    assert (env["OMP_NUM_THREADS"], env["MKL_NUM_THREADS"]) == ("3", "1")
    assert {"BROKER_URL", "CELERY_BROKER_URL"}.isdisjoint(env)


def test_workers_import_from_where_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    paths = cluster._environment("unix:///here", "ns", None, 2)["PYTHONPATH"].split(os.pathsep)
    assert paths[0] == str(tmp_path)
    assert not any("site-packages" in path for path in paths)
