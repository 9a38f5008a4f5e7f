"""Joins the Lua scripts: prelude, the parts that a script's LIB line names, names from `keys`, the script.

Of the parts a script gets only what it uses: each call makes every function of its script anew.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from celery_mem.state import keys

_TABLES = {
    "K": {**keys.FIXED, **keys.PREFIXES},
    "F": keys.TASK,
    "L": keys.FLAGS,
    "M": keys.META,
    "N": keys.NODE,
    "C": keys.COUNTS,
}
_NAME = re.compile(r"\b([KFLMNC])\.([a-z_]+)\b")
_LIB = re.compile(r"^-- LIB +(.*)$", re.MULTILINE)
_LOCAL = re.compile(r"local (?:function )?([\w, ]+?)(?: =.*|\(.*|)$", re.MULTILINE)
_WORD = re.compile(r"\w+")
MANY_LOCALS = 183
"""Lua has room for 200 in a function, with those of loops and inner blocks.

Above this, the own part of a script gets a function of its own, which may use 60 of the names before it
and is a little slower.
"""
BEFORE_JOINING = ("open", "new_run", "clear")
"""Scripts whose caller need not know the generation."""
_FOLDER = files("celery_mem.state") / "scripts"


@dataclass(frozen=True)
class Script:
    """One script, ready to be sent.

    Attributes:
        name: file name without `.lua`.
        source: the joined text.
        sha: what EVALSHA calls it by.
    """

    name: str
    source: str
    sha: str


@cache
def load_script(name: str) -> Script:
    """Read and join one script.

    Raises:
        KeyError: it uses a name that `keys` does not define.
    """
    body = (_FOLDER / f"{name}.lua").read_text()
    lib = _LIB.search(body)
    parts = lib[1].split() if lib else []
    shared = "\n".join(map(_part, parts if name in BEFORE_JOINING else ["prelude", *parts]))
    joined = _leave_out_unused(_strip_comments(shared), _strip_comments(body))
    source = _NAME.sub(lambda m: repr(_TABLES[m[1]][m[2]]), joined)
    # A local is found faster than a field of a global; scripts make a dozen calls per task.
    source = "local call = redis.call\n" + source.replace("redis.call(", "call(")
    return Script(name, source, hashlib.sha1(source.encode()).hexdigest())  # noqa: S324 (Redis names scripts so)


def _part(name: str) -> str:
    return (_FOLDER / "lib" / f"{name}.lua").read_text()


def _leave_out_unused(shared: str, body: str) -> str:
    """Join both, without the functions and variables of `shared` whose names occur nowhere after them."""
    kept, used = [body], set(_WORD.findall(body))
    for statement in reversed(_statements(shared)):
        match = _LOCAL.match(statement)
        if match is None or not used.isdisjoint(_WORD.findall(match[1])):
            kept.append(statement)
            used.update(_WORD.findall(statement))
    shared = "\n".join(reversed(kept[1:]))
    if _count_locals(shared) + _count_locals(body) > MANY_LOCALS:
        body = f"return (function()\nlocal call = call\n{body}\nend)()"
    return f"{shared}\n{body}"


def _count_locals(source: str) -> int:
    found = (_LOCAL.match(line) for line in source.splitlines())
    return sum(len(match[1].split(",")) for match in found if match)


def _statements(source: str) -> list[str]:
    """Cut at the lines that begin a statement: all that are not indented, but for the ends of blocks."""
    found: list[str] = []
    for line in source.splitlines():
        if line[0].isspace() or line.startswith(("end", "else", "}")):
            found[-1] += "\n" + line
        else:
            found.append(line)
    return found


def _strip_comments(source: str) -> str:
    # Comments are most of a contract; Redis need not keep them. Our scripts have no "--" inside strings.
    return "\n".join(line for line in re.sub(r"--.*", "", source).splitlines() if line.strip())


def script_names() -> list[str]:
    """Return the names of all scripts."""
    return sorted(f.name.removesuffix(".lua") for f in _FOLDER.iterdir() if f.name.endswith(".lua"))
