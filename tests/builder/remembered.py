"""A cache of what compilers and nvdisasm return to the builders of small test projects.

All tests of a run share it, since most of them build the same two kernels. ``write_project`` copies
this file into a project and wraps functions of three modules with those below. The environment
variable ``REMEMBERED`` names the cache's folder. The key of a compiler's result is the request and
the bytes of all of the builder's files, so a changed source is compiled. Errors are not cached.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from build_kernels.compile.worker_process import WorkerProcess

Disassembler = Callable[[bytes, Sequence[str], Path], str]

#: The environment variable that names the folder of the cache. Empty: nothing is cached.
REMEMBERED = "SMALL_PROJECT_REMEMBERED"


def remembering(process: type[WorkerProcess]) -> type[WorkerProcess]:
    """Return a worker process class that starts a process only for a result that is not cached."""
    known = _folder()
    if known is None:
        return process
    folder = known

    class Remembering(process):  # type: ignore[misc, valid-type]
        def __init__(self, target: str | None) -> None:
            self.target = target
            self._started = False

        def _result(self, task: str, what: str, arguments: Mapping[str, object]) -> bytes:
            path = folder / _digest(task, self.target, arguments)
            if path.exists():
                return path.read_bytes()
            if not self._started:
                super().__init__(self.target)
                self._started = True
            answer: bytes = super()._result(task, what, arguments)
            _write(path, answer)
            return answer

        def close(self) -> None:
            if self._started:
                super().close()

    return Remembering


def once(altered: Callable[[Iterable[str]], list[str]]) -> Callable[[Iterable[str]], list[str]]:
    """Return a comparison of packages with their RECORD that is not repeated for the same packages
    once it has found no difference.
    """
    folder = _folder()
    if folder is None:
        return altered

    @functools.wraps(altered)
    def compared(packages: Iterable[str]) -> list[str]:
        packages = list(packages)
        path = folder / _sha256(json.dumps(packages).encode())
        if path.exists():
            return []
        if not (found := altered(packages)):
            _write(path, b"")
        return found

    return compared


def disassembled(run: Disassembler) -> Disassembler:
    """Return a disassembler that runs once for the same code and options."""
    folder = _folder()
    if folder is None:
        return run

    @functools.wraps(run)
    def found(image: bytes, options: Sequence[str], nvdisasm: Path) -> str:
        path = folder / _sha256(json.dumps([_sha256(image), options]).encode())
        if not path.exists():
            _write(path, run(image, options, nvdisasm).encode())
        return path.read_text(encoding="utf-8")

    return found


def _folder() -> Path | None:
    name = os.environ.get(REMEMBERED)
    return Path(name) if name else None


def _digest(task: str, target: str | None, arguments: Mapping[str, object]) -> str:
    package = Path(__file__).parents[1]
    files = {
        path.relative_to(package).as_posix(): _sha256(path.read_bytes())
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return _sha256(json.dumps([task, target, arguments, files], sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write a file that other processes see whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)
