"""Processes of a host ask each other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest

from celery_mem.memory import asking
from celery_mem.memory.asking import MOST_BYTES, Listener, NobodyThere, ask, in_datagrams, listeners, tell

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # as of Python 3.12
fork = multiprocessing.get_context("fork")


@pytest.fixture(params=["short", "long", "long, no /proc"])
def folder(request, tmp_path, monkeypatch):
    if request.param == "short":
        import tempfile

        with tempfile.TemporaryDirectory(prefix="ask-") as path:
            yield path
        return
    path = tmp_path / ("x" * 120)
    path.mkdir()
    if request.param == "long, no /proc":
        isdir = os.path.isdir
        monkeypatch.setattr(os.path, "isdir", lambda p: p != "/proc/self/fd" and isdir(p))
    yield str(path)
    if request.param == "long, no /proc":
        os.unlink(asking._link_to(str(path)))


@pytest.fixture
def listen(folder):
    made = []

    def make(handler, name="me.sock"):
        made.append(Listener(folder, name, handler).start())
        return made[-1]

    yield make
    for listener in made:
        listener.close()


def test_a_question_gets_its_answer_and_nothing_is_left(folder, listen):
    listen(lambda question: f"you said {question}")
    assert ask(folder, "me.sock", "hello\nthere ä") == "you said hello\nthere ä"
    assert os.listdir(folder) == ["me.sock"]
    assert listeners(folder) == ["me.sock"]


def test_many_ask_at_once(folder, listen):
    listen(lambda question: question)
    wrong = []

    def work(n):
        wrong.extend(i for i in range(50) if ask(folder, "me.sock", f"{n}.{i}") != f"{n}.{i}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_where_nobody_ever_was_nobody_is(folder):
    with pytest.raises(NobodyThere):
        ask(folder, "me.sock", "hello")
    with pytest.raises(NobodyThere):
        tell(folder, "me.sock", "hello")
    with pytest.raises(NobodyThere):
        ask(folder + "/gone" + "y" * 100, "me.sock", "hello")


def test_a_process_that_was_killed_is_not_there(folder):
    child = fork.Process(target=lambda: (Listener(folder, "me.sock", str).start(), time.sleep(60)))
    child.start()
    while not listeners(folder):
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert listeners(folder) == ["me.sock"]
    started = time.monotonic()
    with pytest.raises(NobodyThere):
        ask(folder, "me.sock", "hello")
    assert time.monotonic() - started < 1
    listener = Listener(folder, "me.sock", str).start()  # a new one takes its place
    assert ask(folder, "me.sock", "hello") == "hello"
    listener.close()
    assert listeners(folder) == []


def test_a_process_that_dies_while_it_is_asked_is_not_there(folder):
    child = fork.Process(
        target=lambda: (Listener(folder, "me.sock", lambda q: os._exit(1)).start(), time.sleep(60))
    )
    child.start()
    while not listeners(folder):
        time.sleep(0.001)
    with pytest.raises(NobodyThere):
        ask(folder, "me.sock", "hello", again_s=0.05)
    child.join()


def test_a_slow_answer_is_waited_for_and_made_once(folder, listen):
    asked = []

    def slowly(question):
        asked.append(question)
        time.sleep(0.3)
        return "done"

    listen(slowly)
    assert ask(folder, "me.sock", "hello", again_s=0.02) == "done"
    assert asked == ["hello"]


def test_a_question_that_fails_once_is_asked_again(folder, listen, caplog):
    calls = []

    def handler(question):
        calls.append(question)
        if len(calls) == 1:
            raise RuntimeError("for a moment")
        return "ok"

    listen(handler)
    assert ask(folder, "me.sock", "hello", again_s=0.05) == "ok"
    assert "for a moment" in caplog.text


def test_no_answer_at_all_ends_in_time(folder, listen):
    listen(lambda question: None)
    with pytest.raises(TimeoutError, match="no answer to 'hello'"):
        ask(folder, "me.sock", "hello", timeout=0.2, again_s=0.05)


def test_a_full_buffer_is_waited_for(folder, listen):
    go, heard = threading.Event(), []

    def handler(message):
        go.wait(10)
        heard.append(message)

    listen(handler)

    def send():
        for i in range(600):
            tell(folder, "me.sock", str(i) + "x" * 4000, timeout=20)

    thread = threading.Thread(target=send)
    thread.start()
    time.sleep(0.05)

    def send_impatiently():
        for _ in range(600):
            tell(folder, "me.sock", "y" * 4000, timeout=0.01)

    with pytest.raises(TimeoutError, match="takes no message"):
        send_impatiently()
    go.set()
    thread.join(20)
    assert not thread.is_alive()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not any(m.startswith("599x") for m in heard):
        time.sleep(0.01)
    assert any(m.startswith("599x") for m in heard)


def test_what_is_no_message_harms_nobody(folder, listen, caplog):
    listen(lambda question: "ok")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, asking._short(folder) as short:
        for data in (b"", b"\xff\xfe", b"one", b"a ../../x\nq"):
            sock.sendto(data, f"{short}/me.sock")
    assert ask(folder, "me.sock", "hello") == "ok"


def test_long_lists_go_in_several_messages():
    words = [f"{i:030}" for i in range(5000)]
    messages = list(in_datagrams("d", words))
    assert len(messages) > 1
    assert all(m.startswith("d ") and len(m) <= MOST_BYTES for m in messages)
    assert [w for m in messages for w in m.split(" ")[1:]] == words
    assert list(in_datagrams("d", [])) == []
