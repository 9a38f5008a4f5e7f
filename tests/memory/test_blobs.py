"""Blobs: large objects in Redis, in pieces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_mem.memory import blobs
from celery_mem.memory.serialize import Frames, dumps, loads, loads_inline
from tests.conftest import fake_link

NAME = "{test}:b:1:key"


@pytest.fixture(params=["redis", "fakeredis"])
def link(request, make_store):
    return make_store().link if request.param == "redis" else fake_link()


def store(link, frames, piece_bytes=1000, lease_s=60.0):
    blobs.write(link, blobs.write_commands(NAME, frames, piece_bytes=piece_bytes, lease_s=lease_s))


def load(link, name, what="object"):
    """The object, and its size in bytes."""
    found = blobs.read(link, name, what)
    return found and (loads(bytes(found[0]), found[1]), len(found[0]) + sum(map(len, found[1])))


@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 10_000])
def test_an_object_comes_back_whole_whatever_the_size_of_pieces(link, piece_bytes):
    obj = {"a": np.arange(50), "empty": np.zeros(0), "b": np.ones((2, 3)), "text": "x" * 30}
    frames = dumps(obj)
    store(link, frames, piece_bytes)
    back, nbytes = load(link, NAME)
    assert {k: np.asarray(v).tolist() for k, v in back.items()} == {
        k: np.asarray(v).tolist() for k, v in obj.items()
    }
    assert nbytes == frames.nbytes
    sizes = [link.call("HSTRLEN", NAME, i) for i in range(link.call("HLEN", NAME) - 2)]
    assert sum(sizes) == frames.nbytes
    assert max(sizes) <= piece_bytes
    link.call("UNLINK", NAME)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.integers(1, 50))
def test_parts_of_any_size_are_cut_and_joined(parts, piece_bytes):
    head, *buffers = parts
    commands = blobs.write_commands(
        NAME, Frames(head, [memoryview(b) for b in buffers], ()), piece_bytes=piece_bytes, lease_s=1
    )
    stored = {str(c[i]): c[i + 1] for c in commands if c[0] == "HSET" for i in range(2, len(c), 2)}
    stored["c"] = b"%d" % stored["c"]  # as Redis gives numbers back
    pieces = [stored[str(i)] for i in range(len(stored) - 2)]
    assert b"".join(pieces) == b"".join(parts)
    assert all(len(p) == piece_bytes for p in pieces[:-1])

    class OneBlob:
        def call(self, command, name, *fields):
            if command == "HMGET":
                return [stored.get(str(f)) for f in fields]
            return stored.get(str(fields[0])) if command == "HGET" else 1

    found = blobs.read(OneBlob(), NAME)
    assert [bytes(p) for p in (found[0], *found[1])] == parts


def test_a_blob_has_a_time_to_live_until_a_record_adopts_it(link):
    store(link, dumps(bytes(5000)), lease_s=30)
    assert 0 < link.call("PTTL", NAME) <= 30_000
    link.call("UNLINK", NAME)


def test_writing_it_twice_does_no_harm(link):
    frames = dumps(np.arange(1000))
    store(link, frames)
    store(link, frames)
    assert (load(link, NAME)[0] == np.arange(1000)).all()
    link.call("UNLINK", NAME)


def test_a_blob_that_is_not_there_is_none(link):
    assert blobs.read(link, NAME) is None
    assert load(link, NAME) is None


def test_a_blob_of_which_a_piece_is_missing_is_none(link):
    store(link, dumps(bytes(5000)))
    link.call("HDEL", NAME, 2)
    assert load(link, NAME, "the thing") is None
    link.call("UNLINK", NAME)


def test_a_blob_in_which_a_bit_changed_is_none(link):
    store(link, dumps(bytes(5000)))
    piece = bytearray(link.call("HGET", NAME, 1))
    piece[7] ^= 1
    link.call("HSET", NAME, 1, bytes(piece))
    assert load(link, NAME, "the thing") is None
    link.call("UNLINK", NAME)


def test_arrays_read_from_a_blob_are_writable(link):
    store(link, dumps(np.zeros(1000)))
    array = load(link, NAME)[0]
    array[0] = 1
    assert load(link, NAME)[0][0] == 0
    assert loads_inline(dumps(array).inline())[0] == 1
    link.call("UNLINK", NAME)
