"""Future: what a client holds of a task."""

from __future__ import annotations

import html
from collections.abc import Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dask._task_spec import TaskRef

from celery_mem.client.current import find_client
from celery_mem.client.states import CANCELLED, ERROR, FINAL, FINISHED, KeyState
from celery_mem.errors import ClosedClientError, ForeignFutureError, UnboundFutureError
from celery_mem.graph.keys import Key, text_of
from celery_mem.memory.serialize import note_future

if TYPE_CHECKING:
    from celery_mem.client.client import Client


class Future(TaskRef):  # a TaskRef, so that every layer of Dask sees it as a dependency
    """The result of a task, now or later; pins it for as long as this object lives. Can be awaited.

    Made by a client's methods, not by hand. Pickled, it is its key: in a task or under another client it
    binds to the client there. Copies of one key share one state.
    """

    __slots__ = ("__weakref__", "_client", "_state")
    __celery_mem_future__ = True
    __dask_future__ = True

    key: Key
    _client: Client | None
    _state: KeyState | None

    def __init__(self, key: Key, client: Client | None = None) -> None:
        super().__init__(key)
        self._client = None
        self._state = None
        if client is not None:
            client.hold_future(self)

    @property
    def client(self) -> Client | None:
        """The client it belongs to; None if it is not bound."""
        return self._client

    @property
    def status(self) -> str:
        """One of pending, finished, error, cancelled, lost."""
        return self._bound()[1].status

    def done(self) -> bool:
        """Whether it is finished, failed or cancelled."""
        return self.status in FINAL

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self.status == CANCELLED

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the task and return its result.

        Args:
            timeout: seconds; None waits without end.
        Raises:
            TimeoutError: the task goes on; call again to wait on.
            FutureCancelledError: it was cancelled.
            Exception: whatever the task raised, with its traceback on the worker.
        """
        client, state = self._bound()
        return client.result_of(state, self.key, timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the task and return what it raised; None if it succeeded.

        Args:
            timeout: seconds; None waits without end.
        Raises:
            TimeoutError: the task goes on; call again to wait on.
            FutureCancelledError: it was cancelled.
        """
        client, state = self._bound()
        return client.error_of(state, self.key, timeout)[0]

    def traceback(self, timeout: float | None = None) -> TracebackType | None:
        """Wait for the task and return the traceback of its error; None if it succeeded.

        Args:
            timeout: seconds; None waits without end.
        Raises:
            TimeoutError: the task goes on; call again to wait on.
            FutureCancelledError: it was cancelled.
        """
        client, state = self._bound()
        return client.error_of(state, self.key, timeout)[1]

    def add_done_callback(self, fn: Callable[[Future], Any]) -> None:
        """Call `fn(future)` once when it is done, in a thread of the client's own, at once if it is done.

        What `fn` raises is logged, and stops nothing.
        """
        client, state = self._bound()
        client.call_when_done(self, state, fn)

    def cancel(self, *, force: bool = False, reason: str = "") -> None:
        """Cancel the task; see `Client.cancel`."""
        self._bound()[0].cancel([self], force=force, reason=reason)

    def retry(self) -> None:
        """Run the task again if it failed; see `Client.retry`."""
        self._bound()[0].retry([self])

    def release(self) -> None:
        """Stop pinning the result; the future is of no use afterwards."""
        client, state = self._client, self._state
        self._client = self._state = None
        if client is not None and state is not None:
            client.release_later(state)

    def bind_client(self, client: Client) -> None:
        """Make an unbound future belong to `client`, which then holds its key."""
        if self._client is None:
            client.hold_future(self)

    def attach(self, client: Client, state: KeyState) -> None:
        """Give the future its state; for the client's own use."""
        self._client = client
        self._state = state

    def _bound(self) -> tuple[Client, KeyState]:
        client, state = self._client, self._state
        if client is None or state is None:
            raise UnboundFutureError(
                f"future {self.key!r} belongs to no client in this process (it was released, or unpickled "
                "where no client exists); make a Client first, or call future.bind_client(client)"
            )
        return client, state

    def __del__(self) -> None:
        # May run at any moment in any thread, inside any lock: it only appends to a queue.
        try:
            client, state = self._client, self._state
        except AttributeError:
            return
        if client is not None and state is not None:
            client.release_later(state)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        note_future(text_of(self.key))
        if self._client is not None:
            self._client.session.flush()  # whoever unpickles it looks for the task
        return _unpickle, (self.key,)

    def __copy__(self) -> Future:
        return Future(self.key, self._client)

    def __deepcopy__(self, _: Any) -> Future:
        return Future(self.key, self._client)

    def __dask_tokenize__(self) -> tuple[str, str]:
        return "Future", text_of(self.key)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return object.__hash__(self)

    def __await__(self) -> Generator[Any, None, Any]:
        client, state = self._bound()
        # A generator, whose frame keeps this future: nobody else may, as in `await client.submit(f)`.
        return (yield from client.await_result(self, state).__await__())

    def __str__(self) -> str:
        return repr(self)

    def __repr__(self) -> str:
        status = "unbound" if self._state is None else self._state.status
        return f"<Future: {status}, key: {self.key!r}>"

    def _repr_html_(self) -> str:
        status = "unbound" if self._state is None else self._state.status
        color = {FINISHED: "#1b9e77", ERROR: "#d95f02", CANCELLED: "#999999"}.get(status, "#7570b3")
        return (
            f'<span style="border-left: 4px solid {color}; padding-left: 6px"><b>Future</b> {status} '
            f"<code>{html.escape(repr(self.key))}</code></span>"
        )


def _unpickle(key: Key) -> Future:
    client = find_client()
    return Future(key, client)


def text_of_future(future: Future, client: Client) -> str:
    """Return the key text of a future that is about to be used in a call of `client`.

    Raises:
        ClosedClientError: its client is closed.
        ForeignFutureError: it belongs to another client.
        UnboundFutureError: it belongs to none.
    """
    owner, state = future._bound()
    if owner is not client:
        if owner.closed:
            raise ClosedClientError(f"future {future.key!r} belongs to a client that is closed")
        raise ForeignFutureError(
            f"future {future.key!r} belongs to another client ({owner.id}); "
            "take it over with client.future(future)"
        )
    if state.status == CANCELLED:
        client.raise_cancelled(state, future.key)
    return state.text
