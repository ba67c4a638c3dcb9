"""Makes the folder that the runner takes: ``python -m tests.emulation.conformance.make FOLDER``.

Needs the toolchain and the packages of ``build_kernels/conformance.lock``; no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from build_kernels.compile import toolchain
from build_kernels.emulation.assembly import assemble, model
from build_kernels.emulation.statements import entry
from build_kernels.emulation.translate import translate
from tests.emulation.conformance import matmul, single_mma

RECORD = "conformance.json"
#: Tiles of M and steps of K of a matmul.
TILES, STEPS = 2, 3


def sources() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Return name, PTX and how to launch it, for each kernel."""
    for kind in single_mma.TYPES:
        sizes = [(m, n, 16) for m, n in single_mma.SHAPES]
        launch = {"threads": 128, "shared": 0, "kind": kind, "tile": None, "sizes": sizes}
        yield f"{single_mma.PACKAGE}-{kind}", single_mma.ptx(kind), launch
    for form in matmul.FORMS:
        made = matmul.compiled(form)
        order = ("r" if form.a_rows else "c") + ("c" if form.b_columns else "r")
        name = f"{matmul.PACKAGE}-{form.kind}-{'x'.join(map(str, form.tile))}-{order}"
        m, n, k = form.tile
        launch = {
            "threads": 32 * form.warps,
            "shared": made.metadata.shared,
            **asdict(form),
            "sizes": [(TILES * m, n, STEPS * k)],
        }
        yield name, made.asm["ptx"], launch


def main() -> None:
    """Make the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    library = model()
    record: dict[str, Any] = {
        "model_sha256": hashlib.sha256(library.encode()).hexdigest(),
        "assembler": dict(toolchain.check_emulation()),
        "packages": {
            package: importlib.metadata.version(package)
            for package in ("mmasim", single_mma.PACKAGE, matmul.PACKAGE)
        },
        "kernels": {},
    }
    for name, ptx, launch in sources():
        translated = translate(ptx, library)
        (folder / f"{name}.ptx").write_text(ptx)
        (folder / f"{name}.cubin").write_bytes(assemble(translated.ptx, name))
        made = {"symbol": entry(ptx).symbol, "replaced": translated.replaced}
        record["kernels"][name] = {**launch, **made, "unwaited": list(translated.unwaited)}
        print(f"{name}  {sum(translated.replaced.values())} instructions in software", flush=True)
    (folder / RECORD).write_text(json.dumps(record, indent=1))
    print(f"{len(record['kernels'])} kernels in {folder}")


if __name__ == "__main__":
    main()
