"""The name of every Redis key and hash field, in one place for Python and Lua alike.

All keys of a namespace share the hash tag `{namespace}`, so that it fits one slot of a Redis Cluster.
The scripts write `K.task` and `F.state`; the loader puts the texts below in their place.
"""

from __future__ import annotations

SCHEMA = 2
"""Version of this layout; a namespace made by another one is refused."""

FIXED = {
    "meta": "meta",  # hash: see META
    "ready": "ready",  # zset: rank + key of ready tasks for any node; score = -user priority, lowest first
    "unsettled": "unsettled",  # set: keys that a script with a spent budget left for the sweep
    "functions": "functions",  # hash: function hash -> number of records that use it
    "clients": "clients",  # zset: client id -> lease deadline, ms
    "nodes": "nodes",  # zset: node -> lease deadline, ms
    "slots": "slots",  # zset: slot that runs a ticket now -> lease deadline, ms
    "idle": "idle",  # zset: slot that waits for a wake-up -> since, ms
    "tickets": "tickets",  # zset: ticket sent and not yet taken -> lease deadline, ms
    "copies": "copies",  # set: keys of which more copies are wanted than any one
    "constraints": "constraints",  # hash: constraint -> number of records
    "unrunnable": "unrunnable",  # hash: constraint that no live node meets -> since when it is known, ms
    "names": "names",  # hash: name of a client with a lease of its own -> id of the client that has it now
    "heirs": "heirs",  # hash: client that lost its name -> client that takes over what it holds
    "datasets": "datasets",  # hash: name -> its holder "#token", newline, the pickled collection
    "failures": "failures",  # list: key, newline, blamed key, newline, error of tasks that ran for nobody
    "undurable": "undurable",  # set: keys in memory that are to be durable and are not yet
    "debris": "debris",  # set: tokens of durable files that no record names any more
    "jobs": "jobs",  # hash: job id -> JSON of what the coordinator is to do, and how far it is
    "counts": "counts",  # hash: see COUNTS
    "watchers": "watchers",  # zset: who looks at the memory of nodes, or records -> deadline, ms; expires
    "recordings": "recordings",  # zset: id of a recording of what runs -> deadline, ms; expires
    "leader": "leader",  # string with a time to live: id of the leading coordinator
}
PREFIXES = {
    "task": "t:",  # hash per key: the task record, see TASK
    "dependents": "d:",  # hash per key: dependent -> "", for every dependent that has a record
    "blob": "b:",  # hash per result or payload, named <token>:<key>: "h" head, "0", "1", ... pieces
    "reply": "re:",  # list with a time to live: what an agent says to one who waits for a result
    "function": "f:",  # string per function hash: the pickled function
    "held": "c:",  # set per client, dataset ("#token") and "!": keys it holds
    "notices": "n:",  # stream per client: changes of state of what it holds
    "lines": "rec:",  # stream with a time to live per recording: what slots noted of the tasks that they ran
    "slot": "s:",  # hash per slot: key -> attempt of every task it owns
    "home_queue": "ready:",  # zset per node: rank + size class + key of ready tasks for it; as `ready`
    "picky": "picky:",  # zset per constraint: rank + key of its ready tasks; as `ready`
    "node_tickets": "tickets:",  # zset per node: those of the tickets that only it takes
    "wake": "w:",  # list per slot: a token says that there is work
    "node": "node:",  # hash per node: see NODE
    "node_slots": "ns:",  # set per node: its slots that run a ticket now
    "node_keys": "nk:",  # set per node: keys with a replica there
    "revoked": "rv:",  # string per key with a time to live: a worker cancelled it, by Celery's revoke
    "mail": "mail:",  # list per node: what its agent is asked to do, see Store.mail
}
META = {
    # random id of the namespace's birth; after another server took over, ".<number>"; after a restart "~<id>"
    # until all that was there before is deleted
    "generation": "gen",
    "restarted": "restarted",  # why, if it was born by a restart
    "run": "run",  # run_id of the server process that the namespace met last
    "schema": "schema",
    "submissions": "submissions",  # counter: rank of the next submission
    "attempts": "attempts",  # counter: the last fencing token given out
    "ticket_ids": "tickets",  # counter
    "capacity": "capacity",  # slots of all live nodes together
    "queue": "queue",  # Celery queue that carries tickets
    "fence": "fence",  # counter: term of the leading coordinator
}
TASK = {
    "core": "s",  # see CORE
    "recipe": "f",  # see RECIPE; absent for scattered data, and for what is durable
    "payload": "p",  # pickled arguments
    "payload_blob": "q",  # token of the blob that holds a large payload
    "deps": "d",  # keys joined by newlines
    "given": "g",  # see GIVEN
    "owner": "o",  # slot of the current or last attempt
    "result": "b",  # size of the result and the name of its type, with a space between
    "value": "v",  # the result, if small
    "replicas": "x",  # lines: where the copies of the result are, if it is large, see REPLICAS
    "contains": "c",  # keys of the futures inside the result, joined by newlines
    "error": "e",  # pickled error, on the task that raised it
    "blame": "l",  # key of the task that raised the error
    "retries": "t",  # retries left
    "deaths": "k",  # lines: how slots died while they ran this task
    "copies": "m",  # number of nodes that are to have a copy of the result; absent means 1
    "copies_on": "mo",  # nodes of which each is to have a copy, joined by newlines
    "constraint": "z",  # canonical JSON: `workers` (nodes or hosts) and `resources` (name -> amount)
    "prefer": "i",  # nodes that should run it, joined by newlines
    "home": "j",  # while ready and in the queue of a node: size class + node
}
CORE = ("state", "needed", "waiting", "attempt", "flags", "holders")
"""What the core of a record says, which nearly every transition reads and writes, hence one field: words with
one space between, and the holders in lines of their own.

- needed: Invariant: number of dependents that are waiting, ready or processing.
- waiting: Invariant: number of deps not in memory, while waiting.
- attempt: fencing token of the current or last attempt, empty before the first; a report counts only while
  processing.
- flags: letters of FLAGS: one look tells what few records have.
- holders: lines "client epoch": who holds it, and its number for the call that took the hold; "@key 0" is the
  result of key, which contains a future of this one; "#token 1" a dataset; "! 0" means that it runs to its
  end though nobody holds it.
"""
RECIPE = ("rank", "priority", "function")
"""What never changes of a task, as words.

- rank: 10 hex digits of submission, 6 of dask.order.
- priority: the user's, higher runs first.
- function: hash of the pickled function.
"""
GIVEN = ("place", "nbytes", "key", "value")
"""Inputs that were there, and small, when the task was submitted. They are part of it from then on: it does
not depend on those keys, and they may be freed. For each three words with one space between, a newline, and
the value.

- place: among all inputs of the task, from 1; its deps are the others, in order.
"""
FLAGS = {
    "payload_blob": "p",
    "replicas": "r",
    "contains": "c",
    "known": "u",  # some record depends on it, or did
    "near": "n",  # some input has or had replicas: where they are may decide on the queue
    "copies": "m",  # copies or copies_on
    "constraint": "k",
    "prefer": "h",
    "forgotten": "f",  # "!" is among its holders
    "durable": "d",  # its result is to outlive all nodes; once it does, the record gives up its lineage
}
"""A letter in `flags` for each field, or fact, that few records have."""
REPLICAS = ("token", "maker", "nbytes")
"""What the first lines of `replicas` say; all others are places: nodes, "@redis" for a blob, or "@durable"
for a file under `mem_durable_url`.

- token: names this version of the bytes, and the blob if there is one: the attempt, or a client's own.
- maker: the slot that made the result, empty if a client brought it.
- nbytes: its size.

Invariant: each place once, at least one; every node is alive and has the key in its `node_keys`.
"""
COUNTS = {
    "freed": "freed",  # results dropped, as nobody wanted them any more
    "remade": "remade",  # tasks begun before that have to run again, as their results are gone and wanted
    "rerun": "rerun",  # tasks that were running in a slot that died, and are ready again
    "stolen": "stolen",  # tasks taken from the queue of another node
}
"""What happened in the namespace since its birth or last restart, for those who watch; no rule rests on it.

Beside these it has the times of steps and tickets, see counts.py.
"""
NODE = {
    "slots": "slots",
    "pid": "pid",
    "pool": "pool",
    "versions": "versions",  # JSON: package -> version
    "shm": "shm",  # bytes free where shared memory is, when the worker began
    "hashseed": "hashseed",  # PYTHONHASHSEED of its environment
    "broker": "broker",  # kind of Celery broker from which it takes tickets: redis, amqp, ...
    "visibility": "visibility",  # seconds of the broker's visibility timeout, if that was set
    "hostname": "hostname",
    "dir": "dir",  # path of the node's folder in shared memory
    "control": "control",  # path of the folder of sockets of its processes
    "replaced": "replaced",  # token of the last request to replace its processes that was carried out
    "memory": "memory",  # JSON: bytes of files, live results, spilled results, the pool, processes
    "limit": "limit",  # bytes of memory that it may use
    "resources": "resources",  # JSON: name -> amount that its tasks may use at a time
    "status": "status",  # running, paused, retiring or stopping; absent means running
    "pace": "pace",  # ms that a task takes on average
    "took": "took",  # when one of its slots took tasks last, ms
}

