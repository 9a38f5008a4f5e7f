"""Processes whose clocks are wrong: leases are judged by the clock of Redis."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from tests import tasks
from tests.deployment import ROOT, Deployment

CLOCK = Path(__file__).parent / "chaos" / "clock"
LEASE_S = 1.0


@pytest.mark.parametrize("skew_s", [3600.0, -3600.0])
def test_clocks_that_are_wrong_by_an_hour_change_nothing(tmp_path: Path, skew_s: float) -> None:
    """Of a worker and the leader; set while a task runs and a result is held."""
    clock = tmp_path / "clock"
    clock.write_bytes(struct.pack("d", 0.0))
    env = {"TEST_CLOCK": str(clock), "PYTHONPATH": f"{CLOCK}:{ROOT}"}
    leases = {
        "node_lease": LEASE_S,
        "client_lease": LEASE_S,
        "leader_lease": LEASE_S,
        "ticket_lease": LEASE_S,
    }
    with Deployment(**leases) as it:
        it.start_coordinator("c0", env=env)
        it.start_worker("w0", env=env)
        with it.client() as client:
            held = client.map(tasks.inc, range(10))
            client.gather(held, timeout=60)
            running = client.submit(tasks.counted, (it.url, "long"), 1, 2, seconds=2 * LEASE_S)
            it.wait_until(lambda: it.runs("long"), "it to run")
            with clock.open("r+b") as file:
                file.write(struct.pack("d", skew_s))
            agents = it.redis.zrange(it.key("nodes"), 0, -1, withscores=True)
            assert running.result(timeout=60) == 3
            assert it.runs("long") == {"long": 1}
            later = it.redis.zrange(it.key("nodes"), 0, -1, withscores=True)
            assert 0 < later[0][1] - agents[0][1] < 60_000  # renewed, by the clock that judges it
            assert client.gather(held) == list(range(1, 11))
            assert client.submit(tasks.inc, 41).result(timeout=60) == 42
            time.sleep(LEASE_S)  # as long as a lease that nobody renewed
            assert [f.status for f in held] == ["finished"] * 10
        it.check_empty()
