"""Copies of buffers."""

from __future__ import annotations

import pytest

from celery_mem.memory.copying import HUGE_LEAST, copy_of


@pytest.mark.parametrize("n", [0, 1, 1000, HUGE_LEAST - 1, HUGE_LEAST, HUGE_LEAST + 4097])
def test_a_copy_is_equal_writable_and_on_its_own(n: int) -> None:
    original = bytearray(bytes(range(256)) * (n // 256 + 1))[:n]
    copy = copy_of(memoryview(original))
    view = memoryview(copy)
    assert view.nbytes == n
    assert view == original
    if n:
        view[0] = 77
        assert original[0] == 0
