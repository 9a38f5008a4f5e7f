"""The `mem_*` settings: one closed, frozen object."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from celery_mem.errors import ConfigError
from celery_mem.sentinels import SCHEME, is_sentinel, parse_sentinel

if TYPE_CHECKING:
    from celery import Celery

REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+socket", SCHEME)
ENVIRONMENT = "CELERY_MEM_"
SECRET = {"secret_key"}
EVENTS = ("off", "sampled", "all")
TRACING = ("auto", "off")
PUBLISH = ("on_demand", "pinned", "always")
_WORDS = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)


def _setting(
    default: Any, doc: str, unit: str = "", *, or_zero: bool = False, choices: tuple[str, ...] = ()
) -> Any:
    return field(default=default, metadata={"doc": doc, "unit": unit, "or_zero": or_zero, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """What a deployment may tune; in a Celery configuration each name carries the prefix `mem_`.

    Precedence: keyword argument, environment `CELERY_MEM_<NAME>`, Celery configuration, default.
    """

    url: str = _setting("", "Redis that holds the graph; empty means the broker's or result backend's Redis")
    sentinel_master: str = _setting(
        "", "name of the master, if the address names Sentinels only; empty means the broker's master_name"
    )
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
    resubmit_bytes: int = _setting(
        64 << 20,
        "payloads of unfinished tasks that a client keeps, to submit them again if Redis loses them",
        "bytes",
        or_zero=True,
    )
    payload_limit: int = _setting(
        256 << 20, "larger arguments of one task are refused; 0 refuses none", "bytes", or_zero=True
    )
    payload_warning: int = _setting(
        10_000_000,
        "a call whose arguments are larger than this together is warned about; 0 means never",
        "bytes",
        or_zero=True,
    )
    retry_timeout: float = _setting(60.0, "how long a broken Redis connection is tried again", "seconds")
    reply_timeout: float = _setting(60.0, "silence after which a Redis connection counts as dead", "seconds")
    connect_timeout: float = _setting(5.0, "how long one attempt to connect may take", "seconds")
    events: str = _setting(
        "sampled",
        "which tasks Flower sees: none; as many as cost less than a twentieth of throughput; or all",
        choices=EVENTS,
    )
    tracing: str = _setting(
        "auto",
        "auto: a task submitted inside a span of OpenTelemetry has a span on its worker; off: none has",
        choices=TRACING,
    )
    allowed_failures: int = _setting(3, "deaths of its slot a task survives", "deaths")
    stop_grace: float = _setting(
        0.3,
        "time that a task which is cancelled or out of time has to clean up; then its process is killed",
        "seconds",
        or_zero=True,
    )
    ssl_cert_reqs: str = _setting(
        "required",
        "of a rediss:// address: its certificate is checked; none takes any, as self-signed ones of Heroku",
        choices=("required", "none"),
    )
    ssl_ca_certs: str = _setting("", "file of the authorities that are trusted; empty means the system's")
    secret_key: str = _setting(
        "",
        "signs all that is pickled: keys of 32 characters or more, separated by commas, of which the first "
        "signs and all are good for a check; file:<path> for a file with one in a line; empty signs nothing",
    )
    require_signing: bool = _setting(False, "refuse to start without a secret_key")
    sign: str = _setting(
        "pickles",
        "what is signed: pickles, that is everything that can run code, or all, with the contents of arrays",
        choices=("pickles", "all"),
    )
    # the memory of the workers
    node_memory: bool = _setting(True, "large results stay on the node that made them; off: all go to Redis")
    memory_limit: int = _setting(
        0,
        "memory of one node; 0 means all of the container's or host's, which workers of a LocalCluster share",
        "bytes",
        or_zero=True,
    )
    memory_target: float = _setting(0.6, "above it the coldest results are spilled to disk", "fraction")
    memory_pause: float = _setting(0.85, "above it the node takes no new task", "fraction")
    write_behind: float = _setting(
        1.0, "a result that only its maker has is written to node memory after it", "seconds", or_zero=True
    )
    live_bytes: int = _setting(
        1 << 30,
        "results not yet written that one process holds, up to an eighth of memory; more are written at once",
        "bytes",
        or_zero=True,
    )
    recycle_bytes: int = _setting(
        256 << 20, "memory that a node keeps of dropped results to write it again", "bytes", or_zero=True
    )
    spill_url: str = _setting(
        "", "where spilled results go, any address of fsspec; empty means a folder in the temp folder"
    )
    durable_url: str = _setting(
        "",
        "where large results with durable=True are kept, any address of fsspec that all hosts reach; empty "
        "means Redis",
    )
    publish: str = _setting(
        "on_demand",
        "copies in Redis for other hosts: while somebody waits for one; pinned: once asked for, as long as "
        "the result is held; always: of every result, as soon as it is made",
        choices=PUBLISH,
    )
    no_workers_timeout: float = _setting(
        0.0, "a task that no live node may run fails after it; 0 means it waits", "seconds", or_zero=True
    )
    save_seconds: float = _setting(
        20.0, "a worker that stops in good order saves results for at most this time", "seconds", or_zero=True
    )
    shm_folder: str = _setting("", "where node memory is; empty means /dev/shm, or else the temp folder")
    shm_min: int = _setting(
        256 << 20, "a folder with less free space is no place for node memory", "bytes", or_zero=True
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_value(f, getattr(self, f.name))
        if self.memory_target > self.memory_pause:
            raise ConfigError(
                f"mem_memory_target ({self.memory_target}) is above mem_memory_pause ({self.memory_pause}): "
                "a node would stop before it spills"
            )
        if not self.namespace or any(c in self.namespace for c in "{}:\n\r\t *?[]"):
            raise ConfigError(
                f"mem_namespace must be a plain word without braces or colons: {self.namespace!r}"
            )

    def __repr__(self) -> str:
        """Show what differs from the defaults, and no secrets."""
        shown = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if "url" in shown:
            shown["url"] = mask_url(self.url)
        shown |= dict.fromkeys(shown.keys() & SECRET, "***")
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @classmethod
    def load(cls, app: Celery | None = None, **overrides: Any) -> Settings:
        """Collect the settings of this process.

        Args:
            app: a Celery app whose configuration counts; None leaves it out.
            overrides: settings by name, without prefix; None means "not given".
        Raises:
            ConfigError: an unknown name, a bad value, or no Redis address in any place. In the environment,
                where others may use the prefix too, a name is unknown if it is nearly that of a setting.
        """
        names = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        if app is not None:
            _check_configuration(app, names)
            values |= {n: app.conf[f"mem_{n}"] for n in names if app.conf.get(f"mem_{n}") is not None}
        _check_environment(names)
        for name, f in names.items():
            text = os.environ.get(f"{ENVIRONMENT}{name.upper()}")
            if text:
                values[name] = _parse(text, f)
        given = {k: v for k, v in overrides.items() if v is not None}
        _check_names(set(given), names, "")
        values |= given
        if not values.get("url"):
            values["url"] = _default_url(app)
        if isinstance(values["url"], str) and is_sentinel(values["url"]):
            options = {} if app is None else app.conf.broker_transport_options
            service = values.get("sentinel_master") or options.get("master_name", "")
            values["url"] = parse_sentinel(values["url"], service).canonical
        check_url(values["url"])
        values["url"] = _with_tls(values["url"], values)
        if not values.get("secret_key"):
            values["secret_key"] = key_beside(values["url"])
        return cls(**values)

    def replace(self, **changes: Any) -> Settings:
        """Return a copy with some settings changed."""
        return dataclasses.replace(self, **changes)


def _with_tls(url: str, values: Mapping[str, Any]) -> str:
    """Return a rediss:// address that says how its certificate is checked, as redis-py and kombu read it."""
    parts = urlsplit(url)
    if parts.scheme != "rediss":
        return url
    query = dict(parse_qsl(parts.query))
    asked = values.get("ssl_cert_reqs") or query.get("ssl_cert_reqs") or "required"
    query["ssl_cert_reqs"] = asked.lower().removeprefix("cert_")  # Celery's own spelling is CERT_NONE
    if values.get("ssl_ca_certs"):
        query["ssl_ca_certs"] = values["ssl_ca_certs"]
    return urlunsplit(parts._replace(query=urlencode(query)))


