"""The directive `settings-table`: every setting of celery-mem, read from the class that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from celery_mem import config

BYTES = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


class SettingsTable(SphinxDirective):
    """A table of the settings."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        self.env.note_dependency(config.__file__)
        box = nodes.container()
        self.state.nested_parse(StringList(list(table()), source=config.__file__), 0, box)
        return box.children


def table() -> Iterator[str]:
    """Yield the lines of a table in Markdown."""
    yield "| setting, and its name in the environment | default | what it is |"
    yield "|---|---|---|"
    for f in fields(config.Settings):
        names = f"`mem_{f.name}` `CELERY_MEM_{f.name.upper()}`"
        meaning = f.metadata["doc"].replace("|", r"\|").replace("<", r"\<")
        if choices := f.metadata["choices"]:
            meaning += f" ({', '.join(f'`{choice}`' for choice in choices)})"
        yield f"| {names} | {default_of(f)} | {meaning} |"


def default_of(f: Field[Any]) -> str:
    """Return the default of a setting with its unit, for people."""
    if f.default == "":
        return "empty"
    unit = f.metadata["unit"]
    if not unit:
        return f"`{f.default}`"
    if unit == "bytes":
        for size, name in BYTES:
            if f.default and f.default % size == 0:
                return f"{f.default // size} {name}"
    if unit == "fraction":
        return f"{f.default:g}"
    return f"{f.default:g} {unit}"


def setup(app: Sphinx) -> dict[str, Any]:
    """Make the directive known to Sphinx."""
    app.add_directive("settings-table", SettingsTable)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
