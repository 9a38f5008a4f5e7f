"""Four nodes, two coordinators, clients and a Redis, and all that can be done to them."""

from __future__ import annotations

import heapq
import json
import os
import random
import re
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil
from redis.exceptions import RedisError

from celery_mem.state.audit import Violation, audit
from celery_mem.state.keys import NODE, TASK
from celery_mem.state.letters import replace_processes
from celery_mem.state.store import Store
from tests.deployment import Deployment, wait_until
from tests.faults.chaos.jobs import write_flights
from tests.faults.chaos.schedule import WEIGHTS, Step
from tests.faults.proxy import Proxy

NODE_LEASE_S, CLIENT_LEASE_S, LEADER_LEASE_S = 3.0, 6.0, 3.0
LEASES = {
    "node_lease": NODE_LEASE_S,
    "client_lease": CLIENT_LEASE_S,
    "leader_lease": LEADER_LEASE_S,
    "ticket_lease": 2.0,
    "blob_lease": 30.0,
}
NODES = {"w0": ("prefork", 2), "w1": ("prefork", 1), "w2": ("threads", 2), "w3": ("prefork", 2)}
COORDINATORS = ("c0", "c1")
PLAYERS = ("k0", "k1", "k2")
THROUGH_PROXY = frozenset({"w1", "w2", "c1", "k1"})
OFF_CLOCK = frozenset({"w0", "w2", "c0"})
LASTING = frozenset({"k2"})
"""Clients with a name: what comes after a killed one takes over what that held."""
WITHOUT_MEMORY = frozenset({"w1"})
"""Nodes whose results all go to Redis."""
SKEWS_S = (3600.0, -3600.0, 40.0, -40.0, 0.0)
MESSAGE_SAMPLES = 30
CLOCK = Path(__file__).with_name("clock")
OWN_KEYS = re.compile(r"(meta|counts|nodes|slots|idle|tickets|leader|clients|(s|w|node|ns|tickets|n):.*)$")
"""What a cluster has in Redis with nothing to do, clients of its workers too; any other key belongs to a task
or a result."""


