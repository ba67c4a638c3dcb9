"""Compilation targets such as ``sm_90a``, and the devices that each runs on."""

from __future__ import annotations

import re
import typing
from dataclasses import dataclass
from typing import Literal

from router_runtime.errors import FormatError

#: The targets that ``build_kernels`` compiles for, those of a default build first. The builder's
#: catalog lists the same.
BUILDABLE = ("sm_90a", "sm_100f", "sm_100a", "sm_103a", "sm_107a")

#: A family target -> the compute capabilities of its family, as NVIDIA has published them.
_FAMILIES = {"sm_100f": ((10, 0), (10, 3), (10, 7))}

_TARGET = re.compile(r"sm_([1-9][0-9]*)([0-9])([af]?)")


@dataclass(frozen=True, slots=True)
class Target:
    """A compilation target such as ``sm_90a``.

    ``a`` loads on exactly its own compute capability, ``f`` on those of its family, no suffix on
    its own and later minors of the same major version.
    """

    major: int
    minor: int
    suffix: Literal["", "a", "f"]

    @classmethod
    def parse(cls, text: str) -> Target:
        """Return the target of that name. Raises FormatError for any other text, and for a family
        whose members are not known here.
        """
        match = _TARGET.fullmatch(text)
        if match is None or (match[3] == "f" and text not in _FAMILIES):
            raise FormatError(
                f"expected a target such as sm_90a, sm_100a or sm_100f, found {text!r}"
            )
        return cls(int(match[1]), int(match[2]), typing.cast(Literal["", "a", "f"], match[3]))

    def __str__(self) -> str:
        return f"sm_{self.major}{self.minor}{self.suffix}"

    @property
    def capabilities(self) -> tuple[tuple[int, int], ...]:
        """Return the compute capabilities that it is made for, its own first: for ``f`` those of
        its family.
        """
        return _FAMILIES.get(str(self), ((self.major, self.minor),))

    def runs_on(self, major: int, minor: int) -> bool:
        """Return whether a cubin for this target loads on compute capability ``major.minor``."""
        if self.suffix:
            return (major, minor) in self.capabilities
        return major == self.major and minor >= self.minor
