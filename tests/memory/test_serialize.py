"""Objects to bytes and back."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from celery_mem.errors import DeserializationError, SerializationError
from celery_mem.memory.serialize import Frames, dumps, loads, loads_inline, note_future


class Reference:
    """Says that it is a future of `key` when it is pickled, as futures do."""

    def __init__(self, key):
        self.key = key

    def __reduce__(self):
        note_future(self.key)
        return Reference, (self.key,)


class Outer:
    """Pickles something by itself while it is being pickled."""

    def __reduce__(self):
        dumps(Reference("inner"))
        return Outer, ()


def fail(*_):
    raise ValueError("cannot")


class NeverAgain:
    def __reduce__(self):
        return fail, (1,)


class Unwilling:
    def __reduce__(self):
        raise RuntimeError("will not")


def round_trip(obj):
    return loads_inline(dumps(obj).inline())


class TestRoundTrip:
    @pytest.mark.parametrize(
        "obj", [None, 1, "text", [1, {2: (3.5,)}], b"bytes", {1, 2}, bytearray(b"x"), ""]
    )
    def test_objects_come_back_equal(self, obj):
        assert round_trip(obj) == obj

    def test_what_pickle_cannot_cloudpickle_can(self):
        factor = 3
        assert round_trip(lambda x: x * factor)(5) == 15

        class Local:
            x = 7

        assert round_trip(Local()).x == 7

    def test_what_is_defined_in_main_goes_by_value(self):
        module = types.ModuleType("__main__")
        exec("def double(x): return 2 * x", module.__dict__)
        before = sys.modules["__main__"]
        sys.modules["__main__"] = module
        try:
            data = dumps({"f": module.double}).inline()
        finally:
            sys.modules["__main__"] = before
        assert loads_inline(data)["f"](4) == 8

    @pytest.mark.parametrize("dtype", ["u1", "f8", "complex128", "M8[s]"])
    @pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4)])
    def test_arrays_travel_out_of_band_and_are_writable(self, dtype, shape):
        array = np.zeros(shape, dtype)
        frames = dumps({"a": array})
        if dtype != "M8[s]":  # which numpy hands to nobody as a buffer
            assert sum(b.nbytes for b in frames.buffers) == array.nbytes
        back = loads_inline(frames.inline())["a"]
        assert (back == array).all()
        assert back.dtype == array.dtype
        assert back.flags.writeable

    def test_arrays_that_are_not_contiguous_travel_too(self):
        array = np.arange(24).reshape(4, 6)
        for view in (array[:, ::2], array.T, array[::-1], np.asfortranarray(array)):
            back = round_trip([view])[0]
            assert (back == view).all()

    def test_each_reading_makes_new_objects(self):
        data = dumps(np.zeros(3)).inline()
        first = loads_inline(data)
        first[0] = 1
        assert loads_inline(data)[0] == 0

    def test_buffers_are_the_objects_own_memory(self):
        array = np.zeros(1000)
        frames = dumps(array)
        array[0] = 5
        assert loads(frames.head, frames.buffers)[0] == 5

    def test_frames_know_their_size(self):
        frames = dumps(np.zeros(1000))
        assert frames.nbytes == len(frames.head) + 8000
        assert Frames(b"abc", [], ()).nbytes == 3


class TestFuturesInside:
    def test_are_named_each_once(self):
        assert dumps([Reference("a"), {"k": Reference("b")}, Reference("a")]).contains == ("a", "b")
        assert dumps([1, 2]).contains == ()

    def test_are_named_when_cloudpickle_has_to_help(self):
        one, two = Reference("a"), Reference("b")
        assert set(dumps(lambda: (one, two)).contains) == {"a", "b"}

    def test_are_not_mixed_up_where_pickling_nests(self):
        assert dumps([Reference("outer"), Outer()]).contains == ("outer",)

    def test_are_not_mixed_up_among_threads(self):
        found = {}

        def work(name):
            for _ in range(200):
                found.setdefault(name, set()).add(dumps([Reference(name)] * 3).contains)

        threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {str(i): {(str(i),)} for i in range(4)}

    def test_are_forgotten_after_a_failure(self):
        with pytest.raises(SerializationError):
            dumps([Reference("a"), threading.Lock()])
        assert dumps(1).contains == ()


class TestErrors:
    @pytest.mark.parametrize(("obj", "says"), [(threading.Lock(), "lock"), (Unwilling(), "will not")])
    def test_what_cannot_be_pickled_is_named(self, obj, says):
        with pytest.raises(SerializationError, match=f"the result of x of type .*{says}"):
            dumps(obj, "the result of x")

    def test_what_cannot_be_unpickled_is_named(self):
        with pytest.raises(
            DeserializationError, match="the thing cannot be unpickled here: ValueError: cannot"
        ):
            loads_inline(dumps(NeverAgain()).inline(), "the thing")

    def test_a_missing_module_is_named(self):
        with pytest.raises(DeserializationError, match="needs the module 'no_such_module'"):
            loads(b"cno_such_module\nthing\n.")

    @pytest.mark.parametrize("data", [b"", b"x123", b"b", b"b\x01\x00"])
    def test_bytes_that_are_no_object_are_refused(self, data):
        with pytest.raises(DeserializationError):
            loads_inline(data)

    def test_bytes_that_were_cut_are_refused(self):
        data = dumps(np.zeros(100)).inline()
        with pytest.raises(DeserializationError, match="expected"):
            loads_inline(data[:-1])


THING = b"\x80\x05\x8c\x11slow_package.part\x8c\x05Thing\x93."


@pytest.fixture
def slow_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that needs what is in it, and takes its time."""
    package = tmp_path / "slow_package"
    package.mkdir()
    (package / "__init__.py").write_text("import time; time.sleep(0.2); from slow_package.part import Thing")
    (package / "part.py").write_text("import slow_package\nclass Thing: pass\n")
    (tmp_path / "slow_user.py").write_text("import slow_package.part\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("slow_package", "slow_package.part", "slow_user"):
        sys.modules.pop(name, None)


def test_two_threads_import_one_after_the_other_what_their_objects_need(slow_package: None) -> None:
    user = b"\x80\x05\x8c\x09slow_user\x8c\x05Thing\x93."
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(loads, b"\x80\x05\x8c\x0cslow_package\x8c\x05Thing\x93.")
        while "slow_package" not in sys.modules:
            time.sleep(0.001)
        assert pool.submit(loads, user).result().__module__ == "slow_user"
        assert first.result().__module__ == "slow_package.part"


def test_a_package_that_another_thread_imports_is_waited_for(slow_package: None) -> None:
    errors = []

    def begin() -> None:
        try:
            import slow_package  # type: ignore[import-not-found]  # noqa: F401
        except ImportError as error:
            errors.append(error)

    thread = threading.Thread(target=begin)
    thread.start()
    while "slow_package" not in sys.modules:
        time.sleep(0.001)
    found = loads(THING)
    thread.join()
    assert errors == []
    assert found.__name__ == "Thing"
