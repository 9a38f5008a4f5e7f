"""The node agent: a small process beside each worker that says the node lives, and sees when parts of it die.

It runs no user code and waits for nobody's GIL. It keeps the node within its memory, drops what was freed,
moves data between hosts, and stops tasks that were cancelled or are out of time. It ends after its worker,
however that ends: it sees that its parent is another one, gives up the slots whose processes are gone, and
signs the node off. A worker that stops in good order tells it so by SIGUSR1 and waits: then what only this
node has is saved to Redis first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import time
from typing import Any

if __name__ == "__main__":
    # Where OpenTelemetry is installed, redis-py imports all of it: 10 MB beside each worker, and nobody is to
    # trace an agent.
    sys.modules["opentelemetry"] = None  # type: ignore[assignment]

from celery_mem.config import Settings
from celery_mem.errors import CeleryMemError, NamespaceResetError
from celery_mem.graph.killed import give_up_slot
from celery_mem.memory.files import NodeFolder
from celery_mem.memory.process import is_alive
from celery_mem.state.keys import NODE, process_of
from celery_mem.state.store import Store, birth_of, node_news
from celery_mem.worker.control import note_generation, noted_generation, remove_control
from celery_mem.worker.housekeeping import Housekeeper
from celery_mem.worker.mailbox import Mailbox
from celery_mem.worker.stopper import Stopper

log = logging.getLogger("celery_mem.agent")

AGENT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Blocked when an agent is started: it listens to them when it is ready to."""
TICK_S = 0.25
EXIT_S = 1.0
"""How long a worker may take to see how one of its pool children ended."""
MANY_EXITS = 100
RETRY_S = 1.0
WATCHED_S = 0.5
"""How often a node tells of its memory while somebody looks at it."""


