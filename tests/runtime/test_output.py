"""Commands whose output cannot be written end in one line at most, with a status of their own."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from router_runtime.format import output

pytestmark = pytest.mark.one_torch

ROOT = Path(__file__).resolve().parents[2]

RUNTIME = ("-m", "router_runtime")
#: The builder's commands need click alone, which this environment has too.
BUILDER = ("-m", "build_kernels")
COMMANDS = [
    pytest.param((*RUNTIME, "doctor"), id="doctor"),
    pytest.param((*RUNTIME, "doctor", "--json"), id="json"),
    pytest.param((*RUNTIME, "--help"), id="help"),
    pytest.param((*BUILDER, "list"), id="list"),
]
FULL = "Error: standard output: expected a place that takes it, found no space left on the device; "


def run(
    arguments: Sequence[str], redirection: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with its standard output redirected as in a shell."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_full_device(arguments: Sequence[str]) -> None:
    done = run(arguments, ">/dev/full")
    assert done.stderr.splitlines()[-1].startswith(FULL)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == output.NOT_WRITTEN == 74


@pytest.mark.parametrize("arguments", COMMANDS[::3])
def test_a_reader_that_has_ended(arguments: Sequence[str]) -> None:
    done = run(arguments, '| true; exit "${PIPESTATUS[0]}"')
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Error" not in done.stderr
    assert done.returncode == output.PIPE_CLOSED == 141


def test_closed_output_is_no_error() -> None:
    """The status is then all that is wanted."""
    done = run((*RUNTIME, "--version"), ">&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_output_that_is_open_for_reading_only() -> None:
    done = run((*RUNTIME, "--version"), "1<README.md")
    assert done.returncode == output.NOT_WRITTEN
    assert "Bad file descriptor; make room there, or write to another place" in done.stderr


LATE = """
import sys
from router_runtime.format.output import guarded_output
with guarded_output():
    print("in a buffer until the end")
    sys.exit(3)
"""


def test_output_that_fails_at_the_end() -> None:
    done = run(("-c", LATE), ">/dev/full")
    assert done.returncode == output.NOT_WRITTEN
    assert done.stderr.startswith(FULL)
    assert run(("-c", LATE), ">/dev/null").returncode == 3


def test_an_error_of_output_is_not_taken_for_one_of_files() -> None:
    """Code that turns errors of its own files into words does not see it."""
    assert not issubclass(output.OutputError, OSError)


class Failing:
    def __init__(self, error: OSError) -> None:
        self._error = error

    def write(self, text: str) -> int:
        raise self._error

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        raise OSError


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (errno.EPIPE, 141, ""),
        (errno.EDQUOT, 74, "found no space left for this user on the device; make room there"),
        (errno.EIO, 74, "found [Errno 5] Input/output error; make room there"),
    ],
)
def test_every_error(
    number: int,
    status: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = Failing(OSError(number, os.strerror(number)))
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as raised, output.guarded_output():
        sys.stdout.write("anything")
    assert raised.value.code == status
    assert sys.stdout is stream
    assert said in capsys.readouterr().err
