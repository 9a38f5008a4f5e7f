"""The tables of docs/migration.md are true of both packages."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import celery_mem
from celery_mem.config import Settings

distributed = pytest.importorskip("distributed")

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
THEIRS, OURS = distributed.Client, celery_mem.Client


def public(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def parameters(thing: Any) -> set[str]:
    return set(inspect.signature(thing).parameters) - {"self", "args", "kwargs", "settings", "collections"}


def section(title: str) -> str:
    [text] = re.findall(rf"^## {title}\n(.*?)(?=^## )", PAGE, re.DOTALL | re.MULTILINE)
    return str(text)


def rows(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose head begins so."""
    table = re.findall(rf"^\| {head}.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def names(text: str) -> set[str]:
    """What stands in backquotes and is a name."""
    return set(re.findall(r"`(\w+)`", text))


def listed(mark: str) -> set[str]:
    """The names in the paragraph that has this mark."""
    return names(PAGE.split(f"<!-- {mark} -->\n")[1].split("\n\n")[0])


def not_there(text: str) -> set[str]:
    return set().union(*(names(row[0]) for row in rows(text, "not there")))


def test_every_method_of_their_client_is_there_or_said_to_be_missing() -> None:
    same, missing = listed("same"), not_there(section("Methods of Client"))
    assert same == public(THEIRS) & public(OURS)
    assert missing == public(THEIRS) - public(OURS)


def test_what_is_said_to_be_only_here_is() -> None:
    said = listed("only here")
    assert said <= public(OURS)
    assert not said & public(THEIRS)


def test_the_options_that_differ_are_those_of_the_table() -> None:
    table = {row[0].strip("`"): (names(row[1]), names(row[2])) for row in rows(PAGE, "method")}
    theirs, ours = table.pop("Client")
    assert theirs == parameters(THEIRS) - parameters(OURS)
    assert ours == parameters(OURS) - parameters(THEIRS)
    found = {}
    for name in public(THEIRS) & public(OURS) - {"asynchronous"}:
        a, b = parameters(getattr(THEIRS, name)), parameters(getattr(OURS, name))
        if a != b:
            found[name] = (a - b, b - a)
    assert table == found


def test_futures_and_iterators_are_as_the_page_says() -> None:
    text = section("Futures")
    theirs, ours = public(distributed.Future) | {"key"}, public(celery_mem.Future)
    assert listed("future: same") == theirs & ours
    assert not_there(text) == theirs - ours
    iterator = names(text.split("`as_completed` is the same, with")[1].split(";")[0])
    missing = names(text.split("`clear`; its")[1].split("are not there")[0])
    assert iterator == public(celery_mem.as_completed)
    assert missing == public(distributed.as_completed) - public(celery_mem.as_completed)


def test_what_coordinates_tasks_exists_there_and_not_here() -> None:
    said = set().union(
        *(names(row[0]) for row in rows(section("Not there: what coordinates tasks"), "dask.distributed"))
    )
    assert said <= set(distributed.__all__)
    assert not said & set(celery_mem.__all__)


def test_the_settings_exist_on_both_sides() -> None:
    import dask

    for theirs, ours in rows(section("Settings"), "dask.distributed"):
        name = re.findall(r"`([\w.-]+)`", theirs)[0]
        if "." in name:
            dask.config.get(name)  # raises KeyError
        assert set(re.findall(r"`mem_(\w+)`", ours)) <= {f.name for f in fields(Settings)}
