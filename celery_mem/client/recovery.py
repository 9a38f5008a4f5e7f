"""What a client does when Redis lost track of it: it takes its holds again, and makes again what is gone.

That is so when its lease ran out while it was cut off, when a server took over that lacks the last writes,
and when Redis comes back empty. Whatever Redis still knows counts; of the rest the client sends again what it
knows how to make: unfinished calls with all that they depend on, and finished results whose values came with
their notices. What is left are futures that say so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from celery_mem.client.parcels import CHUNK_TASKS, LAST_ORDER, Parcel, cuts, lineage
from celery_mem.client.states import ERROR, FINISHED, PENDING, KeyState
from celery_mem.errors import StateLostError
from celery_mem.graph.calls import Function
from celery_mem.graph.errors import encode_error
from celery_mem.graph.keys import key_of
from celery_mem.memory import blobs
from celery_mem.memory.seal import Kind
from celery_mem.memory.serialize import unpickled
from celery_mem.state.store import NewData, NewTask

if TYPE_CHECKING:
    from celery_mem.client.session import Session

log = logging.getLogger("celery_mem.client")


class Recovery:
    """One such look. All of it happens under `session.order`: nobody takes or drops holds meanwhile.

    Args:
        why: what happened, for the errors of futures that cannot go on.
    """

    def __init__(self, session: Session, why: str) -> None:
        self._session = session
        self._why = why
        self._store = session.store

    def run(self) -> None:
        """Take all holds again, drop those that nobody here has any more, and make again what is gone."""
        session = self._session
        session.known_functions.clear()
        with session.lock:
            session.listener.begin_anew()
            states = list(session.states.values())
        unknown = self._hold([(s.text, s.epoch) for s in states])
        self._release_others()
        gone = [s for s in states if s.text in unknown]
        if gone:
            self._make_again(gone)

    def _hold(self, holds: Sequence[tuple[str, int]]) -> set[str]:
        """Hold keys again; returns those that Redis does not know."""
        unknown: set[str] = set()
        for start in range(0, len(holds), CHUNK_TASKS) or (0,):
            found, tickets = self._store.hold_again(
                self._session.id,
                holds[start : start + CHUNK_TASKS],
                begin=start == 0,
                lease_s=self._session.lease_s,
            )
            unknown.update(found)
            self._session.send_tickets(tickets)
        return unknown

    def _release_others(self) -> None:
        """What was released in the writes that are missing is held again by nobody."""
        session = self._session
        lent = {task.key for parcel in session.outbox.unsent for task in parcel.tasks}
        held = self._store.held_by(session.id)
        others = [t for t in held if t not in session.states and t not in lent]
        for start in range(0, len(others), CHUNK_TASKS):
            session.send_tickets(self._store.release(session.id, others[start : start + CHUNK_TASKS]))

    # --- what is gone ---

    def _make_again(self, gone: Sequence[KeyState]) -> None:
        self._bring_values([s for s in gone if s.status == FINISHED and s.data is not None])
        unsent = self._session.outbox.unsent
        kept = [*unsent, *(s.parcel for s in gone if s.parcel is not None)]
        tasks, functions, payloads = self._what_can_be_made(lineage(kept))
        wanted = {s.text: s for s in gone if not (s.status == ERROR or s.data is not None)}
        lost = self._lost(wanted, tasks, unsent)
        with self._session.lock:
            for text, state in wanted.items():
                if text in tasks:
                    state.status = PENDING  # where it was finished, its large result is gone with Redis
        if tasks:
            self._submit(list(tasks.values()), functions, payloads, wanted)
        self._give_up(lost)
        log.warning("%s: of %d keys that are gone, %d cannot be made again", self._why, len(gone), len(lost))

    def _lost(
        self, wanted: Mapping[str, KeyState], tasks: Mapping[str, NewTask], unsent: Sequence[Parcel]
    ) -> list[KeyState]:
        """Return what cannot be made; not what somebody is about to send, who will see for himself."""
        to_come = self._session.bringing | {t.key for parcel in unsent for t in parcel.tasks}
        return [s for text, s in wanted.items() if text not in tasks and text not in to_come]

    def _bring_values(self, states: Sequence[KeyState]) -> None:
        """Put finished results back that are known here."""
        for state in states:
            assert state.data is not None
            data = NewData(state.text, len(state.data), "", "v", state.data)
            self._session.send_tickets(self._store.put(self._session.id, state.epoch, [data]))

    def _what_can_be_made(
        self, parcels: Sequence[Parcel]
    ) -> tuple[dict[str, NewTask], dict[str, Function], dict[str, bytes]]:
        """Return the tasks whose inputs are there or can be made, their functions and large payloads."""
        tasks = {t.key: t for p in reversed(parcels) for t in p.tasks}  # the first under a key counts
        outside = list({dep for t in tasks.values() for dep in t.deps if dep not in tasks})
        known: set[str] = set()
        for start in range(0, len(outside), CHUNK_TASKS):
            page = outside[start : start + CHUNK_TASKS]
            found = self._store.link.batch([("EXISTS", self._store.keys.of("task", text)) for text in page])
            known.update(text for text, exists in zip(page, found, strict=True) if exists)
        functions: dict[str, Function] = {}
        payloads: dict[str, bytes] = {}
        made: dict[str, NewTask] = {}
        for parcel in parcels:
            functions |= parcel.functions
            payloads |= parcel.blobs
            for task in parcel.tasks:
                is_whole = not task.payload_blob or task.payload_blob in payloads
                if is_whole and all(dep in made or dep in known for dep in task.deps):
                    made.setdefault(task.key, task)
        return made, functions, payloads

    def _submit(
        self,
        tasks: Sequence[NewTask],
        functions: dict[str, Function],
        payloads: dict[str, bytes],
        wanted: dict[str, KeyState],
    ) -> None:
        """Send tasks again: under their old holds; what nobody waits for is held until all are there."""
        session = self._session
        loan = session.next_epoch()
        borrowed: list[str] = []
        rank: int | None = None
        for start, end in cuts(tasks):
            chunk = []
            for i, task in enumerate(tasks[start:end], start):
                state = wanted.get(task.key) or session.states.get(task.key)
                if state is None:
                    borrowed.append(task.key)
                epoch = loan if state is None else state.epoch
                chunk.append(task._replace(hold=True, epoch=epoch, order=min(i, LAST_ORDER)))
                if task.payload_blob:
                    self._write_payload(task, payloads[task.payload_blob])
            codes = [(name, functions[name].code) for name in dict.fromkeys(t.function for t in chunk)]
            rank, tickets = self._store.submit(session.id, loan, chunk, codes, generation=rank)
            session.send_tickets(tickets)
        for start in range(0, len(borrowed), CHUNK_TASKS):
            session.send_tickets(self._store.release(session.id, borrowed[start : start + CHUNK_TASKS]))

    def _write_payload(self, task: NewTask, data: bytes) -> None:
        settings = self._session.settings
        name = self._store.keys.blob(task.payload_blob, task.key)
        commands = blobs.write_commands(
            name, unpickled(data), piece_bytes=settings.piece_bytes, lease_s=settings.blob_lease
        )
        blobs.write(self._session.bulk, commands)

    def _give_up(self, states: Sequence[KeyState]) -> None:
        session = self._session
        with session.lock:
            for state in states:
                if session.states.get(state.text) is state:
                    del session.states[state.text]
                why = f"{self._why}, and this client cannot make it again"
                session.lost_keys[state.text] = why
                error = encode_error(StateLostError(key_of(state.text), why), key=state.text)
                state.error = session.seal.close(Kind.ERROR, "", error)
                state.data, state.status = None, ERROR
                session.finish(state)