KEY_FILE = "secret_key"


def key_beside(url: str) -> str:
    """Return the setting for the key that an embedded cluster keeps beside its Redis' socket, if any."""
    parts = urlsplit(url)
    if parts.scheme not in ("unix", "redis+socket"):
        return ""
    path = os.path.join(os.path.dirname(parts.path), KEY_FILE)
    try:
        return f"file:{path}" if os.stat(path).st_uid == os.geteuid() else ""
    except OSError:
        return ""


def _check_configuration(app: Celery, known: Mapping[str, object]) -> None:
    """Refuse what looks like one of our settings and is none.

    Celery finds `mem_url` as CELERY_MEM_URL in a configuration with a namespace, such as Django's; without a
    namespace an upper-case name is not found at all.
    """
    prefix = f"{app.namespace}_MEM_" if app.namespace else "MEM_"
    for name in app.conf:
        if app.namespace and name.upper().startswith(prefix.upper()):
            _check_names({name[len(prefix) :].lower()}, known, prefix, str.upper)
        elif name.startswith("mem_"):
            _check_names({name[4:]}, known, "mem_")
        elif name.startswith("MEM_") and name[4:].lower() in known:
            raise ConfigError(f"unknown setting {name}; did you mean {name.lower()}?")


ALIKE = 0.7
"""Likeness from which a name in the environment is taken for a misspelt one: others may use its prefix."""


