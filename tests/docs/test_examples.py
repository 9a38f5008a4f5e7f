"""The code in the README and in docs/ runs, top to bottom, and prints what the page says."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from celery_mem.cli import mem
from celery_mem.client import current

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = re.compile(r"^\$ (celery-mem .*)$", re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_the_code_on_a_page_runs(page: Path) -> None:
    text = page.read_text()
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        for block in BLOCK.finditer(text):
            if block[1] == "console":
                run_commands(block[2], names["cluster"])
            else:
                run("\n" * text.count("\n", 0, block.start(2)) + block[2], page.name, names)
    finally:
        while (client := current.find_client()) is not None:
            client.close()


class Promises(ast.NodeTransformer):
    """Notes what calls of `print` print that have a comment behind them, which says what that is.

    Args:
        source: what the code was parsed from.
        printed: gets the texts, by the line where a call begins.
    """

    def __init__(self, source: str, printed: dict[int, str]) -> None:
        self.lines = source.splitlines()
        self.printed = printed
        self.said: dict[int, str] = {}

    def visit_Call(self, call: ast.Call) -> ast.AST:
        if not (isinstance(call.func, ast.Name) and call.func.id == "print"):
            return self.generic_visit(call)
        assert call.end_lineno is not None
        behind = self.lines[call.end_lineno - 1].encode()[call.end_col_offset :].decode().strip()
        if behind.startswith("# "):
            self.said[call.lineno] = behind.removeprefix("# ")
            call.func.id = "_note"
            call.args.insert(0, ast.copy_location(ast.Constant(call.lineno), call))
        return call

    def note(self, line: int, *args: object) -> None:
        self.printed[line] = " ".join(map(str, args))


def run(source: str, where: str, names: dict[str, object]) -> None:
    """Run code, and compare what it prints with what it says that it prints."""
    printed: dict[int, str] = {}
    promises = Promises(source, printed)
    tree = promises.visit(ast.parse(source))
    names["_note"] = promises.note
    exec(compile(tree, where, "exec"), names)
    wrong = {n: (printed[n], said) for n, said in promises.said.items() if not keeps(printed[n], said)}
    assert wrong == {}, f"what lines of {where} print, and what they should: {wrong}"


def keeps(printed: str, said: str) -> bool:
    """Whether this is what a comment says: `…` stands for anything, `@host` for the name of this machine."""
    pattern = re.escape(said).replace("…", ".*").replace("@host", r"@[\w.-]+")
    return re.fullmatch(pattern, printed, re.DOTALL) is not None


def run_commands(block: str, cluster: Any) -> None:
    """Run the commands of ours in a block, for the cluster of the page."""
    for command in COMMANDS.findall(block):
        done = CliRunner().invoke(mem, command.split()[1:], env={"CELERY_MEM_URL": cluster.url})
        assert done.exit_code == 0, f"{command}: {done.output}"


def test_a_promise_of_a_page_that_is_not_kept_is_found() -> None:
    run("print(1)  # 1\nprint(\n    'ab', 'at@home'\n)  # a… at@host\nx = 3  # 4\n", "page", {})
    with pytest.raises(AssertionError, match=r"{2: \('2850', '285'\)}"):
        run("print(1)  # 1\nprint(2850)  # 285\nprint(2)\n", "page", {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_links_on_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
