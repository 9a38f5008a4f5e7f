"""Client: submit calls and Dask collections, hold their results, get them back."""

from __future__ import annotations

import html
import itertools
import logging
import os
import queue as queues
import re
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from celery_mem.client import current
from celery_mem.client.control import DataControl
from celery_mem.client.data import DataMethods
from celery_mem.client.future import Future, text_of_future
from celery_mem.client.legacy import check_name
from celery_mem.client.lifetimes import LifetimeMethods, parse_lease
from celery_mem.client.placing import Placing
from celery_mem.client.profiling import ProfilingMethods
from celery_mem.client.reading import Found
from celery_mem.client.scattering import Scattering
from celery_mem.client.session import Session
from celery_mem.client.signatures import is_signature, submit_signature
from celery_mem.client.states import (
    CANCELLED,
    ERROR,
    FINAL,
    Countdown,
    KeyState,
    seconds_left,
    until_final,
    unwatch,
    watch,
)
from celery_mem.client.submission import Submission, check_timeout
from celery_mem.config import Settings, mask_url
from celery_mem.errors import (
    ConfigError,
    DataLostError,
    FutureCancelledError,
    MissingKeyError,
)
from celery_mem.graph import collections as lowering
from celery_mem.graph import inside
from celery_mem.graph.app_tasks import as_app_task, is_app_task
from celery_mem.graph.calls import Function, encode_arrangement, encode_function, name_of, token_of
from celery_mem.graph.constraints import Resources, Workers, with_queue
from celery_mem.graph.errors import decode_error
from celery_mem.graph.keys import Key, key_of, text_of
from celery_mem.graph.tickets import TicketOffice
from celery_mem.graph.tracing import traced
from celery_mem.memory import blobs
from celery_mem.memory.seal import Kind
from celery_mem.memory.serialize import Frames

if TYPE_CHECKING:
    from celery import Celery

    from celery_mem.local import LocalCluster

log = logging.getLogger("celery_mem.client")

