"""The `mem_*` settings: one closed, frozen object."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from celery_mem.errors import ConfigError

if TYPE_CHECKING:
    from celery import Celery

REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+socket")


def _setting(default: Any, doc: str, unit: str = "") -> Any:
    return field(default=default, metadata={"doc": doc, "unit": unit})


@dataclass(frozen=True)
class Settings:
    """What a deployment may tune; in a Celery configuration each name carries the prefix `mem_`.

    Precedence: keyword argument, environment `CELERY_MEM_<NAME>`, Celery configuration, default.
    """

    url: str = _setting("", "Redis that holds the graph; empty means the broker's or result backend's Redis")
    namespace: str = _setting("mem", "prefix of all keys; clusters with different namespaces share one Redis")
    queue: str = _setting("", "Celery queue that carries tickets; empty means the app's default queue")
    inline_limit: int = _setting(65_536, "results up to this size live inside the task record", "bytes")
    notice_limit: int = _setting(16_384, "results up to this size are sent along with the notice", "bytes")
    piece_bytes: int = _setting(64 << 20, "larger buffers are stored in pieces of this size", "bytes")
    cache_bytes: int = _setting(256 << 20, "results a slot keeps at hand for tasks that follow", "bytes")
    client_lease: float = _setting(60.0, "a silent client's futures are released after this time", "seconds")
    node_lease: float = _setting(10.0, "a silent node is given up after this time", "seconds")
    leader_lease: float = _setting(5.0, "a silent coordinator is replaced after this time", "seconds")
    ticket_lease: float = _setting(10.0, "a ticket that no worker took by then is sent again", "seconds")
    blob_lease: float = _setting(120.0, "a stored result that no task record adopts vanishes", "seconds")
    slice: float = _setting(1.0, "time after which a slot lets other Celery tasks have their turn", "seconds")
    linger: float = _setting(0.2, "time a slot waits for more work before it goes home", "seconds")
    batch_target: float = _setting(0.005, "work a slot takes at once while tasks are short", "seconds")
    batch_limit: int = _setting(256, "most tasks a slot takes at once", "tasks")
    sweep_budget: int = _setting(2_000, "most records one script call visits while it frees", "records")
    retry_timeout: float = _setting(60.0, "how long a broken Redis connection is tried again", "seconds")
    connect_timeout: float = _setting(5.0, "how long one attempt to connect may take", "seconds")
    allowed_failures: int = _setting(3, "deaths of its slot a task survives", "deaths")

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata["unit"] and not (isinstance(value, (int, float)) and value > 0):
                raise ConfigError(
                    f"mem_{f.name} must be a number of {f.metadata['unit']} above zero, not {value!r}"
                )
        if not self.namespace or any(c in self.namespace for c in "{}:\n\r\t *?[]"):
            raise ConfigError(
                f"mem_namespace must be a plain word without braces or colons: {self.namespace!r}"
            )

    @classmethod
    def load(cls, app: Celery | None = None, **overrides: Any) -> Settings:
        """Collect the settings of this process.

        Args:
            app: a Celery app whose configuration counts; None leaves it out.
            overrides: settings by name, without prefix; None means "not given".
        Raises:
            ConfigError: an unknown name, a bad value, or no Redis address in any place.
        """
        names = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        if app is not None:
            _check_names({k[4:] for k in app.conf if k.startswith("mem_")}, names, "mem_")
            values |= {n: app.conf[f"mem_{n}"] for n in names if app.conf.get(f"mem_{n}") is not None}
        for name, f in names.items():
            text = os.environ.get(f"CELERY_MEM_{name.upper()}")
            if text:
                values[name] = _parse(text, f)
        given = {k: v for k, v in overrides.items() if v is not None}
        _check_names(set(given), names, "")
        values |= given
        if not values.get("url"):
            values["url"] = _default_url(app)
        check_url(values["url"])
        return cls(**values)

    def replace(self, **changes: Any) -> Settings:
        """Return a copy with some settings changed."""
        return dataclasses.replace(self, **changes)


def _check_names(given: set[str], known: Mapping[str, object], prefix: str) -> None:
    for name in sorted(given - known.keys()):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {prefix}{near[0]}?" if near else ""
        raise ConfigError(f"unknown setting {prefix}{name}{hint}")


def _parse(text: str, f: dataclasses.Field[Any]) -> Any:
    kind: Any = type(f.default)
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"CELERY_MEM_{f.name.upper()}={text!r} is not a {kind.__name__}") from None


def _default_url(app: Celery | None) -> str:
    candidates = [os.environ.get("REDIS_URL")]
    if app is not None:
        candidates = [app.conf.broker_url, app.conf.result_backend, *candidates]
    for url in candidates:
        if isinstance(url, str) and urlsplit(url).scheme in REDIS_SCHEMES:
            return url
    raise ConfigError(
        "no Redis address: set mem_url in the Celery configuration, or CELERY_MEM_URL or REDIS_URL in the "
        "environment, or use a Redis broker"
    )


def check_url(url: object) -> str:
    """Return `url` if it can be the address of a Redis.

    Raises:
        ConfigError: it cannot; the text says what is wrong, without any password.
    """
    if not isinstance(url, str):
        raise ConfigError(f"a Redis address is a text such as redis://localhost:6379/0, not {url!r}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"not a Redis address ({error}): {mask_url(url)}") from None
    if parts.scheme not in REDIS_SCHEMES:
        raise ConfigError(f"not a Redis address (expected redis://, rediss:// or unix://): {mask_url(url)}")
    if parts.scheme in ("redis", "rediss") and not parts.hostname:
        raise ConfigError(f"no host in the Redis address: {mask_url(url)}")
    if parts.scheme in ("unix", "redis+socket") and not parts.path:
        raise ConfigError(f"no socket path in the Redis address: {mask_url(url)}")
    del port
    return url


def mask_url(url: str) -> str:
    """Return `url` with its password hidden, fit for logs."""
    head, at, tail = url.rpartition("@")
    scheme, sep, userinfo = head.partition("://")
    if not at or not sep:
        return url
    user = userinfo.partition(":")[0]
    return f"{scheme}://{user}:***@{tail}"
