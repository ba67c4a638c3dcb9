"""What ``pip install CHECKOUT`` does beyond copying packages: it takes the built cubins along.

The build backend (hatchling) loads this file by its path, as pyproject.toml says. A package without
cubins could serve nothing on a GPU, so none is made: the error has the command to type. An editable
installation runs the checkout itself, which has ``artifacts/`` beside the package.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# The backend runs in an environment of its own, in which the checkout is no package.
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from build_kernels import publish  # noqa: E402
from build_kernels.errors import BuildError  # noqa: E402
from build_kernels.release import notes  # noqa: E402
from router_runtime.errors import RouterRuntimeError  # noqa: E402
from router_runtime.evidence.store import EVIDENCE_NAME, load_evidence  # noqa: E402
from router_runtime.format.manifest import MANIFEST_NAME  # noqa: E402
from router_runtime.format.wheel import ARTIFACTS  # noqa: E402


class ArtifactsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the built artifacts into what is made of a checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files to a wheel or a source archive; ``version`` tells an editable one."""
        if version == "editable":
            return
        inside = ARTIFACTS if self.target_name == "wheel" else "artifacts/"
        folder = ROOT / "artifacts"
        try:
            names = list(_names(folder))
        except (BuildError, RouterRuntimeError) as error:
            # Without a traceback, which would hide the message among the backend's own lines.
            raise SystemExit(str(error)) from error
        for name in names:
            build_data["force_include"][str(folder / name)] = inside + name


def _names(folder: Path) -> Iterator[str]:
    """Yield the files of a built folder: manifest, cubins, and the evidence about them."""
    command = f"next: make -C {folder.parent} build-cubins, and run the command again"
    manifest = publish.current(folder)
    if manifest is None:
        raise BuildError(
            f"expected the cubins of this checkout in {folder}, found no {MANIFEST_NAME} of this "
            f"version; {command}"
        )
    yield MANIFEST_NAME
    for entry in manifest.entries:
        if publish.bytes_with_digest(folder, entry.file, entry.sha256) is None:
            raise BuildError(
                f"expected the cubin {entry.file} in {folder}, found it altered or missing; "
                f"{command}"
            )
        yield entry.file
    evidence = load_evidence(folder / EVIDENCE_NAME)
    for record in notes.counting(manifest, evidence).of_both_kinds:
        yield f"{EVIDENCE_NAME}/{record.file_name}"
