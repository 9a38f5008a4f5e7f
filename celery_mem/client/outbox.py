"""Small submissions on their way: what comes close together is sent together.

A script call costs several times what it costs per task. A loop that submits one task after the other would
pay it for each; so small calls put their tasks here, and they are sent by whoever waits for a result, by the
next call that needs them in Redis, when there are enough, or by the keeper thread some milliseconds later.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from celery_mem.client.parcels import Parcel
from celery_mem.errors import (
    CeleryMemError,
    MissingKeyError,
    StateLostError,
    UnknownDependencyError,
    UnknownFunctionError,
)
from celery_mem.graph.calls import Function
from celery_mem.graph.keys import key_of

if TYPE_CHECKING:
    from celery_mem.client.session import Session
    from celery_mem.client.states import KeyState

log = logging.getLogger("celery_mem.client")

SMALL_CALL = 32
"""Calls of up to so many tasks wait here; larger ones are sent at once."""
ENOUGH = 128
"""Tasks that are sent without waiting for more."""
SMALL_CODE = 2_048
"""A function of up to so many bytes goes along with each call, which costs less than to be asked for it."""


class Outbox:
    """Tasks that were submitted and not sent. All methods want `session.order` held."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._parcels: list[tuple[Parcel, list[KeyState]]] = []  # with the states of the keys that each holds
        self._sending: list[Parcel] = []
        self._functions: dict[str, Function] = {}
        self._n_tasks = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits; may be asked without the lock."""
        return not self._parcels

    def add(self, parcel: Parcel, states: list[KeyState]) -> None:
        """Take over the tasks of a call. If they cannot be sent later, their futures say why."""
        if not self._parcels:
            self._session.releases.ring()
        self._parcels.append((parcel, states))
        self._functions.update(parcel.functions)
        self._n_tasks += len(parcel.tasks)
        if self._n_tasks >= ENOUGH:
            self.flush()

    @property
    def unsent(self) -> list[Parcel]:
        """What waits, or is being sent."""
        return [*self._sending, *(parcel for parcel, _ in self._parcels)]

    def flush(self) -> None:
        """Send what waits. Errors go to the futures of the calls that they concern."""
        if not self._parcels:
            return
        parcels, self._parcels = self._parcels, []
        functions, self._functions = self._functions, {}
        self._n_tasks = 0
        try:
            self._send([p for p, _ in parcels], functions)
        except UnknownDependencyError:
            # Nothing was written. One call is at fault; the others must not suffer for it.
            for parcel, states in parcels:
                try:
                    self._send([parcel], functions)
                except UnknownDependencyError as error:
                    self._session.fail(states, as_missing_key(error, self._session.lost_keys))
                except Exception as error:
                    self._session.fail(states, error)
        except Exception as error:
            self._session.fail([s for _, states in parcels for s in states], error)
        except BaseException as error:  # Ctrl-C: it is not known whether they arrived
            self._session.fail([s for _, states in parcels for s in states], error)
            raise

    def _send(self, parcels: list[Parcel], functions: Mapping[str, Function]) -> None:
        tasks = [t for p in parcels for t in p.tasks]
        tasks = [t._replace(order=i) if t.order != i else t for i, t in enumerate(tasks)]
        names = dict.fromkeys(t.function for t in tasks)
        used = [functions[name] for name in names]
        known = self._session.known_functions
        pairs = [(f.hash, b"" if f.hash in known and len(f.code) > SMALL_CODE else f.code) for f in used]
        with self.sending(parcels):
            try:
                self._session.submit([(tasks, pairs)])
            except UnknownFunctionError:
                self._session.submit([(tasks, [(f.hash, f.code) for f in used])])
        known.update(names)

    @contextlib.contextmanager
    def sending(self, parcels: list[Parcel]) -> Iterator[None]:
        """While they are sent: if Redis loses them meanwhile, whoever sends them does so once more."""
        before, self._sending = self._sending, parcels
        try:
            yield
        finally:
            self._sending = before

    def forget(self) -> None:
        """Drop what waits, as after a fork."""
        self._parcels = []


def as_missing_key(error: UnknownDependencyError, lost: Mapping[str, str]) -> CeleryMemError:
    """Say in keys what a script said of a dependency without a record.

    Args:
        lost: keys that Redis lost, and why.
    """
    dep, _, task = error.detail.partition(" of ")
    if dep in lost:
        return StateLostError(key_of(dep), lost[dep])
    return MissingKeyError(key_of(dep), key_of(task))
