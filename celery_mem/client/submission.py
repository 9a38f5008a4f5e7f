"""One call that submits tasks: collects them, and sends them in chunks when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from celery_mem.client.future import Future, text_of_future
from celery_mem.client.outbox import SMALL_CALL, SMALL_CODE, as_missing_key
from celery_mem.client.parcels import CHUNK_BYTES, CHUNK_TASKS, LAST_ORDER, Parcel, cuts
from celery_mem.client.placing import Placing
from celery_mem.client.states import KeyState
from celery_mem.client.weight import LIGHT, Weight
from celery_mem.errors import MissingKeyError, UnknownDependencyError, UnknownFunctionError
from celery_mem.graph import collections as lowering
from celery_mem.graph import inside
from celery_mem.graph.calls import (
    Function,
    Payload,
    call,
    call_name,
    encode_call,
    encode_function,
    encode_node,
    with_timeout,
)
from celery_mem.graph.keys import Key, text_of
from celery_mem.graph.nodes import is_node
from celery_mem.graph.tracing import current_context, with_context
from celery_mem.memory.seal import Kind
from celery_mem.memory.serialize import unpickled
from celery_mem.state.store import NewTask

if TYPE_CHECKING:
    from celery_mem.client.client import Client

LARGE_PAYLOAD = 1 << 20

Chunk = tuple[list[NewTask], list[tuple[str, bytes]]]
"""Tasks, and the functions that they use."""


class Submission:
    """Tasks of one call. Used as a context: the keys it refers to are given up again if the block fails.

    Args:
        client: whose call it is.
        priority, retries: for all tasks, where annotations do not say otherwise.
        placing: where they may run.
        streams: chunks are sent as they fill up, while others are still being made; only for tasks that do
            not depend on each other.
        annotations: name -> {key: value}, of Dask.
        durable: whether the results that it refers to are to outlive all workers.
        timeout: how long each task may run, seconds.
    """

    def __init__(
        self,
        client: Client,
        *,
        priority: float = 0,
        retries: int = 0,
        placing: Placing | None = None,
        streams: bool = False,
        annotations: Mapping[str, Mapping[Key, Any]] | None = None,
        durable: bool = False,
        timeout: float | None = None,
    ) -> None:
        self.client = client
        self._durable = durable
        self._timeout = timeout
        self.states: dict[str, KeyState] = {}
        self._new: list[KeyState] = []
        self._session = client.session
        self._inherited = inside.inherited_priority()
        self._priority = priority
        self._retries = retries
        self._placing = placing or Placing()
        self._annotations = annotations or {}
        self._streams = streams
        self._under_way: tuple[Parcel, Chunk, Callable[[], int]] | None = None
        self._rank: int | None = None
        self._n_sent = 0
        self._n_packed = 0
        self._tasks: list[NewTask] = []
        self._functions: dict[str, Function] = {}
        self._encoded: dict[
            int, tuple[Function, Any]
        ] = {}  # by id; with the object, so that it stays that id
        self._trace = current_context(client.settings.tracing)
        self._weight = Weight(client.settings)
        self._payloads: dict[str, bytes] = {}  # those that are blobs, by token
        self._blobs: list[str] = []
        self._blobs_due = 0.0
        self._loans: list[str] = []
        self._epoch = 0

    def set_options(self, priority: float, retries: int, placing: Placing, timeout: float | None) -> None:
        """Set options of the tasks that are added from now on."""
        self._priority, self._retries = priority, retries
        self._placing, self._timeout = placing, timeout

    def refer(self, text: str) -> tuple[KeyState, bool]:
        """Count a future of `text`; returns its state and whether this call must submit it."""
        state, new = self._session.refer(text, self._epoch)
        self.states[text] = state
        if new:
            self._new.append(state)
        return state, new

    def add_call(
        self,
        text: str,
        func: Callable[..., Any],
        function: Function,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Add the task `func(*args, **kwargs)`; `function` is `func` encoded."""
        if function.contains:
            args, function = (func, *args), encode_function(call)
        payload = encode_call(args, kwargs, Future, lambda f: text_of_future(f, self.client))
        self.add(text, function, payload)

    def add(
        self, text: str, function: Function, payload: Payload, *, hold: bool = True, key: Key | None = None
    ) -> None:
        """Add a task.

        Raises:
            PayloadTooLargeError: its arguments are.
        """
        data, blob = with_timeout(payload.data, self._timeout), ""
        if self._trace:
            data = with_context(data, self._trace)
        seal = self._session.seal
        if seal.is_on:
            function = self._session.signed(function)
            data = seal.close(Kind.PAYLOAD, call_name(text, function.hash, payload.deps), data)
        self._functions[function.hash] = function
        if len(data) > LIGHT:
            self._weight.add(text, len(data))
        if len(data) > LARGE_PAYLOAD:
            blob = self._write_blob(text, data)
            self._payloads[blob] = data
            data = b""
        priority, retries = self._priority, self._retries
        if self._annotations and key is not None:
            priority = self._annotations.get("priority", {}).get(key, priority)
            retries = self._annotations.get("retries", {}).get(key, retries)
        constraint, prefer = self._placing.of(key)
        order = min(self._n_sent + len(self._tasks), LAST_ORDER)
        self._tasks.append(
            NewTask(
                text,
                function.hash,
                data,
                blob,
                payload.deps,
                priority + self._inherited,
                order,
                retries,
                hold,
                self._epoch,
                constraint,
                prefer,
            )
        )
        if self._streams and len(self._tasks) >= CHUNK_TASKS:
            self._stream()

    def _pack(self) -> Parcel:
        """Make a parcel of the tasks at hand, kept until the keys that it holds are final."""
        tasks = self._tasks
        blobs = {t.payload_blob: self._payloads[t.payload_blob] for t in tasks if t.payload_blob}
        parcel = Parcel(tasks, self._functions, blobs)
        nbytes = sum(len(t.payload) for t in tasks) + sum(map(len, blobs.values()))
        self._session.ledger.keep(parcel, self._new[self._n_packed :], nbytes, self._session.states)
        self._n_packed = len(self._new)
        return parcel

    def _stream(self) -> None:
        """Send what there is, and go on while Redis takes it in."""
        self._session.flush_outbox()
        parcel = self._pack()
        for chunk in self._chunks(codes=False):
            self._land(parcel)
            self._under_way = parcel, chunk, self._session.launch(*chunk, self._rank)
        self._n_sent += len(self._tasks)
        self._tasks = []

    def _land(self, *next_parcels: Parcel) -> None:
        """Wait until Redis has what is under way."""
        if self._under_way is None:
            return
        parcel, (tasks, functions), arrive = self._under_way
        self._under_way = None
        session = self._session
        with session.outbox.sending([parcel, *next_parcels]):
            try:
                self._rank = arrive()
            except UnknownFunctionError:
                codes = [(name, self._functions[name].code) for name, _ in functions]
                self._rank = session.submit([(tasks, codes)], self._rank)
            except UnknownDependencyError as error:
                raise as_missing_key(error, session.lost_keys) from error
        session.known_functions.update(name for name, _ in functions)

    def add_graph(self, lowered: lowering.Lowered, outputs: Sequence[Key]) -> list[str]:
        """Add the nodes of a graph and hold its outputs; returns their key texts."""
        out = [text_of(key) for key in outputs]
        held = dict(zip(out, outputs, strict=True))
        new: dict[str, bool] = {}
        for text in out:
            is_new = self.refer(text)[1]
            new.setdefault(text, is_new)
        texts: dict[Key, str] = {}
        nodes = lowered.nodes
        self._take_external(lowered, held, new)
        for key, node in nodes.items():
            text = texts[key] = text_of(key)
            deps = []
            for dep in lowered.dependencies[key]:
                dep_text = texts.get(dep)
                deps.append(text_of(dep) if dep_text is None else dep_text)
            func, args, kwargs = lowering.call_of(node)
            function = self._encode_once(func)
            if function.contains:
                args, function = (func, *args), encode_function(call)
            payload = encode_node(args, kwargs, deps, lowering.TaskRef, is_node, text_of)
            self.add(text, function, payload, hold=text in held and new[text], key=key)
        return out

    def _encode_once(self, func: Callable[..., Any]) -> Function:
        """Pickle a function once in this call: many nodes of a graph share one object."""
        known = self._encoded.get(id(func))
        if known is None:
            known = self._encoded[id(func)] = encode_function(func), func
        return known[0]

    def _write_blob(self, text: str, data: bytes) -> str:
        """Store a large payload; those before it must not vanish while many are being written."""
        lease_s = self.client.settings.blob_lease
        token = self.client.next_blob_token()
        name = self.client.write_blob(token, text, unpickled(data))
        if not self._blobs:
            self._blobs_due = time.monotonic() + lease_s / 4
        elif time.monotonic() > self._blobs_due:
            self._session.write([("PEXPIRE", blob, int(lease_s * 1000)) for blob in self._blobs])
            self._blobs_due = time.monotonic() + lease_s / 4
        self._blobs.append(name)
        return token

    def _take_external(
        self, lowered: lowering.Lowered, held: Mapping[str, Key], new: Mapping[str, bool]
    ) -> None:
        """Hold outputs that are not in the graph; a future of another client is refused."""
        for key in lowered.external:
            text = text_of(key)
            future = lowered.futures.get(key)
            if future is not None and future.client is not None:
                self.client._text_of(future)
            if text in self._session.states and not new.get(text, False):
                continue
            if text in held:
                unknown = self._session.hold([text], self._epoch)
                if unknown:
                    raise MissingKeyError(key, "the call")

    def __enter__(self) -> Self:
        # Until the tasks are sent nobody else may refer to their keys and send a task that depends on them.
        self._session.order.acquire()
        try:
            self._session.check_open()
            self._epoch = self._session.next_epoch()
        except BaseException:
            self._session.order.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        sent = False
        try:
            if kind is None:
                self._send()
                if self._durable:
                    self._session.make_durable(list(self.states))
                sent = True
        finally:
            if not sent:
                self._under_way = None  # who uses the connection next waits for it
                self._session.forget(self._new, "its call failed")
                # A part may have arrived.
                self._session.releases.owe([*(s.text for s in self._new), *self._loans])
            self._session.order.release()

    def _send(self) -> None:
        tasks, session = self._tasks, self._session
        if not tasks:
            self._land()
            return
        parcel = self._pack()
        self._land(parcel)
        if len(tasks) <= SMALL_CALL and not self._blobs and sum(len(t.payload) for t in tasks) < CHUNK_BYTES:
            session.outbox.add(parcel, self._new)
            return
        try:
            session.flush_outbox()
            with session.outbox.sending([parcel]):
                try:
                    session.submit(self._chunks(codes=False), self._rank)
                except UnknownFunctionError:
                    session.submit(self._chunks(codes=True), self._rank)
        except UnknownDependencyError as error:
            raise as_missing_key(error, self._session.lost_keys) from error
        self._session.releases.owe(self._loans)
        self._session.known_functions.update(self._functions)

    def _chunks(self, *, codes: bool) -> Iterator[Chunk]:
        """Cut the tasks into chunks. What a later chunk depends on is held until all are sent."""
        tasks = self._tasks
        ranges = list(cuts(tasks))
        if len(ranges) > 1:
            tasks = self._with_loans(tasks, ranges)
        sent: set[str] = set()
        for start, end in ranges:
            chunk = tasks[start:end]
            functions = []
            for name in dict.fromkeys(t.function for t in chunk):
                function = self._functions[name]
                known = not codes and (name in sent or name in self._session.known_functions)
                is_asked_for = known and len(function.code) > SMALL_CODE
                functions.append((name, b"" if is_asked_for else function.code))
                sent.add(name)
            yield chunk, functions

    def _with_loans(self, tasks: list[NewTask], ranges: list[tuple[int, int]]) -> list[NewTask]:
        chunk_of = {t.key: i for i, (start, end) in enumerate(ranges) for t in tasks[start:end]}
        needed_later = set()
        for task in tasks:
            if task.deps:
                mine = chunk_of[task.key]
                for dep in task.deps:
                    if chunk_of.get(dep, mine) < mine:
                        needed_later.add(dep)
        self._loans = [t.key for t in tasks if not t.hold and t.key in needed_later]
        loans = set(self._loans)
        return [t._replace(hold=True) if t.key in loans else t for t in tasks] if loans else tasks


def check_timeout(timeout: Any) -> None:
    """Raise ValueError unless a task can have such a time limit."""
    if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0):
        raise ValueError(f"timeout: the seconds that the task may run, more than 0, not {timeout!r}")
