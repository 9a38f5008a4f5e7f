"""Signatures: nothing is unpickled that was not made by somebody who has the key.

With `mem_secret_key` every pickle stream carries an HMAC-SHA256 over the namespace, its kind, its name and
its bytes, so a signed piece is of no use in another place. Whoever can write to Redis, but does not have the
key, can then destroy work and cannot run code. See docs/security.md for what is bound to what.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import logging
import struct
from collections.abc import Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

from celery_mem.config import Settings, mask_url
from celery_mem.errors import ConfigError, SignatureError
from celery_mem.memory.serialize import PLAIN, Frames, loads, split_inline

log = logging.getLogger("celery_mem.security")


class Kind:
    """What is signed. A signature of one kind is none of another."""

    FUNCTION, PAYLOAD, RESULT, ERROR, DATASET = "function", "payload", "result", "error", "dataset"
    ARRAYS = "result with buffers"
    ALL = (FUNCTION, PAYLOAD, RESULT, ERROR, DATASET, ARRAYS)


MARK = b"S"
"""First byte of what is signed; no pickle stream, payload, function or error begins so."""
_HEAD = 1 + 32  # bytes of the mark and the signature
_SMALL = PLAIN + MARK
LEAST_KEY_CHARS = 32
FILE = "file:"


class _Key:
    """HMAC-SHA256 (RFC 2104) under one key, whose own blocks are hashed once and not per message."""

    def __init__(self, secret: bytes) -> None:
        self._begun = hmac.new(secret, digestmod="sha256")

    def mac(self, message: bytes) -> bytes:
        one = self._begun.copy()
        one.update(message)
        return one.digest()


class Seal:
    """Signs and checks for one namespace.

    Args:
        namespace: part of every signature.
        keys: the first signs, all of them are good for a check; none at all signs nothing.
        all_bytes: sign the contents of buffers too, and not only their lengths.
    """

    def __init__(self, namespace: str, keys: Sequence[bytes], *, all_bytes: bool = False) -> None:
        self.is_on = bool(keys)
        self._keys = [_Key(secret) for secret in keys]
        self._all_bytes = all_bytes
        self._starts = {kind: f"{namespace}\0{kind}\0".encode() for kind in Kind.ALL}

    def close(self, kind: str, name: str, data: bytes) -> bytes:
        """Return `data` with a signature ahead of it; as it is without a key."""
        if not self.is_on:
            return data
        message = self._starts[kind] + name.encode("utf-8", "surrogateescape") + b"\0" + data
        return MARK + self._keys[0].mac(message) + data

    def open(self, kind: str, name: str, data: Any, *, shown: str = "") -> bytes:
        """Return what `close` signed.

        Args:
            shown: what an error text calls it; empty means the first line of `name`.
        Raises:
            SignatureError: it is not signed, or for another place, or altered, or with another key.
        """
        if data[:1] != MARK or not self.is_on:
            return bytes(self._unsigned(kind, shown or name, data))
        body = bytes(data[_HEAD:])
        message = self._starts[kind] + name.encode("utf-8", "surrogateescape") + b"\0" + body
        self._check(kind, shown or name, data[1:_HEAD], message)
        return body

    # --- results: the pickle stream is signed, with the lengths of the buffers that go with it ---

    def close_frames(self, key: str, frames: Frames) -> Frames:
        """Return the frames of a result with a signed head."""
        if not self.is_on:
            return frames
        head, buffers, contains = frames
        mac = self._keys[0].mac(self._about_result(key, head, buffers))
        return Frames(MARK + mac + head, buffers, contains)

    def load(self, key: str, head: Any, buffers: Sequence[Any], what: str) -> Any:
        """Unpickle a result.

        Raises:
            SignatureError: as `open`.
            DeserializationError: as `serialize.loads`.
        """
        if head[:1] != MARK or not self.is_on:
            return loads(self._unsigned(Kind.RESULT, key, head), buffers, what)
        body = bytes(head[_HEAD:])
        self._check(Kind.RESULT, key, head[1:_HEAD], self._about_result(key, body, buffers))
        return loads(body, buffers, what)

    def load_inline(self, key: str, data: bytes, what: str) -> Any:
        """Unpickle a result that `Frames.inline` made; each call makes a new, writable object."""
        if self.is_on and data[:2] == _SMALL:  # most results are small: the same as below with fewer copies
            body = data[1 + _HEAD :]
            self._check(Kind.RESULT, key, data[2 : 1 + _HEAD], self._about_result(key, body, ()))
            return loads(body, (), what)
        head, buffers = split_inline(data, what)
        return self.load(key, head, buffers, what)

    def _about_result(self, key: str, head: bytes, buffers: Sequence[Any]) -> bytes:
        about = self._starts[Kind.RESULT if not buffers else Kind.ARRAYS]
        about += key.encode("utf-8", "surrogateescape") + b"\0"
        if buffers:
            lengths = (memoryview(b).nbytes for b in buffers)
            about += struct.pack(f"<{1 + len(buffers)}Q", len(head), *lengths)
            if self._all_bytes:
                about += b"".join(hashlib.sha256(b).digest() for b in buffers)
        return about + head

    def _unsigned(self, kind: str, name: str, data: Any) -> Any:
        """Return what bears no signature if it need not."""
        if data[:1] == MARK:
            _refuse(kind, name, "it is signed, and this process has no mem_secret_key to check that with")
        if self.is_on:
            _refuse(kind, name, "it is not signed")
        return data

    def _check(self, kind: str, name: str, mac: Any, message: bytes) -> None:
        for key in self._keys:
            if hmac.compare_digest(mac, key.mac(message)):
                return
        _refuse(kind, name, "its signature is not valid here")


def _refuse(kind: str, name: str, why: str) -> NoReturn:
    name = name.partition("\n")[0]
    log.error("refused the %s of %s: %s", kind, name, why)
    raise SignatureError(kind, name, why)


def strip(data: bytes) -> bytes:
    """Return signed bytes without their signature, unchecked: to be shown, never to be unpickled."""
    return data[_HEAD:] if data[:1] == MARK else data


@functools.lru_cache(maxsize=64)
def _make_seal(namespace: str, secret_key: str, sign: str) -> Seal:
    return Seal(namespace, read_keys(secret_key), all_bytes=sign == "all")


def seal_of(settings: Settings) -> Seal:
    """Return the seal that goes with the settings of a process.

    Raises:
        ConfigError: a key is too short, its file cannot be read, or there must be one and is none.
    """
    seal = _make_seal(settings.namespace, settings.secret_key, settings.sign)
    if not seal.is_on and settings.require_signing:
        raise ConfigError(
            "mem_require_signing is set and there is no mem_secret_key: make one with `celery-mem keygen` "
            "and give it to all clients, workers and coordinators"
        )
    return seal


def read_keys(text: str) -> list[bytes]:
    """Return the keys that the text of the setting names: separated by commas, or one a line in a file."""
    found: list[str] = []
    for word in map(str.strip, text.split(",")):
        if word.startswith(FILE):
            try:
                with open(word.removeprefix(FILE), encoding="utf-8") as file:
                    found += [line.strip() for line in file if line.strip()]
            except OSError as error:
                raise ConfigError(f"mem_secret_key: the file of the key cannot be read: {error}") from None
        elif word:
            found.append(word)
    for key in found:
        if len(key) < LEAST_KEY_CHARS:
            raise ConfigError(
                f"mem_secret_key: a key has at least {LEAST_KEY_CHARS} characters, and one here has "
                f"{len(key)}; `celery-mem keygen` makes good ones"
            )
    return [key.encode() for key in found]


def warn_if_unsigned(settings: Settings) -> None:
    """Say at the start of a process that anybody who reaches Redis could run code in it, where that is so."""
    if seal_of(settings).is_on or is_local(settings.url):
        return
    log.warning(
        "no mem_secret_key: whoever can write to the Redis at %s can run code in every client and worker; "
        "`celery-mem keygen` makes a key, and mem_require_signing refuses to go on without one",
        mask_url(settings.url),
    )


def is_local(url: str) -> bool:
    """Whether only this machine reaches a Redis: over a socket file, or a loop-back address."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return (
        "unix" in parts.scheme
        or "socket" in parts.scheme
        or host in ("localhost", "::1")
        or host.startswith("127.")
    )
