"""What goes into a cubin, as digests.

Two digests, for two questions:

- ``Sources.identity``: are two cubins made of the same sources? It covers what the compiler sees
  (``router_runtime.format.source_digest``) of the files that a kernel and its contract reach.
  Comments, docstrings, layout and names of files do not count. The manifest has it, and evidence of
  one target counts for another target because of it.
- ``Sources.exact``: does compiling again give the same bytes? It covers names and bytes of the
  files that the compiler reads, because a compiler may put more into a cubin than its meaning: the
  name of a module, the number of a line. A build reuses a cubin because of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from build_kernels.compile.languages import LANGUAGES, Language
from build_kernels.compile.sources import headers
from build_kernels.errors import BuildError
from router_runtime.format.source_digest import RUNTIME, CudaSources, PythonSources

#: Modules whose bytes decide how every language is compiled.
_WORKER = ("compile/environment.py", "compile/worker.py", "compile/worker_process.py")


class Sources:
    """The sources of the kernels in the folder ``package`` of the builder, each read once.

    Contracts import names of ``router_runtime.format``: these count by their names alone, for the
    manifest has what a contract declares, and the runtime's own modules go into no cubin.
    """

    def __init__(self, package: Path) -> None:
        self._package = package
        self._kernels = package / "kernels"
        folders = {"build_kernels": package, "router_runtime": RUNTIME}
        self._python = PythonSources(folders, boundaries=("router_runtime",))

    def identity(self, kernel: str, language: Language) -> str:
        """SHA-256 of what the compiler sees of a kernel and its contract, and of the recipe."""
        self._check(kernel, language)
        try:
            if language == "cuda":
                text, available = self._cuda(kernel)
                program = CudaSources(available).digest(text)
            else:
                program = self._python.digest(_module(kernel))
            contract = self._python.digest(f"build_kernels.kernels.{kernel}.contract")
        except ValueError as error:
            # Paths in messages start at the project's root.
            text = str(error).replace(f"{self._package.parent}/", "")
            remedy = "" if "; next: " in text else "; next: correct it"
            raise BuildError(f"kernel {kernel}: {text}{remedy}") from error
        return digest([program, contract, f"{language} {LANGUAGES[language].recipe}"])

    def exact(self, kernel: str, language: Language) -> str:
        """SHA-256 of the names and the bytes of what the compiler reads of a kernel, and of the
        modules that call the compiler.
        """
        self._check(kernel, language)
        if language == "cuda":
            text, available = self._cuda(kernel)
            reached = CudaSources(available).reached(text)
            files = {name: available[name].encode() for name in reached}
            files[f"{kernel}.cu"] = text.encode()
        else:
            modules = self._python.reached(_module(kernel))
            files = {name: path.read_bytes() for name, path in modules.items()}
        for name in (LANGUAGES[language].compiler, *_WORKER):
            files[name] = (self._package / name).read_bytes()
        return files_digest(files)

    def files(self, kernel: str, language: Language) -> set[Path]:
        """Return the files that ``identity`` covers."""
        contract = self._python.reached(f"build_kernels.kernels.{kernel}.contract")
        if language == "cuda":
            text, available = self._cuda(kernel)
            folder = self._kernels / kernel
            found = {
                (self._kernels if name.startswith("common/") else folder) / name
                for name in CudaSources(available).reached(text)
            } | {folder / f"{kernel}.cu"}
        else:
            found = set(self._python.reached(_module(kernel)).values())
        return found | set(contract.values())

    def _cuda(self, kernel: str) -> tuple[str, dict[str, str]]:
        source = self._kernels / kernel / f"{kernel}.cu"
        return source.read_text(encoding="utf-8"), headers(kernel, self._kernels)

    def _check(self, kernel: str, language: Language) -> None:
        folder = self._kernels / kernel
        for path in (folder / f"{kernel}{LANGUAGES[language].suffixes[0]}", folder / "contract.py"):
            if not path.is_file():
                raise BuildError(
                    f"kernel {kernel}: expected the file {path.relative_to(self._package.parent)}, "
                    "found none; next: add it, or remove the kernel's row "
                    "from build_kernels/catalog/kernels.py"
                )


def _module(kernel: str) -> str:
    return f"build_kernels.kernels.{kernel}.{kernel}"


def digest(facts: Iterable[str]) -> str:
    """SHA-256 of texts in their order; where one ends and the next begins counts."""
    found = hashlib.sha256()
    for fact in facts:
        data = fact.encode()
        found.update(len(data).to_bytes(8, "little"))
        found.update(data)
    return found.hexdigest()


def files_digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 of named contents, by name."""
    return digest(
        text for name in sorted(files) for text in (name, hashlib.sha256(files[name]).hexdigest())
    )
