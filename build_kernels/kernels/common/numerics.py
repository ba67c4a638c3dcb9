"""The constants that decide results, stated once for every kernel.

A CUDA C++ kernel receives ``CONSTANTS`` as macros (floats as hexadecimal literals), a CuTe DSL
kernel reads the mapping. Both evaluate a score by the same sequence of IEEE-rounded fp32
operations, so its bits depend neither on the language nor on the GPU. The constants SCORING and
GATE_TEMPERATURE of an entry say which (``router_runtime.format.scoring``). If GATE_TEMPERATURE is
not 1, the logit is first multiplied by fl32(1 / GATE_TEMPERATURE). For SCORING sqrtsoftplus:

    m = min(max(z, 0), LOGIT_MAX)                   min and max return the operand that is a number
    a = min(|z|, EXP_CLAMP)
    t = fma(a, EXP_NEG_LOG2E, EXP_SHIFT)
    n = t - EXP_SHIFT                               the integer nearest to -a / ln 2
    r = fma(n, EXP_NEG_LN2_HI, -a)
    r = fma(n, EXP_NEG_LN2_LO, r)                   r = -a - n ln 2, |r| <= ln(2) / 2
    p = EXP_C0 + r (EXP_C1 + r (... + r EXP_C6))    Horner's rule, one fma a step; p = exp(r)
    u = float(bits(p) + (bits(t) << 23)) * EXP_UNSCALE
    q = LOG1P_C0 + u (LOG1P_C1 + ... + u LOG1P_C8)  Horner's rule, one fma a step; q = log1p(u) / u
    s = sqrt(fma(u, q, m))

For SCORING sigmoid, with the same u:

    s = (z >= 0 ? 1 : u) / (1 + u)                  division rounded to the nearest

EXP_SHIFT is 3 * 2^22 + 30. Added to a small number it leaves the nearest integer plus 30 in the low
bits of t, so that the shift by 23 (modulo 2^32) multiplies p by 2^(n + 30), exactly, and the
multiplication by EXP_UNSCALE = 2^-30 rounds once, also when u is subnormal. At EXP_CLAMP and above,
u is below half of the smallest subnormal and becomes zero.

A NaN logit passes min and max as m = 0 and a = EXP_CLAMP, hence s = 0, as step 3 of the router
requires, also for the sigmoid, whose comparison it fails; its key is -inf. The clamp at -LOGIT_MAX
has no effect on a score (s = 0 from -104 down) and needs no operation. Nor does either clamp have
one on a sigmoid.

Measured over every finite fp32 logit against FP64: the relative error of s is at most 1.43e-7 for
-80 <= z (0.6e-7 above 80), and below -80 the error is at most 4e-7 s + 2.7e-23, the second term
being the last subnormals of u. The required bound is 4e-7 (and 4e-7 s + 4e-23).
One term less in either polynomial would still meet it, at 1.9e-7 and 2.1e-7; one fma of about 36
operations is not worth half of the margin. Of the sigmoid the relative error is at most 1.11e-7 for
z >= 0 and 1.77e-7 for -80 <= z < 0, and below -80 the error is at most 4e-7 s + 7.1e-46. The
required bound is 4e-7 (and 4e-7 s + 1.5e-45).

The coefficients minimise the relative error of exp on [-ln(2)/2, ln(2)/2] and of log1p(u)/u on
[0, 1]; tests/kernels/fit_scoring.py computes them.
"""

from __future__ import annotations

import types
from collections.abc import Mapping

from router_runtime.format.contract import Constants

#: The version of everything after the logits: change it when any result of steps 2 to 6 changes.
EPILOGUE_VERSION = 1

#: The scoring function that a tag need not name.
_PLAIN = ("sqrtsoftplus", 1.0)

#: Slices of the hidden dimension, whose sums a dense kernel and hash_gate add last
#: (dense/summation.py).
SLICES = 4


def dense_tag(constants: Constants) -> str:
    """Return what decides the bits of a dense result: family of MMAs, chunk, slices, epilogue, and
    the scoring function, if it is not sqrtsoftplus with the gate temperature 1.

    Entries with the same tag give the same bits, those of hash_gate included. mma.sync and wgmma
    are one family: they were compared. tcgen05 is another until it has been compared on a device
    that has it; ``router-runtime verify`` compares the entries of one family.
    """
    family = "bf16-tcgen05-k16-f32" if constants["MMA"] == "tcgen05" else "bf16-k16-f32"
    order = f"chunk{int(constants['K_CHUNK'])}/slices{SLICES}"
    return f"{family}/{order}/{_epilogue_tag(constants)}"


def _epilogue_tag(constants: Constants) -> str:
    found = (str(constants["SCORING"]), float(constants["GATE_TEMPERATURE"]))
    plain = f"epilogue{EPILOGUE_VERSION}"
    return plain if found == _PLAIN else f"{plain}/{found[0]}/temperature{found[1]:.9g}"


_EXP = (
    "0x1.000000p+0",
    "0x1.000000p+0",
    "0x1.fffffcp-2",
    "0x1.55548cp-3",
    "0x1.555858p-5",
    "0x1.123de0p-7",
    "0x1.6ac74ep-10",
)

_LOG1P = (
    "0x1.000000p+0",
    "-0x1.ffff14p-2",
    "0x1.5535dep-2",
    "-0x1.fd1368p-3",
    "0x1.884554p-3",
    "-0x1.19af90p-3",
    "0x1.447088p-4",
    "-0x1.eca3dap-6",
    "0x1.5fa142p-8",
)

CONSTANTS: Mapping[str, int | float] = types.MappingProxyType(
    {
        # Steps 1, 2 and 6: the reduction's chunk, the stored NaN, the clamp, the guarded division.
        "K_CHUNK": 256,
        "NAN_LOGIT_BITS": 0x7FFFFFFF,
        "LOGIT_MAX": float.fromhex("0x1.fffffep+127"),
        "RENORM_EPSILON": 1e-20,
        # Step 3, the reduction of exp's argument.
        "EXP_CLAMP": 104.0,
        "EXP_NEG_LOG2E": float.fromhex("-0x1.715476p+0"),
        "EXP_SHIFT": 12582942.0,
        "EXP_NEG_LN2_HI": float.fromhex("-0x1.62e430p-1"),
        "EXP_NEG_LN2_LO": float.fromhex("0x1.05c610p-29"),
        "EXP_UNSCALE": 2.0**-30,
        # Step 3, the polynomials, lowest power first.
        **{f"EXP_C{power}": float.fromhex(text) for power, text in enumerate(_EXP)},
        **{f"LOG1P_C{power}": float.fromhex(text) for power, text in enumerate(_LOG1P)},
    }
)
