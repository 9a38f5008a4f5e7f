"""gather, wait, as_completed and progress."""

from __future__ import annotations

import asyncio
import time
from collections import namedtuple

import pytest

from celery_mem import as_completed, progress, wait
from celery_mem.errors import (
    ClosedClientError,
    ForeignFutureError,
    FutureCancelledError,
    FuturesCancelledError,
    UnboundFutureError,
)
from tests.on_cluster import fail, inc, until

Point = namedtuple("Point", "x y")


class TestGather:
    def test_keeps_any_nesting(self, client):
        x, y = client.map(inc, [1, 2])
        nested = {"a": [x, (y, {x})], "b": Point(y, [7]), "c": "plain", 3: frozenset([x])}
        assert client.gather(nested) == {
            "a": [2, (3, {2})],
            "b": Point(3, [7]),
            "c": "plain",
            3: frozenset([2]),
        }
        assert client.gather(x) == 2

    @pytest.mark.parametrize("empty", [[], (), set(), {}, [[]], 5, None])
    def test_of_nothing_is_what_was_given(self, client, empty):
        assert client.gather(empty) == empty

    def test_takes_the_same_future_twice(self, client):
        x = client.submit(inc, 1)
        assert client.gather([x, x, client.submit(inc, 1)]) == [2, 2, 2]

    def test_raises_the_first_failure_in_order(self, client):
        futures = [client.submit(inc, 1), client.submit(fail, "one"), client.submit(fail, "two")]
        wait(futures)
        with pytest.raises(ValueError, match="one"):
            client.gather(futures)

    def test_raises_a_failure_without_waiting_for_the_others(self, client, gate):
        futures = [client.submit(gate.pass_, 1), client.submit(fail)]
        with pytest.raises(ValueError, match="as asked"):
            client.gather(futures)
        assert futures[0].status == "pending"
        gate.open()

    def test_can_skip_failures(self, client, gate):
        good, bad = client.submit(inc, 1), client.submit(fail)
        gone = client.submit(gate.pass_, 1)
        gone.cancel()
        assert client.gather([good, bad, [bad, gone]], errors="skip") == [2, []]
        assert client.gather({"good": good, "bad": bad}, errors="skip") == {"good": 2, "bad": None}

    def test_knows_no_other_way_with_errors(self, client):
        with pytest.raises(ValueError, match="raise"):
            client.gather([], errors="ignore")

    def test_has_one_timeout_for_all(self, client, gate):
        futures = [client.submit(inc, 1), client.submit(gate.pass_, 1)]
        with pytest.raises(TimeoutError, match="1 of 2 tasks not done"):
            client.gather(futures, timeout=0.3)
        gate.open()
        assert client.gather(futures, timeout=20) == [2, 1]

    def test_refuses_futures_of_another_client(self, connect):
        one, other = connect(), connect()
        future = one.submit(inc, 1)
        for use in (other.gather, lambda f: other.submit(inc, f), lambda f: other.map(inc, [f]), other.retry):
            with pytest.raises(ForeignFutureError, match="belongs to another client"):
                use(future)

    def test_refuses_futures_of_a_closed_client(self, connect):
        one, other = connect(), connect()
        future = one.submit(inc, 1)
        one.close()
        with pytest.raises(ClosedClientError, match="closed"):
            other.gather([future])
        with pytest.raises(FutureCancelledError, match="its client was closed"):
            future.result()

    def test_refuses_unbound_futures(self, client):
        future = client.submit(inc, 1)
        future.release()
        with pytest.raises(UnboundFutureError):
            client.gather([future])


class TestWait:
    def test_waits_for_all(self, client, gate):
        futures = client.map(gate.pass_, range(4))
        gate.open()
        done, not_done = wait(futures)
        assert (done, not_done) == (set(futures), set())

    def test_waits_for_the_first(self, client, gate):
        slow, quick = client.submit(gate.pass_, 1), client.submit(inc, 1)
        done, not_done = wait([slow, quick], return_when="FIRST_COMPLETED", timeout=20)
        assert (done, not_done) == ({quick}, {slow})
        assert wait([slow, quick], return_when="FIRST_COMPLETED").done == {quick}
        gate.open()

    def test_waits_for_futures_of_several_clients(self, connect, gate):
        one, other = connect(), connect()
        slow, quick = one.submit(gate.pass_, 1), other.submit(inc, 1)
        assert wait([slow, quick], return_when="FIRST_COMPLETED", timeout=20).done == {quick}
        gate.open()
        assert wait([slow, quick], timeout=20).done == {slow, quick}

    def test_raises_no_errors_of_tasks(self, client):
        future = client.submit(fail)
        assert wait(future).done == {future}

    def test_raises_where_one_was_cancelled(self, client, gate):
        futures = [client.submit(gate.pass_, 1), client.submit(inc, 1)]
        futures[0].cancel()
        with pytest.raises(FuturesCancelledError, match="1 futures were cancelled"):
            wait(futures)

    @pytest.mark.parametrize("timeout", [0.01, "10ms"])
    def test_times_out(self, client, gate, timeout):
        futures = client.map(gate.pass_, [1, 2])
        with pytest.raises(TimeoutError, match="2 of 2 futures not done"):
            wait(futures, timeout=timeout)
        with pytest.raises(TimeoutError):
            wait(futures, timeout=timeout, return_when="FIRST_COMPLETED")
        gate.open()

    @pytest.mark.parametrize("return_when", ["ALL_COMPLETED", "FIRST_COMPLETED"])
    def test_of_nothing_returns_at_once(self, return_when):
        assert wait([], return_when=return_when) == (set(), set())

    def test_knows_no_other_end(self):
        with pytest.raises(ValueError, match="ALL_COMPLETED or FIRST_COMPLETED"):
            wait([], return_when="FIRST_EXCEPTION")