def _check_environment(known: Mapping[str, object]) -> None:
    given = {name[len(ENVIRONMENT) :].lower() for name in os.environ if name.startswith(ENVIRONMENT)}
    meant = {name for name in given if difflib.get_close_matches(name, known, n=1, cutoff=ALIKE)}
    _check_names(meant, known, ENVIRONMENT, str.upper)


def _check_names(
    given: set[str], known: Mapping[str, object], prefix: str, spell: Callable[[str], str] = str
) -> None:
    for name in sorted(given - known.keys()):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {prefix}{spell(near[0])}?" if near else ""
        raise ConfigError(f"unknown setting {prefix}{spell(name)}{hint}")


def _check_value(f: dataclasses.Field[Any], value: Any) -> None:
    unit, choices = f.metadata["unit"], f.metadata["choices"]
    if isinstance(f.default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"mem_{f.name} must be True or False, not {value!r}")
    elif choices:
        if value not in choices:
            raise ConfigError(f"mem_{f.name} must be one of {', '.join(choices)}, not {value!r}")
    elif unit == "fraction":
        if not (_is_number(value) and 0 < value <= 1):
            raise ConfigError(f"mem_{f.name} must be a fraction above 0 and up to 1, not {value!r}")
    elif unit and f.metadata["or_zero"]:
        if not (_is_number(value) and value >= 0):
            raise ConfigError(f"mem_{f.name} must be a number of {unit}, zero or more, not {value!r}")
    elif unit and not (_is_number(value) and value > 0):
        raise ConfigError(f"mem_{f.name} must be a number of {unit} above zero, not {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parse(text: str, f: dataclasses.Field[Any]) -> Any:
    kind: Any = type(f.default)
    if kind is bool:
        value = _WORDS.get(text.strip().lower())
        if value is None:
            raise ConfigError(f"CELERY_MEM_{f.name.upper()}={text!r} is neither true nor false")
        return value
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
    if is_sentinel(url):
        parse_sentinel(url)
        return url
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
    url = url.partition("?sentinel_password=")[0]
    head, at, tail = url.rpartition("@")
    scheme, sep, userinfo = head.partition("://")
    if not at or not sep:
        return url
    user = userinfo.partition(":")[0]
    return f"{scheme}://{user}:***@{tail}"
