"""Node memory with real workers: what is where, and what is left when something ends."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from celery_mem import Client
from celery_mem.memory.files import NodeFolder
from celery_mem.state.store import Location
from tests import tasks
from tests.deployment import Deployment, wait_until
from tests.worker.test_worker import agents_of, children_of

pytestmark = pytest.mark.node_memory


N = 1_000_000


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with Deployment(node_lease=2.0, ticket_lease=2.0, slice=0.5) as it:
        it.start_coordinator()
        yield it


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    deployment.forget_runs()
    with deployment.client() as client:
        yield client
    deployment.check_empty()


def folder_of(deployment: Deployment, name: str) -> NodeFolder:
    """The folder of a worker, whose agent is up."""
    path = deployment.redis.hget(deployment.key(f"node:{deployment.node(name)}"), "dir").decode()
    wait_until(lambda: os.path.exists(f"{path}/agent.sock"), "the agent to be up")
    found = NodeFolder.open(path)
    assert found is not None
    return found


def where(deployment: Deployment, *futures: Any) -> list[Location]:
    store = deployment.store()
    try:
        found = store.locate([f.key for f in futures])
        assert None not in found
        return found  # type: ignore[return-value]
    finally:
        store.link.close()


def blobs_of(deployment: Deployment) -> list[bytes]:
    return list(deployment.redis.scan_iter(deployment.key("b:*"), 1000))


def memory_of(deployment: Deployment, name: str) -> dict[str, int]:
    told = deployment.redis.hget(deployment.key(f"node:{deployment.node(name)}"), "memory")
    return json.loads(told) if told else {}  # type: ignore[no-any-return]


def is_empty(folder: NodeFolder) -> bool:
    return not list(folder.tokens())


def stop(deployment: Deployment, name: str) -> None:
    deployment.signal(name, signal.SIGTERM)
    deployment.wait_gone(name)


def large(deployment: Deployment, client: Client, n: int, size: int = N) -> list[Any]:
    """Submit tasks with large results and wait for them, without reading them."""
    futures = [client.submit(tasks.large, (deployment.url, f"n{i}"), size, i) for i in range(n)]
    wait_until(lambda: all(f.done() for f in futures), "all to be made")
    return futures


def test_large_results_stay_on_the_node_and_are_gone_after_release(
    deployment: Deployment, client: Client
) -> None:
    deployment.start_worker("w0", slots=2)
    folder = folder_of(deployment, "w0")
    futures = large(deployment, client, 5)
    assert {f.places for f in where(deployment, *futures)} == {(deployment.node("w0"),)}
    wait_until(lambda: len(list(folder.tokens())) == 5, "all to be written")
    assert blobs_of(deployment) == []
    sums = [client.submit(tasks.total, (deployment.url, "total"), f) for f in futures * 3]
    assert client.gather(sums, timeout=60) == [i * N for i in range(5)] * 3
    assert blobs_of(deployment) == []
    wait_until(lambda: memory_of(deployment, "w0").get("files", 0) >= 5 * N, "the node to tell")
    del futures, sums
    wait_until(lambda: is_empty(folder), "all to be dropped")
    stop(deployment, "w0")
    assert not os.path.exists(folder.path)


def test_what_a_killed_child_had_not_written_is_made_again(deployment: Deployment, client: Client) -> None:
    deployment.start_worker("w0", slots=1, env={"CELERY_MEM_WRITE_BEHIND": "3600"})
    folder = folder_of(deployment, "w0")
    made = client.submit(tasks.large, (deployment.url, "made"), N, 3, priority=1)
    pid = client.submit(tasks.here)
    busy = client.submit(tasks.wait_for_word, (deployment.url, "busy"))
    wait_until(lambda: deployment.runs().get("busy"), "the slot to be busy")
    assert is_empty(folder)
    os.kill(pid.result(timeout=60), signal.SIGKILL)
    deployment.redis.rpush("go:busy", "word", "word")
    total = client.submit(tasks.total, (deployment.url, "total"), made)
    assert total.result(timeout=60) == 3 * N
    assert busy.result(timeout=60) is None
    assert deployment.runs()["made"] == 2
    del made, total
    stop(deployment, "w0")
    deployment.redis.unlink("go:busy")


def test_children_that_end_in_good_order_write_what_they_have(deployment: Deployment, client: Client) -> None:
    deployment.start_worker(
        "w0", "--max-tasks-per-child", "1", slots=1, env={"CELERY_MEM_WRITE_BEHIND": "3600"}
    )
    futures = []
    for i in range(4):
        # Each run of a ticket ends while there is something that was not written.
        futures.append(client.submit(tasks.large, (deployment.url, f"n{i}"), N, i))
        wait_until(futures[-1].done, "it to be made")
        child = children_of(deployment.pid("w0"))
        wait_until(lambda child=child: set(children_of(deployment.pid("w0"))) != set(child), "a new child")
    sums = [client.submit(tasks.total, (deployment.url, "total"), f) for f in futures]
    assert client.gather(sums, timeout=60) == [i * N for i in range(4)]
    assert {n for name, n in deployment.runs().items() if name != "total"} == {1}
    del futures, sums
    stop(deployment, "w0")


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_worker_that_stops_in_good_order_saves_what_only_it_has(
    deployment: Deployment, client: Client, pool: str
) -> None:
    deployment.start_worker("w0", slots=1, pool=pool, env={"CELERY_MEM_WRITE_BEHIND": "3600"})
    folder = folder_of(deployment, "w0")
    futures = large(deployment, client, 3)
    stop(deployment, "w0")
    assert not os.path.exists(folder.path)
    assert {f.places for f in where(deployment, *futures)} == {("@redis",)}
    deployment.start_worker("w1", slots=1)
    sums = [client.submit(tasks.total, (deployment.url, "total"), f) for f in futures]
    assert client.gather(sums, timeout=60) == [0, N, 2 * N]
    assert {n for name, n in deployment.runs().items() if name != "total"} == {1}
    del futures, sums
    stop(deployment, "w1")


def test_a_worker_that_is_killed_leaves_nothing_and_its_results_are_made_again(
    deployment: Deployment, client: Client
) -> None:
    deployment.start_worker("w0", slots=1)
    folder = folder_of(deployment, "w0")
    futures = large(deployment, client, 3)
    deployment.kill("w0")  # its agent survives it
    wait_until(lambda: not os.path.exists(folder.path), "its folder to be removed")
    deployment.start_worker("w1", slots=1)
    sums = [client.submit(tasks.total, (deployment.url, "total"), f) for f in futures]
    assert client.gather(sums, timeout=60) == [0, N, 2 * N]
    del futures, sums
    stop(deployment, "w1")


def test_what_a_worker_and_its_agent_left_when_both_were_killed_is_removed_by_the_next(
    deployment: Deployment, client: Client
) -> None:
    deployment.start_worker("w0", slots=1)
    folder = folder_of(deployment, "w0")
    futures = large(deployment, client, 2)
    (agent,) = agents_of(deployment.pid("w0"))
    agent.suspend()  # it must not see the other's end
    deployment.kill("w0")
    agent.kill()
    assert os.path.exists(folder.path)
    deployment.start_worker("w0", slots=1)
    assert not os.path.exists(folder.path)
    sums = [client.submit(tasks.total, (deployment.url, "total"), f) for f in futures]
    assert client.gather(sums, timeout=60) == [0, N]
    del futures, sums
    stop(deployment, "w0")


def test_where_shared_memory_is_too_small_results_are_files_in_the_temp_folder(
    deployment: Deployment, client: Client, tmp_path: Path
) -> None:
    tmp = tempfile.mkdtemp(dir="/var/tmp")
    env = {"CELERY_MEM_SHM_FOLDER": str(tmp_path / "none"), "TMPDIR": tmp}
    deployment.start_worker("w0", slots=1, env=env)
    folder = folder_of(deployment, "w0")
    assert folder.path.startswith(tmp)
    assert "not to shared memory" in deployment.log("w0")
    (made,) = large(deployment, client, 1)
    wait_until(lambda: not is_empty(folder), "it to be written")
    assert blobs_of(deployment) == []
    del made
    stop(deployment, "w0")
    assert os.listdir(tmp) == []
    os.rmdir(tmp)


def test_without_any_room_results_go_through_redis(deployment: Deployment, client: Client) -> None:
    deployment.start_worker("w0", slots=1, env={"CELERY_MEM_SHM_MIN": str(1 << 60)})
    assert "results go through Redis" in deployment.log("w0")
    (made,) = large(deployment, client, 1)
    assert [f.places for f in where(deployment, made)] == [("@redis",)]
    total = client.submit(tasks.total, (deployment.url, "total"), made)
    assert total.result(timeout=60) == 0
    del made, total
    stop(deployment, "w0")


def test_a_node_above_its_target_spills_and_reads_back(deployment: Deployment, client: Client) -> None:
    # The processes take some 200 MB: the target is a little above that.
    env = {"CELERY_MEM_MEMORY_LIMIT": "400000000", "CELERY_MEM_MEMORY_PAUSE": "1.0"}
    deployment.start_worker("w0", slots=1, env=env)
    if not folder_of(deployment, "w0").is_memory:
        pytest.skip("/dev/shm is no shared memory here")
    futures = large(deployment, client, 10, 20 * N)
    wait_until(lambda: memory_of(deployment, "w0").get("spilled", 0) > 50 * N, "some to be spilled")
    sums = [client.submit(tasks.total, (deployment.url, "total"), f) for f in futures]
    assert client.gather(sums, timeout=60) == [i * 20 * N for i in range(10)]
    assert {n for name, n in deployment.runs().items() if name != "total"} == {1}
    del futures, sums
    stop(deployment, "w0")


def test_a_child_that_grows_beyond_its_share_is_replaced_between_tickets(
    deployment: Deployment, client: Client
) -> None:
    env = {"CELERY_MEM_MEMORY_LIMIT": "300000000", "CELERY_MEM_MEMORY_PAUSE": "1.0"}
    deployment.start_worker("w0", slots=1, env=env)
    small = client.submit(tasks.here, 1).result(timeout=60)
    assert client.submit(tasks.hoard, 400 * N).result(timeout=60) == small
    process = psutil.Process(small)
    wait_until(lambda: not process.is_running(), "the child to be replaced")
    assert client.submit(tasks.here, 2).result(timeout=60) != small
    assert "more than its share of 300 MB" in deployment.log("w0")
    stop(deployment, "w0")


def test_what_a_worker_offers_and_its_own_queue_are_announced(deployment: Deployment) -> None:
    deployment.start_worker("w0", "--mem-resources", "GPU=2,TPU=1", slots=1)
    told = deployment.redis.hgetall(deployment.key(f"node:{deployment.node('w0')}"))
    resources = json.loads(told[b"resources"])
    assert resources.pop("queue:celery-mem.mem") > 1e6  # no end of the queue that it consumes
    assert resources == {"GPU": 2, "TPU": 1}
    assert told[b"status"] == b"running"
    assert int(told[b"limit"]) > 0
    stop(deployment, "w0")
    assert not [k for k in deployment.redis.scan_iter("*", 1000) if deployment.node("w0").encode() in k]


def test_resources_that_are_none_are_refused(deployment: Deployment) -> None:
    deployment.start_worker("odd", "--mem-resources", "GPU", slots=1, wait=False)
    deployment.wait_gone("odd")
    assert "pairs such as GPU=2" in deployment.log("odd")
