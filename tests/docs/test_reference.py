"""The reference is made from docstrings and settings: each public name has what it is made of."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

import celery_mem
from celery_mem.config import Settings

DOCS = Path(__file__).parents[2] / "docs"
GIVEN_ON = {"self", "cls", "args", "kwargs"}


def public_things() -> Iterator[tuple[str, Any]]:
    for name in celery_mem.__all__:
        thing = getattr(celery_mem, name)
        if not name.startswith("__"):
            yield name, thing
        if inspect.isclass(thing):
            yield from ((f"{name}.{n}", member) for n, member in members(thing))


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """What a class of ours offers itself: no private names, nothing that Dask's base brings."""
    for base in (c for c in cls.__mro__ if c.__module__.startswith("celery_mem")):
        for name, found in vars(base).items():
            member = getattr(found, "__func__", found)  # of a class method
            if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                yield name, member


THINGS = dict(public_things())


@pytest.mark.parametrize("name", THINGS)
def test_a_public_name_is_described_with_all_that_it_takes(name: str) -> None:
    thing = THINGS[name]
    text = inspect.getdoc(thing) or ""
    assert text, f"{name} has no docstring"
    if "own use" in text or re.search(r"; see `Client\.\w+`", text) or isinstance(thing, property):
        return
    takes = set(inspect.signature(thing).parameters) - GIVEN_ON
    assert {p for p in takes if not re.search(rf"\b{p}\b", text)} == set()
    if takes & {"timeout", "lease"}:
        assert re.search(r"seconds|as in `submit`", text), f"{name}: timeout of what unit?"


def test_every_setting_is_in_the_table_with_its_unit() -> None:
    extension: dict[str, Callable[[], Iterator[str]]] = run_path(str(DOCS / "extensions/settings_table.py"))
    rows = list(extension["table"]())[2:]
    assert [row.split("`")[1] for row in rows] == [f"mem_{f.name}" for f in fields(Settings)]
    assert rows[5].startswith("| `mem_notice_limit` `CELERY_MEM_NOTICE_LIMIT` | 16 KiB |")
    [lease] = [row for row in rows if "`mem_client_lease`" in row]
    assert lease.split(" | ")[1] == "60 seconds"
