"""A real notebook: the kernel of Jupyter runs cells, and what they show is looked at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[2]
SETUP = """\
from celery_mem import Client, progress
from tests.on_cluster import fail, inc

client = Client()
client"""
WORK = """\
futures = client.map(inc, range(30)) + [client.submit(fail, "<b>")]
progress(futures, description="<counting>")
futures[0]"""
RESULT = """\
import threading
for thread in threading.enumerate():
    if thread.name == "celery-mem-progress":
        thread.join()
sum(client.gather(futures[:30]))"""
PROFILE = """\
with client.record() as recording, client.profile_memory() as sampler:
    client.submit(inc, 100).result()
len(recording), list(sampler.runs)"""
LOCAL = "client.cluster"
END = "del futures; client.close(); client"


def html_of(outputs: list[Any]) -> list[str]:
    return [o["data"]["text/html"] for o in outputs if "text/html" in o.get("data", {})]


def test_a_notebook_shows_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for name in ("CELERY_MEM_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    cells = [nbformat.v4.new_code_cell(text) for text in (SETUP, WORK, RESULT, PROFILE, LOCAL, END)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    setup, work, result, profile, local, end = (cell["outputs"] for cell in notebook.cells)

    [page] = html_of(setup)
    assert "<caption>Client</caption>" in page
    assert "unix://" in page

    bar, future = html_of(work)
    assert 'role="progressbar" aria-valuenow="100"' in bar
    assert "&lt;counting&gt; (1 failed)" in bar
    assert "31/31" in bar
    assert "<b>Future</b>" in future
    [total] = result
    assert total["data"]["text/plain"] == str(sum(range(31)))
    assert profile[-1]["data"]["text/plain"] == "(1, ['run 1'])"
    assert "<caption>LocalCluster</caption>" in html_of(local)[0]
    assert "closed" in html_of(end)[0]
