"""Reproducible random tensors: the same bits on every machine and with every torch version.

``torch.randn`` promises neither (its stream depends on version and device), and numpy would be a
dependency of its own, so random words come from SplitMix64 in counter mode: 64-bit integer
arithmetic only, each word a function of (seed, stream, index). Everything built from words is
exact: integers below 2^24 times powers of two, one rounding to bf16, or raw bit patterns. No
logarithm, no cosine, no order of summation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB

#: Words drawn at a time: few enough for a cache, enough to keep all threads of a pass busy.
_BLOCK = 1 << 18


class Random:
    """A generator of CPU tensors from a seed. Every call uses the next stream, so that the values
    of one call do not depend on the shapes of earlier ones.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._stream = 0

    def words(self, *shape: int) -> Tensor:
        """Random 64-bit words, int64 of the given shape."""
        self._stream += 1
        start = self._seed * _GAMMA + self._stream * _MIX_1
        words = torch.arange(1, math.prod(shape) + 1, dtype=torch.int64)
        # Block by block and in place, so that the next pass finds its operands in the cache.
        for z in _blocks(words):
            z.mul_(_signed(_GAMMA)).add_(_signed(start))
            z.bitwise_xor_(_shift_right(z, 30)).mul_(_signed(_MIX_1))
            z.bitwise_xor_(_shift_right(z, 27)).mul_(_signed(_MIX_2))
            z.bitwise_xor_(_shift_right(z, 31))
        return words.reshape(shape)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers of [low, high), int64. ``high - low`` is far below 2^40, so the bias is nil."""
        return _shift_right(self.words(*shape), 24) % (high - low) + low

    def bits(self, *shape: int) -> Tensor:
        """fp32 numbers of random bits: all exponents, subnormals, infinities and NaNs."""
        return self.words(*shape).to(torch.int32).view(torch.float32)

    def normal(self, *shape: int) -> Tensor:
        """fp32, near normal with deviation 1.15, at most 4: four 16-bit uniforms, added exactly."""
        words = self.words(*shape)
        found = torch.empty(shape, dtype=torch.float32)
        pairs = 0x0000FFFF0000FFFF
        for z, block in zip(_blocks(words), _blocks(found), strict=True):
            # Two sums of two fields in one word, then their sum.
            two = (z >> 16).bitwise_and_(pairs).add_(z & pairs)
            block.copy_((two >> 32).add_(two & 0xFFFFFFFF).sub_(2 * 0xFFFF)).mul_(2.0**-15)
        return found

    def uniform(self, low: int, high: int, *shape: int) -> Tensor:
        """fp32, uniform in [low, high) in steps of 2^-12."""
        return self.integers(low << 12, high << 12, *shape).float() * 2.0**-12

    def choice(self, options: Tensor, *shape: int) -> Tensor:
        """Random elements of the one-dimensional tensor ``options``."""
        return options[self.integers(0, options.numel(), *shape)]


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a contiguous tensor, ``_BLOCK`` elements each."""
    return torch.split(tensor.view(-1), _BLOCK)


def _signed(value: int) -> int:
    """The int64 of the same low 64 bits."""
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def _shift_right(words: Tensor, count: int) -> Tensor:
    """Logical shift: torch's ``>>`` on int64 copies the sign."""
    return (words >> count).bitwise_and_(_MASK >> count)
