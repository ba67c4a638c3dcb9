"""One cubin to be: what a build hands to a compiler."""

from __future__ import annotations

from dataclasses import dataclass

from build_kernels.catalog.kernels import Language
from build_kernels.catalog.latency import Latency
from router_runtime.format.contract import Constants


@dataclass(frozen=True, slots=True)
class Job:
    kernel: str
    language: Language
    model: str | None
    target: str
    variant: str
    constants: Constants
    source_sha256: str
    latency: Latency = ()

    @property
    def key(self) -> str:
        """The same name that the manifest's entry has."""
        return f"{self.kernel}/{self.model or 'any'}/{self.target}/{self.variant}"
