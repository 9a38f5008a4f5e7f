"""A progress bar for futures and persisted collections, in terminals and notebooks."""

from __future__ import annotations

import html
import sys
import threading
import time
from types import TracebackType
from typing import Any, Protocol, Self

from celery_mem.client.states import ERROR
from celery_mem.client.waiting import as_completed
from celery_mem.graph.collections import futures_of

REDRAW_S = 0.1
"""A notebook's page is told at most so often."""


class Bar(Protocol):
    """Something that shows how far work is."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None: ...

    def show(self, done: int, failed: int) -> None:
        """Show that so many are done, some of them failed."""


def progress(*futures: Any, description: str = "tasks", notebook: bool | None = None) -> None:
    """Show a bar until all futures are done; failed ones are counted, and not raised.

    Args:
        futures: futures, persisted collections, or containers of them.
        description: label of the bar.
        notebook: True updates the bar in the background and returns at once; None finds out whether this is a
            notebook. There the bar is HTML, for which no widgets need be installed.
    """
    found = list({id(f._bound()[1]): f for f in futures_of(list(futures))}.values())
    is_notebook = _in_notebook()
    kind = NotebookBar if is_notebook else TerminalBar
    bar = kind(description, len(found))
    if is_notebook if notebook is None else notebook:
        thread = threading.Thread(target=_follow, args=(found, bar), name="celery-mem-progress", daemon=True)
        thread.start()
    else:
        _follow(found, bar)


def _follow(futures: list[Any], bar: Bar) -> None:
    done = failed = 0
    with bar:
        for batch in as_completed(futures).batches():
            done += len(batch)
            failed += sum(f.status == ERROR for f in batch)
            bar.show(done, failed)


class TerminalBar:
    """A bar of rich."""

    def __init__(self, description: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._description = description
        self._progress = Progress(*columns)
        self._task = self._progress.add_task(description, total=total)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, done: int, failed: int) -> None:
        """Show that so many are done, some of them failed."""
        self._progress.update(self._task, completed=done, description=_label(self._description, failed))


class NotebookBar:
    """A bar in the output of a cell, made where the call is and changed from any thread."""

    def __init__(self, description: str, total: int) -> None:
        from IPython.display import display

        self._description = description
        self._total = total
        self._began = self._drawn_at = time.monotonic()
        self._done = self._failed = 0
        self._place = display(self._page(False), display_id=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._place.update(self._page(True))

    def show(self, done: int, failed: int) -> None:
        """Show that so many are done, some of them failed."""
        self._done, self._failed = done, failed
        if time.monotonic() - self._drawn_at >= REDRAW_S:
            self._drawn_at = time.monotonic()
            self._place.update(self._page(False))

    def _page(self, is_over: bool) -> Any:
        from IPython.display import HTML

        passed = time.monotonic() - self._began
        share = 100 * self._done / self._total if self._total else 100
        colour = "#d95f02" if self._failed else "#1b9e77" if is_over else "#7570b3"
        label = html.escape(_label(self._description, self._failed))
        return HTML(
            '<div style="display: flex; flex-wrap: wrap; align-items: center; gap: 0 10px; max-width: 44em">'
            f'<span>{label}</span><div role="progressbar" aria-valuenow="{share:.0f}" '
            'style="flex: 1 1 12em; height: 10px; border-radius: 5px; background: #8884; overflow: hidden">'
            f'<div style="width: {share:.1f}%; height: 100%; background: {colour}"></div></div>'
            f"<code>{self._done}/{self._total}</code> <code>{passed:.1f} s</code></div>"
        )


def _label(description: str, failed: int) -> str:
    return f"{description} ({failed} failed)" if failed else description


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    shell = get_ipython()
    return shell is not None and shell.__class__.__name__ == "ZMQInteractiveShell"
