"""Who can write to Redis and has no key can run no code: not in workers, not in clients."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_mem import Client, LocalCluster
from celery_mem.config import KEY_FILE, Settings
from celery_mem.errors import CeleryMemError, ConfigError, SignatureError
from celery_mem.memory.seal import Kind, Seal, read_keys, seal_of, warn_if_unsigned
from celery_mem.memory.serialize import dumps
from tests.security.conftest import KEY, OTHER_KEY, Intruder
from tests.worker.conftest import Space


def double(x: Any) -> Any:
    return 2 * x


def minus(x: Any, y: Any) -> Any:
    return x - y


def fail() -> None:
    raise ValueError("as asked")


def zeros(n: int) -> Any:
    return np.zeros(n)


def run(space: Space) -> None:
    space.slot().run_ticket("1")


class TestWhatAWorkerRefuses:
    def test_arguments_that_are_not_signed(self, space: Space, intruder: Intruder) -> None:
        future = space.submit(double, 1)
        intruder.write(future, "payload", b"cp" + intruder.pickle())
        run(space)
        text = intruder.check(future, "payload")
        assert future.key in text
        assert "is not signed" in text

    def test_arguments_signed_for_another_task(self, space: Space, intruder: Intruder) -> None:
        future, other = space.submit(double, 1), space.submit(double, 2)
        intruder.write(future, "payload", intruder.read(other, "payload"))
        run(space)
        assert "its signature is not valid here" in intruder.check(future, "payload")
        assert other.result(timeout=10) == 4

    def test_arguments_signed_for_another_function(self, space: Space, intruder: Intruder) -> None:
        future, other = space.submit(double, 1), space.submit(minus, 1, 2)
        recipe = intruder.read(future, "recipe")
        other_recipe = recipe.replace(
            intruder.function_of(future).encode(), intruder.function_of(other).encode()
        )
        intruder.write(future, "recipe", other_recipe)
        run(space)
        intruder.check(future, "payload")
        intruder.write(future, "recipe", recipe)  # which says whose code is to be kept

    def test_inputs_in_another_order(self, space: Space, intruder: Intruder) -> None:
        x, y = (space.submit(double, n) for n in (1, 2))
        future = space.submit(minus, x, y)
        deps = intruder.read(future, "deps").split(b"\n")
        intruder.write(future, "deps", b"\n".join(reversed(deps)))
        run(space)
        run(space)
        intruder.check(future, "payload")

    def test_code_that_is_not_signed(self, space: Space, intruder: Intruder) -> None:
        future = space.submit(double, 1)
        intruder.write_function(future, b'{"python": [3, 11]}\np' + intruder.pickle())
        run(space)
        intruder.check(future, "function")

    @pytest.mark.parametrize("how", ["not signed", "of another key"])
    def test_inputs_that_were_exchanged(self, space: Space, intruder: Intruder, how: str) -> None:
        x, other = space.submit(double, 1), space.submit(double, 2)
        run(space)
        x.result(timeout=10)
        future = space.submit(minus, x, other)
        given = intruder.read(future, "given")
        mine, theirs = intruder.read(x, "value"), intruder.read(other, "value")
        assert len(mine) == len(theirs)
        new = (
            theirs
            if how == "of another key"
            else b"p" + intruder.pickle().ljust(len(mine) - 1, b".")[: len(mine) - 1]
        )
        intruder.write(future, "given", given.replace(mine, new, 1))
        run(space)
        intruder.check(future, "result")

    def test_a_large_payload_that_was_exchanged(self, space: Space, intruder: Intruder) -> None:
        future = space.submit(len, b"x" * 3_000_000)
        token = intruder.read(future, "payload_blob").decode()
        name = space.store.keys.blob(token, future.key)
        data = b"cp" + intruder.pickle()
        sizes = b"".join(n.to_bytes(8, "little") for n in (0, len(data)))
        intruder.link.call("DEL", name)
        from celery_mem.memory.checksum import checksum_of

        intruder.link.call("HSET", name, "h", sizes, "c", checksum_of([b"", data]), 0, data)
        run(space)
        intruder.check(future, "payload")


class TestWhatAClientRefuses:
    def test_a_result_that_is_not_signed(self, space: Space, intruder: Intruder) -> None:
        future = space.submit(double, "x" * 20_000)  # more than a notice carries
        run(space)
        space.client.wait_for([future._state], 10, "it")
        intruder.write(future, "value", b"p" + intruder.pickle())
        intruder.check(future, "result")

    def test_a_large_result_that_is_not_signed(self, space: Space, intruder: Intruder) -> None:
        future = space.submit(zeros, 100_000)
        run(space)
        space.client.wait_for([future._state], 10, "it")
        intruder.write_blob(future, intruder.pickle())
        intruder.check(future, "result")

    def test_an_error_that_is_not_signed(self, space: Space, intruder: Intruder) -> None:
        future = space.submit(fail)
        run(space)
        space.client.wait_for([future._state], 10, "it")
        future._state.error = b"{}\n" + intruder.pickle()  # as a notice would bring it
        intruder.check(future, "error")

    def test_a_dataset_that_is_not_signed(self, space: Space, intruder: Intruder) -> None:
        space.client.publish_dataset(a=[1, 2])
        names = space.store.keys.fixed("datasets")
        holder = intruder.link.call("HGET", names, "a").partition(b"\n")[0]
        intruder.link.call("HSET", names, "a", holder + b"\n0\np" + intruder.pickle())
        with pytest.raises(SignatureError, match="the dataset of a was refused: it is not signed"):
            space.client.get_dataset("a")
        assert not intruder.trace.exists()
        space.client.unpublish_dataset("a")

    def test_a_result_that_was_signed_with_a_key_that_is_not_known(self, space: Space) -> None:
        future = space.submit(double, "x" * 20_000)
        space.slot(secret_key=f"{OTHER_KEY},{KEY}").run_ticket("1")
        with pytest.raises(SignatureError, match="its signature is not valid here"):
            future.result(timeout=10)


def test_what_is_refused_has_a_line_in_the_log(
    space: Space, intruder: Intruder, caplog: pytest.LogCaptureFixture
) -> None:
    future = space.submit(double, 1)
    intruder.write(future, "payload", b"cp" + intruder.pickle())
    run(space)
    intruder.check(future, "payload")
    lines = [r.getMessage() for r in caplog.records if r.name == "celery_mem.security"]
    assert lines == [f"refused the payload of {future.key}: it is not signed"]


def test_without_a_key_signed_work_is_refused_and_says_why(
    space: Space, caplog: pytest.LogCaptureFixture
) -> None:
    future = space.submit(double, 1)
    space.slot(secret_key="").run_ticket("1")
    # The error of that slot is not signed, and is refused in its turn.
    with pytest.raises(SignatureError, match=f"the error of {future.key} was refused: it is not signed"):
        future.result(timeout=10)
    assert "this process has no mem_secret_key to check that with" in caplog.text


def test_keys_can_be_changed_while_work_goes_on(space: Space) -> None:
    """The new one is made known everywhere before anybody signs with it."""
    with Client(
        space.settings.url,
        namespace=space.settings.namespace,
        secret_key=f"{KEY},{OTHER_KEY}",
        set_as_default=False,
    ) as client:
        future = client.submit(double, "x" * 20_000)
        client.session.flush()
        space.slot(secret_key=f"{OTHER_KEY},{KEY}").run_ticket("1")
        assert future.result(timeout=10) == 2 * "x" * 20_000


def test_contents_of_arrays_are_signed_if_that_is_wanted() -> None:
    frames = dumps(np.arange(10))
    for sign, is_refused in (("pickles", False), ("all", True)):
        seal = Seal("mem", [KEY.encode()], all_bytes=sign == "all")
        signed = seal.close_frames("k", frames)
        altered = [bytearray(b) for b in signed.buffers]
        altered[0][3] ^= 1
        if is_refused:
            with pytest.raises(SignatureError):
                seal.load("k", signed.head, altered, "it")
        else:
            seal.load("k", signed.head, altered, "it")
        with pytest.raises(SignatureError):
            seal.load("k", signed.head, [bytearray(8)], "it")  # of another length


def test_the_namespace_and_the_kind_are_part_of_a_signature() -> None:
    seal = Seal("one", [KEY.encode()])
    signed = seal.close(Kind.PAYLOAD, "k", b"data")
    assert seal.open(Kind.PAYLOAD, "k", signed) == b"data"
    for other, kind, name in (
        (Seal("two", [KEY.encode()]), Kind.PAYLOAD, "k"),
        (seal, Kind.FUNCTION, "k"),
        (seal, Kind.PAYLOAD, "l"),
        (Seal("one", [OTHER_KEY.encode()]), Kind.PAYLOAD, "k"),
    ):
        with pytest.raises(SignatureError):
            other.open(kind, name, signed)


@given(data=st.binary(max_size=200), at=st.integers(0, 500), bit=st.integers(0, 7), cut=st.integers(0, 500))
def test_no_altered_byte_gets_through(data: bytes, at: int, bit: int, cut: int) -> None:
    seal = Seal("mem", [KEY.encode()])
    signed = bytearray(seal.close(Kind.RESULT, "k", data))
    signed[at % len(signed)] ^= 1 << bit
    with pytest.raises(SignatureError):
        seal.open(Kind.RESULT, "k", bytes(signed))
    with pytest.raises(SignatureError):
        seal.open(Kind.RESULT, "k", bytes(signed)[: cut % len(signed)])


@given(data=st.binary(max_size=300))
def test_bytes_of_any_kind_are_a_clear_error_and_never_unpickled(data: bytes) -> None:
    seal = Seal("mem", [KEY.encode()])
    with pytest.raises(CeleryMemError):
        seal.load_inline("k", data, "it")
    with pytest.raises(SignatureError):
        seal.load("k", data, [], "it")


class TestTheKey:
    def test_is_long(self) -> None:
        with pytest.raises(ConfigError, match="at least 32 characters, and one here has 5"):
            seal_of(Settings(url="redis://localhost", secret_key="short"))

    def test_may_be_in_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "keys"
        path.write_text(f"{OTHER_KEY}\n\n{KEY}\n")
        assert read_keys(f"file:{path}") == [OTHER_KEY.encode(), KEY.encode()]
        with pytest.raises(ConfigError, match="the file of the key cannot be read"):
            read_keys("file:/nowhere")

    def test_is_shown_nowhere(self) -> None:
        settings = Settings(url="redis://:hidden@example.com", secret_key=KEY)
        assert KEY not in repr(settings)
        assert "hidden" not in repr(settings)

    def test_can_be_required(self) -> None:
        with pytest.raises(ConfigError, match="celery-mem keygen"):
            Client("redis://localhost:1", require_signing=True)

    @pytest.mark.parametrize(
        ("url", "warns"),
        [
            ("redis://example.com", True),
            ("rediss://:pw@10.0.0.1:6380/0", True),
            ("redis://localhost", False),
            ("redis://127.0.0.1:6379", False),
            ("unix:///tmp/redis.sock", False),
        ],
    )
    def test_is_missed_where_others_reach_redis(
        self, url: str, warns: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            warn_if_unsigned(Settings(url=url))
        assert ("no mem_secret_key" in caplog.text) == warns
        assert "pw" not in caplog.text

    def test_of_an_embedded_cluster_is_made_and_found(self, cluster: LocalCluster, client: Client) -> None:
        assert Settings.load(url=cluster.url).secret_key.endswith(KEY_FILE)
        future = client.submit(double, 21)
        assert future.result(timeout=60) == 42
        with pytest.raises(SignatureError):
            Seal("mem", [KEY.encode()]).load_inline(future.key, future._state.data, "it")
        assert pickle.loads(future._state.data[34:]) == 42  # it is all that is ahead of the pickle stream
