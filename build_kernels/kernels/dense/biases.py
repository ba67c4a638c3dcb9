"""Selection biases in shared memory."""

from __future__ import annotations

import cutlass
from cutlass import Float32, Int32, Int64, cute

from build_kernels.kernels.common import epilogue
from build_kernels.kernels.common.parameters import Routing
from build_kernels.kernels.common.ptx import arith, memory

#: The bias of padding experts in the forms that rank by bounds: such an expert loses every tie too,
#: because its id is above all others.
LOWEST = float("-inf")


@cute.jit
def load(
    source: Int64,
    target: Int32,
    part: Int32,
    count: cutlass.Constexpr[int],
    experts: cutlass.Constexpr[int],
    padding: cutlass.Constexpr[float],
    thread: Int32,
    threads: cutlass.Constexpr[int],
) -> None:
    """Load the FP32 biases of part ``part`` of the experts, which has ``count`` of them.

    ``threads`` threads call this; a barrier among them has to follow. ``source`` is the global
    address of all biases, ``target`` the shared address of ``count`` values. An expert from
    ``experts`` on gets ``padding``.
    """
    for i in cutlass.range_constexpr(-(-count // threads)):
        place = thread + i * threads
        if place < count:
            value = Float32(padding)
            expert = part * count + place
            if expert < experts:
                value = memory.load_global_f32(source + Int64(expert) * 4)
            memory.store_shared_f32(target + place * 4, value)


@cute.jit
def of_token(
    routing: Routing, images: Int32, token: Int32, text_biases: Int32, image_biases: Int32
) -> Int32:
    """Return the address of the biases that a token is selected by.

    That is ``image_biases`` for an image token, if ``images`` is not 0, else ``text_biases``.
    """
    image = Int32(0)
    if images != 0 and token < routing.tokens:
        image = epilogue.is_image(routing, token)
    return arith.select(arith.equal(image, Int32(0)), text_biases, image_biases)
