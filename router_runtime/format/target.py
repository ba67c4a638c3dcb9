"""Compilation targets such as ``sm_90a``, and the devices that each runs on."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass
from typing import Literal

from router_runtime.errors import FormatError

#: The targets that ``build_kernels`` compiles for. The builder's catalog lists the same.
BUILDABLE = ("sm_90a", "sm_100a", "sm_103a", "sm_100f")

_TARGET = re.compile(r"sm_([1-9][0-9]*)([0-9])([af]?)")


@dataclass(frozen=True, slots=True)
class Target:
    """A compilation target such as ``sm_90a``.

    ``a`` loads on exactly its own compute capability, ``f`` on its own and later minors of the same
    family, no suffix on its own and later minors of the same major version.
    """

    major: int
    minor: int
    suffix: Literal["", "a", "f"]

    @classmethod
    def parse(cls, text: str) -> Target:
        """Return the target of that name. Raises FormatError for any other text."""
        match = _TARGET.fullmatch(text)
        if match is None:
            raise FormatError(
                f"expected a target such as sm_90a, sm_100a or sm_100f, found {text!r}"
            )
        return cls(int(match[1]), int(match[2]), typing.cast(Literal["", "a", "f"], match[3]))

    def __str__(self) -> str:
        return f"sm_{self.major}{self.minor}{self.suffix}"

    def runs_on(self, major: int, minor: int) -> bool:
        """Return whether a cubin for this target loads on compute capability ``major.minor``."""
        if self.suffix == "a":
            return (major, minor) == (self.major, self.minor)
        return major == self.major and minor >= self.minor
