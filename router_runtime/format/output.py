"""Standard output that may fail: its reader is gone, or its disk is full.

A command ends with a status of its own then, because the statuses 0 and 1 say what it found.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

from router_runtime.errors import explain
from router_runtime.format import system_errors

#: The reader of a pipe has ended: what the shell shows for a program that SIGPIPE ends.
PIPE_CLOSED = 128 + signal.SIGPIPE
#: The output could not be written for another reason.
NOT_WRITTEN = os.EX_IOERR


class OutputError(Exception):
    """Standard output could not be written. It is no OSError, so that code that opens files does
    not take it for an error of its own. The cause is the OSError.
    """


@contextlib.contextmanager
def guarded_output() -> Iterator[None]:
    """Run a command. If its output cannot be written, the process ends with ``PIPE_CLOSED``, in
    silence, or with one line on standard error and ``NOT_WRITTEN``.
    """
    stream = sys.stdout
    if stream is None:  # closed before the start: there is nothing to write to
        yield
        return
    guarded = _Guarded(stream)
    sys.stdout = cast(TextIO, guarded)
    try:
        try:
            yield
        finally:
            guarded.flush()
    except OutputError as error:
        _discard(stream)
        raise SystemExit(_status(error.__cause__)) from error
    finally:
        sys.stdout = stream


class _Guarded:
    """A stream whose failures are OutputError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: Any) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputError from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputError from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _status(cause: BaseException | None) -> int:
    assert isinstance(cause, OSError)
    if cause.errno == errno.EPIPE:
        return PIPE_CLOSED
    text = explain(
        "standard output",
        expected="a place that takes it",
        found=system_errors.found(cause),
        remedy=system_errors.remedy(cause, "make room there, or write to another place"),
    )
    with contextlib.suppress(OSError):
        print(f"Error: {text}", file=sys.stderr)
    return NOT_WRITTEN


def _discard(stream: TextIO) -> None:
    """Let what is left in the stream's buffer go nowhere: Python flushes it when it ends."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
