"""What a client with a name and a lease of its own finds when it comes back: holds of the process before it.

Each process is a client of its own, with its own holds, numbers and notices. A name belongs to one of them.
Whoever claims it becomes the heir of the one before, dead or alive, which is no client any more from then
on; the heir takes over hold after hold. So no notice and no call of the old process can be mistaken for the
new one's.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from celery_mem.client.states import KeyState
from celery_mem.errors import CeleryMemError, ConfigError

if TYPE_CHECKING:
    from celery_mem.client.session import Session

log = logging.getLogger("celery_mem.client")

WAIT_S = 30.0
"""How long the listener may take to tell how the keys that were taken over stand."""


class Legacy:
    """The name of a session, and the keys that it took over.

    Args:
        session: whose name it is.
        name: lasts over processes.
    """

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self.name = name
        self.why_taken = (
            f"another process has become the client {name!r}, and took over what this one held; "
            "only one process at a time can have a name"
        )
        self._before: list[str] = []
        self._kept: dict[str, KeyState] = {}  # with one reference of our own each, until let go
        self._is_complete = threading.Event()

    def claim(self) -> None:
        """Become the client of this name."""
        session = self._session
        self._before = session.store.claim_name(session.id, self.name, session.lease_s)

    def take(self) -> None:
        """Take over what those before held, and wait until it is known how that stands."""
        if not self._before:
            return
        session, store = self._session, self._session.store
        with session.order:
            epoch = session.next_epoch()
            # Ahead of the first notice about them.
            for text in dict.fromkeys(t for before in self._before for t in store.held_by(before)):
                state, _ = session.refer(text, epoch)
                self._kept[text] = state
            left = 1
            while left:
                left, tickets = store.inherit(session.id, epoch)
                session.send_tickets(tickets)
            held = set(store.held_by(session.id))
            gone = [state for text, state in self._kept.items() if text not in held]
            session.forget(gone, "the process that held it before let it go")
            for state in gone:
                del self._kept[state.text]
        if not self._is_complete.wait(WAIT_S):
            log.warning("client %s does not know yet how what it took over stands", session.id)

    def hear(self, notice: bytes) -> None:
        """Take in a notice about the name. The listener calls, with `session.lock` held."""
        code = notice.partition(b" ")[2]
        if code == b"i":
            self._is_complete.set()
        elif code == b"t":
            threading.Thread(target=self._give_way, name="celery-mem-name-taken", daemon=True).start()

    def _give_way(self) -> None:
        try:
            if self.is_taken():
                log.warning("client %s ends: %s", self._session.id, self.why_taken)
                self._session.give_way(self.why_taken)
        except CeleryMemError as error:  # the next renewal of the lease tells it again
            log.warning("client %s may have lost its name: %s", self._session.id, error)

    def is_taken(self) -> bool:
        """Whether another client has the name now."""
        return self._session.store.owner_of_name(self.name) not in ("", self._session.id)

    def kept(self) -> list[str]:
        """Return the keys that were taken over and not let go."""
        return list(self._kept)

    def forget(self) -> None:
        """There is nothing any more that was taken over."""
        self._before = []
        self._kept = {}

    def let_go(self, texts: list[str]) -> None:
        """Hold keys that were taken over no longer than their futures live."""
        for text in texts:
            state = self._kept.pop(text, None)
            if state is not None:
                self._session.releases.later(state)


def check_name(name: str | None) -> None:
    """Raise ConfigError unless a client can be called so."""
    is_plain = name and name.isprintable() and (name[0].isalnum() or name[0] == "_") and len(name) <= 200
    if name is not None and not is_plain:
        raise ConfigError(
            "the name of a client is a printable text of up to 200 characters that begins with a letter, "
            f"a digit or '_', not {name!r}"
        )
