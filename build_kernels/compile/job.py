"""One cubin to be compiled: what a plan consists of."""

from __future__ import annotations

from dataclasses import dataclass

from build_kernels.compile.languages import LANGUAGES, Language
from router_runtime.format.contract import Constants


@dataclass(frozen=True, slots=True)
class Job:
    """One cubin to be compiled.

    Attributes:
        kernel: Name of the folder under ``kernels/``.
        language: Of its source.
        model: The model that it is compiled for; None: it serves every model.
        target: Such as sm_90a.
        variant: Name of the catalog's row.
        constants: Compile-time constants by name.
        source_sha256: Digest of what the compiler sees of the sources, of constants and flags.
        inputs_sha256: Digest of the names and bytes of the sources, of constants, flags and target:
            where it is the same, so is the cubin.
        latency: (tokens, microseconds), tokens ascending; of no influence on the cubin.

    """

    kernel: str
    language: Language
    model: str | None
    target: str
    variant: str
    constants: Constants
    source_sha256: str
    inputs_sha256: str
    latency: tuple[tuple[int, float], ...] = ()

    @property
    def key(self) -> str:
        """Return the key that the manifest's entry will have."""
        return f"{self.kernel}/{self.model or 'any'}/{self.target}/{self.variant}"

    @property
    def worker(self) -> str:
        """Return the kind of worker that compiles it: its target, or its language if one worker
        compiles for every target.
        """
        return self.target if LANGUAGES[self.language].worker_per_target else self.language
