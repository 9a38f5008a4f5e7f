"""The page about a recording, as text and in a browser."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from celery_mem.profiling import report
from celery_mem.profiling.lines import DONE, FAILED, Line
from celery_mem.profiling.memory import NodeMemory, Sample
from celery_mem.profiling.recording import Recording

EVIL = "</script><script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\">'\"&"
MIB = 2**20


def small_run() -> Recording:
    recording = Recording("mem")
    recording.began, recording.ended = 1_000.0, 1_004.0
    recording.add(
        "n@host|1-1.1",
        [Line("inc-1", "inc", 1_000.5, 1_000.6, 1_001.0, 28), Line("b", "sum", 1_001.0, 1_001.0, 1_003.0)],
    )
    recording.add(
        "n@host|2-1.1", [Line("bad-1", "bad", 1_000.0, 1_000.0, 1_000.5, 0, FAILED, "ValueError: no")]
    )
    recording.memory.add(Sample(1_000.0, {}, None))
    recording.memory.add(Sample(1_002.0, {"n@host": NodeMemory(3 * MIB, 0, MIB, 100 * MIB)}, MIB))
    return recording


def etl_run() -> Recording:
    """A run of some seconds on two nodes, as one may look like."""
    chance = random.Random(3)
    recording = Recording("shop")
    recording.began = 1_790_000_000.0
    steps = [("read_csv", 0.16, 22), ("clean", 0.07, 20), ("merge", 0.12, 8), ("mean", 0.02, 0)]
    slots = [f"celery@shop-{node}|{pid}-9.1" for node in (1, 2) for pid in (11, 12, 13)]
    clocks = dict.fromkeys(slots, recording.began + 0.15)
    held: list[tuple[float, int, int]] = []
    for name, mean, mib in steps:
        barrier = min(clocks.values())
        for n in range(54):
            slot = min(clocks, key=lambda s: clocks[s])
            began = max(clocks[slot], barrier) + chance.uniform(0.001, 0.012)
            called = began + (chance.uniform(0.002, 0.03) if name in ("merge", "clean") else 0.001)
            ended = called + mean * chance.lognormvariate(0, 0.45)
            failed = name == "merge" and n in (20, 41)
            line = Line(
                f"{name}-{chance.getrandbits(64):016x}",
                name,
                began,
                called,
                ended,
                0 if failed else mib * MIB + 80,
                FAILED if failed else DONE,
                "KeyError: 'origin'" if failed else "",
            )
            recording.add(slot, [line])
            clocks[slot] = ended
            held.append((ended, slots.index(slot) // 3, 0 if failed else mib))
    recording.ended = max(clocks.values()) + 0.3
    times = [recording.began + n * (recording.ended - recording.began) / 40 for n in range(41)]
    for time in times:
        nodes = {}
        for node in (0, 1):
            alive = sum(mib for ended, of, mib in held if of == node and time - 3.5 < ended <= time) * MIB
            spilled = max(0, alive - 420 * MIB)
            nodes[f"celery@shop-{node + 1}"] = NodeMemory(alive - spilled, spilled, 260 * MIB, 1024 * MIB)
        recording.memory.add(Sample(time, nodes, 14 * MIB))
    return recording


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_the_page_has_tables_and_data() -> None:
    page = small_run().report()
    assert "<b>3</b>tasks" in page
    assert "<b>1</b>failed" in page
    assert "<b>3.00 s</b>first to last" in page
    assert "<b>3.0 MiB</b>peak memory" in page
    assert re.search(r">sum</span>.*?<td>1</td><td>-</td><td>2.00 s</td><td>2.00 s</td><td>2.00 s</td>", page)
    data = data_of(page)
    tasks = data["tasks"]
    assert [lane["slot"] for lane in data["lanes"]] == ["n@host|1-1.1", "n@host|2-1.1"]
    assert tasks["row"] == [1, 0, 0]
    assert tasks["began"] == [0, 500_000, 1_000_000]
    assert tasks["called"] == [0, 100_000, 0]
    assert tasks["errors"] == {"0": "ValueError: no"}
    assert data["memory"]["redis"] == [None, MIB]
    assert data["memory"]["nodes"] == {"n@host": [None, [3 * MIB, 0, MIB, 100 * MIB]]}


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = small_run().report()
    assert "default-src 'none'" in page
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(", page)


def test_attempts_of_a_slot_that_lie_over_each_other_have_rows_of_their_own() -> None:
    recording = Recording()
    recording.began, recording.ended = 10.0, 20.0
    lines = [
        Line("parent", "g", 10.0, 10.0, 20.0),
        Line("one", "f", 11.0, 11.0, 12.0),
        Line("two", "f", 12.0, 12.0, 13.0),
    ]
    recording.add("n|1.1", lines)
    data = data_of(recording.report())
    assert data["tasks"]["row"] == [0, 1, 1]
    assert [lane["rows"] for lane in data["lanes"]] == [2]


def test_clocks_that_are_corrected_make_no_further_row() -> None:
    recording = Recording()
    recording.began, recording.ended = 10.0, 12.0
    recording.add("n|1.1", [Line("one", "f", 10.0, 10.0, 11.00005), Line("two", "f", 11.0, 11.0, 12.0)])
    assert data_of(recording.report())["tasks"]["row"] == [0, 0]


def test_names_are_text_wherever_they_stand() -> None:
    recording = Recording(EVIL)
    recording.began, recording.ended = 1.0, 2.0
    recording.add(EVIL, [Line(EVIL, EVIL, 1.0, 1.0, 2.0, 1, FAILED, EVIL)])
    recording.memory.add(Sample(1.0, {EVIL: NodeMemory()}, 1))
    recording.gaps.append(EVIL)
    page = recording.report(title=EVIL)
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert "<img" not in page
    assert data_of(page)["tasks"]["key"] == [EVIL]


def test_an_empty_recording_makes_a_page() -> None:
    page = Recording().report()
    assert "No task ran meanwhile." in page
    assert data_of(page)["tasks"]["row"] == []


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_DRAWN", 2)
    monkeypatch.setattr(report, "MOST_FUNCTIONS", 1)
    recording = small_run()
    recording.dropped = 1_234
    recording.gaps = ["a gap"] * 12
    page = recording.report()
    assert "1,234 tasks are not in this recording" in page
    assert "the 2 longest of 3 tasks" in page
    assert "and 2 more gaps" in page
    assert "and 2 more</th>" in page
    assert sorted(data_of(page)["tasks"]["key"]) == ["b", "bad-1"] or data_of(page)["tasks"]["key"][-1] == "b"


def test_a_page_is_written_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "graph.html"
    path.write_text("old")
    page = small_run().report(path, title="My run")
    assert path.read_text(encoding="utf-8") == page
    assert "<title>My run</title>" in page
    assert [p.name for p in tmp_path.iterdir()] == ["graph.html"]
    with pytest.raises(OSError, match="No such file"):
        small_run().report(tmp_path / "nowhere" / "graph.html")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0000005, "0 µs"), (0.0123, "12.3 ms"), (1.5, "1.50 s"), (12_345, "12,345 s")]
)
def test_times_are_for_people(value: float, text: str) -> None:
    assert report.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1_023, "1,023 B"), (1_536, "1.5 KiB"), (2**45, "32.0 TiB")]
)
def test_sizes_are_for_people(value: float, text: str) -> None:
    assert report.size(value) == text


# --- in a browser -------------------------------------------------------------------------------------------


def browse(page: Path, folder: Path, *options: str) -> str:
    """Open a page without a network; returns what the browser prints."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium: apt-get install chromium")
    quiet = [
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    quiet += ["--disable-sync", f"--user-data-dir={folder / 'profile'}", "--proxy-server=127.0.0.1:9"]
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--virtual-time-budget=2000"]
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, timeout=60, check=True)
    return done.stdout.decode()


