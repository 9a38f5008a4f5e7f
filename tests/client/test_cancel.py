"""cancel, with dependents and other holders; retry."""

from __future__ import annotations

import os
import threading

import dask.array as da
import pytest

from celery_mem import wait
from celery_mem.errors import FutureCancelledError
from tests.on_cluster import add, count_call, fail, fail_until, inc, until


@pytest.fixture
def busy(client, gate):
    """Both slots are taken, so that what is submitted waits; opening the gate frees them."""
    blockers = client.map(gate.pass_, ["b0", "b1"], priority=100)
    assert {gate.next_reached(), gate.next_reached()} == {"b0", "b1"}
    yield blockers
    blockers.clear()


class TestCancel:
    def test_what_has_not_started_does_not_start(self, client, gate, busy):
        future = client.submit(count_call, gate, "cancelled")
        client.cancel(future)
        gate.open()
        wait(busy)
        assert client.submit(count_call, gate, "cancelled", pure=False).result() == 1

    def test_the_result_of_what_runs_is_discarded(self, client, gate, busy):
        busy[0].cancel()
        assert busy[0].status == "cancelled"
        gate.open()
        assert client.gather(busy, errors="skip") == ["b1"]

    def test_dependents_are_cancelled_too(self, client, gate, busy):
        x = client.submit(inc, 1)
        y = client.submit(inc, x)
        z = client.submit(add, y, y)
        unrelated = client.submit(inc, 100)
        x.cancel(reason="changed my mind")
        assert [f.status for f in (x, y, z, unrelated)] == ["cancelled"] * 3 + ["pending"]
        with pytest.raises(FutureCancelledError, match="changed my mind"):
            z.result()
        gate.open()
        assert unrelated.result() == 101

    def test_what_it_depends_on_stays(self, client, gate):
        x = client.submit(inc, 1)
        y = client.submit(gate.pass_, x)
        y.cancel()
        assert x.result() == 2
        gate.open()

    def test_takes_many_futures_and_collections(self, client, gate, busy):
        futures = client.map(inc, range(5))
        array = client.persist(da.ones(10, chunks=5))
        client.cancel([futures[:3], {"more": futures[3:]}])
        client.cancel(array)
        assert all(f.cancelled() for f in futures)
        with pytest.raises(FutureCancelledError):
            client.compute(array.sum()).result()
        client.cancel([])
        gate.open()

    def test_a_finished_future_can_be_cancelled_and_its_data_goes(self, client):
        future = client.submit(inc, 1)
        future.result()
        future.cancel()
        assert client.info()["tasks"] == {}
        with pytest.raises(FutureCancelledError):
            future.result()

    def test_the_same_call_runs_anew_and_old_futures_stay_cancelled(self, client, gate):
        old = client.submit(count_call, gate, "anew")
        assert old.result() == 1
        old.cancel()
        new = client.submit(count_call, gate, "anew")
        assert new.result() == 2
        assert old.cancelled()

    def test_ends_the_wait_of_other_threads(self, client, gate):
        future = client.submit(gate.pass_, 1)
        gate.next_reached()
        threading.Timer(0.05, future.cancel).start()
        with pytest.raises(FutureCancelledError, match="cancelled by this client"):
            future.result()
        gate.open()


class TestCancelAmongClients:
    def test_what_another_client_holds_goes_on(self, connect, client, gate, busy):
        other = connect()
        mine, theirs = client.submit(inc, 1), other.submit(inc, 1)
        mine.cancel()
        assert (mine.status, theirs.status) == ("cancelled", "pending")
        gate.open()
        assert theirs.result() == 2

    def test_what_their_dependents_need_goes_on(self, connect, client, gate, busy):
        other = connect()
        x = client.submit(inc, 1)
        theirs = other.submit(inc, other.future(x))
        x.cancel()
        gate.open()
        assert theirs.result() == 3

    def test_by_force_it_is_cancelled_for_all_and_they_are_told(self, connect, client, gate, busy):
        other = connect()
        mine, theirs = client.submit(inc, 1), other.submit(inc, 1)
        dependent = other.submit(inc, theirs)
        other.session.flush()
        client.cancel(mine, force=True, reason="maintenance")
        for future in (theirs, dependent):
            with pytest.raises(FutureCancelledError, match="maintenance"):
                future.result(timeout=20)
        gate.open()
        assert other.submit(inc, 1).result() == 2


class TestRetry:
    def test_runs_a_failed_task_again(self, client, gate):
        future = client.submit(fail_until, gate, "retry", 2)
        assert str(future.exception()) == "call 1"
        future.retry()
        assert future.result(timeout=20) == 2

    def test_runs_the_failed_inputs_and_all_that_they_took_down(self, client, gate):
        x = client.submit(fail_until, gate, "root", 2)
        y, z = client.submit(inc, x), client.submit(add, x, x)
        wait([y, z])
        client.retry(z)
        assert client.gather([x, y, z], timeout=20) == [2, 3, 4]

    def test_is_pending_at_once(self, client, gate):
        def fail_then_wait():
            if count_call(gate, "pending") == 1:
                raise ValueError("first")
            return gate.pass_("second")

        future = client.submit(fail_then_wait)
        future.exception()
        future.retry()
        assert future.status == "pending"
        gate.open()
        assert future.result(timeout=20) == "second"

    def test_so_are_the_inputs_behind_it_and_what_these_took_down(self, client, gate):
        def fail_then_wait():
            if count_call(gate, "root") == 1:
                raise ValueError("first")
            return gate.pass_(1)

        x = client.submit(fail_then_wait)
        y, z = client.submit(inc, x), client.submit(add, x, x)
        wait([x, y, z])
        with client.session.lock:  # no notice is taken in meanwhile
            client.retry(z)
            assert [f.status for f in (x, y, z)] == ["pending"] * 3
        gate.open()
        assert client.gather([x, y, z], timeout=20) == [1, 2, 2]

    def test_leaves_what_did_not_fail_alone(self, client, gate):
        good = client.submit(count_call, gate, "good")
        assert good.result() == 1
        client.retry([good])
        assert good.result() == 1

    def test_fails_again_if_nothing_has_changed(self, client):
        future = client.submit(fail)
        future.exception()
        for _ in range(3):
            future.retry()
            with pytest.raises(ValueError, match="as asked"):
                future.result(timeout=20)

    def test_another_client_sees_it_pending_and_then_done(self, connect, gate):
        one, other = connect(), connect()
        mine = one.submit(fail_until, gate, "seen", 2)
        theirs = other.future(mine)
        assert str(theirs.exception()) == "call 1"
        mine.retry()
        assert mine.result(timeout=20) == 2
        assert until(lambda: theirs.status == "finished")
        assert theirs.result() == 2


def test_work_that_nobody_wants_any_more_never_runs(client, gate, busy, tmp_path):
    marker = tmp_path / "ran"
    future = client.submit(os.mkdir, str(marker))
    del future
    assert until(lambda: not client.info()["tasks"].get("ready"))
    gate.open()
    wait(busy)
    assert client.submit(inc, 1).result() == 2
    assert not marker.exists()
