"""Which entries may serve a Router: what its caller says beside the evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from router_runtime.device.resolve import Request
from router_runtime.evidence.ladder import ACCEPTABLE
from router_runtime.format.contract import Constants
from router_runtime.routing.checks import wrong_value
from router_runtime.routing.config import KERNELS


@dataclass(frozen=True, slots=True)
class Selection:
    """What a caller says about the entries that may serve.

    Attributes:
        variants: Kernel -> the one variant of it that may serve, whatever its evidence.
        accept: A status that may serve beside those that do by default, or None.

    """

    variants: Mapping[str, str] = dataclasses.field(default_factory=dict)
    accept: str | None = None

    def check(self, mode: str) -> None:
        """Raise InputError for a kernel that a router of that mode does not use, and for a status
        that cannot be accepted.
        """
        known = KERNELS[mode]
        unknown = [name for name in self.variants if name not in known]
        if unknown:
            raise wrong_value("variants", f"kernels of a {mode} router, {list(known)}", unknown)
        for kernel, variant in self.variants.items():
            if not isinstance(variant, str):
                raise wrong_value(f"variants[{kernel!r}]", "the name of a variant", variant)
        accept = self.accept
        if accept is not None and not (isinstance(accept, str) and accept in ACCEPTABLE):
            expected = f"None or one of {list(ACCEPTABLE)}"
            raise wrong_value("accept", expected, accept)

    def request(
        self, kernel: str, constants: Constants, quantities: Mapping[str, int] | None = None
    ) -> Request:
        """Return the request for a kernel that serves this router."""
        return Request(
            kernel,
            constants,
            quantities or {},
            variant=self.variants.get(kernel),
            accept=self.accept,
        )
