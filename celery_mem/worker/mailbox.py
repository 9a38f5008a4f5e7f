"""What a node's agent is asked to do: at once what takes no time, and what moves data in threads beside."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from celery_mem.errors import CeleryMemError
from celery_mem.state.letters import MOVES, RESTART, STOP
from celery_mem.state.link import Link
from celery_mem.state.store import Store

log = logging.getLogger("celery_mem.agent")

MOST = 500
"""Messages taken at once."""
MOVERS = 2
WAIT_S = 1.0
RETRY_S = 1.0

Mover = Callable[[str, list[str]], None]
"""Does what a message says that moves data: `p`, `f`, `s` or `k` and its fields; the last may hold spaces."""


class Mailbox:
    """Reads the mailbox of one node until it is closed.

    Args:
        node: its name.
        store: whose settings say where Redis is.
        drop: drops copies by their tokens.
        move: see `Mover`; called in two threads of its own.
        stop: gets slot, attempt and key of what is to be stopped once it is void.
        restart: gets the token of a request to replace the processes of the node.
    """

    def __init__(
        self,
        node: str,
        store: Store,
        *,
        drop: Callable[[list[str]], None],
        move: Mover,
        stop: Callable[[str, str, str], None],
        restart: Callable[[str], None],
    ) -> None:
        self.name = store.keys.of("mail", node)
        self.drop = drop
        self.move = move
        self.stop = stop
        self.restart = restart
        self._link = Link.connect(store.settings, blocking=True)
        self._moves: queue.SimpleQueue[tuple[str, list[str]] | None] = queue.SimpleQueue()
        self._closed = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the threads."""
        for target in (self._read_on, *[self._move_on] * MOVERS):
            thread = threading.Thread(
                target=target, name=f"celery-mem-mailbox-{target.__name__}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Stop reading; what is being moved is finished."""
        self._closed = True
        self._link.abort()  # nobody needs to wait until a message comes
        for _ in range(MOVERS):
            self._moves.put(None)
        for thread in self._threads:
            thread.join()
        self._link.close()

    def read_once(self, wait_s: float = WAIT_S) -> int:
        """Wait for messages and do or pass on what they say; returns how many there were."""
        first = self._link.call("BLPOP", self.name, wait_s)
        if first is None:
            return 0
        messages = [first[1], *(self._link.call("LPOP", self.name, MOST) or ())]
        tokens: list[str] = []
        for message in messages:
            verb, _, rest = message.decode().partition(" ")
            if verb == "d":
                tokens += rest.split(" ")
            elif verb in MOVES:
                self._moves.put((verb, rest.split(" ", MOVES[verb] - 1)))
            elif verb == STOP:
                slot, attempt, key = rest.split(" ", 2)
                self.stop(slot, attempt, key)
            elif verb == RESTART:
                self.restart(rest)
            else:
                log.warning("a message that nobody here understands: %r", message[:80])
        if tokens:
            self.drop(tokens)
        return len(messages)

    def _read_on(self) -> None:
        while not self._closed:
            try:
                self.read_once()
            except Exception as error:
                if not self._closed:
                    log.warning("the mailbox cannot be read: %s", error)
                    time.sleep(RETRY_S)

    def _move_on(self) -> None:
        while (message := self._moves.get()) is not None:
            verb, fields = message
            try:
                self.move(verb, fields)
            except CeleryMemError as error:
                log.warning("result %s could not be moved (%s): %s", fields[-1], verb, error)
            except Exception:
                log.exception("result %s could not be moved (%s)", fields[-1], verb)
