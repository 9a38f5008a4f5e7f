"""A Python process on another host that runs what a test sends it, one call after another.

Run as `python -m tests.hosts.remote`, it reads pickles of a function and its arguments from standard input,
and writes pickles of the outcome to standard output. It ends with its input, and so with who writes there.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Concatenate, ParamSpec, TypeVar

import cloudpickle

P = ParamSpec("P")
R = TypeVar("R")


class At(SimpleNamespace):
    """What a remote process keeps from call to call; every function that it runs gets it first."""

    def __getattr__(self, name: str) -> Any:  # for the type checker: anything may be kept here
        raise AttributeError(f"nothing was kept as {name!r}")


class RemoteError(AssertionError):
    """A call failed on the other host; the text is its traceback there."""


class Remote:
    """The test's end.

    Args:
        command: starts the other end.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, function: Callable[Concatenate[At, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `function(at, ...)` there and return its result; it may be a lambda.

        Raises:
            RemoteError: it raised.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(cloudpickle.dumps((function, args, kwargs)))
        self._process.stdin.flush()
        failed, result = pickle.load(self._process.stdout)
        if failed:
            raise RemoteError(result)
        return result

    def close(self) -> None:
        """End the process; what it kept is dropped as at the end of any program."""
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


def serve() -> None:
    """Run calls until the input ends."""
    outcomes = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a call prints is no outcome
    at = At()
    while True:
        try:
            function, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            outcome = False, function(at, *args, **kwargs)
            sent = cloudpickle.dumps(outcome)
        except Exception:
            sent = cloudpickle.dumps((True, traceback.format_exc()))
        outcomes.write(sent)
        outcomes.flush()


if __name__ == "__main__":
    serve()
