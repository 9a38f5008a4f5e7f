"""Processes of a host ask each other, by datagrams on sockets in the node folder.

A message is lost, comes twice or meets a dead process, and all of that is fine: whoever asks repeats the
question, so a handler must bear it, and a socket without a process refuses at once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import selectors
import socket
import stat
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from celery_mem.errors import CeleryMemError

log = logging.getLogger("celery_mem.memory")

MOST_BYTES = 32 << 10
"""Of one message: every system takes that much in a datagram."""
AGAIN_S = 1.0
_PATH_LIMIT = 100  # of a socket; Linux has 108 bytes, macOS 104
_GONE = {errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTDIR}
_BUSY = {errno.EAGAIN, errno.ENOBUFS}
_REMEMBERED = 256
_NO_ANSWER = "-"

Handler = Callable[[str], str | None]


class NobodyThere(CeleryMemError, ConnectionError):  # noqa: N818 (a plain fact, often the expected one)
    """The process that was asked does not run, or listens no more."""


def socket_name(process: str) -> str:
    """Return the name of the socket of a process, by its identity."""
    return f"{process}.sock"


def ask(folder: str, name: str, question: str, *, timeout: float = 30.0, again_s: float = AGAIN_S) -> str:
    """Ask who listens as `name` in a node folder and return the answer.

    Args:
        timeout: seconds for all; an answer that takes long is waited for while the process lives.
        again_s: seconds after which the question is repeated.
    Raises:
        NobodyThere: nobody listens, or not any more.
        TimeoutError: no answer came.
    """
    deadline = time.monotonic() + timeout
    ident = secrets.token_hex(6)
    reply_name = f"r-{ident}.sock"
    message = f"{ident} {reply_name}\n{question}".encode()
    with _bound(folder, reply_name) as sock:
        while (left := deadline - time.monotonic()) > 0:
            _send(sock, folder, name, message, deadline)
            until = time.monotonic() + min(again_s, left)
            while (wait := until - time.monotonic()) > 0:
                sock.settimeout(wait)
                try:
                    got, _, answer = sock.recv(MOST_BYTES).decode().partition("\n")
                except TimeoutError:
                    break
                if got == ident:
                    return answer
    raise TimeoutError(f"{name} in {folder} gave no answer to {question[:80]!r} for {timeout:g} s")


def tell(folder: str, name: str, message: str, *, timeout: float = 5.0) -> None:
    """Send a message that needs no answer. It may be lost.

    Raises:
        NobodyThere: nobody listens.
        TimeoutError: the other's buffer stayed full.
    """
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sock:
        data = f"{secrets.token_hex(6)} {_NO_ANSWER}\n{message}".encode()
        _send(sock, folder, name, data, time.monotonic() + timeout)


def listeners(folder: str) -> list[str]:
    """Return the names of the sockets of a folder that processes listen on, dead ones too."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted(n for n in names if n.endswith(".sock") and not n.startswith("r-"))


def in_datagrams(verb: str, words: list[str]) -> Iterator[str]:
    """Yield messages `<verb> <word> <word>...`, none longer than a datagram may be."""
    pending, room = [verb], MOST_BYTES - 200
    for word in words:
        if room < len(word) + 1:
            yield " ".join(pending)
            pending, room = [verb], MOST_BYTES - 200
        pending.append(word)
        room -= len(word) + 1
    if len(pending) > 1:
        yield " ".join(pending)


