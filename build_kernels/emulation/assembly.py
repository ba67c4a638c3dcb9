"""The model's PTX by NVRTC, and cubins from translated PTX by ptxas, both of locked packages."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from build_kernels.compile import toolchain
from build_kernels.compile.worker_process import WorkerProcess
from build_kernels.emulation import interface
from build_kernels.emulation.translate import TARGET
from build_kernels.errors import BuildError

_FOLDER = Path(__file__).parent / "model"


def model() -> str:
    """Return the PTX of the functions that stand in for tcgen05 instructions."""
    headers = {path.name: path.read_text(encoding="ascii") for path in _FOLDER.glob("*.cuh")}
    worker = WorkerProcess(None)
    try:
        return worker.library(
            "model",
            (_FOLDER / "model.cu").read_text(encoding="ascii"),
            dict(sorted(headers.items())),
            interface.constants(),
            "compute_90a",
        )
    finally:
        worker.close()


def assemble(ptx: str, where: str) -> bytes:
    """Return the cubin of a module for sm_90a. Raises BuildError, starting with ``where``."""
    with tempfile.TemporaryDirectory(prefix="build-kernels-") as folder:
        Path(folder, "module.ptx").write_text(ptx, encoding="ascii")
        # Relative names: the folder leaves no trace in the cubin.
        result = subprocess.run(
            [toolchain.ptxas(), f"-arch={TARGET}", "module.ptx", "-o", "module.cubin"],
            cwd=folder,
            env={"PATH": "", "TMPDIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise BuildError(
                f"{where}: expected ptxas to assemble the translated PTX, found:\n"
                f"{result.stderr.strip()[:3000]}"
            )
        return Path(folder, "module.cubin").read_bytes()
