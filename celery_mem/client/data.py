"""What a client offers for data: bring it, see where it is, move it, say how many copies there are to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from celery_mem.client.scattering import places_wanted
from celery_mem.graph.calls import name_of
from celery_mem.graph.constraints import Workers
from celery_mem.graph.keys import Key, key_of

if TYPE_CHECKING:
    from celery_mem.client.control import DataControl
    from celery_mem.client.future import Future
    from celery_mem.client.scattering import Scattering
    from celery_mem.client.session import Session


class DataMethods:
    """The methods of `Client` for data.

    Attributes:
        control, scattering: where they are carried out; for this package's own use.
    """

    control: DataControl
    scattering: Scattering
    _session: Session

    def fresh_token(self) -> str:
        """Return a text that this client never gives again; for this package's own use."""
        raise NotImplementedError

    def scatter(
        self,
        data: Any,
        workers: Workers = None,
        broadcast: bool | int = False,
        direct: bool | None = None,
        hash: bool = True,  # noqa: A002 (its known name)
        timeout: float | None = None,
        *,
        as_one: bool = False,
    ) -> Any:
        """Put data into the memory of the workers; it is pinned as long as its futures live.

        Nobody can make it again: it is lost with its last copy.

        Args:
            data: a list, tuple or set gives the same of futures, a dict one with futures for values, under
                its own keys; anything else is one object. Data of a key that exists is not replaced.
            workers: nodes or hosts that are to have it, in turns; None means those of this host, or else all.
            broadcast: True has a copy made on each of them, a number so many copies; waits for that. The
                number stays in force, see `replicate`.
            direct: ignored; the way is found.
            hash: equal objects share a key; False gives each a new one.
            timeout: seconds to wait for the copies.
            as_one: take a container as one object, too.
        Raises:
            SerializationError: an object cannot be pickled.
            UnknownWorkerError: a worker that was named is not there.
            StoreFullError: there is room neither on a node of this host nor in Redis.
        """
        kind = type(data)
        if not as_one and kind is dict:
            return self._scatter(data, workers, broadcast, timeout)
        is_named = isinstance(data, tuple) and hasattr(data, "_fields")
        if not as_one and (kind in (list, tuple, set, frozenset) or is_named):
            keys = [self._data_key(x, hash) for x in data]
            futures = self._scatter(dict(zip(keys, data, strict=True)), workers, broadcast, timeout)
            return kind(*map(futures.get, keys)) if is_named else kind(map(futures.get, keys))
        key = self._data_key(data, hash)
        return self._scatter({key: data}, workers, broadcast, timeout)[key]

    def _data_key(self, x: Any, by_hash: bool) -> str:
        from dask.tokenize import tokenize

        return f"{name_of(type(x))}-{tokenize(x) if by_hash else self.fresh_token()}"

    def _scatter(
        self, items: Mapping[Any, Any], workers: Workers, broadcast: bool | int, timeout: float | None
    ) -> dict[Any, Future]:
        copies, named = places_wanted(
            broadcast, workers, self.control.nodes() if broadcast is not False else ()
        )
        futures, large = self.scattering.put(items, workers)
        if broadcast is not False and large:
            self.control.want(large, copies, named)
            self.control.await_copies(large, timeout)
        return futures

    def who_has(self, futures: Any = None) -> dict[Key, list[str]]:
        """Return where results are: for each key a list of nodes, and "@redis"; empty while there is none.

        Args:
            futures: futures, collections or keys; None means all that this client holds.
        """
        return self.control.who_has(futures)

    def has_what(self, workers: Workers = None) -> dict[str, list[Key]]:
        """Return the keys of which each node has a copy, whoever holds them.

        Args:
            workers: nodes or hosts; None means all.
        """
        return self.control.has_what(workers)

    def nbytes(self, keys: Any = None, summary: bool = True) -> dict[Any, int]:
        """Return the size of results, bytes; each counts once, however many copies there are.

        Args:
            keys: futures, collections or keys; None means all that this client holds.
            summary: add up what has the same prefix, such as the name of the function.
        """
        return self.control.nbytes(keys, summary)

    def replicate(
        self,
        futures: Any,
        n: int | None = None,
        workers: Workers = None,
        branching_factor: int = 2,
        timeout: float | None = None,
    ) -> None:
        """Have copies of results on several nodes, and wait until they are there.

        It stays in force for as long as the results are held: when a copy is lost or a node joins, the number
        is restored, and what drops surplus copies honours it.

        Args:
            futures: futures or collections; waited for first.
            n: number of nodes with a copy; None means all, or all of `workers`. A lower number than before
                has the others dropped, and 1 asks for nothing special any more.
            workers: nodes or hosts that are to have the copies.
            branching_factor: ignored.
            timeout: seconds; the copies go on being made.
        Raises:
            UnknownWorkerError: a worker that was named is not there.
            TimeoutError: they were not there in time.
        """
        self.control.replicate(futures, n, workers, timeout)

    def rebalance(self, futures: Any = None, workers: Workers = None, timeout: float | None = None) -> None:
        """Move results so that each node holds about as many bytes as the others, and wait for it.

        Args:
            futures: what may be moved; waited for first. None means everything.
            workers: nodes or hosts between which it is moved; None means all.
            timeout: seconds; the moving goes on.
        Raises:
            MissingKeyError: of a future there is nothing any more.
            UnknownWorkerError: a worker that was named is not there.
            JobError: some results could not be moved.
            TimeoutError: it was not done in time.
        """
        self.control.rebalance(futures, workers, timeout)

    def retire_workers(
        self, workers: Workers = None, close_workers: bool = True, timeout: float | None = None
    ) -> dict[str, dict[str, Any]]:
        """Let workers go in good order, and wait for it.

        They take no more tasks and finish those that they run. What only they have is copied to other
        nodes, or to Redis if there is none.

        Args:
            workers: nodes or hosts.
            close_workers: stop them then. False leaves them, empty, to whoever manages them.
            timeout: seconds; the retiring goes on.
        Returns:
            what is known of each worker that went.
        Raises:
            UnknownWorkerError: a worker that was named is not there.
            TimeoutError: it was not done in time.
        """
        return self.control.retire(workers, close_workers, timeout)

    def processing(self) -> dict[str, list[Key]]:
        """Return the keys that each node is running now."""
        return {node: [key_of(t) for t in texts] for node, texts in self._session.processing().items()}

    def ncores(self, workers: Workers = None) -> dict[str, int]:
        """Return the number of slots of each node.

        Args:
            workers: nodes or hosts; None means all.
        """
        return self.control.ncores(workers)