def test_a_browser_draws_it(tmp_path: Path) -> None:
    # With $CELERY_MEM_SCREENSHOT, the picture goes where that says.
    picture = Path(os.environ.get("CELERY_MEM_SCREENSHOT") or tmp_path / "report.png").absolute()
    path = tmp_path / "report.html"
    page = etl_run().report(title="Flights, cleaned and merged")
    use = """
      <script>
        const box = document.getElementById("stream").getBoundingClientRect();
        const point = (type, x) => document.getElementById("stream").dispatchEvent(new PointerEvent(type, {
          clientX: box.left + x, clientY: box.top + 10, button: 0, pointerId: 1, bubbles: true}));
        const told = [];
        for (let x = 0; x < box.width; x += 2) {
          point("pointermove", x);
          const tip = document.getElementById("tip");
          if (!tip.hidden) told.push(tip.textContent);
        }
        const span = () => document.getElementById("span").textContent;
        const spans = [span()];
        document.getElementById("in").click(); spans.push(span());
        point("pointerdown", 300); point("pointermove", 400); point("pointerup", 400); spans.push(span());
        document.getElementById("all").click(); spans.push(span());
        document.querySelector("#functions tr").click();
        const chosen = document.querySelectorAll("tr.chosen").length;
        const found = document.createElement("pre");
        found.id = "found";
        found.textContent = JSON.stringify({told, spans, chosen});
        found.hidden = true;
        document.body.append(found);
        document.querySelector("#functions tr").click();
        document.getElementById("tip").hidden = true;
      </script></body>"""
    path.write_text(page.replace("</body>", use), encoding="utf-8")
    window = os.environ.get("CELERY_MEM_WINDOW", "1000,960")
    shown = browse(path, tmp_path, "--dump-dom", f"--screenshot={picture}", f"--window-size={window}")
    assert picture.stat().st_size > 10_000
    assert 'data-drawn="216"' in shown
    found = re.search(r'<pre id="found" hidden="">(.*?)</pre>', shown)
    assert found is not None
    seen = json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert any(
        re.match(r"read_csvread_csv-[0-9a-f]{16}.* MiBcelery@shop-1\|11-9.1$", text) for text in seen["told"]
    )
    assert len(set(seen["spans"])) == 3
    assert seen["spans"][0] == seen["spans"][3]
    assert seen["chosen"] == 1


def test_a_browser_takes_names_as_text(tmp_path: Path) -> None:
    recording = Recording(EVIL)
    recording.began, recording.ended = 1.0, 2.0
    recording.add(EVIL, [Line(EVIL, EVIL, 1.0, 1.0, 2.0, 1, FAILED, EVIL)])
    recording.memory.add(Sample(1.0, {EVIL: NodeMemory(1, 1, 1, 1)}, 1))
    path = tmp_path / "evil.html"
    recording.report(path, title="harmless")
    shown = browse(path, tmp_path, "--dump-dom", "--window-size=390,800")
    assert "<title>harmless</title>" in shown
    assert 'data-drawn="1"' in shown
    assert "<img" not in shown
