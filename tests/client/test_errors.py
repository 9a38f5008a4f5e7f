"""What goes wrong in a task, or on its way, and how it arrives."""

from __future__ import annotations

import os
import sys
import textwrap
import threading
import traceback

import psutil
import pytest

from celery_mem.errors import (
    CeleryMemError,
    DeserializationError,
    RemoteError,
    SerializationError,
    TaskExitError,
    VersionMismatchError,
)
from celery_mem.graph import calls
from tests.on_cluster import add, count_call, fail, identity, inc, until


class TwoArgumentsError(Exception):
    def __init__(self, code, reason):
        super().__init__(f"{code}: {reason}")
        self.code = code


class UnpicklableError(Exception):
    def __init__(self):
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class NotUnpicklableError(Exception):
    def __reduce__(self):
        return fail, ("cannot be made again",)


class StubbornError(Exception):
    def __new__(cls, *, secret):
        return super().__new__(cls, secret)

    def __init__(self, *, secret):
        super().__init__(secret)


class WithoutTextError(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class UntouchableError(Exception):
    @property
    def __traceback__(self):
        raise RuntimeError("not to be looked at")


class WithoutTextExit(BaseException):
    def __str__(self):
        raise RuntimeError("no text")


class LoadsNowhere:
    def __reduce__(self):
        return fail, ("not here",)


def raise_it(kind, *args, **kwargs):
    raise kind(*args, **kwargs)


def raise_from():
    try:
        deeper(0)
    except ZeroDivisionError as error:
        raise LookupError("outer") from error


def raise_in_handler():
    try:
        deeper(0)
    except ZeroDivisionError:
        raise LookupError("outer")  # noqa: B904


def deeper(x):
    return 1 / x


def recurse(n):
    return recurse(n + 1)


def interrupt():
    raise KeyboardInterrupt


class TestExceptions:
    def test_the_exception_itself_is_raised(self, client):
        future = client.submit(fail, "so and so")
        with pytest.raises(ValueError, match="so and so") as caught:
            future.result()
        assert type(caught.value) is ValueError
        assert future.exception().args == ("so and so",)

    def test_the_traceback_shows_the_lines_of_the_task(self, client):
        with pytest.raises(ZeroDivisionError) as caught:
            client.submit(deeper, 0).result()
        text = "".join(traceback.format_exception(caught.value))
        assert "return 1 / x" in text
        assert __file__ in text
        assert "celery_mem/worker" not in text

    def test_the_traceback_of_a_lambda_too(self, client):
        with pytest.raises(ZeroDivisionError) as caught:
            client.submit(lambda: deeper(0)).result()
        names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert names[-2:] == ["<lambda>", "deeper"]

    @pytest.mark.parametrize(("task", "link"), [(raise_from, "__cause__"), (raise_in_handler, "__context__")])
    def test_what_is_behind_an_exception_comes_along(self, client, task, link):
        with pytest.raises(LookupError, match="outer") as caught:
            client.submit(task).result()
        inner = getattr(caught.value, link)
        assert type(inner) is ZeroDivisionError
        assert "return 1 / x" in "".join(traceback.format_exception(caught.value))

    def test_dependents_raise_the_same(self, client):
        bad = client.submit(fail, "root")
        last = client.submit(add, client.submit(inc, bad), client.submit(inc, 1))
        with pytest.raises(ValueError, match="root") as caught:
            last.result()
        assert "fail" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert last.status == "error"
        late = client.submit(identity, [bad])
        with pytest.raises(ValueError, match="root"):
            late.result()

    def test_every_call_raises_a_new_exception(self, client):
        future = client.submit(fail)
        assert future.exception() is not future.exception()

    def test_one_with_two_arguments_arrives_as_it_is(self, client):
        with pytest.raises(TwoArgumentsError, match="7: seven") as caught:
            client.submit(raise_it, TwoArgumentsError, 7, "seven").result()
        assert caught.value.code == 7

    def test_one_of_a_class_made_here_is_caught_by_that_class(self, client):
        class LocalError(Exception):
            pass

        with pytest.raises(LocalError, match="mine"):
            client.submit(raise_it, LocalError, "mine").result()

    def test_one_whose_own_way_of_unpickling_fails_arrives_as_it_is(self, client):
        with pytest.raises(NotUnpicklableError):
            client.submit(raise_it, NotUnpicklableError).result()

    @pytest.mark.parametrize(("kind", "kwargs"), [(UnpicklableError, {}), (StubbornError, {"secret": "x"})])
    def test_one_that_cannot_travel_is_described(self, client, kind, kwargs):
        with pytest.raises(RemoteError, match=kind.__name__) as caught:
            client.submit(raise_it, kind, **kwargs).result()
        assert caught.value.type_name == f"{__name__}.{kind.__name__}"
        assert "in raise_it" in caught.value.traceback_text
        assert "in raise_it" in "".join(traceback.format_exception(caught.value))

    def test_one_without_text_arrives(self, client):
        with pytest.raises(WithoutTextError):
            client.submit(raise_it, WithoutTextError).result(timeout=30)

    def test_what_would_end_the_worker_arrives_without_text_too(self, client):
        with pytest.raises(TaskExitError, match="WithoutTextExit"):
            client.submit(raise_it, WithoutTextExit).result(timeout=30)

    def test_one_that_cannot_be_looked_at_fails_its_task_all_the_same(self, client):
        with pytest.raises(CeleryMemError, match=r"cannot be examined.*UntouchableError"):
            client.submit(raise_it, UntouchableError).result(timeout=30)
        assert client.submit(inc, 1).result(timeout=20) == 2

    def test_endless_recursion_arrives_with_a_bounded_traceback(self, client):
        with pytest.raises(RecursionError, match="maximum recursion depth") as caught:
            client.submit(recurse, 0).result(timeout=20)
        assert len(traceback.extract_tb(caught.value.__traceback__)) < 200
        assert client.submit(inc, 1).result(timeout=20) == 2

    @pytest.mark.parametrize(
        ("task", "args", "name"),
        [(sys.exit, (3,), r"SystemExit\(3\)"), (interrupt, (), "KeyboardInterrupt")],
    )
    def test_what_would_end_the_worker_is_an_error_of_the_task(self, client, task, args, name):
        worker = psutil.Process(client.submit(os.getpid, pure=False).result()).parent()
        before = {child.pid for child in worker.children()}
        with pytest.raises(TaskExitError, match=name):
            client.submit(task, *args).result(timeout=20)
        assert client.submit(inc, 1).result(timeout=20) == 2
        assert {child.pid for child in worker.children()} == before

    def test_raised_errors_pin_nothing(self, client):
        import gc

        gc.collect()
        gc.disable()
        try:
            for use in (
                lambda: client.submit(raise_from).result(),
                lambda: client.gather([client.submit(fail)]),
                lambda: client.submit(identity, threading.Lock()),
                lambda: client.submit(sum, client.submit(fail, "x")).result(),
            ):
                try:
                    use()
                except Exception:
                    pass
            assert until(lambda: not client.session.states, timeout=5)
        finally:
            gc.enable()


class TestErredFutures:
    def test_the_same_call_is_not_repeated_while_its_error_is_held(self, client, gate):
        def fail_and_count():
            raise ValueError(str(count_call(gate, "held")))

        first = client.submit(fail_and_count, key="held-error")
        assert str(first.exception()) == "1"
        second = client.submit(fail_and_count, key="held-error")
        assert str(second.exception()) == "1"

    def test_the_call_is_repeated_once_its_error_is_released(self, client, gate):
        def fail_and_count():
            raise ValueError(str(count_call(gate, "released")))

        for n in "123":
            assert str(client.submit(fail_and_count, key="released-error").exception()) == n


class TestResults:
    def test_a_result_that_cannot_be_pickled_is_an_error_that_names_its_type(self, client):
        future = client.submit(threading.Lock)
        with pytest.raises(
            SerializationError, match=r"result of allocate_lock-.* of type lock cannot be pickled"
        ):
            future.result()

    def test_it_is_not_tried_again(self, client, gate):
        def lock():
            count_call(gate, "lock")
            return threading.Lock()

        assert isinstance(client.submit(lock, retries=3).exception(), SerializationError)
        assert count_call(gate, "lock") == 2

    def test_a_result_that_cannot_be_unpickled_says_so_where_it_is_read(self, client):
        made = client.submit(LoadsNowhere)
        with pytest.raises(DeserializationError, match=r"result of 'LoadsNowhere.*ValueError: not here"):
            made.result()
        with pytest.raises(DeserializationError, match=r"input LoadsNowhere.*ValueError: not here"):
            client.submit(identity, made).result()


class TestOtherMachines:
    def test_a_module_that_the_worker_lacks_is_named(self, client, tmp_path, monkeypatch):
        (tmp_path / "only_here.py").write_text("def here(x):\n    return x\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        import only_here

        future = client.submit(only_here.here, 1)
        with pytest.raises(DeserializationError, match=r"function.* needs the module 'only_here'"):
            future.result()
        future = client.submit(identity, only_here.here)
        with pytest.raises(DeserializationError, match=r"arguments needs the module 'only_here'"):
            future.result()

    def test_another_python_or_dask_is_named(self, client, monkeypatch):
        versions = {"python": [3, 1], "dask": "2020.1.0"}
        monkeypatch.setattr(calls, "_versions", lambda: versions)

        def function():
            return 1

        with pytest.raises(VersionMismatchError, match=r"python 3\.1 there and .* dask 2020\.1\.0 there"):
            client.submit(function).result()


def test_a_main_script_is_run_by_its_functions(cluster, tmp_path):
    import subprocess

    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
            from celery_mem import Client

            class Error(Exception):
                def __init__(self, a, b):
                    super().__init__(a + b)

            class Thing:
                def __init__(self, n):
                    self.n = n

            def double(thing):
                return Thing(helper(thing.n))

            def helper(n):
                return 2 * n

            def fail():
                raise Error("a", "b")

            if __name__ == "__main__":
                client = Client({cluster.url!r})
                assert client.submit(double, Thing(4)).result().n == 8
                assert client.submit(double, client.submit(Thing, 3)).result().n == 6
                try:
                    client.submit(fail).result()
                except Error as error:
                    print(error)
                kept = client.submit(Thing, 5)
                print(kept.result().n)
            """)
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("ab\n5\n", "")
