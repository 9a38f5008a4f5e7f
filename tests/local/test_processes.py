"""What is promised about the children of a LocalCluster, with stand-ins for Redis and the workers."""

import gc
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from celery_mem.local.processes import LocalClusterError, Processes
from tests.local.conftest import POOL, SLEEPER, all_gone, members

Parent = Callable[[str], subprocess.Popen[str]]

CLUSTER = f"""
import json, os, sys, tempfile
from celery_mem.local.processes import Processes
folder = tempfile.mkdtemp()
processes = Processes(folder, os.environ, grace_s=1)
processes.start("redis", {SLEEPER}, stage=0)
processes.start("worker-0", {POOL})
processes.wait_until_started()
while processes.log_tail("worker-0") != "pool is up": pass
def report(**more):
    found = dict(folder=folder, supervisor=processes._supervisor.pid, **processes.pids(), **more)
    print(json.dumps(found), flush=True)
"""
WAIT_FOR_THE_END = "sys.stdin.read()\n"


def heard(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())  # type: ignore[no-any-return]


def everything(report: dict[str, Any]) -> list[psutil.Process]:
    supervisor = psutil.Process(report["supervisor"])
    found = [supervisor, *supervisor.children(), *members(report["worker-0"])]
    assert len(found) == 1 + 3 + 3, "supervisor; keeper, redis, worker; worker and its two children"
    return found


def start_and_see(processes: Processes, name: str, argv: list[str], **options: object) -> int:
    processes.start(name, argv, **options)  # type: ignore[arg-type]
    processes.wait_until_started()
    return processes.pids()[name]


def test_close_leaves_no_process_and_no_folder(processes: Processes) -> None:
    start_and_see(processes, "redis", SLEEPER, stage=0)
    pool = start_and_see(processes, "worker-0", POOL)
    left = [*psutil.Process(processes._supervisor.pid).children(), *members(pool)]
    processes.close()
    assert all_gone(left, timeout=0)
    assert processes.pids() == {}
    assert not os.path.exists(processes.folder)


def test_close_can_be_repeated(processes: Processes) -> None:
    processes.close()
    processes.close()


def test_a_process_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    processes = Processes(str(tmp_path / "x"), os.environ, grace_s=0.1, to_stderr=True)
    pid = start_and_see(processes, "worker-0", ["sh", "-c", "trap '' TERM; sleep 1000 & wait"])
    left = members(pid)
    processes.close()
    assert all_gone(left, timeout=0)


def test_higher_stages_end_before_lower_ones(processes: Processes, tmp_path: Path) -> None:
    def diary(word: str) -> list[str]:
        code = f"trap 'echo {word} >> {tmp_path}/diary; exit' TERM; echo up; sleep 1000 & wait"
        return ["sh", "-c", code]

    start_and_see(processes, "redis", diary("redis"), stage=0)
    start_and_see(processes, "worker-0", diary("worker"), stage=1)
    while processes.log_tail("redis") + processes.log_tail("worker-0") != "upup":
        pass
    processes.close()
    assert (tmp_path / "diary").read_text().split() == ["worker", "redis"]


def test_a_killed_parent_leaves_no_orphan(parent: Parent) -> None:
    process = parent(CLUSTER + "report()\n" + WAIT_FOR_THE_END)
    report = heard(process)
    left = everything(report)
    process.kill()
    assert all_gone(left)
    assert not os.path.exists(report["folder"])


def test_a_parent_that_forgets_to_close_leaves_no_orphan(parent: Parent) -> None:
    process = parent(CLUSTER + "report()\n" + WAIT_FOR_THE_END)
    report = heard(process)
    left = everything(report)
    process.communicate("")
    assert process.returncode == 0
    assert all_gone(left)
    assert not os.path.exists(report["folder"])


def test_a_killed_supervisor_leaves_no_orphan(processes: Processes) -> None:
    start_and_see(processes, "redis", SLEEPER, stage=0)
    pool = start_and_see(processes, "worker-0", POOL)
    left = [*psutil.Process(processes._supervisor.pid).children(), *members(pool)]
    processes._supervisor.send_signal(signal.SIGKILL)
    assert processes.wait_for(processes.is_over, 10)
    assert all_gone(left)
    assert not os.path.exists(processes.folder)
    assert "killed by SIGKILL" in (processes.trouble("supervisor") or "")


