"""What is to be timed in a folder of candidates, and what was measured there, as files.

The builder writes the first and reads the second; ``tests.bench.tune`` does the opposite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_kernels.catalog.models import Model
from build_kernels.errors import BuildError
from router_runtime.errors import FormatError
from router_runtime.format.codec import decode, parse_json

#: Says what is to be timed in a folder of candidates, and marks it.
TUNING_NAME = "tuning.json"

#: The kernel whose bits are expected of every candidate.
REFERENCE = "dense_router_decode"

#: A kernel for many tokens takes as long for fewer tokens than these as for these.
FEW = 128


@dataclass(frozen=True, slots=True)
class Trial:
    """Entries of one model and class, to be compared with each other.

    Attributes:
        model: The model's name.
        kernel: Such as ``dense_router_prefill``.
        variant: The class, by the variant that serves it, such as ``wgmma_4096``.
        tokens: The batches of the class.
        today: The variant that serves them today: the class itself if the model has it; None:
            nothing does.
        entries: Names of variants, the one of today among them.

    """

    model: str
    kernel: str
    variant: str
    tokens: tuple[int, ...]
    today: str | None
    entries: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a folder of candidates is for.

    Attributes:
        target: Such as ``sm_90a``.
        tokens: The numbers of tokens of a complete row of latencies.
        models: The models.
        trials: What is compared.
        dropped: Candidate -> why it was left out.

    """

    target: str
    tokens: tuple[int, ...]
    models: tuple[Model, ...]
    trials: tuple[Trial, ...]
    dropped: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Figures:
    """What a GPU measured.

    Attributes:
        device: The GPU's name.
        target: That of the folder.
        complete: Whether everything was measured.
        sha256: Key of an entry -> the digest of its cubin.
        wrong: Key of an entry -> why it must not serve; it has no figures.
        microseconds: Key of an entry -> tokens in decimal -> of one call.
        torch_mm: Model -> tokens in decimal -> of the matrix product alone, by torch.

    """

    device: str
    target: str
    complete: bool
    sha256: Mapping[str, str]
    wrong: Mapping[str, str]
    microseconds: Mapping[str, Mapping[str, float]]
    torch_mm: Mapping[str, Mapping[str, float]]


def read_tuning(folder: Path) -> Tuning:
    """Return what ``build-kernels tune`` wrote. Raises BuildError for another folder."""
    command = f".venv/bin/python -m build_kernels tune MODEL --out {folder}"
    found: Tuning = _read(Tuning, folder / TUNING_NAME, command)
    return found


def read_figures(path: Path) -> Figures:
    """Return what ``tests.bench.tune`` wrote. Raises BuildError for another file."""
    found: Figures = _read(Figures, path, "python -m tests.bench.tune --artifacts DIR, on a GPU")
    return found


def _read(kind: type, path: Path, command: str) -> Any:
    try:
        return decode(kind, parse_json(path.read_bytes(), path.name), str(path))
    except (OSError, FormatError) as error:
        raise BuildError(
            f"expected {path}, as the next command writes it, found: {error}; next: {command}"
        ) from error
