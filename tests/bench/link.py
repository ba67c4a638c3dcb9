"""The tiny kernel between two routers of a chain.

It reads one number per token of the previous router's output and writes one element per token of
the next one's input, so that no router can start its mathematics before the previous one is done.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from router_runtime.device.driver import check
from router_runtime.errors import DriverError, explain

if TYPE_CHECKING:
    from torch import Tensor

_THREADS = 256

SOURCE = r"""
extern "C" __global__ void chain_link(
    const float* previous, long long previous_stride, unsigned short* next, long long next_stride,
    int tokens)
{
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int token = blockIdx.x * blockDim.x + threadIdx.x;
    if (token < tokens) {
        // The upper half of an fp32 number is that number in bf16, rounded towards zero.
        unsigned bits = __float_as_uint(previous[token * previous_stride]);
        next[token * next_stride] = static_cast<unsigned short>(bits >> 16);
    }
}
"""


def compile_link(major: int, minor: int) -> bytes:
    """The link as a cubin for a compute capability. The runtime never compiles; a benchmark may."""
    from cuda.bindings import nvrtc

    program = check(
        nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"chain_link.cu", 0, [], []), "nvrtcCreateProgram"
    )
    options = [f"-arch=sm_{major}{minor}".encode(), b"-default-device"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status:
        log = b" " * check(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
        check(nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
        raise DriverError(
            explain(
                "chain_link",
                expected=f"NVRTC to compile for sm_{major}{minor} (sm_90 or newer)",
                found=f"{status.name}: {log.decode(errors='replace').strip()}",
                remedy="use a newer GPU",
            )
        )
    code = b" " * check(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
    check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
    return bytes(code)


class Link:
    """The link, loaded into the current context. Needs torch to have made that context."""

    def __init__(self, code: bytes) -> None:
        from cuda.bindings import driver as api

        self._api = api
        self._module = check(api.cuModuleLoadData(code), "cuModuleLoadData")
        self._function = check(
            api.cuModuleGetFunction(self._module, b"chain_link"), "cuModuleGetFunction"
        )

    def launch(self, previous: Tensor, following: Tensor, stream: int, dependent: bool) -> None:
        """``dependent``: with programmatic dependent launch."""
        tokens = following.shape[0]
        config = self._api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = -(-tokens // _THREADS), 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = _THREADS, 1, 1
        config.hStream = stream
        attributes: list[Any] = []
        if dependent:
            serial = self._api.CUlaunchAttribute()
            kinds = self._api.CUlaunchAttributeID
            serial.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            serial.value.programmaticStreamSerializationAllowed = 1
            attributes.append(serial)
        config.attrs = attributes
        config.numAttrs = len(attributes)
        values = (
            ctypes.c_void_p(previous.data_ptr()),
            ctypes.c_int64(previous.stride(0)),
            ctypes.c_void_p(following.data_ptr()),
            ctypes.c_int64(following.stride(0)),
            ctypes.c_int32(tokens),
        )
        table = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        check(
            self._api.cuLaunchKernelEx(config, self._function, ctypes.addressof(table), 0),
            "cuLaunchKernelEx(chain_link)",
        )