STATES = ("waiting", "ready", "processing", "memory", "erred", "released", "lost")
ACTIVE = frozenset({"waiting", "ready", "processing"})
LEAVING = frozenset({"retiring", "stopping"})
"""What the status of a node is that takes no more tasks and will be gone."""


class Keys:
    """Builds the Redis keys of one namespace."""

    __slots__ = ("namespace", "prefix")

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.prefix = "{" + namespace + "}:"

    def fixed(self, name: str) -> str:
        """Return one of the keys in `FIXED`."""
        return self.prefix + FIXED[name]

    def of(self, kind: str, name: str) -> str:
        """Return the key of a `kind` in `PREFIXES` that belongs to `name`."""
        return self.prefix + PREFIXES[kind] + name

    def own_queue(self, node: str) -> str:
        """Return the name of the Celery queue that one node alone takes tickets from."""
        return f"celery-mem.{self.namespace}@{node}"

    def blob(self, token: str, key: str) -> str:
        """Return the key of the blob that `token` names."""
        return f"{self.prefix}{PREFIXES['blob']}{token}:{key}"


# --- names of slots: `<node>|<process identity>.<n>` -----------------------------------------------------


def node_of(slot: str) -> str:
    """Return the node that a slot belongs to."""
    return slot.rpartition("|")[0]


def process_of(slot: str) -> str:
    """Return the identity of a slot's process."""
    return slot.rpartition("|")[2].partition(".")[0]
