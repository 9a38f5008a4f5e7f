"""Compares the files of this host's nodes with the records in Redis.

Like `celery_mem.state.audit` it reads one thing after another, so on a namespace at work only what two looks
in a row name is a fault.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping

from celery_mem.memory.durable import durable_files
from celery_mem.memory.files import NodeFolder
from celery_mem.memory.process import is_alive
from celery_mem.memory.roots import dead_folders, possible_roots
from celery_mem.state.audit import Violation, read
from celery_mem.state.store import DURABLE, Location, Store

RULES = {
    "file without key": "a node has only results that a record places there, under the version it names",
    "copy without file": "a copy that a record names is in its node's folder, or where it was made",
    "dead folder": "nothing is left of a worker that is gone",
    "durable file without key": "under mem_durable_url are only results that a record keeps there",
    "durable file missing": "the durable file that a record names is there",
}
"""Every rule that `audit_files` checks, by the name that its violations carry."""
YOUNG_S = 60.0
"""A file may be so much older than the report that Redis gets of it."""
_PAGE = 500


class FileViolation(Violation):
    """One broken rule of files; its key is the key text of a result, the token of a file or a path."""

    @property
    def meaning(self) -> str:
        """What the rule says."""
        return RULES[self.rule]


def audit_files(store: Store) -> list[FileViolation]:
    """Check the nodes of a namespace whose folders are on this host, and this user's folders of dead workers.

    An empty list means that every rule in `RULES` holds. Costs a look at each file.
    """
    found = []
    for node, info in store.node_infos().items():
        folder = NodeFolder.open(str(info.get("dir", "")))
        if folder is None:
            continue  # it is of another host, or has none
        started, copies = time.time(), [place for page in copies_on(store, node) for place in page]
        found += [
            FileViolation("copy without file", place.key, f"({place.token}) is not in {folder.path}")
            for place in copies
            if not is_here(folder, place, node)
        ]
        found += [
            FileViolation("file without key", token, f"is in {folder.path} and no record of {node} names it")
            for token in unknown_files(folder, {place.token for place in copies}, started)
        ]
    for root in possible_roots(store.settings.shm_folder):
        found += [FileViolation("dead folder", path, "is there still") for path in dead_folders(root)]
    return [*found, *_audit_durable(store)]


def _audit_durable(store: Store) -> list[FileViolation]:
    files = durable_files(store.settings)
    if files is None:
        return []
    named = durable_names(store)  # first: what is named by then is there by now, or it was freed meanwhile
    there = dict(files.files())
    found = [
        FileViolation("durable file missing", key, f"({token}) is not under {files.url}")
        for token, key in named.items()
        if key and token not in there
    ]
    return found + [
        FileViolation("durable file without key", token, f"is under {files.url} and no record names it")
        for token in unknown_durable(store, there, durable_names(store))
    ]


def durable_names(store: Store) -> dict[str, str]:
    """Return the durable files that records name: token -> key; and those that are to be deleted."""
    contents = read(store)
    named = {row.token: key for key, row in contents.records.items() if DURABLE in row.places}
    return dict.fromkeys(contents.debris, "") | named


def unknown_durable(store: Store, there: Mapping[str, float], named: Mapping[str, str]) -> list[str]:
    """Return the tokens of durable files that no record names, but those of which Redis may be told yet."""
    old = time.time() - max(YOUNG_S, store.settings.blob_lease)
    return sorted(token for token, written in there.items() if token not in named and written < old)


def remove_unknown_durable(store: Store) -> list[str]:
    """Delete the durable files of this namespace that no record names; returns their tokens."""
    files = durable_files(store.settings)
    if files is None:
        return []
    there = dict(files.files())
    unknown = unknown_durable(store, there, durable_names(store))
    for token in unknown:
        files.drop(token)
    return unknown


def copies_on(store: Store, node: str) -> Iterator[list[Location]]:
    """Read, page by page, which results have a copy on a node."""
    keys = store.on_node(node)
    for start in range(0, len(keys), _PAGE):
        found = store.locate(keys[start : start + _PAGE])
        yield [place for place in found if place is not None and node in place.places]


def is_here(folder: NodeFolder, place: Location, node: str) -> bool:
    """Tell whether a copy that Redis places on the node of `folder` is there."""
    maker, _, process = place.owner.rpartition("|")
    if maker == node and is_alive(process.partition(".")[0]):
        return True  # not yet written, perhaps
    return folder.has(place.token)


def unknown_files(folder: NodeFolder, known: set[str], now: float) -> list[str]:
    """Return the tokens of files that are not `known`, but those which Redis may be told of yet."""
    unknown = [token for token in folder.tokens() if token not in known]
    return [token for token in unknown if now - _written(folder, token) > YOUNG_S]


def _written(folder: NodeFolder, token: str) -> float:
    try:
        return os.stat(f"{folder.path}/files/{token}").st_mtime
    except FileNotFoundError:
        return 0.0  # spilled, and so old
