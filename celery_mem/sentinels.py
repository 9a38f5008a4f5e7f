"""Addresses of a Redis that Sentinels look after: they say which server is the master now."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from celery_mem.errors import ConfigError

SCHEME = "sentinel"
DEFAULT_PORT = 26379
EXAMPLE = "sentinel://:password@host1:26379,host2:26379/mymaster/0"


class SentinelAddress(NamedTuple):
    """What a `sentinel://` address says.

    Attributes:
        hosts: host and port of each Sentinel.
        service: name of the master.
        db: number of the database.
        username, password: for Redis.
        sentinel_password: for the Sentinels.
    """

    hosts: tuple[tuple[str, int], ...]
    service: str
    db: int = 0
    username: str | None = None
    password: str | None = None
    sentinel_password: str | None = None

    @property
    def canonical(self) -> str:
        """The whole address, as `EXAMPLE`."""
        user = "" if self.password is None else f"{quote(self.username or '')}:{quote(self.password)}@"
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        query = f"?sentinel_password={quote(self.sentinel_password)}" if self.sentinel_password else ""
        return f"{SCHEME}://{user}{hosts}/{quote(self.service)}/{self.db}{query}"

    @property
    def for_kombu(self) -> str:
        """The same as kombu spells it; the name of the master goes into `broker_transport_options`."""
        user = "" if self.password is None else f"{quote(self.username or '')}:{quote(self.password)}@"
        return ";".join(f"{SCHEME}://{user}{host}:{port}/{self.db}" for host, port in self.hosts)


def is_sentinel(url: str) -> bool:
    """Tell whether an address names Sentinels."""
    return url.startswith(f"{SCHEME}://")


def parse_sentinel(url: str, service: str = "") -> SentinelAddress:
    """Read an address, as `EXAMPLE` or as kombu spells it: one address per Sentinel, with semicolons between.

    Args:
        service: name of the master where the address has none.
    Raises:
        ConfigError: it is none; the text holds no password.
    """
    first, *others = url.split(";")
    hosts = []
    try:
        parts = urlsplit(first)
        for part in (parts, *map(urlsplit, others)):
            for host in part.netloc.rpartition("@")[2].split(","):
                name, _, port = host.rpartition(":") if ":" in host else (host, "", str(DEFAULT_PORT))
                if not name:
                    raise ValueError("a host is missing")
                hosts.append((name.strip("[]"), int(port)))
        names = [unquote(text) for text in parts.path.split("/") if text]
        db = int(names.pop()) if names and names[-1].isdigit() else 0
        user, _, password = parts.netloc.rpartition("@")[0].partition(":")
        query = parse_qs(parts.query)
    except ValueError as error:
        raise ConfigError(f"not an address of Sentinels ({error}); write it as {EXAMPLE}") from None
    service = names[0] if names else service
    if not service:
        raise ConfigError(
            f"which master the Sentinels are to name is open: write the address as {EXAMPLE}, or set "
            "mem_sentinel_master (or master_name in broker_transport_options)"
        )
    sentinel_password = query.get("sentinel_password", [None])[0]
    return SentinelAddress(
        tuple(hosts), service, db, unquote(user) or None, unquote(password) or None, sentinel_password
    )
