"""The listener: one thread that reads the client's notices and brings its key states up to date."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from celery_mem.client.states import CANCELLED, ERROR, FINISHED, PENDING, KeyState
from celery_mem.errors import CeleryMemError
from celery_mem.state.link import Link

if TYPE_CHECKING:
    from celery_mem.client.session import Session

log = logging.getLogger("celery_mem.client")

BLOCK_MS = 10_000
PAGE = 1_000
TRIM_BYTES = 32_768


class Listener(threading.Thread):
    """Reads the notices stream of one client. A broken connection loses nothing: it goes on where it was."""

    def __init__(self, session: Session) -> None:
        super().__init__(name="celery-mem-listener", daemon=True)
        self.session = session
        self.link = Link.connect(session.settings.replace(retry_timeout=5.0), blocking=True)
        self._stream = session.store.keys.of("notices", session.id)
        self.era = 0  # goes up when all notices before are of the past; changed under `session.lock`
        self._last = "0-0"
        self._n_connects = 0
        self._untrimmed = 0  # bytes read and still in the stream

    def run(self) -> None:
        """Read until the session closes."""
        session = self.session
        while not session.closed:
            try:
                era, entries = self.era, self._read()
                if entries:
                    session.apply([fields for _, fields in entries], era)
            except Exception as error:
                if session.closed:
                    return
                if isinstance(error, CeleryMemError):
                    log.warning("notices of %s wait: %s", session.id, error)
                else:
                    log.exception("notices of %s cannot be read", session.id)
                time.sleep(0.2)

    def _read(self) -> list[Any]:
        commands: list[tuple[Any, ...]] = []
        if self._untrimmed >= TRIM_BYTES:
            commands.append(self._trim())
        commands.append(("XREAD", "COUNT", PAGE, "BLOCK", BLOCK_MS, "STREAMS", self._stream, self._last))
        era = self.era
        reply = self.link.batch(commands)[-1]
        if self.link.n_connects != self._n_connects:
            if self._n_connects:
                self.session.renew_soon()  # see at once what Redis knows of this client since it is back
            self._n_connects = self.link.n_connects
        if era != self.era:
            return []
        if not reply:
            if self._untrimmed:
                self.link.batch([self._trim()])
            return []
        entries: list[Any] = reply[0][1]
        self._last = entries[-1][0].decode()
        self._untrimmed += sum(sum(map(len, fields)) for _, fields in entries)
        return entries

    def begin_anew(self) -> None:
        """Take no notice that came before. The caller holds `session.lock`, and deletes the stream then."""
        self.era += 1
        self._last, self._untrimmed = "0-0", 0
        self.link.interrupt()  # it may wait for something after the last notice of a server that is gone

    def _trim(self) -> tuple[Any, ...]:
        """Return the command that drops what was read."""
        self._untrimmed = 0
        ms, _, seq = self._last.partition("-")
        return "XTRIM", self._stream, "MINID", f"{ms}-{int(seq) + 1}"

    def stop(self) -> None:
        """Wake the thread out of its read."""
        self.link.abort()


def apply_notice(state: KeyState, code: int, body: bytes) -> bool:
    """Change `state` as a notice says; returns whether it is final now.

    The status changes last: whoever reads it without the lock finds the rest in place.
    """
    if code == ord("m"):
        state.data = body
        state.status = FINISHED
    elif code == ord("M"):
        state.data = None
        state.status = FINISHED
    elif code == ord("e"):
        state.error = body
        state.status = ERROR
    elif code == ord("l"):
        state.error = b""
        state.reason = body.decode()
        state.status = ERROR
    elif code == ord("c"):
        state.reason = body.decode() or "cancelled by another client"
        state.status = CANCELLED
    else:
        state.status = PENDING
        return False
    return True
