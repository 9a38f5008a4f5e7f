"""The node agent: a small process beside each worker that says the node lives, and sees when parts of it die.

It runs no user code and waits for nobody's GIL. It ends after its worker, however that ends: it sees that its
parent is another one, gives up the slots whose processes are gone, and signs the node off.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time

from celery_mem.config import Settings
from celery_mem.errors import CeleryMemError, NamespaceResetError
from celery_mem.graph.killed import give_up_slot
from celery_mem.state.keys import NODE
from celery_mem.state.store import Store
from celery_mem.worker.process import is_alive

log = logging.getLogger("celery_mem.agent")

TICK_S = 0.25
RETRY_S = 1.0


class Agent:
    """Keeps one node's lease, and its slots' for as long as their processes live.

    Args:
        node: name of the Celery worker.
        parent: pid of its main process.
        news: what `Store.heartbeat` is told of the node when Redis does not know it.
    """

    def __init__(self, node: str, parent: int, news: dict[str, str], store: Store) -> None:
        self.node = node
        self.parent = parent
        self.news = news
        self.store = store
        self.is_stopping = False  # the whole deployment is stopped: what ends now was not killed by its task

    def renew(self) -> None:
        """Renew the lease of the node and its slots; tell all about it if Redis knows nothing (any more)."""
        known = self.store.link.call("EXISTS", self.store.keys.of("node", self.node))
        self.store.heartbeat(self.node, **({} if known else self.news))

    def bury(self) -> list[str]:
        """Give up slots whose process is gone; returns those that are left."""
        left = []
        for name in self.store.link.call("SMEMBERS", self.store.keys.of("node_slots", self.node)):
            slot = name.decode()
            if is_alive(process_of(slot)):
                left.append(slot)
                continue
            is_death = not (self.is_stopping or self._field("slots") == "0")
            given_up = give_up_slot(self.store, slot, self.node, is_death=is_death)
            log.warning("slot %s ended in the middle of %d tasks", slot, len(given_up.keys))
            if given_up.killed:
                log.error("tasks that ended too many processes: %s", ", ".join(given_up.killed))
        return left

    def run(self) -> None:
        """Work until the worker is gone, then until its slots are."""
        pause = max(TICK_S, self.store.settings.node_lease / 4)
        due = 0.0
        in_touch = time.monotonic()
        while True:
            is_over = os.getppid() != self.parent
            try:
                now = time.monotonic()
                if is_over and self._sign_off():
                    return
                if now >= due:
                    self.renew()
                    due = now + pause
                self.bury()
                in_touch = now
            except NamespaceResetError:
                log.warning("the namespace was reset; node %s joins the new one", self.node)
                due = 0.0
                self._rejoin()
            except CeleryMemError as error:
                log.warning("node %s: %s", self.node, error)
                if is_over and time.monotonic() - in_touch > self.store.settings.node_lease:
                    return  # the lease is over by now, and whoever finds Redis again sees to it
                time.sleep(RETRY_S)
            time.sleep(TICK_S)

    def _sign_off(self) -> bool:
        """Without its worker the node takes no tickets; returns whether it is gone, or another worker's."""
        left = self.bury()
        if self._field("pid") not in (None, str(self.parent)):
            return True  # a worker of the same name has started; its agent has taken over
        if left:
            if self._field("slots") != "0":
                self.store.heartbeat(self.node, slots="0")
            return False
        return not self.store.leave_node(self.node)

    def _rejoin(self) -> None:
        try:
            self.store.generation = Store.connect(self.store.settings, self.store.link).generation
        except CeleryMemError as error:
            log.warning("node %s: %s", self.node, error)

    def _field(self, name: str) -> str | None:
        value = self.store.link.call("HGET", self.store.keys.of("node", self.node), NODE[name])
        return None if value is None else str(value.decode())


def process_of(slot: str) -> str:
    """Return the identity of a slot's process: slots are called `<node>|<identity>.<n>`."""
    return slot.rpartition("|")[2].partition(".")[0]


def main() -> None:
    """Entry point: `agent NODE PARENT_PID`, settings and news of the node as JSON on standard input."""
    node, parent = sys.argv[1], int(sys.argv[2])
    told = json.loads(sys.stdin.buffer.read())
    logging.basicConfig(format="[%(asctime)s: %(levelname)s/%(name)s] %(message)s", level=logging.INFO)
    settings = Settings(**told["settings"]).replace(
        # It cannot send tickets, so it reserves none: the coordinator sees the work that it gives back.
        ticket_lease=0.001,
        # Short, so that it sees the end of its worker while Redis is away too.
        retry_timeout=RETRY_S,
    )
    agent = None

    def stop(*_: object) -> None:
        # A deployment may signal all processes at once, as Heroku does: the agent goes after its worker.
        if agent is not None:
            agent.is_stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    while os.getppid() == parent:
        try:
            store = Store.connect(settings)
            break
        except CeleryMemError as error:
            log.warning("node %s: %s", node, error)
            time.sleep(RETRY_S)
    else:
        return
    agent = Agent(node, parent, told["news"], store)
    agent.run()


if __name__ == "__main__":
    main()
