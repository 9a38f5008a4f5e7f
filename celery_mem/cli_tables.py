"""What the command line shows a person; for programs there is `--json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from celery_mem.graph.constraints import ENOUGH

LISTED = 20
"""Names that are shown of a long list."""


def show_on_terminal(renderable: RenderableType) -> None:
    """Print to standard output, in colour if that is a terminal."""
    Console(highlight=False, soft_wrap=True).print(renderable)


def status_tables(status: Mapping[str, Any]) -> RenderableType:
    """Lay out what `namespace_status` returns."""
    redis = status["redis"]
    limit = f" of {_size(redis['maxmemory'])}" if redis["maxmemory"] else ""
    born = Text(f" (generation {status['generation']})") if status["generation"] else _warning(" is empty")
    head = _fields(
        {
            "namespace": Text(status["namespace"]) + born,
            "coordinator": Text(status["leader"]) if status["leader"] else _warning("none leads"),
            "Redis": Text(f"{redis['version']}, {_size(redis['used_memory'])}{limit} in use"),
            "results": Text(_size(status["nbytes"])),
            "tasks": Text(_counts(status["tasks"]) or "none"),
            "queues": Text(_counts(status["queues"])),
            "so far": Text(_counts(_so_far(status["counts"])) or "nothing freed, nothing run again"),
            "datasets": Text(_names(status["datasets"]) or "none"),
            "copies": Text(
                f"more than one wanted of {status['copies']:,} results"
                if status["copies"]
                else "as they come"
            ),
        }
    )
    nodes = _table("nodes", "node", "busy", "slots", "pool", "pid", "lease")
    memory = _table(
        "memory", "node", "results", "files", "unwritten", "spilled", "limit", "resources", "status"
    )
    for name, node in sorted(status["nodes"].items()):
        cells = (name, node["busy"], node["slots"], node["pool"], node["pid"])
        nodes.add_row(*(Text(str(cell)) for cell in cells), _lease(node["lease"]))
        memory.add_row(*_memory(name, node))
    clients = _table("clients", "client", "keys", "lease")
    for name, client in sorted(status["clients"].items()):
        clients.add_row(Text(name), Text(f"{client['keys']:,}"), _lease(client["lease"]))
    return Lines(head, "", nodes, "", memory, *_jobs(status), *_unrunnable(status), "", clients)


def _so_far(counts: Mapping[str, int]) -> dict[str, int]:
    found = {
        "freed": counts["freed"],
        "run again": counts["remade"] + counts["rerun"],
        "stolen": counts["stolen"],
    }
    return {name: n for name, n in found.items() if n}


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _memory(name: str, node: Mapping[str, Any]) -> list[Text]:
    sizes = [_size(node["memory"].get(kind)) for kind in ("files", "live", "spilled")]
    resources = ", ".join(
        f"{what} {amount:g}" for what, amount in sorted(node["resources"].items()) if amount < ENOUGH
    )
    limit = _size(node["limit"]) if node["limit"] else "none"
    cells = [Text(cell) for cell in (name, f"{node['keys']:,}", *sizes, limit, resources or "none")]
    return [*cells, Text("running") if node["status"] == "running" else _warning(node["status"])]


def _jobs(status: Mapping[str, Any]) -> list[RenderableType]:
    if not status["jobs"]:
        return []
    jobs = _table("jobs", "job", "kind", "done")
    for name, job in status["jobs"].items():
        jobs.add_row(Text(name), Text(job["kind"]), Text(f"{job['done']:,} of {job['total']:,}"))
    return ["", jobs]


def _unrunnable(status: Mapping[str, Any]) -> list[RenderableType]:
    if not status["unrunnable"]:
        return []
    table = _table("tasks that no worker may run", "tasks", "waiting", "reason")
    for row in status["unrunnable"]:
        table.add_row(Text(f"{row['tasks']:,}"), Text(f"{row['waiting']:.0f} s"), _warning(row["reason"]))
    return ["", table]


def task_table(task: Mapping[str, Any]) -> RenderableType:
    """Lay out what `describe_task` returns."""
    result = None
    if task["nbytes"] is not None:
        result = f"{task['type']}, {_size(task['nbytes'])}"
    error = task["error"] or {"type": "", "message": "", "traceback": ""}
    rows = {
        "key": task["key"],
        "state": task["state"],
        "result": result,
        "copies": _copies(task),
        "error": f"{error['type']}: {error['message']}" if task["error"] else None,
        "raised by": task["blame"] if task["blame"] != task["key"] else None,
        "traceback": error["traceback"].rstrip(),
        "slot": task["owner"],
        "attempt": task["attempt"],
        "priority": task["priority"],
        "retries left": task["retries"],
        "deaths": task["deaths"],
        "function": task["function"],
        "waits for": f"{task['waiting']:,} dependencies" if task["waiting"] else None,
        "needed by": f"{task['needed']:,} unfinished tasks" if task["needed"] else None,
        "holders": "\n".join(task["holders"]) or "none",
        "given": "\n".join(task["given"]) or None,
        "dependencies": _listing(task["dependencies"]),
        "dependents": _listing(task["dependents"]),
        "contains": "\n".join(task["contains"][:LISTED]),
    }
    return _fields({name: Text(str(value)) for name, value in rows.items() if value})


def _copies(task: Mapping[str, Any]) -> str:
    wanted = f"{task['copies']} wanted" if task["copies"] > 1 else ""
    if task["copies_on"]:
        wanted = f"{wanted or 'wanted'} on {', '.join(task['copies_on'])}"
    return "\n".join(filter(None, (*task["places"], wanted)))


def _fields(rows: Mapping[str, Text]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(Text(name, style="bold"), value)
    return grid


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))


def _warning(text: str) -> Text:
    return Text(text, style="red")


def _lease(left_s: float) -> Text:
    return Text(f"{left_s:.0f} s") if left_s > 0 else _warning("over")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counts.items())


def _listing(states: Mapping[str, str | None]) -> str:
    lines = [f"{key}  ({state or 'no record'})" for key, state in list(states.items())[:LISTED]]
    if len(states) > LISTED:
        lines.append(f"... and {len(states) - LISTED:,} more")
    return "\n".join(lines)


def _size(nbytes: int | None) -> str:
    size = float(nbytes or 0)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
