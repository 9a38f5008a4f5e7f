"""The cluster inside a test's process: what users' own tests may rely on."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from dask import delayed

from celery_mem import Client, wait
from celery_mem.errors import ConfigError
from celery_mem.testing import InProcessCluster, LeftoverError

STARTS_WITHIN_S = 0.5


@pytest.fixture(scope="module")
def in_process() -> Iterator[InProcessCluster]:
    with InProcessCluster(n_workers=2, threads_per_worker=1, resources={"GPU": 1}) as cluster:
        yield cluster


@pytest.fixture
def client(in_process: InProcessCluster) -> Iterator[Client]:
    with in_process.client() as client:
        yield client
    in_process.check_empty()


def test_it_starts_and_answers_in_less_than_half_a_second() -> None:
    """The promise is a time. The best of three: the machine may be busy with something else."""
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        with InProcessCluster() as cluster, cluster.client(set_as_default=False) as client:
            assert client.submit(int, "7").result(timeout=30) == 7
            times.append(time.perf_counter() - begin)
    assert min(times) < STARTS_WITHIN_S


def test_it_has_no_process_and_leaves_no_thread() -> None:
    program = (
        "import threading\n"
        "import psutil\n"
        "from celery_mem.testing import InProcessCluster\n"
        "with InProcessCluster() as cluster, cluster.client() as client:\n"
        "    assert client.gather(client.map(abs, range(100)), timeout=30) == list(range(100))\n"
        "    assert psutil.Process().children() == []\n"
        "    threads = [t for t in threading.enumerate() if t is not threading.main_thread()]\n"
        "for thread in threads:\n"
        "    if thread.name != 'celery-mem-attendance':\n"  # one for the whole process
        "        thread.join(20)\n"
        "        assert not thread.is_alive(), thread\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


def test_a_client_that_closes_leaves_no_thread_behind(in_process: InProcessCluster) -> None:
    """Its listener waits in a read of a server that nobody can hang up on."""
    before = set(threading.enumerate())
    client = in_process.client(set_as_default=False)
    own = set(threading.enumerate()) - before
    assert own
    client.close()
    assert [t for t in own if t.is_alive()] == []


def test_an_error_arrives_with_its_class_and_the_line_that_raised_it(client: Client) -> None:
    future = client.submit(int, "no number")
    with pytest.raises(ValueError, match="no number"):
        future.result(timeout=30)


def test_a_task_may_wait_for_tasks_although_all_slots_are_busy(client: Client) -> None:
    def outer(n: int) -> int:
        return n if n == 0 else 1 + Client.current().submit(outer, n - 1).result(timeout=30)

    assert client.gather(client.map(outer, [5, 6, 7]), timeout=60) == [5, 6, 7]


def test_results_and_arguments_of_any_size_are_copies(client: Client) -> None:
    given = [bytes(200_000)]
    future = client.submit(lambda x: x, given)
    first, second = future.result(timeout=30), client.gather(future)
    assert first == given
    assert first is not given
    assert first is not second


def test_dask_collections_run(client: Client) -> None:
    total = delayed(sum)([delayed(pow)(n, 2) for n in range(10)])
    assert client.compute(total).result(timeout=30) == 285


def test_tasks_go_where_they_are_told(client: Client, in_process: InProcessCluster) -> None:
    where = {
        node: client.submit(lambda: threading.current_thread().name, workers=[node], pure=False)
        for node in in_process.workers
    }
    for node, future in where.items():
        assert future.result(timeout=30) == f"celery-mem-slot-{node}"
    assert client.submit(int, 1, resources={"GPU": 1}).result(timeout=30) == 1


def test_a_cancelled_future_and_its_waiting_dependents_leave_nothing(client: Client) -> None:
    gate = threading.Event()
    GATES["gate"] = gate
    futures = [client.submit(_wait_at_gate, n, pure=False) for n in range(4)]
    client.cancel(futures)
    assert {f.status for f in futures} == {"cancelled"}
    gate.set()


GATES: dict[str, threading.Event] = {}


def _wait_at_gate(n: int) -> int:
    GATES["gate"].wait(30)
    return n


def test_after_a_restart_it_works_again() -> None:
    with InProcessCluster() as cluster, cluster.client(set_as_default=False) as client:
        before = client.submit(int, 1)
        assert before.result(timeout=30) == 1
        client.restart()
        assert before.status == "cancelled"
        assert client.submit(int, 2).result(timeout=30) == 2
        del before
        cluster.check_empty()


def test_what_is_left_is_named(in_process: InProcessCluster) -> None:
    with in_process.client(set_as_default=False) as client:
        future = client.submit(int, 3, key="kept")
        wait([future], timeout=30)
        with pytest.raises(LeftoverError, match=r"kept \(memory\)"):
            in_process.check_empty(timeout=0)
        del future
        in_process.check_empty()


def test_clusters_do_not_see_each_other() -> None:
    with InProcessCluster() as one, InProcessCluster() as two:
        with one.client(set_as_default=False) as client, two.client(set_as_default=False) as other:
            future = client.submit(int, 1, key="mine")
            assert future.result(timeout=30) == 1
            assert client.who_has().keys() == {"mine"}
            assert other.who_has() == {}
            del future
        one.check_empty()


def test_an_unknown_setting_fails_with_the_nearest_one_and_leaves_nothing() -> None:
    with pytest.raises(ConfigError, match="did you mean inline_limit"):
        InProcessCluster(inline_limt=3)


# --- the fixtures, in runs of their own -------------------------------------------------------------------

PLUGIN = ("-p", "celery_mem.testing.plugin", "-W", "error", "-p", "no:cacheprovider")


def test_the_page_about_testing_holds(pytester: pytest.Pytester) -> None:
    from tests.docs.test_examples import BLOCK, ROOT

    blocks = BLOCK.findall((ROOT / "docs/testing.md").read_text())
    for i, block in enumerate(b for _, b in blocks if "def test_" in b):
        pytester.makepyfile(**{f"test_page_{i}": block})
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=2)


def test_a_test_that_leaves_something_fails_and_the_next_one_is_told_apart(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        def test_leaves(mem_client):
            mem_client.publish_dataset(prices=mem_client.submit(int, 1, key="left-behind"))

        def test_tidies_up(mem_client):
            mem_client.unpublish_dataset("prices")
    """)
    result = pytester.runpytest_subprocess(*PLUGIN)
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*LeftoverError: left in the cluster *left-behind (memory)*"])


def test_a_run_without_clusters_imports_none(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import sys

        def test_nothing():
            assert not {"celery", "fakeredis", "dask", "celery_mem.testing.cluster"} & sys.modules.keys()
    """)
    pytester.runpytest_subprocess(*PLUGIN).assert_outcomes(passed=1)
