"""What the choice of a kernel needs to know about a GPU. Pure: the driver fills it in."""

from __future__ import annotations

from dataclasses import dataclass

#: The oldest driver that loads cubins of the CUDA 13 toolchain: 13.0, ``advice.DRIVER``.
MINIMUM_DRIVER = 13000


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What resolution knows of a device. ``driver`` is the CUDA version it serves (13000: 13.0).
    ``present``: the device is in this machine, and not made up for a target.
    """

    major: int
    minor: int
    driver: int
    sms: int
    shared_memory_per_block_optin: int
    present: bool = True

    @property
    def capability(self) -> tuple[int, int]:
        """Return the compute capability: major, minor."""
        return self.major, self.minor

    def __str__(self) -> str:
        return (
            f"compute capability {self.major}.{self.minor}, driver for CUDA "
            f"{self.driver // 1000}.{self.driver % 1000 // 10}, {self.sms} multiprocessors"
        )
