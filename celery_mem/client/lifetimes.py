"""What a client offers for results that are to live longer than it does."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from celery_mem.client import current
from celery_mem.client.future import Future, text_of_future
from celery_mem.errors import ConfigError, DatasetError, MissingKeyError, NameTakenError
from celery_mem.graph import collections as lowering
from celery_mem.graph.keys import Key, key_of, text_of
from celery_mem.memory.seal import Kind
from celery_mem.memory.serialize import dumps, loads_inline
from celery_mem.state.store import Store

if TYPE_CHECKING:
    from celery_mem.client.client import Client
    from celery_mem.client.session import Session
    from celery_mem.client.states import KeyState

PAGE = 500
"""Keys that one script call holds."""
MOST_BYTES = 64 << 20
"""A dataset beyond this size is data that belongs on the workers."""
_NO_DEFAULT: Any = object()


class LifetimeMethods:
    """The methods of `Client` for results that outlive it."""

    _session: Session

    def fresh_token(self) -> str:
        """Return a text that this client never gives again; for this package's own use."""
        raise NotImplementedError

    def future_of(self, key: Key, state: KeyState) -> Future:
        """Return a future of a key that was just referred to; for this package's own use."""
        raise NotImplementedError

    @property
    def futures(self) -> dict[Key, Future]:
        """Futures of all keys that this client holds, also of those that it found when it came back."""
        session = self._session
        with session.order:
            session.check_open()
            session.releases.count()
            with session.lock:
                states = list(session.states.values())
                for state in states:
                    state.refs += 1
            return {key_of(state.text): self.future_of(key_of(state.text), state) for state in states}

    def forget(self, futures: Any = None) -> None:
        """Keep what was found at the return under a name no longer than its futures live.

        Args:
            futures: futures, collections or keys; None means all that was found.
        """
        legacy = self._session.legacy
        if legacy is None:
            return
        with self._session.order:
            if futures is None:
                texts = legacy.kept()
            else:
                items = futures if isinstance(futures, (list, set, frozenset)) else [futures]
                keys = [
                    x for x in items if isinstance(x, (str, int, float, tuple)) and not lowering.futures_of(x)
                ]
                texts = [text_of(k) for k in keys] + [text_of(f.key) for f in lowering.futures_of(futures)]
            legacy.let_go(texts)

    # --- datasets ---

    @property
    def datasets(self) -> Datasets:
        """All published datasets, as a mapping from name to dataset; assigning and deleting work too."""
        return Datasets(self)

    def publish_dataset(
        self,
        *args: Any,
        name: Key | None = None,
        override: bool = False,
        durable: bool = False,
        **kwargs: Any,
    ) -> None:
        """Publish collections, futures, or containers of them, under names that every client sees.

        A dataset holds the results in it until it is taken back, whatever becomes of this client. Persist a
        collection first: what is not on the cluster would be computed by each who uses it.

        Args:
            args: one object, together with `name`.
            name: a string, a number, or a tuple of these.
            override: put it in the place of the one that has the name.
            durable: the results in it are to outlive all workers, see `submit`.
            kwargs: further datasets by name.
        Raises:
            DatasetError: a name is taken, or there are more than 64 MiB beside what is on the workers.
            FutureCancelledError: one of the futures was cancelled.
            ValueError: neither one object and its `name=`, nor names and objects as keywords.
        """
        if len(args) > 1 or bool(args) != (name is not None):
            raise ValueError(
                "publish_dataset wants one object and its name=, or name=object for each dataset"
            )
        if args:
            self._publish(name, args[0], override, durable)
        for each, data in kwargs.items():
            self._publish(each, data, override, durable)

    def get_dataset(self, name: Key, default: Any = _NO_DEFAULT) -> Any:
        """Return a published dataset; its futures belong to this client, which holds them too.

        Args:
            name: as it was published.
            default: returned if there is no such dataset.
        Raises:
            DatasetError: there is none, and no default; or what it holds was cancelled by force.
        """
        session = self._session
        session.check_open()
        before = None
        while (found := session.store.dataset(text_of(name))) is not None:
            holder, content = found
            count, _, data = content.partition(b"\n")
            texts = session.store.held_by(holder)
            futures = self._hold_all(texts) if len(texts) == int(count) else None
            if futures is not None:
                outer = current._context.set(self)  # type: ignore[arg-type]
                try:
                    return loads_inline(
                        session.seal.open(Kind.DATASET, text_of(name), data), f"dataset {name!r}"
                    )
                finally:
                    current._context.reset(outer)
            if before == holder:  # else it may have been taken back, or overridden, meanwhile
                raise DatasetError(name, "is incomplete: somebody cancelled by force what it holds")
            before = holder
        if default is _NO_DEFAULT:
            raise DatasetError(name, "is not published")
        return default

    def list_datasets(self) -> tuple[Key, ...]:
        """Return the names of all published datasets."""
        self._session.check_open()
        return tuple(sorted((key_of(text) for text in self._session.store.dataset_names()), key=str))

    def unpublish_dataset(self, name: Key) -> None:
        """Take a dataset back: it holds nothing any more. Nothing happens if there is none of this name."""
        self._session.check_open()
        _release(self._session, self._session.store.unpublish(text_of(name)))

    def _publish(self, name: Any, data: Any, override: bool, durable: bool) -> None:
        session, store = self._session, self._session.store
        text = text_of(name)
        futures = lowering.futures_of(data)
        texts = list(dict.fromkeys(text_of_future(f, self) for f in futures))  # type: ignore[arg-type]
        session.flush()
        frames = dumps(data, f"dataset {name!r}")
        texts = list(dict.fromkeys((*texts, *frames.contains)))
        if frames.nbytes > MOST_BYTES:
            raise DatasetError(
                name,
                f"has {frames.nbytes:,} bytes beside what is on the workers; persist or scatter it first",
            )
        holder = f"#{self.fresh_token()}"
        # Until it has its name it is a client with a lease: if this process dies, its holds go.
        store.renew_client(holder, join=True)
        try:
            for start in range(0, len(texts), PAGE):
                unknown, tickets = store.hold(holder, 1, texts[start : start + PAGE])
                session.send_tickets(tickets)
                if unknown:
                    raise MissingKeyError(key_of(unknown[0]), f"dataset {name!r}")
            content = b"%d\n%b" % (len(texts), session.seal.close(Kind.DATASET, text, frames.inline()))
            before = store.publish(text, holder, content, override=override)
        except BaseException as error:
            _release(session, holder)
            if isinstance(error, NameTakenError):
                raise DatasetError(name, "is published already; unpublish it, or say override=True") from None
            raise
        _release(session, before)
        if durable and texts:
            session.make_durable(texts)

    def _hold_all(self, texts: list[str]) -> list[Future] | None:
        """Hold the keys of a dataset, many in a call; None if some are not there (any more)."""
        session = self._session
        futures, fresh = [], []
        with session.order:
            epoch = session.next_epoch()
            for text in texts:
                state, is_new = session.refer(text, epoch)
                futures.append(self.future_of(key_of(text), state))
                if is_new:
                    fresh.append(state)
            unknown: set[str] = set()
            try:
                for start in range(0, len(fresh), PAGE):
                    unknown.update(session.hold([s.text for s in fresh[start : start + PAGE]], epoch))
            except BaseException:
                session.forget(fresh, "its call failed")
                session.releases.owe([s.text for s in fresh])
                raise
            session.forget([s for s in fresh if s.text in unknown], "there is no task of this key any more")
        return None if unknown else futures