SHARED_ARGUMENT = 100_000
"""Arguments of many calls that are larger, in bytes, are stored once."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")

Priority = int | float


class Client(DataMethods, LifetimeMethods, ProfilingMethods):
    """A process's connection to a cluster: what it submits is held until its futures are gone.

    Args:
        address: URL of the cluster's Redis, or a LocalCluster, or a Celery app with celery-mem installed.
            None takes `app`, else `CELERY_MEM_URL` or `REDIS_URL`, else starts a LocalCluster that ends with
            this client.
        app: the Celery app through which tickets are sent, where its broker is not that Redis.
        namespace: which graph on that Redis; default the `mem_namespace` setting.
        set_as_default: make `x.compute()` and `dask.compute(...)` go through this client.
        name: beginning of the client's id, for people; with `lease`, a name that lasts over processes.
        lease: seconds, or a text such as "10m", for which this client may be away: after `close()`, an exit
            or a crash, the next client of this name finds in `client.futures` what this one held. One
            process at a time has the name: a second one takes it over, and the futures of the first say so.
        timeout: seconds to wait for Redis.
        settings: further `mem_*` settings, without the prefix.
    Raises:
        ConfigError: the address is none, or a setting is wrong.
        RedisUnavailableError: no Redis there, a wrong password, or a version before 6.2.
    """

    asynchronous = False  # Dask asks

    def __init__(
        self,
        address: str | LocalCluster | Celery | None = None,
        *,
        app: Celery | None = None,
        namespace: str | None = None,
        set_as_default: bool = True,
        name: str | None = None,
        lease: float | str | None = None,
        timeout: float = 10.0,
        **settings: Any,
    ) -> None:
        self.cluster: LocalCluster | None = None
        self._own_cluster = False
        check_name(name)
        lease_s = parse_lease(lease, name)
        url, namespace, app = self._resolve(address, namespace, app)
        try:
            loaded = _load_settings(app, url=url, namespace=namespace, **settings)
            self.settings = loaded
            self._session = Session(
                loaded,
                name or f"client-{os.getpid()}",
                TicketOffice(loaded, app),
                first_timeout=timeout,
                lease_s=lease_s,
            )
        except BaseException:
            if self._own_cluster and self.cluster is not None:
                self.cluster.close()
            raise
        self.pid = os.getpid()
        self._callbacks: queues.SimpleQueue[tuple[Callable[[Future], Any], Future] | None] | None = None
        self._unique = f"{uuid.uuid4().hex[:12]}"
        self._numbers = itertools.count()
        self._token: Any = None
        self.control = DataControl(self)
        self.scattering = Scattering(self)
        if set_as_default:
            current.set_default(self)
        self._finalizer = weakref.finalize(
            self, _close_parts, self._session, self.cluster if self._own_cluster else None
        )

    def _resolve(
        self, address: Any, namespace: str | None, app: Celery | None
    ) -> tuple[str | None, str | None, Celery | None]:
        from celery_mem.local import LocalCluster

        if address is not None and hasattr(address, "send_task"):
            return None, namespace, address
        if (
            address is None
            and app is None
            and not (os.environ.get("CELERY_MEM_URL") or os.environ.get("REDIS_URL"))
        ):
            address = LocalCluster(namespace=namespace or "mem")
            self._own_cluster = True
        if isinstance(address, LocalCluster):
            if address.closed:
                raise ConfigError("this LocalCluster is closed; make a new one")
            self.cluster = address
            return address.url, namespace or address.namespace, app
        if address is not None and not isinstance(address, str):
            raise ConfigError(f"an address is a URL, a LocalCluster or a Celery app, not {address!r}")
        return address, namespace, app

    @classmethod
    def current(cls) -> Client:
        """Return the client of this context: `with client:`, else the newest default, else the worker's own.

        Raises:
            UnboundFutureError: there is none.
        """
        return current.get_client()

    # --- submit ---

    def submit(
        self,
        func: Callable[..., Any],
        *args: Any,
        key: Key | None = None,
        pure: bool = True,
        retries: int = 0,
        priority: Priority = 0,
        workers: Workers = None,
        allow_other_workers: bool | None = None,
        resources: Resources = None,
        queue: str | None = None,
        durable: bool = False,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run `func(*args, **kwargs)` on the cluster.

        A task of a Celery app is run by the app of the worker, under its name; `self.request.id` is the key.
        A signature (`add.s(2, 3)`, a chain, group or chord) becomes tasks that depend on each other: a group
        gives a list of futures, all else one. Arguments go ahead of its own, as Celery has it.

        Futures among the arguments, nested in containers or in other objects too, are dependencies: in
        containers their results arrive, in other objects the futures themselves, bound to a client of the
        worker.

        Args:
            key: name of the task. A key that exists already is not run again, whatever `func` is: the first
                call under a key counts for as long as anybody holds it, or holds what depends on it.
            pure: equal calls share one key and run once. False gives a new key.
            retries: how often to run again after an exception, without delay.
            priority: a number; higher runs first, before the order of submission.
            workers: names of nodes, or of hosts for all nodes there, that alone may run it. A name that
                does not exist is no mistake: the task waits for such a worker, and `celery-mem status`
                says so.
            allow_other_workers: the workers are tried first, and others may run it when these are busy.
            resources: what it takes of its node while it runs, by name, such as `{"GPU": 1}`.
            queue: only workers that consume this Celery queue may run it.
            durable: write the result to Redis, or under `mem_durable_url`, as soon as it is made. It then
                outlives all workers, and how it was made is forgotten.
            timeout: seconds that one run of the task may take. Then TaskInterrupt is raised inside it, and if
                that does not end it within `mem_stop_grace`, its process is killed; its future raises
                TaskTimeoutError, unless it has `retries` left. On the pools threads and solo the future
                fails, and the task runs on. A function's own argument of this name goes by functools.partial.
        Returns:
            a future; for a group, a list of futures.
        Raises:
            TypeError: `func` is not callable.
            SerializationError: the function or an argument cannot be pickled.
            PayloadTooLargeError: the pickled arguments are above `mem_payload_limit`; `scatter` large data.
            FutureCancelledError: an argument was cancelled.
            ForeignFutureError: an argument is a future of another client.
            UnknownAppTaskError: raised by the future: the worker's app has no task of this name.
        Note:
            Small calls are sent some milliseconds later, together. What Redis has against one its future
            raises: StoreFullError, or MissingKeyError for a future in an object whose task is gone.
        """
        if is_signature(func):
            return submit_signature(
                self,
                func,
                args,
                kwargs,
                key=key,
                pure=pure,
                durable=durable,
                priority=priority,
                retries=retries,
                workers=workers,
                allow_other_workers=allow_other_workers,
                resources=resources,
                queue=queue,
                timeout=timeout,
            )
        if not callable(func):
            raise TypeError(f"submit wants a function and its arguments, not {func!r}")
        if is_app_task(func):
            func, retries = as_app_task(func, retries)
        resources = with_queue(resources, queue)
        function = encode_function(func)
        if key is None:
            key = self.key_of_call(function, args, kwargs, pure=pure)
        text = text_of(key)
        placing = Placing(workers, allow_other_workers, resources)
        check_timeout(timeout)
        with Submission(
            self, priority=priority, retries=retries, placing=placing, durable=durable, timeout=timeout
        ) as submission:
            state, new = submission.refer(text)
            if new:
                submission.add_call(text, func, function, args, kwargs)
        return self.future_of(key, state)

    def key_of_call(
        self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, pure: bool
    ) -> str:
        """Return the key of a call that was given none; for this package's own use."""
        token = token_of(function, args, kwargs, self._text_of) if pure else self.fresh_token()
        return f"{function.name}-{token}"

    def map(
        self,
        func: Callable[..., Any],
        *iterables: Collection[Any],
        key: str | Sequence[Key] | None = None,
        pure: bool = True,
        retries: int = 0,
        priority: Priority = 0,
        batch_size: int | None = None,
        workers: Workers = None,
        allow_other_workers: bool | None = None,
        resources: Resources = None,
        queue: str | None = None,
        durable: bool = False,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> list[Future]:
        """Run `func` on the items of the iterables, side by side, as the builtin `map` does.

        Args:
            key: a prefix for the keys, or one key per call.
            batch_size: ignored; tasks always go to Redis in chunks.
            pure, retries, priority: of each task, as in `submit`.
            workers, allow_other_workers, resources, queue, durable, timeout: of each task, as in `submit`.
            kwargs: given to every call; large ones are stored once.
        Returns:
            a future for each call, in their order; as many as the shortest of the iterables has items.
        Raises:
            TypeError: an argument is an iterator or a queue, whose end nobody knows.
            ValueError: there are not as many keys as calls.
            SerializationError: the function or an argument cannot be pickled.
            FutureCancelledError: an argument was cancelled.
        """
        if not callable(func):
            raise TypeError(f"map wants a function and iterables, not {func!r}")
        if is_app_task(func):
            func, retries = as_app_task(func, retries)
        resources = with_queue(resources, queue)
        for it in iterables:
            if isinstance(it, Iterator | queues.Queue):
                raise TypeError(
                    f"map wants lists or other collections, not the iterator {it!r}; use list(...)"
                )
        calls = list(zip(*iterables, strict=False))
        if not calls:
            return []
        placing = Placing(workers, allow_other_workers, resources)
        check_timeout(timeout)
        function = encode_function(func)
        kwargs = {name: self._shared(value) for name, value in kwargs.items()}
        prefix = key if isinstance(key, str) else function.name
        keys: Iterable[Key]
        if key is not None and not isinstance(key, str):
            if len(key) != len(calls):
                raise ValueError(f"{len(key)} keys were given for {len(calls)} calls")
            keys = list(key)
        elif pure:
            keys = (f"{prefix}-{token_of(function, args, kwargs, self._text_of)}" for args in calls)
        else:
            keys = (f"{prefix}-{self.fresh_token()}" for _ in calls)
        futures = []
        with Submission(
            self,
            priority=priority,
            retries=retries,
            placing=placing,
            streams=True,
            durable=durable,
            timeout=timeout,
        ) as submission:
            for args, k in zip(calls, keys, strict=True):
                text = text_of(k)
                state, new = submission.refer(text)
                if new:
                    submission.add_call(text, func, function, args, kwargs)
                futures.append(self.future_of(k, state))
        return futures

    def _shared(self, value: Any) -> Any:
        """Scatter what would be large in each of many calls."""
        from dask.sizeof import sizeof

        if sizeof(value) <= SHARED_ARGUMENT or lowering.futures_of(value):
            return value
        return self.scatter(value, as_one=True)

    @traced
    def compute(
        self,
        collections: Any,
        *args: Any,
        sync: bool = False,
        optimize_graph: bool = True,
        traverse: bool = True,
        retries: int = 0,
        priority: Priority = 0,
        workers: Any = None,
        allow_other_workers: bool | None = None,
        resources: Any = None,
        durable: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Start computing Dask collections; one future for each.

        Args:
            collections: a collection, or a list, tuple or set of them; further ones may follow. What is no
                collection is returned as it is, but a container with collections in it becomes one future.
            sync: wait, and return results instead of futures.
            optimize_graph: let Dask optimize first.
            traverse: look for collections inside containers.
            retries, priority: of all tasks, as in `submit`.
            workers, resources: of all tasks, as in `submit`; or a dict of that for some collections or keys,
                which counts for their results only. What `dask.annotate` says of a task goes before, where
                Dask's optimizer keeps it.
            allow_other_workers, durable: as in `submit`; of the results, not of what they are made from.
        Returns:
            a future for one collection, a list for several.
        Raises:
            TypeError: an argument that it does not know.
            SerializationError: a function or a value in the graph cannot be pickled.
            GraphCycleError: the graph has a cycle.
        """
        _refuse(kwargs, "compute")
        single = not args and not isinstance(collections, (list, tuple, set, frozenset))
        items = [collections] if single else [*(collections if not args else (collections, *args))]
        # Not by dask.delayed(container), which mixes up what is in it where its collections differ in kind.
        unpacked = [lowering.unpack([x], traverse and not isinstance(x, Iterator)) for x in items]
        members = list(itertools.chain.from_iterable(found for found, _ in unpacked))
        lowered = lowering.lower(members, finalize=True, optimize_graph=optimize_graph)
        placing = Placing(workers, allow_other_workers, resources, members=members, lowered=lowered)
        futures = iter(self._submit_lowered(lowered, lowered.final_keys, retries, priority, placing, durable))
        out = []
        for x, (found, repack) in zip(items, unpacked, strict=True):
            mine = list(itertools.islice(futures, len(found)))
            if mine and not lowering.is_dask_collection(x):
                out.append(self._arranged(x, repack, mine, priority, placing, durable))
            else:
                out.append(mine[0] if mine else x)
        answer = out[0] if single else out
        return self.gather(answer) if sync else answer

    def _arranged(
        self,
        x: Any,
        repack: Callable[[list[Any]], tuple[Any, ...]],
        parts: list[Future],
        priority: Priority,
        placing: Placing,
        durable: bool,
    ) -> Future:
        """Submit a task that puts the results of `parts` where the collections in `x` are."""
        key = f"{name_of(type(x))}-{self.fresh_token()}"
        payload = encode_arrangement(lambda places: repack(places)[0], [text_of(f.key) for f in parts])
        with Submission(self, priority=priority, placing=placing, durable=durable) as submission:
            state, _ = submission.refer(key)
            submission.add(key, encode_function(lowering.identity), payload)
        return self.future_of(key, state)

    @traced
    def persist(
        self,
        collections: Any,
        *args: Any,
        optimize_graph: bool = True,
        retries: int = 0,
        priority: Priority = 0,
        workers: Any = None,
        allow_other_workers: bool | None = None,
        resources: Any = None,
        durable: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Start computing Dask collections and keep their parts on the cluster.

        Args:
            collections: a collection, or a list, tuple or set of them; further ones may follow.
            optimize_graph, retries, priority: as in `compute`.
            workers, allow_other_workers, resources, durable: as in `compute`.
        Returns:
            collections like the ones given, whose graphs hold one future per part and nothing else. The data
            stays for as long as they, or what is derived from them, live.
        Raises:
            AssertionError: an argument is no Dask collection.
            TypeError: an argument that it does not know.
            SerializationError: a function or a value in the graph cannot be pickled.
        """
        _refuse(kwargs, "persist")
        single = not args and not isinstance(collections, (list, tuple, set, frozenset))
        items = [collections] if single else [*(collections if not args else (collections, *args))]
        for x in items:
            if not lowering.is_dask_collection(x):
                raise AssertionError(f"persist wants Dask collections, not {type(x).__qualname__}")
        lowered = lowering.lower(items, finalize=False, optimize_graph=optimize_graph)
        flat = list(dict.fromkeys(itertools.chain.from_iterable(lowered.outputs)))
        placing = Placing(workers, allow_other_workers, resources, members=items, lowered=lowered)
        found = self._submit_lowered(lowered, flat, retries, priority, placing, durable)
        futures = dict(zip(flat, found, strict=True))
        del found
        out = [
            lowering.rebuild_persisted(x, {k: futures[k] for k in keys})
            for x, keys in zip(lowered.optimized, lowered.outputs, strict=True)
        ]
        return out[0] if single else out

    @traced
    def get(
        self,
        dsk: Any,
        keys: Any,
        *,
        sync: bool = True,
        retries: int = 0,
        priority: Priority = 0,
        workers: Any = None,
        allow_other_workers: bool | None = None,
        resources: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Compute keys of a raw Dask graph; what Dask calls for `x.compute()`.

        Args:
            dsk: a graph: dict, HighLevelGraph or expression.
            keys: a key, or lists of keys, nested to any depth. As everywhere, a key that is held already, by
                anybody, is not computed again.
            sync: wait and return results, and keep nothing; False returns futures.
            retries, priority: of all tasks, as in `submit`.
            workers, allow_other_workers, resources: as in `compute`; dicts name keys.
            kwargs: options meant for Dask's own schedulers, without effect.
        Returns:
            results (or futures) in the nesting of `keys`.
        Raises:
            GraphCycleError: the graph has a cycle.
            MissingKeyError: it names a key that is neither in it nor held.
        """
        lowered = lowering.lower_graph(dsk, keys, live=_LiveKeys(self._session))
        wanted = list(dict.fromkeys(lowered.outputs[0]))
        placing = Placing(workers, allow_other_workers, resources, lowered=lowered)
        found = self._submit_lowered(lowered, wanted, retries, priority, placing)
        futures = dict(zip(wanted, found, strict=True))
        del found
        if not sync:
            return lowering.nest(keys, futures)
        try:
            results = dict(zip(wanted, self.gather(list(futures.values())), strict=True))
        finally:
            # Now and not soon: the next call may use the same keys for other tasks.
            futures.clear()
            self._session.flush_releases()
        return lowering.nest(keys, results)

    def _submit_lowered(
        self,
        lowered: lowering.Lowered,
        outputs: Sequence[Key],
        retries: int,
        priority: Priority,
        placing: Placing,
        durable: bool = False,
    ) -> list[Future]:
        submission = Submission(
            self,
            priority=priority,
            retries=retries,
            placing=placing,
            annotations=lowered.annotations,
            durable=durable,
        )
        with submission:
            texts = submission.add_graph(lowered, outputs)
        return [
            self.future_of(key, submission.states[text]) for key, text in zip(outputs, texts, strict=True)
        ]

    def write_blob(self, token: str, text: str, frames: Frames) -> str:
        """Store a large object ahead of the call that refers to it, for this package's own use.

        Returns:
            its name in Redis.
        """
        name = self._session.store.keys.blob(token, text)
        commands = blobs.write_commands(
            name, frames, piece_bytes=self.settings.piece_bytes, lease_s=self.settings.blob_lease
        )
        self._session.write(commands)
        return name

    # --- results ---

    @traced
    def gather(self, futures: Any, *, errors: str = "raise", timeout: float | None = None) -> Any:
        """Wait for futures and return their results in the same nesting.

        Args:
            futures: a future, or lists, tuples, sets and dicts of them, nested to any depth.
            errors: "raise" raises as soon as one fails, the first in order of those that have; "skip" waits
                for all, leaves failed ones out of lists, and puts None in their place in dicts.
            timeout: seconds for the whole call; None waits without end.
        Raises:
            TimeoutError: the tasks go on; call again.
            ForeignFutureError: a future of another client.
            Exception: what a task raised.
        """
        if errors not in ("raise", "skip"):
            raise ValueError(f'errors is "raise" or "skip", not {errors!r}')
        flat: dict[int, Future] = {}
        _collect(futures, flat)
        for future in flat.values():
            if future._client is not self:
                text_of_future(future, self)  # raises the fitting error
        states = [f._bound()[1] for f in flat.values()]
        self.wait_for(states, timeout, "gather", until_failure=errors == "raise")
        good = {}
        for (i, future), state in zip(flat.items(), states, strict=True):
            if state.status not in (ERROR, CANCELLED):
                good[i] = state, future.key
            elif errors == "raise":
                self._raise_failure(state, future.key)
        found = self._session.reading.look([s for s, _ in good.values() if s.data is None])
        self._session.reading.announce(found)
        return _arrange(
            futures,
            {i: self._value(state, key, timeout, found.get(state.text)) for i, (state, key) in good.items()},
        )

    def result_of(self, state: KeyState, key: Key, timeout: float | None) -> Any:
        """Wait for one key and return its result; for this package's own use."""
        if state.status not in FINAL:
            self.wait_for([state], timeout, f"the result of {key!r}")
        return self._value(state, key, timeout)

    def error_of(
        self, state: KeyState, key: Key, timeout: float | None
    ) -> tuple[BaseException | None, TracebackType | None]:
        """Wait for one key and return its error and traceback, or None twice; for this package's own use."""
        self.wait_for([state], timeout, f"the outcome of {key!r}")
        if state.status == CANCELLED:
            self.raise_cancelled(state, key)
        return self._decoded_error(state, key) if state.status == ERROR else (None, None)

    def raise_cancelled(self, state: KeyState, key: Key) -> NoReturn:
        """Raise the error of a cancelled future; for this package's own use."""
        raise FutureCancelledError(key, state.reason)

    def wait_for(
        self, states: Sequence[KeyState], timeout: float | None, what: str, *, until_failure: bool = False
    ) -> None:
        """Wait until keys are final; for this package's own use.

        Args:
            what: how an error text calls it.
            until_failure: also end with the first that failed or was cancelled.
        Raises:
            TimeoutError: they were not in time.
        """
        session = self._session
        deadline = None if timeout is None else time.monotonic() + timeout
        session.flush()
        while True:
            with session.lock:
                pending = [s for s in states if s.status not in FINAL]
                if not pending:
                    return
                if until_failure and any(s.status in (ERROR, CANCELLED) for s in states):
                    return
                session.check_open()
                countdown = Countdown(len(pending), until_failure=until_failure)
                watch(pending, countdown)
            try:
                in_time = inside.wait_for(countdown.wait, seconds_left(deadline))
            finally:
                if not countdown.is_over:
                    with session.lock:
                        unwatch(pending, countdown)
            if not in_time:
                raise TimeoutError(
                    f"{what}: {countdown.left} of {len(states)} tasks not done after {timeout} s"
                )

    def _value(
        self, state: KeyState, key: Key, timeout: float | None = None, found: Found | None = None
    ) -> Any:
        """Return the result of a key that is final.

        Args:
            timeout: seconds to wait if it vanished and is being made again.
            found: where it was, a moment ago.
        """
        what = f"the result of {key!r}"
        while True:
            if state.status in (ERROR, CANCELLED):
                self._raise_failure(state, key)
            data = state.data
            outer = current._context.set(self)  # futures in the result belong to this client
            try:
                if data is not None:
                    return self._session.seal.load_inline(state.text, data, what)
                is_there, value = self._session.reading.read(state, found)
            finally:
                current._context.reset(outer)
            if is_there:
                return value
            found = None
            self._session.expect_again(state)
            self.wait_for([state], timeout, what)

    def _raise_failure(self, state: KeyState, key: Key) -> NoReturn:
        if state.status == CANCELLED:
            self.raise_cancelled(state, key)
        error, tb = self._decoded_error(state, key)
        try:
            raise error.with_traceback(tb)
        finally:
            del error, tb  # or this frame and the error keep each other, and what the callers hold, alive

    async def await_result(self, future: Future, state: KeyState) -> Any:
        """Wait for one future in an event loop and return its result; for this package's own use."""
        import asyncio

        key = future.key
        self._session.flush()
        if inside.worker is None:
            await until_final(state, self._session.lock)
        else:  # where this is a task, its slot has to help, which needs a thread
            await asyncio.to_thread(self.wait_for, [state], None, f"the result of {key!r}")
        return await asyncio.to_thread(self._value, state, key)

    def _decoded_error(self, state: KeyState, key: Key) -> tuple[BaseException, TracebackType | None]:
        if not state.error:
            lost, _, reason = state.reason.partition("\n")
            lost_key = key_of(lost) if lost else key
            return (DataLostError(lost_key, reason) if reason else DataLostError(lost_key)), None
        return decode_error(self._session.seal.open(Kind.ERROR, "", state.error, shown=state.text))

    def call_when_done(self, future: Future, state: KeyState, fn: Callable[[Future], Any]) -> None:
        """Run `fn(future)` in the callback thread when the key is final; for this package's own use."""
        with self._session.lock:
            if self._callbacks is None:
                self._callbacks = queues.SimpleQueue()
                threading.Thread(
                    target=_run_callbacks, args=(self._callbacks,), name="celery-mem-callbacks", daemon=True
                ).start()
            calls = self._callbacks
            if state.status in FINAL:
                calls.put((fn, future))
            else:
                watch([state], lambda _: calls.put((fn, future)))

    # --- futures ---

    def future(self, key: Key | Future) -> Future:
        """Return a future of an existing key, or of another client's future; this client holds it too.

        Raises:
            MissingKeyError: there is no such task.
        """
        if isinstance(key, Future):
            if key.client is not None:
                key.client.session.flush()
            key = key.key
        future = Future(key, self)
        if future.status == CANCELLED:
            raise MissingKeyError(key)
        return future

    def hold_future(self, future: Future) -> None:
        """Bind an unbound future to this client; for this package's own use."""
        text = text_of(future.key)
        session = self._session
        with session.order:
            session.check_open()
            epoch = session.next_epoch()
            state, new = session.refer(text, epoch)
            future.attach(self, state)
            if not new:
                return
            try:
                unknown = session.hold([text], epoch)
            except BaseException:
                session.forget([state], "its call failed")
                session.releases.owe([text])
                raise
            if unknown:
                session.forget(
                    [state], "there is no task of this key: it was released before this client held it"
                )

    def future_of(self, key: Key, state: KeyState) -> Future:
        """Return a future of a key that was just referred to; for this package's own use."""
        future = Future(key)
        future.attach(self, state)
        return future

    def release_later(self, state: KeyState) -> None:
        """Count one future of a key less; safe to call from a finalizer; for this package's own use."""
        self._session.releases.later(state)

    def cancel(self, futures: Any, *, force: bool = False, reason: str = "") -> None:
        """Cancel tasks, and those that depend on them, as far as no other client holds them.

        Work that has not started does not start. A task that runs is stopped: on the pool prefork by a
        TaskInterrupt raised inside it, and if that does not end it within `mem_stop_grace`, with its process;
        on other pools it runs on, and its result is discarded. The futures here are cancelled when this
        returns. Submitting again runs anew. A task that was submitted when a small
        input was there already has that input in itself: to cancel the input leaves the task alone.

        Args:
            futures: a future, a collection, or containers of them.
            force: cancel also what other clients hold; their futures say so.
            reason: part of the error that `result()` raises.
        """
        found = lowering.futures_of(futures)
        texts = list(dict.fromkeys(text_of(f.key) for f in found))
        if texts:
            self._session.cancel(texts, force, reason)

    def retry(self, futures: Any) -> None:
        """Run failed tasks again, with the failed inputs behind them; what did not fail is left alone.

        Args:
            futures: a future, a collection, or containers of them.
        Raises:
            FutureCancelledError: one of them was cancelled.
        """
        texts = list(dict.fromkeys(text_of_future(f, self) for f in lowering.futures_of(futures)))
        if texts:
            self._session.retry(texts)

    def _text_of(self, future: Future) -> str:
        return text_of_future(future, self)

    def fresh_token(self) -> str:
        """Return a text that this client never gives again; for this package's own use."""
        return f"{self._unique}{next(self._numbers):08x}"

    def next_blob_token(self) -> str:
        """Return a name for a new blob of this client; for this package's own use."""
        return f"{_UNSAFE.sub('_', self._session.id)}.{next(self._numbers)}"

    # --- the cluster ---

    @property
    def id(self) -> str:
        """Name of this client among the holders."""
        return self._session.id

    @property
    def session(self) -> Session:
        """The connection; for this package's own use."""
        return self._session

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._session.closed

    def info(self) -> dict[str, Any]:
        """Describe the cluster: Redis, nodes and their memory, queues, tasks by state, bytes, jobs, clients.

        Not one moment's picture: it is read in several steps while work goes on. Costs a scan over all keys
        of the server, in pages that hold up nobody.

        Returns:
            a dict with

            - namespace, generation, queue, leader (id of the coordinator or None), clock (server time, s)
            - redis: version, used_memory and maxmemory (bytes), used_memory_human, maxmemory_policy
            - nodes, by name: slots, busy (slots that run a task), pid, pool, hostname, lease (s left), keys
              (with a copy there), memory (bytes by kind), freed (copies, by its agent), limit (bytes),
              resources (amounts by name), status (running, paused, retiring or stopping)
            - queues: ready (that any node may take; `tasks` counts all), unsettled (left for the sweep),
              tickets (on their way), idle (slots that wait)
            - tasks: number by state
            - nbytes: size of all results, bytes
            - clients, by id: keys (held), lease (s left)
            - datasets: the names of those that are published
            - forgotten: number of tasks that run though nobody holds them
            - copies: number of keys of which more than one copy is wanted
            - jobs, by id: kind, done, total
            - unrunnable: constraint, tasks (number), waiting (s) and reason, of tasks that no node may run
        Raises:
            RedisUnavailableError: Redis does not answer.
        """
        from celery_mem.graph.overview import overview

        self._session.check_open()
        self._session.flush()
        return overview(self._session.store)

    def wait_for_workers(self, n_workers: int = 1, timeout: float | None = None) -> None:
        """Wait until nodes have joined.

        Args:
            n_workers: number of nodes.
            timeout: seconds; None waits without end.
        Raises:
            TimeoutError: fewer came in time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (found := self._session.count_nodes()) < n_workers:
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{found} of {n_workers} nodes after {timeout} s")
            if self.cluster is not None:
                self.cluster.check()
            time.sleep(0.05)

    def restart(self, timeout: float = 30.0) -> None:
        """Give up everything on the cluster: all tasks, results, datasets and names, of all clients.

        Futures of everybody are cancelled, and say who did this. Processes of prefork pools that run tasks
        are killed and replaced; one that runs another Celery task, or none, is replaced after its next. On
        other pools tasks run on, and their results are discarded.

        Args:
            timeout: seconds to wait for the nodes that were there.
        Raises:
            TimeoutError: some did not come back in time; all else is done.
        """
        self.control.restart(timeout)

    def restart_workers(
        self, workers: Workers = None, timeout: float = 30.0, raise_for_error: bool = True
    ) -> dict[str, str]:
        """Replace the processes of nodes at once, and keep the state: what they ran runs again.

        A process that runs another Celery task, or none, is replaced after its next. Results that only such a
        process had are made again.

        Args:
            workers: names of nodes, or of hosts; None means all.
            timeout: seconds to wait.
            raise_for_error: False returns instead what became of each.
        Returns:
            by node: "OK", "timed out", or "removed" if it left meanwhile.
        Raises:
            UnsupportedPoolError: a node has no processes that could be replaced; nothing was done.
            TimeoutError: some nodes did not do it in time.
        """
        return self.control.restart_workers(workers, timeout, raise_for_error)

    # --- life ---

    def as_current(self) -> Any:
        """Return a context manager in which this is `Client.current()`, and which does not close it."""
        return _Current(self)

    def close(self, release: bool | None = None) -> None:
        """Disconnect, and release all futures; a cluster that this client started ends too.

        Whoever waits for a future gets a FutureCancelledError. Harmless when repeated.

        Args:
            release: True lets go of everything. By default a client with a lease leaves what it holds to the
                next of its name.
        """
        current.remove(self)
        if release:
            self._session.close()
        self._finalizer()
        if self._callbacks is not None:
            self._callbacks.put(None)

    def __enter__(self) -> Self:
        self._token = current._context.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            current._context.reset(self._token)
            self._token = None
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<Client: closed>"
        return f"<Client {self.id}: {mask_url(self.settings.url)!r}, namespace {self.settings.namespace!r}>"

    def _repr_html_(self) -> str:
        rows = {
            "id": self.id,
            "address": "closed" if self.closed else mask_url(self.settings.url),
            "namespace": self.settings.namespace,
            "futures": str(len(self._session.states)),
        }
        cells = "".join(f"<tr><th>{n}</th><td>{html.escape(t)}</td></tr>" for n, t in rows.items())
        return f"<table><caption>Client</caption>{cells}</table>"

    def __reduce__(self) -> Any:
        raise TypeError("a client cannot be pickled; use Client.current() inside the task")


class _Current:
    def __init__(self, client: Client) -> None:
        self.client = client
        self._tokens: list[Any] = []

    def __enter__(self) -> Client:
        self._tokens.append(current._context.set(self.client))
        return self.client

    def __exit__(self, *_: object) -> None:
        current._context.reset(self._tokens.pop())


class _LiveKeys:
    """The keys that a session holds, as a container of Dask keys."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __contains__(self, key: Any) -> bool:
        return text_of(key) in self.session.states


def _close_parts(session: Session, cluster: LocalCluster | None) -> None:
    session.close(release=session.legacy is None)
    if cluster is not None:
        cluster.close()


def _load_settings(app: Celery | None, **overrides: Any) -> Settings:
    """Collect the settings; those that were given when celery-mem was installed in `app` count too."""
    if app is None or not hasattr(app, "mem_settings"):
        return Settings.load(app, **overrides)
    settings: Settings = app.mem_settings()
    return settings.replace(**{name: value for name, value in overrides.items() if value is not None})


def _refuse(kwargs: Mapping[str, Any], method: str) -> None:
    if kwargs:
        raise TypeError(f"{method}() got unexpected arguments: {', '.join(kwargs)}")


def _run_callbacks(calls: queues.SimpleQueue[tuple[Callable[[Future], Any], Future] | None]) -> None:
    while (item := calls.get()) is not None:
        fn, future = item
        try:
            fn(future)
        except Exception:
            log.exception("a callback of %r failed", future.key)
        del item, fn, future  # while it waits for the next one, it must not hold this one


def _collect(x: Any, into: dict[int, Future]) -> None:
    if isinstance(x, Future):
        into[id(x)] = x
    elif isinstance(x, dict):
        for v in x.values():
            _collect(v, into)
    elif isinstance(x, (list, tuple, set, frozenset)):
        for v in x:
            _collect(v, into)


def _arrange(x: Any, results: Mapping[int, Any]) -> Any:
    """Put results where the futures are; a failed one, which has none, is left out of lists."""
    if isinstance(x, Future):
        return results.get(id(x))
    if isinstance(x, dict):
        return {k: _arrange(v, results) for k, v in x.items()}
    if isinstance(x, (list, tuple, set, frozenset)):
        items: Iterable[Any] = (
            _arrange(v, results) for v in x if not (isinstance(v, Future) and id(v) not in results)
        )
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x