class TestAsCompleted:
    def test_yields_each_as_it_is_done(self, client, gate):
        slow, quick = client.submit(gate.pass_, 1), client.submit(inc, 1)
        completed = as_completed([slow, quick])
        assert next(completed) is quick
        gate.open()
        assert list(completed) == [slow]

    def test_takes_more_while_it_runs(self, client):
        completed = as_completed(client.map(inc, range(3)))
        seen = []
        for future in completed:
            seen.append(future.result())
            if future.result() == 1:
                completed.add(client.submit(inc, 10))
                completed.update(client.map(inc, [20, 30]))
        assert sorted(seen) == [1, 2, 3, 11, 21, 31]

    def test_counts(self, client, gate):
        completed = as_completed([client.submit(gate.pass_, 1)])
        assert (completed.count(), completed.is_empty(), completed.has_ready()) == (1, False, False)
        gate.open()
        assert until(completed.has_ready)
        next(completed)
        assert (completed.count(), completed.is_empty(), completed.has_ready()) == (0, True, False)

    def test_yields_every_copy_of_a_key(self, client):
        one, copy = client.submit(inc, 1), client.submit(inc, 1)
        assert set(as_completed([one, copy])) == {one, copy}

    def test_yields_results_along(self, client):
        futures = client.map(inc, range(3))
        assert sorted(r for _, r in as_completed(futures, with_results=True)) == [1, 2, 3]

    def test_raises_errors_with_results_or_yields_them(self, client, gate):
        bad = client.submit(fail)
        with pytest.raises(ValueError, match="as asked"):
            next(as_completed([bad], with_results=True))
        [(future, (kind, error, where))] = as_completed([bad], with_results=True, raise_errors=False)
        assert (future, kind, str(error)) == (bad, ValueError, "as asked")
        assert where is not None
        gone = client.submit(gate.pass_, 1)
        gone.cancel()
        [(_, (kind, _, _))] = as_completed([gone], with_results=True, raise_errors=False)
        assert kind is FutureCancelledError

    def test_yields_batches(self, client, gate):
        futures = client.map(inc, range(20))
        wait(futures)
        assert [len(batch) for batch in as_completed(futures).batches()] == [20]
        completed = as_completed([client.submit(gate.pass_, 1)])
        assert completed.next_batch(block=False) == []
        gate.open()
        assert len(completed.next_batch()) == 1
        assert completed.next_batch() == []

    def test_times_out_as_a_whole(self, client, gate):
        futures = [client.submit(inc, 1), client.submit(gate.pass_, 1)]
        seen = []
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="1 futures not done"):
            seen += as_completed(futures, timeout="300ms")
        assert time.monotonic() - started < 5
        gate.open()

    def test_forgets_what_is_cleared(self, client, gate):
        completed = as_completed([client.submit(gate.pass_, 1), client.submit(inc, 1)])
        completed.clear()
        assert list(completed) == []
        gate.open()
        other = client.submit(inc, 5)
        completed.add(other)
        assert list(completed) == [other]

    def test_given_up_half_way_pins_nothing(self, client, gate):
        for future in as_completed([client.submit(inc, 1), client.submit(gate.pass_, 2)]):
            assert future.result() == 2
            break
        del future
        assert until(lambda: not client.session.states)
        assert until(lambda: not client.info()["tasks"])

    def test_iterates_in_an_event_loop(self, client, gate):
        async def main():
            futures = [client.submit(gate.pass_, 1), *client.map(inc, range(5))]
            seen = []
            async for future in as_completed(futures):
                seen.append(await future)
                if len(seen) == 5:
                    gate.open()
            async for _, result in as_completed(futures[:2], with_results=True):
                seen.append(result)
            return seen

        seen = asyncio.run(main())
        assert (sorted(seen[:5]), seen[5], sorted(seen[6:])) == ([1, 2, 3, 4, 5], 1, [1, 1])

    def test_in_an_event_loop_times_out_and_can_be_given_up(self, client, gate):
        future = client.submit(gate.pass_, 1)

        async def main():
            with pytest.raises(TimeoutError, match="1 futures not done"):
                async for _ in as_completed([future], timeout=0.01):
                    pass

            async def forever():
                async for _ in as_completed([future]):
                    pass

            with pytest.raises(TimeoutError):
                await asyncio.wait_for(forever(), 0.01)

        started = time.monotonic()
        asyncio.run(main())
        assert time.monotonic() - started < 5
        gate.open()


class TestProgress:
    def test_shows_a_bar_until_all_are_done(self, client, capsys):
        futures = client.map(inc, range(30))
        progress(futures, description="counting")
        shown = capsys.readouterr().out
        assert "counting" in shown
        assert "30/30" in shown
        assert all(f.done() for f in futures)

    def test_counts_failures_and_copies(self, client, capsys):
        progress([client.submit(fail), client.submit(inc, 1), client.submit(inc, 1)], [])
        shown = capsys.readouterr().out
        assert "2/2" in shown
        assert "(1 failed)" in shown

    def test_returns_at_once_in_a_notebook(self, client, gate, capsys, monkeypatch):
        future = client.submit(gate.pass_, 1)
        progress(future, notebook=True)
        gate.open()
        assert until(lambda: "1/1" in capsys.readouterr().out)


def test_a_wait_ends_when_the_client_closes_in_another_thread(connect, gate):
    import threading

    client = connect()
    future = client.submit(gate.pass_, 1)
    gate.next_reached()
    threading.Timer(0.05, client.close).start()
    with pytest.raises(FutureCancelledError, match="its client was closed"):
        client.gather([[future]])
    gate.open()
