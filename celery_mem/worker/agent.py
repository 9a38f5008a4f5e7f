"""The node agent: a small process beside each worker that says the node lives, and notices when parts of it die.

It runs no user code and waits for nobody's GIL. It ends with its worker, however that ends: it sees that its parent
is another one, gives up the slots whose processes are gone, and signs the node off.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time

from celery_mem.config import Settings
from celery_mem.errors import CeleryMemError
from celery_mem.graph.killed import killed_error
from celery_mem.state.store import Store

log = logging.getLogger("celery_mem.agent")

TICK_S = 0.25


class Agent:
    """Keeps one node's lease.

    Args:
        node: name of the Celery worker.
        parent: pid of its main process.
    """

    def __init__(self, node: str, parent: int, store: Store) -> None:
        self.node = node
        self.parent = parent
        self.store = store
        self.generation = store.generation

    def run_once(self) -> list[str]:
        """Renew the lease; give up slots whose process is gone. Returns those slots."""
        dead = [slot for slot in self.store.heartbeat(self.node) if not is_alive(pid_of(slot))]
        for slot in dead:
            keys, killed, _ = self.store.abandon_slot(slot, self.node, killed_error(slot))
            log.warning("slot %s died with %d tasks, %d of them for good", slot, len(keys), len(killed))
        return dead

    def run(self) -> None:
        """Work until the worker is gone."""
        pause = max(TICK_S, self.store.settings.node_lease / 4)
        due = 0.0
        while os.getppid() == self.parent:
            if time.monotonic() >= due:
                due = time.monotonic() + pause
                self.run_once()
            time.sleep(TICK_S)
        self.sign_off()

    def sign_off(self) -> None:
        """The worker is gone: give up its slots as their processes end, then take the node off the list."""
        deadline = time.monotonic() + self.store.settings.node_lease
        while time.monotonic() < deadline:
            self.run_once()
            if not self.store.leave_node(self.node):
                return
            time.sleep(TICK_S)


def pid_of(slot: str) -> int:
    """Return the process of a slot."""
    return int(slot.rpartition("|")[2].partition(".")[0])


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that ended and waits for its parent does not."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def main() -> None:
    """Entry point: `agent NODE PARENT_PID`, settings as JSON on standard input."""
    node, parent = sys.argv[1], int(sys.argv[2])
    settings = Settings(**json.loads(sys.stdin.buffer.read()))
    # A deployment may signal all processes at once (Heroku does): the agent goes when its worker has gone.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        Agent(node, parent, Store.connect(settings)).run()
    except CeleryMemError as error:
        log.error("agent of %s stops: %s", node, error)
        sys.exit(1)


if __name__ == "__main__":
    main()