class Arena:
    """Everything that runs, and the faults; `tend` restores what was killed when its time has come.

    Args:
        seed: of the clients' jobs.
        patience_s: a result that takes longer counts as a hang.
        jobs: names of the jobs to do; empty means all.
        players: number of clients.
    """

    def __init__(
        self, seed: int, *, patience_s: float = 90.0, jobs: tuple[str, ...] = (), players: int = len(PLAYERS)
    ) -> None:
        self.seed = seed
        self.patience_s = patience_s
        self.jobs = jobs
        self.deployment = it = Deployment(
            ("--appendonly", "yes", "--appendfsync", "everysec"),
            inline_limit=1000,
            slice=0.5,
            allowed_failures=1000,  # a task may meet any number of faults that are not its own
            write_behind=0.2,
            **LEASES,
        )
        self.folder = Path(it.processes.folder)
        write_flights(self.folder)
        self.proxy = Proxy(it.url.removeprefix("unix://"), seed=seed, mean=20_000)
        self.proxy.calm()
        self.players = PLAYERS[:players]
        self.lives: Counter[str] = Counter()
        self.events: dict[str, Callable[[Step, random.Random], bool]] = {
            kind: getattr(self, kind.replace(" ", "_")) for kind in WEIGHTS
        }
        self.stopped_clients: dict[str, float] = {}  # name -> when it went on
        self._due: list[tuple[float, int, Callable[[], None]]] = []  # heap of what is to be restored
        self._n_due = 0
        self._away: set[str] = set()
        self._is_closed = False
        self._messages: list[tuple[str, bytes]] = []
        self._read: dict[str, int] = {}
        for name in OFF_CLOCK:
            self._clock(name).write_bytes(struct.pack("d", 0.0))
        for name in (*COORDINATORS, *NODES):
            self._start(name)
        for name in NODES:
            it.wait_until(lambda n=name: it.redis.exists(it.key(f"node:{it.node(n)}")), f"{name} to join")
        for name in self.players:
            self._start(name)

    # --- life and death ---

    def _clock(self, name: str) -> Path:
        return self.folder / f"clock-{name}"

    def _start(self, name: str) -> None:
        it = self.deployment
        env = {"SHOP_BROKER": it.url, "PYTHONUNBUFFERED": "1"}
        if name in THROUGH_PROXY:
            env["CELERY_MEM_URL"] = self.proxy.url
        if name in OFF_CLOCK:
            env |= {"TEST_CLOCK": str(self._clock(name)), "PYTHONPATH": f"{CLOCK}:{CLOCK.parents[3]}"}
        if name in WITHOUT_MEMORY:
            env["CELERY_MEM_NODE_MEMORY"] = "false"
        self._away.discard(name)
        if name in NODES:
            pool, slots = NODES[name]
            it.start_worker(name, pool=pool, slots=slots, app="tests.worker.shop", env=env, wait=False)
        elif name in COORDINATORS:
            it.start_coordinator(name, env=env)
        else:
            self.lives[name] += 1
            spec = {
                "name": name,
                "life": self.lives[name],
                "seed": self.seed,
                "url": it.url,
                "folder": str(self.folder),
                "patience_s": self.patience_s,
                "jobs": self.jobs,
                "lease": "20s" if name in LASTING else "",
            }
            it.start(name, [sys.executable, "-m", "tests.faults.chaos.player", json.dumps(spec)], env)

    def replace(self, player: str) -> None:
        """Start a client that ended by itself once more."""
        self.deployment.wait_gone(player)
        self._start(player)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._n_due += 1
        heapq.heappush(self._due, (time.monotonic() + seconds, self._n_due, call))

    def tend(self, *, all_of_it: bool = False) -> None:
        """Restore what is due: start again what was killed, let go on what was stopped."""
        while self._due and (all_of_it or self._due[0][0] <= time.monotonic()):
            heapq.heappop(self._due)[2]()
        if self._away or not self.deployment.processes.pids():
            return
        for name in {*NODES, *COORDINATORS} - self.deployment.processes.pids().keys():
            self._start(name)  # it ended by itself, as a worker whose broker forgot its scripts does

    def _process(self, name: str) -> psutil.Process | None:
        pid = self.deployment.processes.pids().get(name)
        if pid is None:
            return None
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(pid)
        return None

    def _family(self, name: str) -> tuple[psutil.Process | None, psutil.Process | None, list[psutil.Process]]:
        """Return main process, agent and pool children of a worker."""
        main = self._process(name)
        agent, children = None, []
        with suppress(psutil.Error):
            for child in main.children() if main else ():
                if "celery_mem.worker.agent" in child.cmdline():
                    agent = child
                elif "celery" in child.cmdline():
                    children.append(child)
        return main, agent, children

    def _kill(self, name: str, chance: random.Random) -> bool:
        process = self._process(name)
        if process is None or name in self._away:
            return False
        process.kill()
        self.deployment.wait_gone(name)
        self._away.add(name)
        self._later(chance.choice([0.0, 0.5, 3.0]), lambda: self._start(name))
        return True

    def _stop(self, processes: list[psutil.Process], seconds: float) -> bool:
        stopped = []
        for process in processes:
            with suppress(psutil.Error):
                process.suspend()
                stopped.append(process)

        def go_on() -> None:
            for process in reversed(stopped):
                with suppress(psutil.Error):
                    process.resume()

        if stopped:
            self._later(seconds, go_on)
        return bool(stopped)

    # --- faults: each returns whether there was anything to break ---

    def kill_a_pool_child(self, step: Step, chance: random.Random) -> bool:
        children = [c for name in NODES for c in self._family(name)[2]]
        if not children:
            return False
        with suppress(psutil.NoSuchProcess):
            chance.choice(children).kill()
            return True
        return False

    def kill_a_worker(self, step: Step, chance: random.Random) -> bool:
        return self._kill(chance.choice(list(NODES)), chance)

    def kill_an_agent(self, step: Step, chance: random.Random) -> bool:
        agent = self._family(chance.choice(list(NODES)))[1]
        if agent is None:
            return False
        with suppress(psutil.NoSuchProcess):
            agent.kill()
        return True

    def kill_a_coordinator(self, step: Step, chance: random.Random) -> bool:
        return self._kill(chance.choice(COORDINATORS), chance)

    def _leader(self) -> str | None:
        with suppress(RedisError):
            leader = self.deployment.redis.get(self.deployment.key("leader"))
            for name, pid in self.deployment.processes.pids().items():
                if leader and f"-{pid}-".encode() in leader:
                    return name
        return None

    def kill_the_leader(self, step: Step, chance: random.Random) -> bool:
        leader = self._leader()
        return leader is not None and self._kill(leader, chance)

    def kill_a_client(self, step: Step, chance: random.Random) -> bool:
        return self._kill(chance.choice(self.players), chance)

    def end_a_worker(self, step: Step, chance: random.Random) -> bool:
        name = chance.choice(list(NODES))
        process = self._process(name)
        if process is None or name in self._away:
            return False
        process.terminate()
        self._away.add(name)

        def start() -> None:
            if name in self.deployment.processes.pids():
                self._later(0.5, start)
            else:
                self._start(name)

        self._later(1.0, start)
        return True

    def stop_a_node(self, step: Step, chance: random.Random) -> bool:
        main, agent, children = self._family(chance.choice(list(NODES)))
        return self._stop([p for p in (main, agent, *children) if p], NODE_LEASE_S * chance.uniform(1.3, 2.5))

    def stop_a_pool_child(self, step: Step, chance: random.Random) -> bool:
        children = [c for name in NODES for c in self._family(name)[2]]
        return bool(children) and self._stop([chance.choice(children)], NODE_LEASE_S * 1.5)

    def stop_an_agent(self, step: Step, chance: random.Random) -> bool:
        agent = self._family(chance.choice(list(NODES)))[1]
        return agent is not None and self._stop([agent], NODE_LEASE_S * chance.uniform(1.3, 2.0))

    def stop_a_coordinator(self, step: Step, chance: random.Random) -> bool:
        process = self._process(chance.choice(COORDINATORS))
        return process is not None and self._stop([process], LEADER_LEASE_S * 1.7)

    def stop_the_leader(self, step: Step, chance: random.Random) -> bool:
        leader = self._leader()
        process = self._process(leader) if leader else None
        return process is not None and self._stop([process], LEADER_LEASE_S * chance.uniform(1.3, 2.0))

    def stop_a_client(self, step: Step, chance: random.Random) -> bool:
        name = chance.choice(self.players)
        process = self._process(name)
        if process is None or not self._stop([process], CLIENT_LEASE_S * 1.6):
            return False
        self.stopped_clients[name] = time.monotonic() + CLIENT_LEASE_S * 1.6
        return True

    def kill_Redis(self, step: Step, chance: random.Random) -> bool:  # noqa: N802
        self.deployment.kill("redis")
        time.sleep(chance.choice([0.0, 0.2, 1.5]))
        self.deployment.start_redis()
        return True

    def cut_connections(self, step: Step, chance: random.Random) -> bool:
        return self.proxy.cut_soon(chance) > 0

    def _blobs(self) -> list[bytes]:
        """Return results of tasks in Redis that can be made again; not payloads, nor what has no lineage."""
        it = self.deployment
        found = []
        for name in it.redis.scan_iter(it.key("b:*"), 1000):
            token, _, key = name.removeprefix(it.key("b:").encode()).partition(b":")
            record = it.key("t:").encode() + key
            recipe, payload = it.redis.hmget(record, TASK["recipe"], TASK["payload_blob"])
            if recipe and payload != token:
                found.append(name)
        return sorted(found)

    def delete_a_blob(self, step: Step, chance: random.Random) -> bool:
        blobs = self._blobs()
        return bool(blobs) and bool(self.deployment.redis.unlink(chance.choice(blobs)))

    def _folders(self) -> list[Path]:
        it = self.deployment
        told = [it.redis.hget(it.key(f"node:{it.node(name)}"), NODE["dir"]) for name in NODES]
        return [Path(path.decode()) for path in told if path]

    def delete_a_file(self, step: Step, chance: random.Random) -> bool:
        files = []
        for folder in self._folders():
            for part in ("files", "spilled"):
                with suppress(OSError):
                    files += [folder / part / name for name in os.listdir(folder / part)]
        if not files:
            return False
        with suppress(FileNotFoundError):
            chance.choice(sorted(files)).unlink()
        return True

    def _take_ticket(self, seconds: float = 1.5) -> tuple[str, bytes] | None:
        """Take a message off the broker as a worker does."""
        queues = ["shop", *(f"celery-mem.mem@{self.deployment.node(name)}" for name in NODES)]
        taken = self.deployment.redis.brpop(queues, timeout=seconds)
        if taken is None:
            return None
        queue, message = taken[0].decode(), taken[1]
        self._messages.append((queue, message))
        del self._messages[:-MESSAGE_SAMPLES]
        return queue, message

    def drop_a_ticket(self, step: Step, chance: random.Random) -> bool:
        return self._take_ticket() is not None

    def repeat_a_ticket(self, step: Step, chance: random.Random) -> bool:
        if (taken := self._take_ticket()) is not None:
            self.deployment.redis.rpush(taken[0], taken[1], taken[1])
        elif self._messages:  # one of long ago
            queue, message = chance.choice(self._messages)
            self.deployment.redis.rpush(queue, message)
        else:
            return False
        return True

    def jump_a_clock(self, step: Step, chance: random.Random) -> bool:
        name, skew = chance.choice(sorted(OFF_CLOCK)), chance.choice(SKEWS_S)
        with self._clock(name).open("r+b") as file:
            file.write(struct.pack("d", skew))
        return True

    def forget_scripts(self, step: Step, chance: random.Random) -> bool:
        self.deployment.redis.script_flush()
        return True

    def replace_processes(self, step: Step, chance: random.Random) -> bool:
        """As `Client.restart_workers` does."""
        node = self.deployment.node(chance.choice(list(NODES)))
        box = self.deployment.key(f"mail:{node}")
        if not self.deployment.redis.exists(self.deployment.key(f"node:{node}")):
            return False
        self.deployment.redis.rpush(box, replace_processes(f"chaos-{step.number}"))
        return True

    def inject(self, step: Step) -> bool:
        """Break what a step says; returns whether there was anything to break."""
        return self.events[step.kind](step, step.chance())

    # --- what clients say ---

    def news(self) -> Iterator[dict[str, Any]]:
        """Yield what clients have said since the last call."""
        for name in self.players:
            with suppress(FileNotFoundError), open(self.folder / f"{name}.log", "rb") as file:
                file.seek(self._read.get(name, 0))
                data = file.read()
                whole = data[: data.rfind(b"\n") + 1]
                self._read[name] = self._read.get(name, 0) + len(whole)
                for line in whole.splitlines():
                    at = line.find(b'{"')  # after what a killed one left of a line
                    with suppress(ValueError):
                        yield json.loads(line[at:]) | {"player": name}

    # --- the end ---

    def calm_down(self) -> None:
        """Break nothing any more, restore all, and have the clients end when their jobs are done."""
        self.proxy.calm()
        for name in OFF_CLOCK:
            self._clock(name).write_bytes(struct.pack("d", 0.0))
        while self._due:
            self.tend(all_of_it=True)
            time.sleep(0.05)
        for name in self.players:
            self.deployment.signal(name, signal.SIGTERM)

    def left(self) -> list[str]:
        """Return keys of tasks, results and clients in Redis; blobs that vanish by themselves are none."""
        it = self.deployment
        prefix = it.key("")
        found = []
        for name in it.redis.scan_iter(prefix + "*", 1000):
            text = name.decode().removeprefix(prefix)
            if not OWN_KEYS.match(text) and not (text.startswith("b:") and it.redis.pttl(name) >= 0):
                found.append(text)
        return sorted(found)

    def files_left(self) -> list[str]:
        """Return files of results that nodes still have."""
        found = []
        for folder in self._folders():
            for part in ("files", "spilled"):
                with suppress(OSError):
                    found += [f"{folder}/{part}/{name}" for name in os.listdir(folder / part)]
        return found

    def close(self) -> list[str]:
        """End everything; returns what is left of it on this machine, processes and files."""
        self._is_closed = True
        name = self.folder.name
        folders = [str(folder) for folder in self._folders()]
        self.proxy.close()
        processes = self.deployment.processes
        for worker in NODES:
            with suppress(KeyError, ProcessLookupError):
                self.deployment.signal(worker, signal.SIGTERM)
        processes.wait_for(lambda: not NODES.keys() & processes.pids().keys(), 30)
        left = [f"{worker} does not end" for worker in NODES if worker in processes.pids()]
        left += [f"files {folder}" for folder in folders if os.path.exists(folder)]
        self.deployment.redis.close()
        processes.close()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if any(name in value for value in process.environ().values()) and process.is_running():
                    left.append(f"process {process.pid}: {' '.join(process.cmdline()[:6])}")
        return left

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_closed:
            return
        self.proxy.close()
        while self._due:
            with suppress(Exception):
                self.tend(all_of_it=True)
        self.deployment.close()


class Auditor:
    """Looks whether a rule stays broken: the cluster is alive, and what one look finds may be a moment's."""

    def __init__(self, store: Store, looks: int = 4) -> None:
        self.store = store
        self.looks = looks
        self._seen: Counter[tuple[str, str, str]] = Counter()

    def look(self) -> list[Violation]:
        """Return what the last looks all found."""
        found = {(v.rule, v.key, v.text): v for v in audit(self.store)}
        self._seen = Counter({known: self._seen[known] + 1 for known in found})
        return [found[known] for known, n in self._seen.items() if n >= self.looks]


def wait_for_calm(what: Callable[[], Any], seconds: float) -> Any:
    """Wait until there is nothing any more; returns what there is at the end."""
    with suppress(AssertionError):
        wait_until(lambda: not what(), "", seconds)
    return what()
