"""Each rule of the doctor: what it finds, and that it is silent where all is well."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from celery_mem.graph.doctor import ERROR, WARNING, Facts, examine, gather_facts
from celery_mem.state.store import Store

WELL = Facts(
    redis={
        "redis_version": "7.2.4",
        "maxmemory_policy": "noeviction",
        "maxmemory": "1000",
        "used_memory": "100",
        "aof_enabled": "1",
        "rdb_last_bgsave_status": "ok",
        "maxclients": "10000",
        "connected_clients": "30",
    },
    hash_limit=1024,
    nodes={
        "w@h": {
            "slots": 4,
            "dir": "/dev/shm/x",
            "shm": 1 << 30,
            "hashseed": "0",
            "versions": {"python": "3.12", "dask": "1"},
        }
    },
    leader="c",
    versions={"python": "3.12", "dask": "1"},
    is_signed=True,
)


def with_redis(**info: str) -> Facts:
    return dataclasses.replace(WELL, redis=WELL.redis | info)


def with_node(**news: Any) -> Facts:
    return dataclasses.replace(WELL, nodes={"w@h": WELL.nodes["w@h"] | news})


def test_of_a_healthy_deployment_nothing_is_said() -> None:
    assert examine(WELL) == []


@pytest.mark.parametrize(
    ("facts", "level", "rule", "text"),
    [
        (with_redis(redis_version="6.0.9"), ERROR, "version", "version 6.0.9"),
        (with_redis(maxmemory_policy="allkeys-lru"), ERROR, "eviction", "deletes what is in use"),
        (with_redis(maxmemory_policy="volatile-ttl"), WARNING, "eviction", "being written"),
        (with_redis(used_memory="900"), WARNING, "memory", "new work is refused"),
        (with_redis(aof_enabled="0"), WARNING, "persistence", "no append-only file"),
        (with_redis(rdb_last_bgsave_status="err"), ERROR, "persistence", "MISCONF"),
        (with_redis(maxclients="40"), WARNING, "connections", "30 of the 40"),
        (dataclasses.replace(WELL, hash_limit=64), WARNING, "records", "64 bytes"),
        (dataclasses.replace(WELL, clock_s=-90.0), WARNING, "clock", "differ by 90 s"),
        (dataclasses.replace(WELL, is_signed=False), WARNING, "signatures", "can run code"),
        (dataclasses.replace(WELL, leader=""), WARNING, "coordinator", "no coordinator leads"),
        (dataclasses.replace(WELL, nodes={}), WARNING, "workers", "no worker has joined"),
        (
            with_node(versions={"python": "3.11"}),
            ERROR,
            "versions",
            "w@h has python 3.11, this host has 3.12",
        ),
        (with_node(shm=1000), WARNING, "shared memory", "w@h had 0 MB"),
        (with_node(dir=""), WARNING, "shared memory", "all go through Redis"),
        (with_node(hashseed=""), WARNING, "hash seed", "PYTHONHASHSEED"),
        (with_node(visibility=10), WARNING, "visibility timeout", "of 10 s"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(facts: Facts, level: str, rule: str, text: str) -> None:
    (finding,) = examine(facts)
    assert (finding.level, finding.rule) == (level, rule)
    assert text in finding.text
    assert finding.advice


def test_a_redis_that_only_this_host_reaches_needs_no_signatures() -> None:
    assert examine(dataclasses.replace(WELL, is_signed=False, is_local=True)) == []


def test_errors_come_first() -> None:
    facts = dataclasses.replace(with_redis(maxmemory_policy="allkeys-lru", aof_enabled="0"), leader="")
    assert [finding.level for finding in examine(facts)] == [ERROR, WARNING, WARNING]


def test_the_facts_of_a_server_are_read(store: Store) -> None:
    facts = gather_facts(store, store.settings)
    assert facts.redis["redis_version"]
    assert facts.number("used_memory") > 0
    assert abs(facts.clock_s) < 1e9  # the clock of this store stands still
    assert facts.versions["python"].count(".") == 1
    assert facts.is_local
