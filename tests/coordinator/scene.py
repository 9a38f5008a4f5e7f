"""A namespace, a coordinator in it, nodes that only say that they are there, and a clock."""

from __future__ import annotations

from celery_mem.coordinator.daemon import Coordinator
from celery_mem.memory import blobs
from celery_mem.memory.serialize import dumps
from celery_mem.state.audit import read
from celery_mem.state.store import REDIS, NewData, NewTask, Store, Tickets, node_news


class Scene:
    """What a test of duties works on; what is outside of Redis ends here."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.sent: list[Tickets] = []
        self.stopped: list[str] = []
        self.deleted: list[str] = []
        self.coordinator = Coordinator(store, self)
        self.now_s = 0.0
        store.renew_client("alice", join=True)

    # --- the outside ---

    def send_tickets(self, tickets: Tickets) -> None:
        if tickets:
            self.sent.append(tickets)

    def stop_worker(self, node: str) -> None:
        self.stopped.append(node)

    def delete_queue(self, queue: str) -> None:
        self.deleted.append(queue)

    # --- time ---

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        assert self.store.now_ms is not None
        self.store.now_ms += int(seconds * 1000)

    def run(self) -> dict[str, int]:
        return self.coordinator.run_once(self.now_s)

    def run_for(self, seconds: float, step: float = 0.5) -> None:
        """Let the coordinator and the agents work while time passes; nodes keep their leases."""
        end = self.now_s + seconds
        while self.now_s < end:
            self.run()
            self.obey()
            self.pass_time(step)
            self.store.renew_client("alice")
            for node in self.store.node_infos():
                self.store.heartbeat(node)
        self.run()

    # --- tasks and data ---

    def submit(self, *keys: str, chain: bool = False, hold: bool = True, constraint: str = "") -> None:
        tasks = [
            NewTask(
                key,
                "f",
                b"payload",
                deps=keys[i - 1 : i] if chain else (),
                order=i,
                hold=hold or key == keys[-1],
                constraint=constraint,
            )
            for i, key in enumerate(keys)
        ]
        self.store.submit("alice", 1, tasks, [("f", b"code")])

    def states(self) -> dict[str, str]:
        return {key: row.state for key, row in read(self.store).records.items()}

    def node(self, name: str, *, slots: int = 1, **news: object) -> None:
        """A node joins, or says something new."""
        told = {"slots": str(slots), "dir": f"/dev/shm/{name}", "status": "running", **news}
        self.store.heartbeat(name, queue="queue", **node_news(**told))

    def data(self, key: str, nbytes: int, *places: str) -> None:
        """A client brings data that is on some nodes."""
        self.store.put("alice", 1, [NewData(key, nbytes, "bytes", "n", token_of(key), (), places[0])])
        for place in places[1:]:
            assert self.store.gain(place, [(key, token_of(key))]) == []

    def places(self, *keys: str) -> list[set[str]]:
        located = self.store.locate(keys)
        return [set() if found is None else set(found.places) for found in located]

    def loads(self) -> dict[str, int]:
        """Bytes on each node."""
        found = {}
        for node in self.store.node_infos():
            located = self.store.locate(self.store.on_node(node))
            found[node] = sum(r.nbytes for r in located if r is not None)
        return found

    # --- agents ---

    def mail(self, node: str) -> list[str]:
        """Take all out of a mailbox."""
        name = self.store.keys.of("mail", node)
        messages = self.store.link.call("LRANGE", name, 0, -1)
        self.store.link.call("DEL", name)
        return [m.decode() for m in messages]

    def obey(self, *nodes: str) -> None:
        """Do what agents are asked for; all of them if none is named."""
        for node in nodes or self.store.node_infos():
            for message in self.mail(node):
                verb, *fields = message.split(" ", 3)
                if verb == "f":
                    self.store.gain(node, [(fields[2], fields[0])])
                elif verb == "s":
                    self._save(fields[1], fields[0])

    def _save(self, key: str, token: str) -> None:
        name = self.store.keys.blob(token, key)
        blobs.write(
            self.store.link, blobs.write_commands(name, dumps(key), piece_bytes=1_000_000, lease_s=60)
        )
        self.store.gain(REDIS, [(key, token)])

    # --- jobs ---

    def post(self, kind: str, **asked: object) -> str:
        """Ask for a job as a client does; returns its name."""
        name = f"{kind}-1"
        job = {"kind": kind, "status": "running", "reason": "", "done": 0, "total": 0}
        self.store.post_job(name, job | asked)
        return name

    def answer(self, name: str) -> bytes | None:
        """Take the answer to a job."""
        found: bytes | None = self.store.link.call("LPOP", self.store.keys.of("reply", name))
        return found


def token_of(key: str) -> str:
    return "t-" + key.replace(" ", "_")


def fresh_coordinator(scene: Scene) -> None:
    """Replace the coordinator by one that knows nothing."""
    scene.store.link.call("UNLINK", scene.store.keys.fixed("leader"))
    scene.coordinator = Coordinator(scene.store, scene)