class Agent:
    """Keeps one node's lease, and its slots' for as long as their processes live.

    Args:
        node: name of the Celery worker.
        parent: pid of its main process.
        news: what `Store.heartbeat` is told of the node when Redis does not know it.
        folder: the node's results; None if all go through Redis.
    """

    def __init__(
        self, node: str, parent: int, news: dict[str, str], store: Store, folder: NodeFolder | None = None
    ) -> None:
        self.node = node
        self.parent = parent
        self.news = news
        self.store = store
        self.is_stopping = False  # the whole deployment is stopped: what ends now was not killed by its task
        self.is_told_to_leave = False  # the worker stopped in good order and waits until the node is gone
        self.house = None if folder is None else Housekeeper(node, parent, folder, store, int(news["limit"]))
        self.stopper = Stopper(node, news["pool"], news.get("control", ""), store, self._note_exit)
        self.mailbox = Mailbox(
            node,
            store,
            drop=_ignore if self.house is None else self.house.drop,
            move=_ignore if self.house is None else self.house.move,
            stop=self.stopper.cancel,
            restart=self._replace_processes,
        )
        self._exits: dict[int, str] = {}  # pid -> how a pool child ended
        self._gone_since: dict[str, float] = {}  # slot whose process is gone, nobody said how yet
        self._due = 0.0
        self._is_known = False
        self._is_watched = False
        self._rejoined = store.n_rejoined

    def renew(self) -> None:
        """Renew the lease of the node and its slots; tell all about it if Redis knows nothing (any more)."""
        pid, status = self.store.link.call(
            "HMGET", self.store.keys.of("node", self.node), NODE["pid"], NODE["status"]
        )
        has_rejoined = self._rejoined != self.store.n_rejoined  # Redis may be in a state of some time before
        self._rejoined = self.store.n_rejoined
        known = pid is not None and not (has_rejoined and not self._is_leaving)
        told = {} if known else self.news
        if self.house is not None:
            if not known and self._is_known:
                self.house.begin_anew()  # its replicas were given up with it, or Redis may know of other ones
            told = told | node_news(memory=self.house.look())
            if not self._is_leaving and status != b"retiring":
                told["status"] = "paused" if self.house.is_paused else "running"
        if status == b"retiring":
            told = {name: value for name, value in told.items() if name != "status"}
        self._is_known = True
        self.store.heartbeat(self.node, **told)

    def bury(self) -> list[str]:
        """Give up slots whose process is gone; returns those that are left."""
        left = []
        for name in self.store.link.call("SMEMBERS", self.store.keys.of("node_slots", self.node)):
            slot = name.decode()
            if (
                self._runs(slot)
                or self.stopper.buries(process_of(slot))
                or (death := self._death(slot)) is None
            ):
                left.append(slot)
                continue
            given_up = give_up_slot(self.store, slot, self.node, death=death)
            self._gone_since.pop(slot, None)
            log.warning("slot %s ended in the middle of %d tasks", slot, len(given_up.keys))
            if given_up.killed:
                log.error("tasks that ended too many processes: %s", ", ".join(given_up.killed))
        return left

    def _death(self, slot: str) -> str | None:
        """Return how the process of a slot ended; empty if it was to end, None if that will be known soon."""
        if self.is_stopping or self.is_told_to_leave or self._field("slots") == "0":
            return ""
        if os.getppid() != self.parent:
            return "its worker ended"
        pid = int(process_of(slot).partition("-")[0])
        since = self._gone_since.setdefault(slot, time.monotonic())
        if pid not in self._exits and self.news["pool"] == "prefork" and time.monotonic() - since < EXIT_S:
            return None
        return self._exits.pop(pid, "its process was gone")

    def _note_exit(self, pid: int, code: int) -> None:
        self._exits[pid] = _name_of_exit(code)
        while len(self._exits) > MANY_EXITS:  # of those that ran no slot, or gave up theirs in good order
            del self._exits[next(iter(self._exits))]

    def _replace_processes(self, token: str) -> None:
        self.stopper.replace_processes(give_back=True)
        self.store.heartbeat(self.node, replaced=token)

    def run(self) -> None:
        """Work until the worker is gone, then until its slots are."""
        if self.house is not None:
            self.house.start()
        if self.stopper.control:
            self.stopper.start()
            self._catch_up()
        self.mailbox.start()
        try:
            self._run()
        finally:
            self.mailbox.close()
            self.stopper.close()
            if self.house is not None:
                self.house.close()

    def _catch_up(self) -> None:
        """End what a restart left that no agent saw: none had started yet, or the last one was killed."""
        noted, generation = noted_generation(self.stopper.control), self.store.generation
        if noted and birth_of(noted) != birth_of(generation) and self.store.why_restarted():
            self.stopper.replace_processes(give_back=False)
        note_generation(self.stopper.control, generation)

    def _run(self) -> None:
        in_touch = time.monotonic()
        while True:
            try:
                now = time.monotonic()
                self._is_watched = self.store.check_generation()
                if self._is_leaving and self._sign_off():
                    return
                self._renew_when_due()
                self.bury()
                if self.house is not None:
                    self.house.look_for_deaths()
                in_touch = now
            except NamespaceResetError:
                log.warning("the namespace was reset; node %s joins the new one", self.node)
                self._due = 0.0
                self._rejoin()
                continue  # at once: whoever asked for a restart waits for the node
            except CeleryMemError as error:
                log.warning("node %s: %s", self.node, error)
                if self._is_leaving and time.monotonic() - in_touch > self.store.settings.node_lease:
                    return  # the lease is over by now, and whoever finds Redis again sees to it
                time.sleep(RETRY_S)
            time.sleep(TICK_S)

    @property
    def _is_leaving(self) -> bool:
        return self.is_told_to_leave or os.getppid() != self.parent

    def _renew_when_due(self) -> None:
        now = time.monotonic()
        pause = max(TICK_S, self.store.settings.node_lease / 4)
        if now >= self._due or (self._is_watched and now >= self._due - pause + WATCHED_S):
            self.renew()
            self._due = now + pause

    def _runs(self, slot: str) -> bool:
        process = process_of(slot)
        if self.is_told_to_leave and process.partition("-")[0] == str(self.parent):
            return False  # it only waits for us
        return is_alive(process)

    def _sign_off(self) -> bool:
        """Without its worker the node takes no tickets; returns whether it is gone, or another worker's."""
        left = self.bury()
        if self._field("pid") not in (None, str(self.parent)):
            return True  # a worker of the same name has started; its agent has taken over
        if left or self._field("slots") != "0":
            self.store.heartbeat(self.node, slots="0", status="stopping")
        if left:
            return False
        if self.house is not None and self.is_told_to_leave:
            self.house.save_unique(self._renew_when_due)
            self.is_told_to_leave = os.getppid() == self.parent
        # Its tickets are left to the coordinator, like those of all that it gives back.
        while not (leave := self.store.leave_node(self.node)).is_over:
            if leave.slots:
                return False
        return True

    def _rejoin(self) -> None:
        try:
            if self.store.why_restarted():
                self.stopper.replace_processes(give_back=False)
            self.store.rejoin()
            if self.stopper.control:
                note_generation(self.stopper.control, self.store.generation)
        except CeleryMemError as error:
            log.warning("node %s: %s", self.node, error)
            time.sleep(RETRY_S)
            return
        if self.house is not None:
            self.house.begin_anew(self.store.generation)

    def _field(self, name: str) -> str | None:
        value = self.store.link.call("HGET", self.store.keys.of("node", self.node), NODE[name])
        return None if value is None else str(value.decode())


