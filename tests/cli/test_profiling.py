"""`celery-mem record` and `celery-mem report`."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from celery_mem.profiling.lines import Line, Parcel, pack
from celery_mem.profiling.recording import Recording
from celery_mem.state.store import NewTask, Store
from tests.cli.conftest import Cli

LINE = Line("x", "inc", 1_000.0, 1_000.0, 1_001.0, 8)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_record_goes_on_until_it_is_told_to_stop(store: Store, tmp_path: Path, end: signal.Signals) -> None:
    path = tmp_path / "run.json"
    address = ["-u", store.settings.url, "-n", store.settings.namespace]
    command = [sys.executable, "-m", "celery_mem.cli", "record", str(path), *address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == (
            f"records what runs in namespace {store.settings.namespace} until Ctrl-C\n"
        )
        store.renew_client("client", join=True)
        store.submit("client", 1, [NewTask("x", "inc", b"payload")], [("inc", b"code")])
        step = store.step("node|1.1", "node", want=1)
        lines = [(name, pack(Parcel("node|1.1", 0, [LINE]))) for name in step.recordings]
        store.step("node|1.1", "node", mode="q", want=0, lines=lines)
        process.send_signal(end)
        assert process.stdout.read() == f"wrote {path}: 1 tasks\n"
    assert process.returncode == 0
    [(line, slot)] = Recording.load(path)
    assert (line.key, line.nbytes, slot) == ("x", 8, "node|1.1")
    assert store.link.call("EXISTS", store.keys.fixed("recordings"), store.keys.fixed("watchers")) == 0


def test_report_makes_a_page_of_a_file(cli: Cli, tmp_path: Path) -> None:
    recording = Recording("mem")
    recording.began, recording.ended = 1_000.0, 1_002.0
    recording.add("node|1.1", [LINE])
    recording.save(tmp_path / "run.json")
    page = tmp_path / "graph.html"
    found = cli("report", str(page), "--from", str(tmp_path / "run.json"), "--title", "A <run>")
    assert found.stdout == f"wrote {page}: 1 tasks\n"
    assert "<h1>A &lt;run&gt;</h1>" in page.read_text()

    assert (
        "with --from that is over" in cli("report", str(page), "--from", str(page), "--seconds", "1").stderr
    )
    refused = cli("report", str(page), "--from", str(page))
    assert refused.exit_code == 1
    assert (
        refused.stderr
        == f"Error: {page} is no recording of celery-mem: " + refused.stderr.partition("celery-mem: ")[2]
    )


def test_report_records_by_itself(cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "graph.html"
    found = cli("report", str(page), "--seconds", "0.1")
    assert found.exit_code == 0
    assert "No task ran meanwhile." in page.read_text()


def test_a_place_that_is_none_is_told_before_the_run(cli: Cli, tmp_path: Path) -> None:
    refused = cli("record", str(tmp_path / "nowhere" / "run.json"))
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr == f"Error: there is no folder {tmp_path / 'nowhere'} to write run.json in\n"
    refused = cli("report", str(tmp_path / "nowhere" / "run.html"), "--seconds", "0.1")
    assert (refused.exit_code, refused.stdout) == (1, "")


def test_a_name_that_ends_in_html_gets_the_page(cli: Cli, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    assert cli("record", str(page), "--seconds", "0.1", "--most", "10").exit_code == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
