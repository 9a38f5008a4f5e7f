"""Results that are not where they should be, or not as they were; nodes that are lost; deep lineage."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from celery_mem import Client, Future
from celery_mem.errors import DataLostError
from celery_mem.graph.keys import text_of
from celery_mem.memory.files import NodeFolder
from tests import tasks
from tests.deployment import Deployment

LEASES = {"client_lease": 5.0, "node_lease": 2.0, "leader_lease": 2.0, "ticket_lease": 1.0}
SIZE = 300_000
STEPS = 50


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with Deployment(inline_limit=1000, recycle_bytes=0, write_behind=0.0, **LEASES) as it:
        it.start_coordinator()
        it.start_worker("w0")
        yield it


@pytest.fixture(scope="module")
def through_redis() -> Iterator[Deployment]:
    with Deployment(node_memory=False, inline_limit=1000, cache_bytes=1, piece_bytes=100_000) as it:
        it.start_coordinator()
        it.start_worker("w0")
        yield it


@pytest.fixture(autouse=True)
def _count_anew(request: pytest.FixtureRequest) -> None:
    for name in {"deployment", "through_redis"} & set(request.fixturenames):
        request.getfixturevalue(name).forget_runs()


# --- not there, or not as it was written --------------------------------------------------------------------


def delete_blob(it: Deployment, name: bytes) -> None:
    it.redis.unlink(name)


def delete_piece(it: Deployment, name: bytes) -> None:
    it.redis.hdel(name, 1)


def flip_bit(it: Deployment, name: bytes) -> None:
    piece = bytearray(it.redis.hget(name, 2))
    piece[50] ^= 4
    it.redis.hset(name, 2, bytes(piece))


@pytest.mark.parametrize("harm", [delete_blob, delete_piece, flip_bit])
def test_a_blob_that_is_not_as_it_was_written_is_made_again(
    through_redis: Deployment, harm: Callable[[Deployment, bytes], None]
) -> None:
    it = through_redis
    with it.client() as client:
        made = client.submit(tasks.large, (it.url, "made"), SIZE)
        assert made.result(timeout=60).sum() == SIZE
        (name,) = it.redis.scan_iter(it.key("b:*"), 1000)
        harm(it, name)
        assert client.submit(tasks.total, (it.url, "read"), made).result(timeout=60) == SIZE
        assert it.runs() == {"made": 2, "read": 1}
        (name,) = it.redis.scan_iter(it.key("b:*"), 1000)
        harm(it, name)
        assert made.result(timeout=60).sum() == SIZE
        assert it.runs() == {"made": 3, "read": 1}
        del made
    it.check_empty()


def folder_of(it: Deployment, node: str = "w0") -> NodeFolder:
    path = it.redis.hget(it.key(f"node:{it.node(node)}"), "dir")
    folder = NodeFolder.open(path.decode())
    assert folder is not None
    return folder


def file_of(it: Deployment, future: Future) -> str:
    """Wait until a result is in a file, and return its token."""
    with it.client() as other:
        (location,) = other.session.store.locate([text_of(future.key)])
    assert location is not None
    it.wait_until(lambda: folder_of(it).is_in_files(location.token), "the result to be written")
    return location.token


def flip_spilled_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[SIZE // 2] ^= 4
    path.write_bytes(data)


def break_disk(path: Path) -> None:
    """As good as an error of the disk: it cannot be opened (ELOOP)."""
    path.unlink()
    path.symlink_to("/dev/null")


@pytest.mark.node_memory
@pytest.mark.parametrize("harm", [flip_spilled_bit, break_disk, Path.unlink])
def test_a_spilled_result_that_cannot_be_read_is_made_again(
    deployment: Deployment, harm: Callable[[Path], None]
) -> None:
    it = deployment
    with it.client() as client:
        made = client.submit(tasks.large, (it.url, "made"), SIZE)
        made.result(timeout=60)
        token = file_of(it, made)
        folder = folder_of(it)
        assert folder.spill(token) > 0
        harm(Path(folder._spill.path) / token)  # type: ignore[attr-defined]
        assert client.submit(tasks.total, (it.url, "read"), made).result(timeout=60) == SIZE
        assert it.runs() == {"made": 2, "read": 1}
        del made
    it.check_empty()


# --- lineage ------------------------------------------------------------------------------------------------


def chain(it: Deployment, client: Client) -> list[Future]:
    """Arrays, each made of the one before, the first of zeros."""
    futures = [client.submit(np.zeros, SIZE)]
    for i in range(STEPS):
        futures.append(client.submit(tasks.step, (it.url, f"{i}"), futures[-1]))
    return futures


def lose(it: Deployment, future: Future) -> None:
    folder_of(it).drop([file_of(it, future)])


@pytest.mark.node_memory
def test_what_is_lost_is_made_again_as_deep_as_necessary_and_no_deeper(deployment: Deployment) -> None:
    it = deployment
    with it.client() as client:
        futures = chain(it, client)
        middle, last = futures[STEPS // 2], futures[-1]
        del futures
        assert last.result(timeout=60)[0] == STEPS
        it.wait_until(lambda: len(list(it.redis.scan_iter(it.key("nk:*")))) == 1, "the node to have results")
        lose(it, last)
        assert last.result(timeout=60)[-1] == STEPS
        assert it.runs() == {str(i): 1 if i < STEPS // 2 else 2 for i in range(STEPS)}
        lose(it, last)
        lose(it, middle)
        assert last.result(timeout=60)[-1] == STEPS
        assert it.runs() == {str(i): 2 if i < STEPS // 2 else 3 for i in range(STEPS)}
        del middle, last
    it.check_empty()


def is_in_error(future: Future) -> bool:
    return future.status == "error"


# --- nodes --------------------------------------------------------------------------------------------------


@pytest.mark.node_memory
def test_two_nodes_lost_at_once_and_a_third_while_it_is_made_again(deployment: Deployment) -> None:
    it = deployment
    names = [f"v{i}" for i in range(3)]
    for name in names:
        it.start_worker(name, wait=False)
    for name in names:
        it.wait_until(lambda n=name: it.redis.exists(it.key(f"node:{it.node(n)}")), "it to join")
    with it.client() as client:
        roots = [
            client.submit(
                tasks.large, (it.url, f"r{i}"), SIZE, i, workers=it.node(n), allow_other_workers=True
            )
            for i, n in enumerate([*names, "w0"])
        ]
        client.gather(roots, timeout=60)
        brought = client.scatter(np.arange(SIZE), workers=it.node("v0"))
        sums = [client.submit(tasks.total, (it.url, f"s{i}"), root) for i, root in enumerate(roots)]
        on_brought = client.submit(np.sum, client.submit(tasks.wait_for_word, (it.url, "word"), brought))
        it.wait_until(lambda: "word" in it.runs(), "a task to wait")
        it.kill("v0")
        it.kill("v1")
        it.wait_until(functools.partial(is_in_error, brought), "the loss to be noticed")
        it.kill("v2")
        it.redis.rpush("go:word", "word")
        again = [client.submit(tasks.total, (it.url, f"t{i}"), root) for i, root in enumerate(roots)]
        expected = [i * SIZE for i in range(len(roots))]
        assert client.gather(sums, timeout=60) == expected
        assert client.gather(again, timeout=60) == expected
        with pytest.raises(DataLostError, match="scattered"):
            client.submit(np.max, brought).result(timeout=60)
        try:
            assert on_brought.result(timeout=60) == np.arange(SIZE).sum()  # it had been read in time
        except DataLostError as error:
            assert error.key == brought.key  # noqa: PT017 (either is right)
        del roots, brought, sums, on_brought, again
    it.redis.unlink("go:word")
    it.check_empty()


def test_a_node_that_was_stopped_for_longer_than_its_lease_and_goes_on_changes_nothing(
    deployment: Deployment,
) -> None:
    it = deployment
    it.start_worker("u0")
    it.start_worker("u1")
    nodes = [it.node("u0"), it.node("u1")]
    with it.client() as client:
        task = client.submit(tasks.wait_for_word, (it.url, "word"), 7, workers=nodes)
        it.wait_until(it.runs, "the task to run")
        (node,) = it.wait_until(lambda: [n for n, keys in client.processing().items() if keys], "it to run")
        main = psutil.Process(it.pid(node.partition("@")[0]))
        stopped = [main, *main.children(recursive=True)]
        try:
            for process in stopped:
                process.send_signal(signal.SIGSTOP)
            it.wait_until(lambda: it.runs() == {"word": 2}, "the task to run elsewhere")
            it.redis.rpush("go:word", "word", "word")  # the one that is stopped gets the first
            assert task.result(timeout=60) == 7
        finally:
            for process in reversed(stopped):
                os.kill(process.pid, signal.SIGCONT)
        it.wait_until(lambda: it.redis.exists(it.key(f"node:{node}")), "the node to join again")
        assert client.submit(tasks.add, task, 1, workers=node).result(timeout=60) == 8
        assert it.runs() == {"word": 2}
        del task
    it.redis.unlink("go:word")
    it.check_empty()
