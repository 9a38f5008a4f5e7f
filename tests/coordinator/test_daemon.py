"""Real coordinator processes: who leads when one of them is killed, stopped or told to go."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests import tasks
from tests.deployment import ROOT, Deployment, wait_until

LEADER_LEASE_S = 1.0

HOLDER = """
import sys
from celery_mem import Client
from tests.tasks import inc
client = Client(sys.argv[1], client_lease=2.0)
futures = client.map(inc, range(2000))
total = client.submit(sum, futures)
assert total.result(timeout=60) == sum(range(1, 2001))
print("holding", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """Two coordinators, and a worker for one of the tests."""
    options = {"leader_lease": LEADER_LEASE_S, "client_lease": 2.0, "ticket_lease": 1.0, "sweep_budget": 100}
    with Deployment(**options) as it:
        it.start_coordinator("c0")
        it.start_coordinator("c1")
        it.start_worker("w0")
        yield it


def leader(deployment: Deployment) -> str | None:
    """Return the name of the process that leads."""
    name = deployment.redis.get(deployment.key("leader"))
    if name is None:
        return None
    pids = {str(pid): process for process, pid in deployment.processes.pids().items()}
    return pids.get(name.decode().split("-")[-2])


def wait_for_leader(deployment: Deployment) -> str:
    return str(deployment.wait_until(lambda: leader(deployment), "a coordinator to lead"))


def other(name: str) -> str:
    return {"c0": "c1", "c1": "c0"}[name]


def wait_for_change(deployment: Deployment, first: str) -> float:
    started = time.monotonic()
    deployment.wait_until(lambda: leader(deployment) == other(first), f"{other(first)} to lead")
    return time.monotonic() - started


def test_a_standby_takes_over_when_the_leader_is_killed(deployment: Deployment) -> None:
    first = wait_for_leader(deployment)
    deployment.kill(first)
    wait_for_change(deployment, first)
    deployment.start_coordinator(first)
    assert wait_for_leader(deployment) == other(first)


def test_a_leader_that_is_told_to_go_hands_over_at_once(deployment: Deployment) -> None:
    first = wait_for_leader(deployment)
    deployment.signal(first, signal.SIGTERM)
    deployment.wait_gone(first)
    # Long before the lease would have ended; half of it is for a busy machine.
    assert wait_for_change(deployment, first) < LEADER_LEASE_S * 3 / 4
    deployment.start_coordinator(first)


def test_a_leader_that_was_stopped_and_resumes_does_not_lead_and_does_no_harm(deployment: Deployment) -> None:
    first = wait_for_leader(deployment)
    deployment.signal(first, signal.SIGSTOP)
    wait_for_change(deployment, first)
    term = deployment.redis.hget(deployment.key("meta"), "fence")
    with deployment.client() as client:
        future = client.submit(tasks.wait_for_word, (deployment.url, "held"), 1)
        wait_until(deployment.runs, "the task to run")
        deployment.signal(first, signal.SIGCONT)
        deployment.wait_until(
            lambda: any(word in deployment.log(first) for word in ("does not lead any more", "fenced")),
            "the old leader to notice",
        )
        assert leader(deployment) == other(first)
        assert deployment.redis.hget(deployment.key("meta"), "fence") == term
        deployment.redis.rpush("go:held", "now")
        assert future.result(timeout=60) == 1
        del future
    deployment.check_empty()


def test_what_a_killed_client_held_is_freed_after_its_lease(deployment: Deployment) -> None:
    command = [sys.executable, "-c", HOLDER, deployment.url]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        assert deployment.store().link.call("EXISTS", deployment.key("functions"))
    finally:
        holder.kill()
        holder.communicate()
    deployment.check_empty()


def test_work_whose_ticket_was_lost_in_the_broker_is_done_all_the_same(deployment: Deployment) -> None:
    deployment.signal("w0", signal.SIGSTOP)  # it takes no message meanwhile
    try:
        with deployment.client() as client:
            future = client.submit(tasks.inc, 41)
            queue = "celery-mem.mem"
            wait_until(lambda: deployment.redis.llen(queue), "the ticket to be in the queue", 10)
            deployment.redis.unlink(queue)
            deployment.signal("w0", signal.SIGCONT)
            assert future.result(timeout=60) == 42
            del future
    finally:
        deployment.signal("w0", signal.SIGCONT)
    deployment.check_empty()
