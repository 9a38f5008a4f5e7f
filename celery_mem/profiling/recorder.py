"""Records what runs: reads what the slots note, and looks at the memory meanwhile."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from redis.exceptions import RedisError

from celery_mem.errors import CeleryMemError, RecordingError
from celery_mem.profiling.lines import unpack
from celery_mem.profiling.memory import Watch, check_interval, look
from celery_mem.profiling.recording import MOST_TASKS, Recording, check_place
from celery_mem.state.store import Store

PERIOD_S = 0.2
"""Between two reads; a stream keeps what 2000 steps of slots wrote, or 500 with very many tasks each."""
AT_ONCE = 500
"""Entries of one read."""


class LiveRecording(Recording):
    """A recording that goes on between `start` and `stop`, or in a `with` block; `Client.record` makes it.

    What a slot takes from `start` on is in it, and every task whose result somebody had before `stop`.

    Args:
        connect: gives a connection of its own.
        path: where to save it at the end, see `save`; None leaves that to the caller.
        interval: seconds between two looks at the memory.
        most: attempts to keep; of more, the oldest are dropped and counted.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        namespace: str,
        path: str | os.PathLike[str] | None = None,
        *,
        interval: float = 0.5,
        most: int = MOST_TASKS,
    ) -> None:
        super().__init__(namespace, most)
        check_interval(interval)
        if path is not None:
            check_place(path)
        self._connect = connect
        self._path = path
        self._interval = interval
        self._recorder: _Recorder | None = None

    def start(self) -> Self:
        """Begin; when it returns, slots note what they take.

        Raises:
            RecordingError: it was started before.
            RedisUnavailableError: Redis is away.
        """
        if self.began:
            raise RecordingError("this recording was started before; client.record() makes another one")
        recorder = _Recorder(self._connect(), self, self._interval)
        self.began = self.ended = time.time()
        recorder.begin()
        self._recorder = recorder
        return self

    def stop(self) -> Self:
        """End it, and save it if it was given a path; harmless when repeated."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.stop()
            if self._path is not None:
                self.save(self._path)
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()


class _Recorder(threading.Thread):
    """The thread that fills a recording."""

    def __init__(self, store: Store, recording: LiveRecording, interval: float) -> None:
        super().__init__(name="celery-mem-recorder", daemon=True)
        self._watch = Watch(store, records=True)
        self._recording = recording
        self._interval = interval
        self._look_at = 0.0
        self._after = "0"
        self._expected: dict[str, int] = {}  # slot -> number of its next line
        self._had_gap = False  # slots may have written lines that nobody can know of
        self._heard_at = time.monotonic()
        self._ends = threading.Event()

    def begin(self) -> None:
        """Tell the slots, and start; or raise what Redis has against it."""
        try:
            self._watch.renew()
        except BaseException:
            self._watch.store.link.close()
            raise
        self.start()

    def run(self) -> None:
        try:
            while True:
                is_last = self._ends.is_set()
                try:
                    self._go_on()
                except (CeleryMemError, RedisError) as error:
                    if is_last:
                        self._recording.gaps.append(f"the last seconds are missing: {error}")
                if is_last:
                    return
                self._ends.wait(PERIOD_S)
        finally:
            self._recording.ended = time.time()
            self._watch.end()

    def stop(self) -> None:
        """Read what is still to be read, and end."""
        self._ends.set()
        self.join()

    def _go_on(self) -> None:
        if self._watch.renew():
            self._begin_anew()
        while True:
            found, self._after = self._watch.store.read_lines(self._watch.id, self._after, most=AT_ONCE)
            for data in found:
                self._take(data)
            if len(found) < AT_ONCE - 1:  # the first entry of a stream says nothing
                break
        self._heard_at = time.monotonic()
        self._recording.ended = time.time()
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + self._interval
            self._recording.memory.add(look(self._watch.store))

    def _begin_anew(self) -> None:
        """Redis had forgotten the recording: it was emptied, restarted, or out of reach for too long."""
        silent = time.monotonic() - self._heard_at
        self._recording.gaps.append(f"Redis lost sight of the recording: up to {silent:.1f} s are missing")
        self._after = "0"
        self._expected = {}
        self._had_gap = True

    def _take(self, data: bytes) -> None:
        try:
            slot, first, lines = unpack(data)
        except ValueError as error:
            self._recording.gaps.append(str(error)[:200])
            return
        expected = self._expected.get(slot, first if self._had_gap else 0)
        if first > expected:
            self._recording.dropped += first - expected
        # A step whose reply was lost is sent again, and its lines come twice.
        self._recording.add(slot, lines[max(0, expected - first) :])
        self._expected[slot] = max(expected, first + len(lines))
