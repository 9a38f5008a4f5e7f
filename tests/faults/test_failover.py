"""Another server takes over, which lacks the last writes; and connections that die without a word."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from redis import Redis

from celery_mem.errors import RedisUnavailableError, StateLostError
from celery_mem.memory.files import NodeFolder
from tests import tasks
from tests.deployment import Deployment, wait_until
from tests.faults.graphs import Graph
from tests.faults.pair import Pair, Relay

LEASES = {"client_lease": 3.0, "node_lease": 2.0, "leader_lease": 1.0, "ticket_lease": 1.0}


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair() as it:
        yield it


class Cluster(Deployment):
    """A deployment on a pair, with its broker; its tasks count their runs in a Redis that lives."""

    def __init__(self, url: str, **settings: object) -> None:
        super().__init__(**settings)
        self.options["url"] = url
        self.start_coordinator()
        self.start_worker("w0", slots=2, wait=False)


def test_a_graph_is_right_though_the_server_that_takes_over_lacks_the_last_writes(pair: Pair) -> None:
    with Cluster(pair.url, inline_limit=1000, **LEASES) as it:
        with it.client() as client:
            before = client.submit(tasks.inc, 1)
            assert before.result(timeout=60) == 2
            array = client.submit(tasks.large, (it.url, "array"), 5000)
            assert array.result(timeout=60).sum() == 5000
            graph = Graph(client, it.url, "g", seed=1, width=40)
            it.wait_until(lambda: len(it.runs()) > 10, "the graph to run")
            pair.stop_replication()
            released = client.submit(tasks.inc, 7)
            assert released.result(timeout=60) == 8
            it.wait_until(lambda: len(it.runs()) > 60, "the graph to go on")
            late = client.submit(tasks.add, before, array)
            late.result(timeout=60)
            del released
            late_array = client.submit(tasks.large, (it.url, "late"), 6000)
            assert late_array.result(timeout=60).sum() == 6000
            pair.fail_over()
            assert client.gather(graph.futures, timeout=100) == graph.values
            assert client.submit(tasks.inc, before).result(timeout=60) == 3
            assert array.result(timeout=60).sum() == 5000
            with pytest.raises(StateLostError) as caught:  # finished, large: the client knows no value
                late_array.result(timeout=60)
            assert caught.value.key == late_array.key
            del graph, before, array, late, late_array
        it.redis = Redis.from_url(pair.url, protocol=2)
        it.check_empty()


def test_sentinels_say_where_to_go_on(pair: Pair) -> None:
    url = pair.start_sentinel()
    with Cluster(url, **LEASES) as it, it.client() as client:
        first = client.submit(tasks.inc, 1)
        assert first.result(timeout=60) == 2
        waiting = client.submit(tasks.wait_for_word, (it.url, "word"), 5)
        it.wait_until(it.runs, "the task to run")
        pair.kill_master()
        it.redis.rpush("go:word", "word", "word")
        assert client.submit(tasks.add, first, waiting).result(timeout=60) == 7
        del first, waiting


# --- back in time -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with Deployment(inline_limit=1000, **LEASES) as it:
        it.start_coordinator()
        it.start_worker("w0", slots=2)
        yield it


READ_ALL = """
local out = {}
for _, name in ipairs(redis.call('KEYS', ARGV[1])) do
  out[#out + 1] = {name, redis.call('DUMP', name), redis.call('PTTL', name)}
end
return out
"""
WRITE_ALL = """
for _, name in ipairs(redis.call('KEYS', ARGV[1])) do redis.call('UNLINK', name) end
for i = 3, #ARGV, 3 do redis.call('RESTORE', ARGV[i], ARGV[i + 1], ARGV[i + 2]) end
redis.call('HSET', ARGV[2], 'run', 'another')
"""


class Past:
    """The namespace as it is now; `restore` brings it back as a server would that lacks all writes since.

    Each is one script: of a state read or written in several calls, while others go on, nothing is promised.
    """

    def __init__(self, deployment: Deployment) -> None:
        self._redis = deployment.redis
        self._pattern = deployment.key("*").replace("{", "\\{")
        self._meta = deployment.key("meta")
        self._keys = self._redis.eval(READ_ALL, 0, self._pattern)

    def restore(self) -> None:
        triples = [x for name, data, ttl in self._keys for x in (name, max(ttl, 0), data)]
        self._redis.eval(WRITE_ALL, 0, self._pattern, self._meta, *triples)
        self._redis.client_kill_filter(_type="normal", skipme=True)


def slots_at_work(deployment: Deployment) -> list[bytes]:
    return deployment.redis.zrange(deployment.key("slots"), 0, -1)


def test_a_slot_that_went_home_gives_back_what_it_is_said_to_own(deployment: Deployment) -> None:
    deployment.forget_runs()
    with deployment.client() as client:
        task = client.submit(tasks.wait_for_word, (deployment.url, "word"), np.zeros(1000))
        deployment.wait_until(deployment.runs, "the task to run")
        past = Past(deployment)
        deployment.redis.rpush("go:word", "word")
        assert task.result(timeout=60).shape == (1000,)
        deployment.wait_until(lambda: not slots_at_work(deployment), "the slots to go home")
        past.restore()
        deployment.redis.rpush("go:word", "word")
        deployment.wait_until(lambda: deployment.runs() == {"word": 2}, "the task to run again")
        assert task.result(timeout=60).shape == (1000,)
        deployment.wait_until(lambda: not slots_at_work(deployment), "the slots to go home")
        del task
    deployment.check_empty()


def test_what_was_released_in_the_writes_that_are_missing_is_released_again(deployment: Deployment) -> None:
    with deployment.client() as client:
        kept, released = client.submit(tasks.inc, 1), client.submit(tasks.inc, 2)
        assert client.gather([kept, released]) == [2, 3]
        past = Past(deployment)
        key = deployment.key(f"t:{released.key}")
        del released
        deployment.wait_until(lambda: not deployment.redis.exists(key), "the result to be freed")
        past.restore()
        deployment.wait_until(lambda: not deployment.redis.exists(key), "the result to be freed again")
        assert client.submit(tasks.inc, kept).result(timeout=60) == 3
        del kept
    deployment.check_empty()


def test_futures_of_a_client_that_joined_in_the_writes_that_are_missing_go_on(deployment: Deployment) -> None:
    deployment.forget_runs()
    past = Past(deployment)
    with deployment.client() as client:
        where = (deployment.url, "first")
        first = client.submit(tasks.wait_for_word, where, 1)
        second = client.submit(tasks.inc, first)
        many = client.map(tasks.add, [second] * 1000, range(1000))
        big = client.submit(tasks.inc, np.full(200_000, 1.0))  # a payload that is a blob
        waiting = client.submit(tasks.add, big, second)
        del first, second
        deployment.wait_until(deployment.runs, "the first to run")
        client.session.listener._last = f"{10**14}-0"  # as of a server whose clock was ahead
        past.restore()
        deployment.redis.rpush("go:first", "word", "word")
        assert client.gather(many, timeout=60) == [2 + i for i in range(1000)]
        assert waiting.result(timeout=60).sum() == 4 * 200_000
        del many, big, waiting
    deployment.redis.unlink("go:first")
    deployment.check_empty()


def test_a_graph_that_is_being_sent_goes_on_with_the_other_server(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 1300  # in three parts; nothing but the last is held
    graph = {("x", i): (tasks.inc, ("x", i - 1)) for i in range(1, n)} | {("x", 0): (tasks.inc, 0)}
    with deployment.client() as client:
        submit = client.session.store.submit
        parts: list[int] = []

        def submit_and_lose_touch(*args: Any, **options: Any) -> Any:
            answer = submit(*args, **options)
            parts.append(1)
            if len(parts) == 1:
                Past(deployment).restore()
            return answer

        monkeypatch.setattr(client.session.store, "submit", submit_and_lose_touch)
        assert client.get(graph, ("x", n - 1)) == n
        assert len(parts) >= 3
    deployment.check_empty()


def test_numbers_that_may_have_been_given_out_are_not_given_out_again(deployment: Deployment) -> None:
    store = deployment.store()
    before = store.generation
    with deployment.client() as client:
        past = Past(deployment)
        assert client.submit(tasks.inc, 5).result(timeout=60) == 6
        attempts = int(deployment.redis.hget(deployment.key("meta"), "attempts"))
        past.restore()
        assert client.submit(tasks.inc, 6).result(timeout=60) == 7
        assert int(deployment.redis.hget(deployment.key("meta"), "attempts")) > attempts + 100_000_000
        assert store.rejoin()
        assert store.generation != before
    store.link.close()
    deployment.check_empty()


@pytest.mark.node_memory
def test_a_copy_that_was_dropped_in_the_writes_that_are_missing_is_made_again(deployment: Deployment) -> None:
    it = deployment
    it.forget_runs()
    path = it.redis.hget(it.key(f"node:{it.node('w0')}"), "dir").decode()
    with it.client() as client:
        array = client.submit(tasks.large, (it.url, "array"), 300_000)
        assert array.result(timeout=60).sum() == 300_000
        past = Past(it)
        folder = NodeFolder.open(path)
        (location,) = client.session.store.locate([array.key])
        assert folder is not None
        assert location is not None
        it.wait_until(functools.partial(folder.is_in_files, location.token), "the result to be written")
        folder.drop([location.token])
        assert client.submit(tasks.total, (it.url, "read"), array).result(timeout=60) == 300_000
        assert it.runs() == {"array": 2, "read": 1}
        past.restore()
        assert client.submit(tasks.total, (it.url, "again"), array).result(timeout=60) == 300_000
        assert it.runs()["array"] == 3
        del array
    it.check_empty()


# --- connections that die without a word --------------------------------------------------------------------


def test_a_command_that_comes_after_its_own_repeat_is_not_carried_out(deployment: Deployment) -> None:
    with Relay(deployment.url.removeprefix("unix://")) as relay, deployment.client(url=relay.url) as client:
        warm = client.submit(tasks.inc, 1)
        assert warm.result(timeout=60) == 2
        relay.hold_back()
        future = client.submit(tasks.inc, 1000)
        name = future.key.encode()
        wait_until(lambda: any(name in data for _, data in relay.held), "the command to be on its way")
        relay.cut_clients()
        assert future.result(timeout=60) == 1001  # it was repeated
        key = deployment.key(f"t:{future.key}")
        del future
        deployment.wait_until(lambda: not deployment.redis.exists(key), "the result to be freed")
        assert relay.held
        relay.deliver()
        assert not deployment.redis.exists(key)
        del warm
    deployment.check_empty()


def test_a_redis_that_is_away_for_too_long_is_an_error_of_calls_not_of_futures(
    deployment: Deployment,
) -> None:
    path = deployment.url.removeprefix("unix://")
    deployment.forget_runs()
    with Relay(path) as relay, deployment.client(url=relay.url, retry_timeout=0.5) as client:
        pending = client.submit(tasks.wait_for_word, (deployment.url, "away"), 1)
        deployment.wait_until(deployment.runs, "the task to run")
        relay.target = f"{path}.gone"
        relay.cut()
        with pytest.raises(RedisUnavailableError):
            client.scatter(1)
        relay.target = path
        deployment.redis.rpush("go:away", "word")
        assert pending.result(timeout=60) == 1
        assert deployment.runs() == {"away": 1}
        del pending
    deployment.check_empty()


def test_after_a_silence_longer_than_every_lease_all_goes_on(deployment: Deployment) -> None:
    path = deployment.url.removeprefix("unix://")
    deployment.forget_runs()
    with Relay(path) as relay:
        settings = {"url": relay.url, "reply_timeout": 1.0}
        with deployment.client(**settings) as client:
            pending = client.submit(tasks.wait_for_word, (deployment.url, "silence"), 1)
            deployment.wait_until(deployment.runs, "the task to run")
            done = client.submit(tasks.inc, 1)
            assert done.result(timeout=60) == 2
            name = deployment.key("clients")
            relay.silence()
            deployment.wait_until(lambda: not deployment.redis.zcard(name), "the client to be given up")
            relay.speak()
            deployment.redis.rpush("go:silence", "word", "word")
            assert client.submit(tasks.add, pending, done).result(timeout=60) == 3
            del pending, done
    deployment.redis.unlink("go:silence")
    deployment.check_empty()
