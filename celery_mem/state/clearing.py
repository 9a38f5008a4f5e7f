"""What a restart leaves to be deleted: every key of the namespace but `meta`, and files that are to go."""

from __future__ import annotations

from celery_mem.state.keys import FIXED
from celery_mem.state.link import Link
from celery_mem.state.loader import load_script

PAGE = 1000
KEPT = ("meta", "debris")


def clear(link: Link, meta: str, generation: str) -> None:
    """Delete what was there before a restart, and let the next life of the namespace begin.

    Several may do so at once, and any of them may die: whoever joins goes on.

    Args:
        meta: name of the key `meta`.
        generation: what it holds now, "~" and the id of the next life.
    """
    prefix = meta.removesuffix(FIXED["meta"])
    kept = {(prefix + FIXED[name]).encode() for name in KEPT}
    script = load_script("clear")
    cursor = b"0"
    while True:
        cursor, page = link.call("SCAN", cursor, "MATCH", f"{prefix}*", "COUNT", PAGE)
        names = [name for name in page if name not in kept]
        is_last = int(cursor) == 0
        if (names or is_last) and not link.run(script, 1, meta, generation, int(is_last), *names):
            return
        if is_last:
            return