def test_parent_and_supervisor_killed_together_leave_no_orphan(parent: Parent) -> None:
    process = parent(CLUSTER + "report()\n" + WAIT_FOR_THE_END)
    report = heard(process)
    left = everything(report)
    process.kill()
    left[0].kill()
    assert all_gone(left)
    assert not os.path.exists(report["folder"])


def test_a_killed_keeper_is_replaced_by_one_that_knows_all(processes: Processes) -> None:
    supervisor = psutil.Process(processes._supervisor.pid)
    pool = start_and_see(processes, "worker-0", POOL)
    (keeper,) = (child for child in supervisor.children() if child.pid != pool)
    keeper.kill()
    while not {child.pid for child in supervisor.children()} - {pool, keeper.pid}:
        pass
    left = [*supervisor.children(), *members(pool)]
    supervisor.kill()
    assert all_gone(left)
    assert not os.path.exists(processes.folder)


def test_a_forked_child_neither_closes_nor_keeps_its_parents_cluster(parent: Parent) -> None:
    process = parent(
        CLUSTER
        + "child = os.fork()\n"
        + "if child == 0:\n"
        + "    processes.close(); del processes; os.close(1); sys.stdin.read(); os._exit(0)\n"
        + "report(child=child)\n"
        + WAIT_FOR_THE_END
    )
    report = heard(process)
    left = everything(report)  # so the child's close() had no effect
    process.kill()
    assert all_gone(left)
    assert psutil.Process(report["child"]).is_running()


def test_a_thread_may_start_what_outlives_it(tmp_path: Path) -> None:
    made: list[Processes] = []

    def make() -> None:
        made.append(Processes(str(tmp_path / "x"), os.environ, grace_s=1, to_stderr=True))
        made[0].start("worker-0", SLEEPER)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    made[0].wait_until_started()
    gc.collect()
    assert psutil.Process(made[0].pids()["worker-0"]).is_running()
    made[0].close()


def test_a_death_is_reported_with_the_log_and_takes_the_group_along(
    processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    pid = start_and_see(processes, "worker-0", POOL)
    while processes.log_tail("worker-0") != "pool is up":
        pass
    left = members(pid)
    os.kill(pid, signal.SIGKILL)
    assert processes.wait_for(lambda: "worker-0" in processes._troubles, 10)
    text = f"worker-0 (pid {pid}) ended: killed by SIGKILL; its log ends with\npool is up"
    assert processes.troubles() == [text]
    assert text in caplog.messages
    assert processes.pids() == {}
    assert all_gone(left)


def test_who_reports_a_death_may_outlive_it_until_the_end(processes: Processes) -> None:
    reporter = "trap '' TERM; sh -c 'echo pool is up; while :; do sleep 1000; done' & wait"
    pid = start_and_see(processes, "worker-0", ["sh", "-c", reporter])
    while processes.log_tail("worker-0") != "pool is up":
        pass
    os.kill(pid, signal.SIGKILL)
    assert processes.wait_for(lambda: "worker-0" in processes._troubles, 10)
    left = members(pid)
    assert left
    processes.close()
    assert all_gone(left, timeout=0)


def test_a_death_is_mended_on_request(processes: Processes) -> None:
    first = start_and_see(processes, "worker-0", SLEEPER, restart=True)
    os.kill(first, signal.SIGKILL)
    assert processes.wait_for(lambda: processes._pids.get("worker-0", first) != first, 10)
    assert processes.troubles() == []


def test_a_command_that_does_not_exist_is_named(processes: Processes) -> None:
    processes.start("worker-0", ["/no/such/program", "--now"])
    processes.wait_until_started()
    assert "worker-0 did not start: /no/such/program" in processes.troubles()[0]


def test_waiting_for_one_that_dies_raises_its_log(processes: Processes) -> None:
    command = ["sh", "-c", "echo no memory; exit 3"]
    with pytest.raises(LocalClusterError, match=r"exit code 3; its log ends with\nno memory$"):
        processes.start_and_wait("redis", command, lambda: False, 10)


def test_waiting_for_one_that_never_answers_ends(processes: Processes) -> None:
    with pytest.raises(LocalClusterError, match=r"redis does not answer after 0.05 s"):
        processes.start_and_wait("redis", SLEEPER, lambda: False, 0.05)


def test_nothing_starts_after_the_end(processes: Processes) -> None:
    processes.close()
    with pytest.raises(LocalClusterError, match="cannot start worker-0"):
        processes.start("worker-0", SLEEPER)