class Datasets(MutableMapping[Any, Any]):
    """The published datasets of a namespace, by name."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getitem__(self, name: Any) -> Any:
        return self._client.get_dataset(name)

    def __setitem__(self, name: Any, data: Any) -> None:
        self._client.publish_dataset(data, name=name)

    def __delitem__(self, name: Any) -> None:
        self._client.unpublish_dataset(name)

    def __contains__(self, name: object) -> bool:
        return name in self._client.list_datasets()

    def __iter__(self) -> Iterator[Any]:
        yield from self._client.list_datasets()

    def __len__(self) -> int:
        return len(self._client.list_datasets())

    def __repr__(self) -> str:
        return f"<Datasets: {', '.join(map(repr, self)) or 'none'}>"


def fire_and_forget(obj: Any) -> None:
    """Have tasks run to their end though nobody holds their futures any more.

    When one has ended, its result is freed, if nobody else holds it. An error is logged by the coordinator.

    Args:
        obj: a future, a persisted collection, or containers of them.
    Raises:
        TypeError: there is no future in it: nothing was submitted.
    """
    by_client: dict[Client, list[str]] = {}
    for future in lowering.futures_of(obj):
        client = future._bound()[0]
        by_client.setdefault(client, []).append(text_of_future(future, client))
    if not by_client:
        raise TypeError(
            f"fire_and_forget wants futures or persisted collections, not {type(obj).__qualname__}"
        )
    for client, texts in by_client.items():
        client.session.entrust(list(dict.fromkeys(texts)))


def parse_lease(lease: float | str | None, name: str | None) -> float | None:
    """Return a lease in seconds; None if there is none.

    Raises:
        ConfigError: it is no time, or there is no name that could outlive the process.
    """
    if lease is None:
        return None
    from dask.utils import parse_timedelta

    try:
        seconds = float(parse_timedelta(lease))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'a lease is a number of seconds or a text such as "10m", not {lease!r}') from error
    if not 0 < seconds < 1e9:
        raise ConfigError(f"a lease is longer than 0 s, not {lease!r}")
    if name is None:
        raise ConfigError("a client with lease= needs name=: the next one finds its futures by it")
    return seconds


def _release(session: Session, holder: str) -> None:
    """Release all that a dataset holds; the coordinator does it if this process dies."""
    store: Store = session.store
    left = 1 if holder else 0
    while left:
        left, tickets = store.expire_client(holder)
        session.send_tickets(tickets)
