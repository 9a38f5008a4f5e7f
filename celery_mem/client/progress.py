"""A progress bar for futures and persisted collections, in terminals and notebooks."""

from __future__ import annotations

import threading
from typing import Any

from celery_mem.client.states import ERROR
from celery_mem.client.waiting import as_completed
from celery_mem.graph.collections import futures_of


def progress(*futures: Any, description: str = "tasks", notebook: bool | None = None) -> None:
    """Show a bar until all futures are done; failed ones are counted, and not raised.

    Args:
        futures: futures, persisted collections, or containers of them.
        description: label of the bar.
        notebook: True updates the bar in the background and returns at once; None finds out whether this is a
            notebook.
    """
    found = list({id(f._bound()[1]): f for f in futures_of(list(futures))}.values())
    if notebook is None:
        notebook = _in_notebook()
    if notebook:
        threading.Thread(target=_show, args=(found, description), daemon=True).start()
    else:
        _show(found, description)


def _show(futures: list[Any], description: str) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=len(futures))
        errors = 0
        for batch in as_completed(futures).batches():
            errors += sum(f.status == ERROR for f in batch)
            bar.update(task, advance=len(batch), description=_label(description, errors))


def _label(description: str, errors: int) -> str:
    return f"{description} ({errors} failed)" if errors else description


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython  # type: ignore[import-not-found]
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and shell.__class__.__name__ == "ZMQInteractiveShell"
