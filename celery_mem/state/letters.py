"""What the agent of a node is asked to do: the messages of its mailbox, see `Store.mail`.

Scripts write `k` (lib/settle.lua), and two more: `d <token>`, drop a copy that was freed (lib/copies.lua);
`x <slot> <attempt> <key>`, stop that attempt as soon as it is void (cancel.lua).
"""

from __future__ import annotations

MOVES = {"p": 3, "f": 3, "s": 2, "k": 2}
"""Number of fields of each message that moves data; the last one is a key, which may hold spaces."""
STOP = "x"
RESTART = "r"


def publish_copy(token: str, reply: str, key: str) -> str:
    """Ask for a transit copy, and for word of it on a reply list."""
    return f"p {token} {reply} {key}"


def fetch_copy(token: str, nbytes: int, key: str) -> str:
    """Ask a node to get a copy from wherever there is one, and become a replica."""
    return f"f {token} {nbytes} {key}"


def save_copy(token: str, key: str) -> str:
    """Ask a node that has a copy for a lasting one in Redis."""
    return f"s {token} {key}"


def keep_copy(token: str, key: str) -> str:
    """Ask a node that has a copy for one that outlives all nodes."""
    return f"k {token} {key}"


def replace_processes(token: str) -> str:
    """Ask a node to end the processes that run tasks; that it did, it says by `token` in its record."""
    return f"r {token}"
