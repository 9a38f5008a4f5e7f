"""A Redis that is full, that dies and comes back, that forgets its scripts, that comes back empty."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from redis import Redis
from redis.exceptions import ResponseError

from celery_mem.errors import StateLostError, StoreFullError
from tests import tasks
from tests.deployment import Deployment, wait_until
from tests.faults.graphs import Graph

LEASES = {"client_lease": 2.0, "node_lease": 2.0, "leader_lease": 2.0, "ticket_lease": 1.0}


# --- full ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Iterator[Deployment]:
    """A Redis with a limit, through which all results go, a coordinator and a worker."""
    limit = ("--maxmemory", "24mb", "--maxmemory-policy", "noeviction")
    with Deployment(limit, node_memory=False, **LEASES) as it:
        it.start_coordinator()
        it.start_worker("w0", slots=2)
        yield it


def fill(deployment: Deployment) -> None:
    """Bring Redis to its limit: nothing more can be written."""
    for size in (1 << 20, 1 << 14, 64):
        with pytest.raises(ResponseError, match=r"OOM|maxmemory|used memory"):
            [deployment.redis.append("filler", b"x" * size) for _ in range(1_000_000)]


def test_a_full_redis_refuses_new_work_frees_what_is_released_and_recovers(small: Deployment) -> None:
    with small.client() as client:
        held = client.map(tasks.inc, range(200))
        assert client.gather(held) == list(range(1, 201))
        fill(small)
        with pytest.raises(StoreFullError):
            client.submit(tasks.inc, 1000).result(timeout=60)
        with pytest.raises(StoreFullError):
            client.gather(client.map(tasks.inc, range(2000, 3000)))
        with pytest.raises(StoreFullError):
            client.scatter(np.zeros(1_000_000))
        del held
        pattern = small.key("t:*")
        small.wait_until(lambda: not list(small.redis.scan_iter(pattern, 1000)), "the records to be freed")
        fill(small)
        # Longer than every lease: all are renewed though nothing can be written.
        members = small.key("clients"), small.key("nodes")
        before = [small.redis.zrange(name, 0, -1) for name in members]
        leader = small.redis.get(small.key("leader"))
        started = time.monotonic()
        small.wait_until(
            lambda: time.monotonic() - started > 1.5 * LEASES["client_lease"], "leases to be over"
        )
        assert [small.redis.zrange(name, 0, -1) for name in members] == before
        assert small.redis.get(small.key("leader")) == leader
        small.redis.unlink("filler")
        assert client.submit(tasks.inc, 1000).result(timeout=60) == 1001
    small.check_empty()


def test_a_result_waits_until_a_full_redis_has_room_for_it(small: Deployment) -> None:
    with small.client() as client:
        running = client.submit(tasks.wait_for_word, (small.url, "small"), 7)
        large = client.submit(tasks.large_after_word, (small.url, "large"), 300_000)
        small.wait_until(lambda: len(small.runs()) == 2, "both to run")
        # The words first: BLPOP frees, RPUSH does not.
        small.redis.rpush("go:later", "word")
        small.redis.rpush("go:small", "word")
        small.redis.rename("go:later", "go:large")
        fill(small)
        assert running.result(timeout=60) == 7
        assert not large.done()
        small.redis.unlink("filler")
        assert large.result(timeout=60).sum() == 300_000
        del running, large
    small.check_empty()


@pytest.mark.parametrize("app", ["celery_mem.worker.app", "tests.worker.shop"])
def test_while_redis_is_full_slots_go_on_for_what_they_get_done_may_free_memory(app: str) -> None:
    limit = ("--maxmemory", "24mb", "--maxmemory-policy", "noeviction")
    with Deployment(limit, slice=0.2, **LEASES) as it:
        it.start_coordinator()
        it.start_worker("w0", slots=2, app=app)
        with it.client() as client:
            layer = client.map(tasks.nap, [0.01] * 300, range(300))
            total = client.submit(tasks.add, *layer)
            del layer
            it.wait_until(
                lambda: it.redis.hlen(it.key("s:" + slot)) if (slot := a_slot(it)) else 0, "work to begin"
            )
            fill(it)
            assert total.result(timeout=60) == sum(range(300))
            assert it.redis.exists("filler")
            it.redis.unlink("filler")
            assert client.submit(tasks.inc, 1).result(timeout=60) == 2
            del total
        it.check_empty()


def a_slot(deployment: Deployment) -> str | None:
    slots = deployment.redis.zrange(deployment.key("slots"), 0, 0)
    return slots[0].decode() if slots else None


# --- killed and started again -------------------------------------------------------------------------------


@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_after_a_restart_of_redis_everybody_goes_on_and_results_are_right(fsync: str) -> None:
    with Deployment(("--appendonly", "yes", "--appendfsync", fsync), inline_limit=1000, **LEASES) as it:
        it.start_coordinator()
        it.start_worker("w0", slots=2)
        with it.client() as client:
            graph = Graph(client, it.url, "g", seed=1, width=60)
            wait_until(lambda: len(it.runs()) > 40, "the graph to run")
            it.kill("redis")
            it.start_redis()
            assert client.gather(graph.futures, timeout=100) == graph.values
            assert client.submit(tasks.inc, 1).result(timeout=60) == 2
            del graph
        if fsync == "always":
            assert set(it.runs().values()) == {1}
        it.check_empty()


def test_when_redis_comes_back_empty_the_client_makes_again_what_it_knows_how_to_make() -> None:
    with Deployment(**LEASES) as it:
        it.start_coordinator()
        it.start_worker("w0", slots=2)
        with it.client() as client:
            small = client.submit(tasks.inc, 1)
            large = client.submit(tasks.large, (it.url, "large"), 300_000)
            assert (small.result(timeout=60), large.result(timeout=60).sum()) == (2, 300_000)
            pending = client.submit(tasks.wait_for_word, (it.url, "word"), 5)
            after = client.submit(tasks.add, pending, small)
            on_large = client.submit(tasks.total_and, (it.url, "on_large"), large, after)
            wait_until(it.runs, "the task to run")
            it.kill("redis")
            it.start_redis()
            it.redis.rpush("go:word", *["word"] * 3)
            assert after.result(timeout=60) == 7
            for future in (large, on_large):  # nobody knows any more how it was made
                with pytest.raises(StateLostError, match="emptied or replaced"):
                    future.result(timeout=60)
            it.wait_until(lambda: it.redis.exists(it.key(f"node:{it.node('w0')}")), "the node to join again")
            assert client.submit(tasks.inc, small).result(timeout=60) == 3
            del small, large, pending, after, on_large
        it.redis.unlink("go:word")
        it.check_empty()


# --- errors that pass ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steady() -> Iterator[Deployment]:
    with Deployment(inline_limit=1000, **LEASES) as it:
        it.start_coordinator()
        it.start_worker("w0", slots=2)
        yield it


def be_busy(redis: Redis) -> None:
    redis.config_set("busy-reply-threshold", 20)
    redis.eval("for _ = 1, 4000000 do redis.sha1hex('') end", 0)


def be_read_only(redis: Redis) -> None:
    redis.replicaof("127.0.0.1", "1")
    time.sleep(0.7)
    redis.replicaof("NO", "ONE")


def be_without_a_master(redis: Redis) -> None:
    redis.config_set("replica-serve-stale-data", "no")
    be_read_only(redis)


def lack_replicas(redis: Redis) -> None:
    redis.config_set("min-replicas-to-write", 1)
    time.sleep(0.7)
    redis.config_set("min-replicas-to-write", 0)


def fail_to_save(redis: Redis) -> None:
    folder = redis.config_get("dir")["dir"]
    os.mkdir(f"{folder}/dump.rdb")  # where the file should go
    redis.config_set("save", "3600 1")
    redis.incr("filler")
    with contextlib.suppress(ResponseError):
        redis.bgsave()
    wait_until(lambda: redis.info("persistence")["rdb_last_bgsave_status"] == "err", "a save to fail")
    time.sleep(0.7)
    redis.config_set("save", "")
    redis.unlink("filler")


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (be_busy, "BUSY"),
        (be_read_only, "READONLY"),
        (be_without_a_master, "MASTERDOWN"),
        (lack_replicas, "NOREPLICAS"),
        (fail_to_save, "MISCONF"),
    ],
)
def test_what_redis_refuses_for_a_while_is_sent_again(
    steady: Deployment, trouble: Callable[[Redis], None], says: str
) -> None:
    before = steady.redis.info("errorstats")
    with steady.client() as client:
        layer = client.map(tasks.nap, [0.02] * 60, range(60))
        total = client.submit(tasks.add, *layer)
        making = threading.Thread(target=trouble, args=(steady.redis,))
        making.start()
        i = 0
        while making.is_alive():  # calls wait, none fails
            i += 1
            assert client.scatter(i).result(timeout=60) == i
        assert total.result(timeout=60) == sum(range(60))
        del layer, total
    after = steady.redis.info("errorstats")
    assert after.get(f"errorstat_{says}") != before.get(f"errorstat_{says}")
    steady.check_empty()


# --- eviction -----------------------------------------------------------------------------------------------


def test_a_redis_that_may_evict_is_warned_of_and_what_it_evicted_is_made_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Deployment(("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"), **LEASES) as it:
        it.start_coordinator()
        it.start_worker("w0", slots=2)
        with it.client() as client:
            assert "set it to noeviction" in caplog.text
            assert "set it to noeviction" in it.log("c0")
            pending = client.submit(tasks.wait_for_word, (it.url, "first"), 1)
            it.wait_until(lambda: len(it.runs()) == 1, "it to run")
            client.submit(tasks.wait_for_word, (it.url, "second"), 1)
            doomed = client.submit(tasks.add, pending, 5)
            client.session.flush()
            it.redis.unlink(it.key(f"t:{doomed.key}"))  # as the server does when it is full
            client.session._eviction._evicted = -1
            it.redis.rpush("go:first", "word", "word")
            assert doomed.result(timeout=60) == 6
            del pending, doomed


# --- scripts ------------------------------------------------------------------------------------------------


def test_scripts_that_redis_forgets_are_sent_again() -> None:
    with Deployment(inline_limit=1000, slice=0.5, **LEASES) as it:
        it.start_coordinator()
        it.start_worker("w0", slots=2)
        with it.client() as client:
            graph = Graph(client, it.url, "g", seed=2, width=60)
            n_flushes = n_runs = 0
            while not all(f.done() for f in graph.futures):
                # Between two, time for some tasks: kombu loads a script again once, then it ends the worker.
                if len(it.runs()) >= n_runs + 10:
                    n_runs = len(it.runs())
                    it.redis.script_flush()
                    n_flushes += 1
            assert n_flushes > 10
            assert client.gather(graph.futures) == graph.values
            del graph
        assert set(it.runs().values()) == {1}
        it.check_empty()


def test_a_worker_is_told_to_end_while_redis_is_away_and_ends() -> None:
    with Deployment(**LEASES) as it:
        it.start_worker("w0", slots=2)
        it.kill("redis")
        it.signal("w0", signal.SIGTERM)
        it.wait_gone("w0")
