"""Future: states, results, callbacks, copies, and its way through pickle."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import time

import pytest

from celery_mem import Future
from celery_mem.client import current
from celery_mem.errors import FutureCancelledError, MissingKeyError, UnboundFutureError
from tests.on_cluster import Box, add, fail, identity, inc, until


def submit_inside(n):
    """A task that returns a future of a task of its own."""
    return current.find_client().submit(inc, n)


def boxes_of(futures):
    return [Box(f) for f in futures]


class TestState:
    def test_goes_from_pending_to_finished(self, client, gate):
        future = client.submit(gate.pass_, 1)
        assert (future.status, future.done(), future.cancelled()) == ("pending", False, False)
        gate.open()
        assert future.result() == 1
        assert (future.status, future.done(), future.cancelled()) == ("finished", True, False)
        assert future.exception() is None
        assert future.traceback() is None

    def test_goes_from_pending_to_error(self, client):
        future = client.submit(fail)
        assert isinstance(future.exception(), ValueError)
        assert (future.status, future.done(), future.cancelled()) == ("error", True, False)
        assert future.traceback().tb_frame.f_code.co_name == "fail"

    def test_goes_from_pending_to_cancelled(self, client, gate):
        future = client.submit(gate.pass_, 1)
        future.cancel(reason="not needed")
        assert (future.status, future.done(), future.cancelled()) == ("cancelled", True, True)
        for ask in (future.result, future.exception, future.traceback):
            with pytest.raises(FutureCancelledError, match="not needed"):
                ask()

    def test_copies_of_one_key_change_together(self, client, gate):
        first, second = client.submit(gate.pass_, 1), client.submit(gate.pass_, 1)
        first.cancel()
        assert second.cancelled()

    def test_a_result_is_unpickled_anew_each_time(self, client):
        future = client.submit(identity, [1])
        future.result().append(2)
        assert future.result() == [1]

    @pytest.mark.parametrize("size", [0, 20_000, 100_000, 1_000_000])
    def test_results_of_any_size_arrive(self, client, size):
        future = client.submit(bytes, size)
        assert future.result() == bytes(size)
        assert future.result() == bytes(size)

    def test_large_arrays_arrive_whole_and_writable(self, client):
        np = pytest.importorskip("numpy")
        future = client.submit(np.arange, 100_000)
        result = future.result()
        assert (result == np.arange(100_000)).all()
        result[0] = 7
        assert future.result()[0] == 0
        assert client.submit(np.sum, future).result() == 4_999_950_000


class TestTimeout:
    def test_a_timeout_leaves_the_task_running(self, client, gate):
        future = client.submit(gate.pass_, 1)
        for ask in (future.result, future.exception, future.traceback):
            with pytest.raises(TimeoutError, match=r"not done after 0\.01 s"):
                ask(timeout=0.01)
        gate.open()
        assert future.result(timeout=20) == 1

    def test_a_timeout_of_zero_asks_without_waiting(self, client, gate):
        future = client.submit(gate.pass_, 1)
        with pytest.raises(TimeoutError):
            future.result(timeout=0)
        gate.open()
        future.result()
        assert future.result(timeout=0) == 1


class TestCallbacks:
    def test_each_is_called_once_with_the_future_in_a_thread_of_its_own(self, client, gate):
        calls = []
        called = threading.Semaphore(0)

        def note(future):
            calls.append((future.key, future.result(), threading.current_thread().name))
            called.release()

        future = client.submit(gate.pass_, 1)
        future.add_done_callback(note)
        future.add_done_callback(note)
        assert calls == []
        gate.open()
        for _ in range(2):
            assert called.acquire(timeout=20)
        future.add_done_callback(note)  # it is done: at once
        assert called.acquire(timeout=20)
        assert calls == [(future.key, 1, "celery-mem-callbacks")] * 3

    @pytest.mark.parametrize("end", ["error", "cancelled"])
    def test_is_called_however_the_task_ends(self, client, gate, end):
        seen = []
        done = threading.Event()
        future = client.submit(fail if end == "error" else gate.pass_, "x")
        future.add_done_callback(lambda f: (seen.append(f.status), done.set()))
        if end == "cancelled":
            future.cancel()
        assert done.wait(20)
        assert seen == [end]

    def test_is_called_when_the_client_closes(self, connect, gate):
        client = connect()
        seen = []
        done = threading.Event()
        future = client.submit(gate.pass_, "x")
        future.add_done_callback(lambda f: (seen.append(f.status), done.set()))
        client.close()
        assert done.wait(20)
        assert seen == ["cancelled"]

    def test_one_that_fails_is_logged_and_disturbs_no_other(self, client, caplog):
        done = threading.Event()
        future = client.submit(inc, 1)
        future.add_done_callback(lambda f: 1 / 0)
        future.add_done_callback(lambda f: done.set())
        assert done.wait(20)
        assert "a callback of 'inc-" in caplog.text
        assert "ZeroDivisionError" in caplog.text
        caplog.clear()  # its traceback keeps the future

    def test_pins_the_future_until_then_and_no_longer(self, client, gate):
        done = threading.Event()
        client.submit(gate.pass_, 1).add_done_callback(lambda f: done.set())
        gate.next_reached()
        gate.open()
        assert done.wait(20)
        assert until(lambda: not client.session.states)


class TestAwait:
    def test_awaits_result_error_and_cancellation(self, client, gate):
        async def main():
            assert await client.submit(inc, 1) == 2
            done = client.submit(inc, 1)
            assert await done == 2
            assert await done == 2
            with pytest.raises(ValueError, match="as asked"):
                await client.submit(fail)
            waiting = client.submit(gate.pass_, 1)
            asyncio.get_running_loop().call_later(0.01, waiting.cancel)
            with pytest.raises(FutureCancelledError):
                await waiting

        asyncio.run(main())

    def test_waits_for_many_at_once(self, client):
        async def main():
            return await asyncio.gather(*client.map(inc, range(50)))

        assert asyncio.run(main()) == list(range(1, 51))

    def test_a_wait_given_up_leaves_nothing_behind(self, client, gate):
        future = client.submit(gate.pass_, 1)

        async def main():
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(future, 0.01)

        started = time.monotonic()
        asyncio.run(main())
        assert time.monotonic() - started < 5
        gate.open()
        assert future.result(timeout=20) == 1


class TestIdentity:
    def test_is_equal_to_itself_only(self, client):
        one, copy_ = client.submit(inc, 1), client.submit(inc, 1)
        assert one == one
        assert one != copy_
        assert len({one, copy_}) == 2

    def test_copies_belong_to_the_same_client(self, connect):
        one, _other = connect(), connect(set_as_default=True)
        future = one.submit(inc, 1)
        for duplicate in (copy.copy(future), copy.deepcopy([future])[0]):
            assert duplicate is not future
            assert duplicate.client is one
            assert duplicate.result() == 2

    def test_shows_key_and_status(self, client, gate):
        future = client.submit(gate.pass_, 1, key="<k>")
        assert repr(future) == "<Future: pending, key: '<k>'>"
        assert str(future) == repr(future)
        gate.open()
        future.result()
        assert repr(future) == "<Future: finished, key: '<k>'>"
        assert "&lt;k&gt;" in future._repr_html_()
        assert "finished" in future._repr_html_()
        assert "unbound" in repr(Future("x"))
        assert "unbound" in Future("x")._repr_html_()


class TestRelease:
    def test_a_released_future_is_of_no_use(self, client):
        future = client.submit(inc, 1)
        future.release()
        assert until(lambda: not client.session.states)
        with pytest.raises(UnboundFutureError, match="was released"):
            future.result()
        future.release()

    def test_other_futures_of_the_key_stay(self, client):
        one, other = client.submit(inc, 1), client.submit(inc, 1)
        one.release()
        del one
        assert other.result() == 2
        assert client.submit(add, other, 1).result() == 3


class TestPickle:
    def test_is_its_key(self, client):
        future = client.submit(inc, 1)
        assert len(pickle.dumps(future)) < 150
        with client.as_current():
            again = pickle.loads(pickle.dumps(future))
        assert (again.key, again.client, again.result()) == (future.key, client, 2)

    def test_goes_to_another_client_which_then_holds_it_too(self, connect):
        one, other = connect(), connect()
        future = one.submit(inc, 1)
        with other.as_current():
            theirs = pickle.loads(pickle.dumps(future))
        del future
        assert until(lambda: not one.session.states)
        assert theirs.client is other
        assert theirs.result() == 2

    def test_is_unbound_where_there_is_no_client_and_can_be_bound(self, client):
        future = client.submit(inc, 1)
        unbound = pickle.loads(pickle.dumps(future))
        assert unbound.client is None
        for use in (unbound.result, unbound.done, lambda: unbound.status, unbound.cancel):
            with pytest.raises(UnboundFutureError, match="make a Client"):
                use()
        unbound.bind_client(client)
        assert unbound.result() == 2

    def test_of_a_key_that_is_gone_is_cancelled_and_says_why(self, client):
        lost = Future("never-was", client)
        assert lost.cancelled()
        with pytest.raises(FutureCancelledError, match="no task of this key"):
            lost.result()


class TestFutureOfAnotherClient:
    def test_is_taken_over_by_future_or_by_key(self, connect):
        one, other = connect(), connect()
        mine = one.submit(inc, 1)
        assert other.future(mine).result() == 2
        assert other.submit(inc, other.future(mine.key)).result() == 3

    def test_of_a_key_without_task_is_refused(self, client):
        with pytest.raises(MissingKeyError, match="never-was"):
            client.future("never-was")

    def test_tells_of_an_error_that_came_before(self, connect):
        one, other = connect(), connect()
        mine = one.submit(fail)
        mine.exception()
        with pytest.raises(ValueError, match="as asked"):
            other.future(mine).result()


class TestResultsThatContainFutures:
    def test_arrive_bound_and_pinned(self, client):
        outer = client.submit(boxes_of, [1])  # no futures: for comparison
        assert outer.result() == [Box(1)]
        x = client.submit(inc, 1)
        outer = client.submit(identity, Box([x]))
        key = x.key
        [inner] = outer.result().content
        del x
        assert (inner.key, inner.client, inner.result()) == (key, client, 2)

    def test_pin_what_is_inside_as_long_as_they_live(self, client):
        x = client.submit(inc, 1)
        outer = client.submit(identity, Box(x))
        outer.exception()
        key = x.key
        del x
        assert until(lambda: key not in client.session.states)
        inner = outer.result().content
        del outer
        assert inner.result() == 2

    def test_of_a_task_that_submits_are_gathered_to_the_end(self, client):
        outer = client.submit(submit_inside, 1)
        inner = outer.result(timeout=20)
        assert isinstance(inner, Future)
        del outer
        assert client.gather(inner, timeout=20) == 2

    def test_belong_to_the_client_that_asked(self, connect):
        asking, _default = connect(), connect(set_as_default=True)
        x = asking.submit(inc, 1)
        assert asking.submit(identity, Box(x)).result().content.client is asking