def _ignore(*_: Any) -> None:
    """Without node memory there is nothing to drop or to move."""


def _name_of_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def main() -> None:
    """Entry point: `agent NODE PARENT_PID`, settings and news of the node as JSON on standard input."""
    node, parent = sys.argv[1], int(sys.argv[2])
    told = json.loads(sys.stdin.buffer.read())
    logging.basicConfig(format="[%(asctime)s: %(levelname)s/%(name)s] %(message)s", level=logging.INFO)
    settings = Settings(**told["settings"])
    settings = settings.replace(
        # It cannot send tickets, so it reserves none: the coordinator sees the work that it gives back.
        ticket_lease=0.001,
        # Short, so that it sees the end of its worker while Redis is away too.
        retry_timeout=RETRY_S,
        # A connection that died unseen must not cost it the lease.
        reply_timeout=min(settings.reply_timeout, max(RETRY_S, settings.node_lease / 3)),
    )
    folder = NodeFolder.open(told["news"]["dir"]) if told["news"].get("dir") else None
    control = told["news"].get("control", "")
    try:
        _serve(node, parent, settings, told["news"], folder)
    finally:
        if os.getppid() != parent or signal.SIGUSR1 in _signalled:
            if folder is not None:
                folder.destroy()
            elif control:
                remove_control(control)


_signalled: set[int] = set()


def _serve(
    node: str, parent: int, settings: Settings, news: dict[str, Any], folder: NodeFolder | None
) -> None:
    agent = None

    def note(number: int, _: object) -> None:
        # A deployment may signal all processes at once, as Heroku does: the agent goes after its worker.
        _signalled.add(number)
        if agent is not None:
            agent.is_stopping = bool(_signalled & {signal.SIGTERM, signal.SIGINT})
            agent.is_told_to_leave = signal.SIGUSR1 in _signalled

    for number in AGENT_SIGNALS:
        signal.signal(number, note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, AGENT_SIGNALS)  # those that came before are heard now
    while True:
        try:
            store = Store.connect(settings)
            break
        except CeleryMemError as error:
            log.warning("node %s: %s", node, error)
            if os.getppid() != parent or signal.SIGUSR1 in _signalled:
                return
            time.sleep(RETRY_S)
    agent = Agent(node, parent, news, store, folder)
    agent.is_told_to_leave = signal.SIGUSR1 in _signalled
    with contextlib.closing(store.link):
        agent.run()


if __name__ == "__main__":
    main()
