"""The wheel: made by the build backend, then written again in one canonical form.

The backend (hatchling, locked, without build isolation) owns names and metadata. What it does
not fix is the bytes: its entries are compressed, and zlib's output differs between versions. So its
entries are written again (``router_runtime.format.wheel``).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_kernels.compile.environment import isolated
from build_kernels.errors import BuildError
from router_runtime.format.wheel import PACKAGE, write

_SBOM = "sbom.cdx.json"

#: The earliest time that a zip archive can state.
_EPOCH_SECONDS = "315532800"


@dataclass(frozen=True, slots=True)
class Project:
    """The runtime's distribution, as in pyproject.toml."""

    name: str
    version: str
    license: str
    python: str
    requirements: tuple[str, ...]

    def requirement(self, package: str) -> str:
        """Return the range of versions of a package that the runtime needs."""
        return next(
            requirement.removeprefix(package)
            for requirement in self.requirements
            if re.match(rf"{re.escape(package)}(?![\w.-])", requirement)
        )


def project(pyproject: bytes, version: str) -> Project:
    """``version`` is the runtime's own, which pyproject.toml takes from its source."""
    table = tomllib.loads(pyproject.decode("utf-8"))["project"]
    return Project(
        name=table["name"],
        version=version,
        license=table["license"],
        python=table["requires-python"],
        requirements=tuple(table["dependencies"]),
    )


def make(
    distribution: str,
    pyproject: bytes,
    beside: Mapping[str, bytes],
    package: Mapping[str, bytes],
    sbom: bytes,
    folder: Path,
) -> bytes:
    """Return the bytes of a wheel of the runtime.

    ``beside``: the files that pyproject.toml refers to (README, licences). ``package``: the files
    to install, by their path. ``folder`` must be new; it is where the backend works.
    """
    source = {"pyproject.toml": _pyproject(distribution, pyproject), _SBOM: sbom}
    for name, data in {**source, **beside, **package}.items():
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    # Nothing of the caller's environment configures the backend. -P and -s: as for a worker.
    result = subprocess.run(
        [sys.executable, "-P", "-s", "-m", "hatchling", "build", "-t", "wheel", "-d", ".."],
        cwd=folder / "source",
        env={**isolated(str(folder)), "SOURCE_DATE_EPOCH": _EPOCH_SECONDS},
        umask=0o022,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    built = list(folder.glob("*.whl"))
    if result.returncode or len(built) != 1:
        raise BuildError(
            f"expected the build backend to make a wheel, found:\n{result.stdout}\n"
            "next: mend what it names: pyproject.toml, a file that it refers to, or a full disk"
        )
    with zipfile.ZipFile(built[0]) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    # A file that the backend left out for a reason of its own must not go missing unnoticed.
    missing = sorted(name for name in package if packed.get(name) != package[name])
    if missing:
        raise BuildError(
            f"expected every file of the runtime in the wheel, missing {missing}; "
            "next: see what pyproject.toml excludes"
        )
    return write(packed)


def _pyproject(distribution: str, text: bytes) -> bytes:
    """The checkout's pyproject.toml narrowed to the runtime alone, under the release's name."""
    import tomlkit  # of release.lock; reading a wheel does without

    document: Any = tomlkit.parse(text.decode("utf-8"))
    document["project"]["name"] = distribution
    scripts = document["project"]["scripts"]
    for script, target in dict(scripts).items():
        if not target.startswith(f"{PACKAGE}."):
            del scripts[script]
    build = document["tool"]["hatch"]["build"]
    del build["hooks"]  # the artifacts are among the files already
    build["ignore-vcs"] = True  # cubins are ignored in a checkout
    build["targets"]["wheel"]["packages"] = [PACKAGE]
    build["targets"]["wheel"]["core-metadata-version"] = (
        "2.4"  # newer ones are not known everywhere
    )
    build["targets"]["wheel"]["sbom-files"] = [_SBOM]
    return tomlkit.dumps(document).encode("utf-8")
