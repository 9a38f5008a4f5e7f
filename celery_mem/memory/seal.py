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
from celery_mem.memory.serialize import Frames, loads, split_inline

log = logging.getLogger("celery_mem.security")


class Kind:
    """What is signed. A signature of one kind is none of another."""

    FUNCTION, PAYLOAD, RESULT, ERROR, DATASET = "function", "payload", "result", "error", "dataset"
    ALL = (FUNCTION, PAYLOAD, RESULT, ERROR, DATASET)


MARK = b"S"
"""First byte of what is signed; no pickle stream, payload, function or error begins so."""
MAC_BYTES = 32
LEAST_KEY_CHARS = 32
FILE = "file:"


class Seal:
    """Signs and checks for one namespace.

    Args:
        namespace: part of every signature.
        keys: the first signs, all of them are good for a check; none at all signs nothing.
        all_bytes: sign the contents of buffers too, and not only their lengths.
    """

    def __init__(self, namespace: str, keys: Sequence[bytes], *, all_bytes: bool = False) -> None:
        self.is_on = bool(keys)
        self._keys = tuple(keys)
        self._all_bytes = all_bytes
        self._starts = {kind: f"{namespace}\0{kind}\0".encode() for kind in Kind.ALL}

    def close(self, kind: str, name: str, data: bytes) -> bytes:
        """Return `data` with a signature ahead of it; as it is without a key."""
        if not self.is_on:
            return data
        return MARK + hmac.digest(self._keys[0], self._about(kind, name) + data, "sha256") + data

    def open(self, kind: str, name: str, data: bytes, *, shown: str = "") -> bytes:
        """Return what `close` signed.

        Args:
            shown: what an error text calls it; empty means the first line of `name`.
        Raises:
            SignatureError: it is not signed, or for another place, or altered, or with another key.
        """
        shown = shown or name.partition("\n")[0]
        if not self._expects_signature(kind, shown, data):
            return data
        mac, body = bytes(data[1 : 1 + MAC_BYTES]), data[1 + MAC_BYTES :]
        self._check(kind, shown, mac, [self._about(kind, name) + body])
        return body

    # --- results: the pickle stream is signed, with the lengths of the buffers that go with it ---

    def close_frames(self, key: str, frames: Frames) -> Frames:
        """Return the frames of a result with a signed head."""
        if not self.is_on:
            return frames
        parts = self._parts(key, frames.head, frames.buffers)
        mac = _mac(self._keys[0], parts)
        return frames._replace(head=MARK + mac + frames.head)

    def load(self, key: str, head: Any, buffers: Sequence[Any], what: str) -> Any:
        """Unpickle a result.

        Raises:
            SignatureError: as `open`.
            DeserializationError: as `serialize.loads`.
        """
        if not self._expects_signature(Kind.RESULT, key, head):
            return loads(head, buffers, what)
        mac, body = bytes(head[1 : 1 + MAC_BYTES]), head[1 + MAC_BYTES :]
        self._check(Kind.RESULT, key, mac, self._parts(key, body, buffers))
        return loads(body, buffers, what)

    def load_inline(self, key: str, data: bytes, what: str) -> Any:
        """Unpickle a result that `Frames.inline` made; each call makes a new, writable object."""
        head, buffers = split_inline(data, what)
        return self.load(key, head, buffers, what)

    def _expects_signature(self, kind: str, shown: str, data: Any) -> bool:
        """Whether there is one to be checked. Raises SignatureError if it lacks, or cannot be checked."""
        is_signed = bytes(data[:1]) == MARK
        if is_signed and not self.is_on:
            _refuse(kind, shown, "it is signed, and this process has no mem_secret_key to check that with")
        if self.is_on and not is_signed:
            _refuse(kind, shown, "it is not signed")
        return is_signed

    def _about(self, kind: str, name: str) -> bytes:
        return self._starts[kind] + name.encode(errors="surrogateescape") + b"\0"

    def _parts(self, key: str, head: Any, buffers: Sequence[Any]) -> list[Any]:
        lengths = struct.pack(f"<{1 + len(buffers)}Q", len(head), *(memoryview(b).nbytes for b in buffers))
        parts = [self._about(Kind.RESULT, key) + lengths + bytes(head)]
        if self._all_bytes:
            parts += [hashlib.sha256(b).digest() for b in buffers]
        return parts

    def _check(self, kind: str, name: str, mac: bytes, parts: Sequence[bytes]) -> None:
        if not any(hmac.compare_digest(mac, _mac(key, parts)) for key in self._keys):
            _refuse(kind, name, "its signature is not valid here")


def _mac(key: bytes, parts: Sequence[bytes]) -> bytes:
    return hmac.digest(key, parts[0] if len(parts) == 1 else b"".join(parts), "sha256")


def _refuse(kind: str, name: str, why: str) -> NoReturn:
    log.error("refused the %s of %s: %s", kind, name, why)
    raise SignatureError(kind, name, why)


def strip(data: bytes) -> bytes:
    """Return signed bytes without their signature, unchecked: to be shown, never to be unpickled."""
    return data[1 + MAC_BYTES :] if data[:1] == MARK else data


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
