"""Errors as they travel."""

from __future__ import annotations

import gc
import json
import pickle
import threading
import traceback
import weakref

import pytest

from celery_mem.errors import CeleryMemError, KilledWorkerError, RemoteError
from celery_mem.graph.errors import MAX_FRAMES, decode_error, encode_error, error_summary
from celery_mem.graph.killed import encode_plain


class TwoArgumentsError(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")
        self.a, self.b = a, b


class WithAttributesError(Exception):
    def __init__(self, text, code=0):
        super().__init__(text)
        self.code = code


class HoldsALockError(Exception):
    def __init__(self):
        super().__init__("locked")
        self.lock = threading.Lock()


class SpeechlessError(Exception):
    def __str__(self):
        raise RuntimeError


def raised(error, depth=3):
    """The error, after it was raised through some frames."""
    try:
        _raise(error, depth)
    except BaseException as caught:
        return caught


def _raise(error, depth):
    if depth:
        _raise(error, depth - 1)
    raise error


def there_and_back(error):
    return decode_error(encode_error(error))


class TestTheException:
    def test_comes_back_with_class_and_arguments(self):
        error, _ = there_and_back(raised(KeyError("x", 1)))
        assert type(error) is KeyError
        assert error.args == ("x", 1)

    def test_keeps_attributes_and_notes(self):
        original = WithAttributesError("text", 7)
        original.add_note("by the way")
        error, _ = there_and_back(original)
        assert (str(error), error.code, error.__notes__) == ("text", 7, ["by the way"])

    def test_with_an_init_that_does_not_take_its_args_comes_back(self):
        error, _ = there_and_back(TwoArgumentsError(1, 2))
        assert type(error) is TwoArgumentsError
        assert (str(error), error.a, error.b) == ("1 and 2", 1, 2)

    @pytest.mark.parametrize(
        "error", [OSError(2, "none", "f"), UnicodeDecodeError("utf8", b"x", 0, 1, "bad")]
    )
    def test_of_the_standard_library_comes_back(self, error):
        back, _ = there_and_back(error)
        assert (type(back), str(back)) == (type(error), str(error))

    def test_that_cannot_be_pickled_is_described(self):
        error, tb = there_and_back(raised(HoldsALockError()))
        assert type(error) is RemoteError
        assert error.type_name == f"{__name__}.HoldsALockError"
        assert error.message == "locked"
        assert "in _raise" in error.traceback_text
        assert "Traceback of the task" in error.__notes__[0]
        assert tb is not None
        assert type(pickle.loads(pickle.dumps(error))) is RemoteError

    def test_whose_text_cannot_be_made_is_described(self):
        assert error_summary(encode_error(SpeechlessError()))[1] == "(its text cannot be made)"

    def test_of_a_group_comes_back(self):
        error, _ = there_and_back(ExceptionGroup("several", [ValueError("a"), KeyError("b")]))
        assert [type(e) for e in error.exceptions] == [ValueError, KeyError]

    def test_that_is_huge_is_described(self):
        error, _ = there_and_back(ValueError("x" * 3_000_000))
        assert type(error) is RemoteError
        assert len(error.message) < 100_000
        assert len(encode_error(ValueError("x" * 3_000_000))) < 500_000


class TestTheTraceback:
    def test_shows_files_lines_and_functions(self):
        error, tb = there_and_back(raised(ValueError("x")))
        names = [frame.name for frame in traceback.extract_tb(tb)]
        assert names == ["raised", "_raise", "_raise", "_raise", "_raise"]
        assert "raise error" in "".join(traceback.format_exception(error.with_traceback(tb)))

    def test_leaves_out_frames_that_are_ours(self):
        _, tb = decode_error(encode_error(raised(ValueError("x")), skip_frames=2))
        assert [frame.name for frame in traceback.extract_tb(tb)] == ["_raise"] * 3

    def test_of_an_error_that_was_never_raised_is_none(self):
        assert there_and_back(ValueError("x"))[1] is None

    def test_of_endless_recursion_is_cut_in_the_middle(self):
        error, tb = there_and_back(raised(ValueError("deep"), depth=900))
        assert len(traceback.extract_tb(tb)) == MAX_FRAMES
        assert str(error) == "deep"

    def test_keeps_nothing_alive(self):
        data = encode_error(raised(TwoArgumentsError(1, 2)))
        gc.collect()
        gc.disable()
        try:
            error, tb = decode_error(data)
            reference = weakref.ref(error)
            try:
                raise error.with_traceback(tb)
            except TwoArgumentsError:
                pass
            del error, tb
            assert reference() is None
        finally:
            gc.enable()


class TestTheChain:
    def chained(self, **links):
        error = raised(ValueError("outer"))
        for name, value in links.items():
            setattr(error, name, value)
        return error

    def test_brings_the_cause(self):
        error, _ = there_and_back(self.chained(__cause__=raised(KeyError("inner"))))
        assert repr(error.__cause__) == "KeyError('inner')"
        assert error.__suppress_context__
        assert traceback.extract_tb(error.__cause__.__traceback__)[-1].name == "_raise"

    def test_brings_the_context_unless_it_is_suppressed(self):
        inner = raised(KeyError("inner"))
        error, _ = there_and_back(self.chained(__context__=inner))
        assert repr(error.__context__) == "KeyError('inner')"
        error, _ = there_and_back(self.chained(__context__=inner, __suppress_context__=True))
        assert error.__context__ is None

    def test_leaves_the_exception_itself_as_it_was(self):
        cause = raised(KeyError("inner"))
        error = self.chained(__cause__=cause)
        tb = error.__traceback__
        encode_error(error)
        assert (error.__cause__, error.__traceback__) == (cause, tb)

    def test_describes_a_link_that_cannot_be_pickled(self):
        error, _ = there_and_back(self.chained(__cause__=HoldsALockError()))
        assert type(error) is ValueError
        assert type(error.__cause__) is RemoteError

    def test_ends_where_it_bites_its_tail(self):
        a, b = ValueError("a"), ValueError("b")
        a.__context__, b.__context__ = b, a
        error, _ = there_and_back(a)
        assert str(error.__context__) == "b"
        assert error.__context__.__context__ is None

    def test_has_a_bounded_length(self):
        error = None
        for i in range(100):
            outer = ValueError(str(i))
            outer.__cause__ = error
            error = outer
        back, _ = there_and_back(error)
        n = 0
        while back is not None:
            back, n = back.__cause__, n + 1
        assert n == 8


class TestTheBytes:
    def test_are_readable_without_unpickling(self):
        data = encode_error(raised(HoldsALockError()))
        kind, message, text = error_summary(data)
        assert (kind, message) == (f"{__name__}.HoldsALockError", "locked")
        assert text.startswith("Traceback (most recent call last)")
        json.loads(data.partition(b"\n")[0])

    def test_of_another_origin_are_an_error_too(self):
        error, tb = decode_error(b"garbage")
        assert type(error) is CeleryMemError
        assert tb is None
        assert error_summary(b"garbage") == ("?", "", "")

    def test_of_a_killed_task_name_it(self, store):
        error, tb = decode_error(
            encode_plain(KilledWorkerError("k", "f", ("on one: SIGKILL", "on two: SIGSEGV")), "k", store)
        )
        assert type(error) is KilledWorkerError
        assert "task k (f) was running when its process died, 2 times: on one: SIGKILL; on two" in str(error)
        assert tb is None