class Listener:
    """Answers what others of this host ask, in a thread of its own.

    Args:
        folder: the node folder.
        name: of its socket; what a dead process left under it is replaced.
        handler: gets the question and returns the answer, None for none. It may be asked the same twice.
    """

    def __init__(self, folder: str, name: str, handler: Handler) -> None:
        self.folder = folder
        self.name = name
        self.handler = handler
        self._answered: OrderedDict[str, str | None] = OrderedDict()
        self._stopped = threading.Event()
        self._wake_r, self._wake_w = os.pipe()
        path = f"{folder}/{name}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            with _short(folder) as short:
                self._sock.bind(f"{short}/{name}")
            os.chmod(path, 0o600)
            self._inode = os.lstat(path).st_ino
        except BaseException:
            self._close_all()
            raise
        self._thread = threading.Thread(target=self._run, name=f"celery-mem {name}", daemon=True)

    def start(self) -> Listener:
        """Start the thread."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop listening; those who ask now learn that nobody is there."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        os.write(self._wake_w, b"x")
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(5)
        self._close_all()
        path = f"{self.folder}/{self.name}"
        with contextlib.suppress(OSError):
            if os.lstat(path).st_ino == self._inode:  # it may be a successor's
                os.unlink(path)

    def _close_all(self) -> None:
        self._sock.close()
        os.close(self._wake_r)
        os.close(self._wake_w)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            selector.register(self._wake_r, selectors.EVENT_READ)
            while not self._stopped.is_set():
                selector.select()
                if self._stopped.is_set():
                    return
                try:
                    data = self._sock.recv(2 * MOST_BYTES, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    continue
                self._handle(data)

    def _handle(self, data: bytes) -> None:
        try:
            first, _, question = data.decode().partition("\n")
            ident, reply_name = first.split(" ")
        except ValueError:
            log.warning("%s got a message that is none: %r", self.name, data[:80])
            return
        if ident not in self._answered:
            try:
                answer = self.handler(question)
            except Exception:
                log.exception("%s could not answer %r", self.name, question[:80])
                return  # whoever asked asks again, until their time is over
            self._answered[ident] = answer
            if len(self._answered) > _REMEMBERED:
                self._answered.popitem(last=False)
        answer = self._answered[ident]
        if answer is None or reply_name == _NO_ANSWER or "/" in reply_name:
            return
        try:
            # Who takes no answer for a second is not there; the others must not wait.
            _send(self._sock, self.folder, reply_name, f"{ident}\n{answer}".encode(), time.monotonic() + 1)
        except (NobodyThere, TimeoutError):
            pass


def _send(sock: socket.socket, folder: str, name: str, data: bytes, deadline: float) -> None:
    """Send a datagram, waiting while the other's buffer is full."""
    if len(data) > 2 * MOST_BYTES:
        raise ValueError(f"a message of {len(data)} bytes is too long for a datagram")
    pause = 0.001
    with _short(folder) as short:
        while True:
            try:
                sock.settimeout(0)
                sock.sendto(data, f"{short}/{name}")
                return
            except OSError as error:
                if error.errno in _GONE:
                    raise NobodyThere(f"nobody listens as {name} in {folder}") from error
                if error.errno not in _BUSY:
                    raise
            if time.monotonic() + pause > deadline:
                raise TimeoutError(f"{name} in {folder} takes no message")
            time.sleep(pause)
            pause = min(pause * 2, 0.05)


@contextlib.contextmanager
def _bound(folder: str, name: str) -> Iterator[socket.socket]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        with _short(folder) as short:
            try:
                sock.bind(f"{short}/{name}")
            except FileNotFoundError as error:
                raise NobodyThere(f"{folder} is gone") from error
        yield sock
    finally:
        sock.close()
        with contextlib.suppress(OSError):
            os.unlink(f"{folder}/{name}")


def is_listening(folder: str, name: str) -> bool:
    """Tell whether a process listens, as the kernel knows: in another container its pid says nothing here."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            with _short(folder) as short:
                sock.connect(f"{short}/{name}")
        except (FileNotFoundError, ConnectionRefusedError, NobodyThere):
            return False
        except OSError:
            return True
    return True


@contextlib.contextmanager
def _short(folder: str) -> Iterator[str]:
    """Give a path of a folder that leaves room for a socket's name in it."""
    if len(os.fsencode(folder)) <= _PATH_LIMIT - 40:
        yield folder
        return
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NobodyThere(f"{folder} is gone") from error
    try:
        yield f"/proc/self/fd/{fd}" if os.path.isdir("/proc/self/fd") else _link_to(folder)
    finally:
        os.close(fd)


def _link_to(folder: str) -> str:
    """Return a short link to a folder, where there is no /proc. It stays: the next to ask needs it too."""
    base = "/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir()  # noqa: S108 (checked below)
    path = f"{base}/cm-{os.geteuid()}-{hashlib.sha256(folder.encode()).hexdigest()[:16]}"
    with contextlib.suppress(FileExistsError):
        os.symlink(folder, path)
    found = os.lstat(path)
    if not stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid() or os.readlink(path) != folder:
        raise PermissionError(f"{path} is no link of this user to {folder}; remove it")
    return path
