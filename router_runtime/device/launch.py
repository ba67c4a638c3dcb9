"""Launching a loaded kernel by parameter name.

The order of arguments is stated once, in the contract. ``LoadedKernel.launch`` takes every argument
by name. ``LoadedKernel.bind`` fixes the arguments that stay (weights, bias, scale) and returns a
launcher for those that vary from call to call, with everything else computed beforehand: that is
the hot path.

One launch costs two passes over memory that already exists: ``struct`` packs the varying arguments
at once beside those that stay, and the grid and the stream are stored into the launch
configuration. The memory block with all of it belongs to one launcher and one thread: the
bindings release the interpreter lock inside the launch, so two threads may be in it at once. The
driver copies arguments and configuration before it returns, so a thread's next launch may reuse
them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from router_runtime.device import driver
from router_runtime.device.launch_config import CONFIG_BYTES, STREAM_WORD, launch_config
from router_runtime.device.packing import ArgumentLayout, selector
from router_runtime.device.tensor_map import EncodedTensorMap, Matrix
from router_runtime.errors import DriverError, InputError, explain
from router_runtime.format.contract import Contract
from router_runtime.format.manifest import Entry

_TORCH_NAMES = {
    "bf16": "bfloat16",
    "f32": "float32",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "u8": "uint8",
    "u32": "uint32",
    "u64": "uint64",
}


class LaunchBlock:
    """One thread's launch configuration and argument memory for one launcher."""

    __slots__ = (*("arguments", "config", "keep", "maps", "pointers", "words32", "words64"),)

    def __init__(self, contract: Contract, layout: ArgumentLayout, arguments: bytes) -> None:
        self.config = launch_config(contract)
        raw = (ctypes.c_ubyte * CONFIG_BYTES).from_address(self.config.getPtr())
        self.words32 = memoryview(raw).cast("B").cast("I")
        self.words64 = memoryview(raw).cast("B").cast("Q")
        self.arguments = ctypes.create_string_buffer(arguments, max(len(arguments), 1))
        self.maps = [EncodedTensorMap(recipe) for recipe in layout.maps]
        start = ctypes.addressof(self.arguments)
        addresses = [
            self.maps[-1 - place].address if place < 0 else start + place for place in layout.places
        ]
        table = (ctypes.c_void_p * max(len(addresses), 1))(*addresses)
        self.pointers = ctypes.addressof(table)
        self.keep = (raw, table)


class LoadedKernel:
    """A kernel on a device, checked against its contract. ``loader.load_entry`` makes it."""

    def __init__(self, entry: Entry, function: Any, device: int, multiprocessors: int) -> None:
        self.entry = entry
        self.function = function
        self.device = device
        self.multiprocessors = multiprocessors
        self._types = {parameter.name: parameter.type for parameter in entry.contract.parameters}
        self._grid_names = {
            axis.argument for axis in entry.contract.grid if axis.argument is not None
        }
        api = driver.bindings()
        self._launch_kernel = api.cuLaunchKernelEx
        self._local = threading.local()
        self._unbound: BoundLaunch | None = None
        _kernels.add(self)

    def __repr__(self) -> str:
        return f"LoadedKernel({self.entry.key} on cuda:{self.device})"

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names of a launch's arguments: the parameters, and what the grid and the tensor maps
        refer to.
        """
        names = dict.fromkeys(name for name, kind in self._types.items() if kind != "tensormap")
        names.update(dict.fromkeys(recipe.argument for recipe in self.entry.contract.tensor_maps))
        names.update(dict.fromkeys(sorted(self._grid_names)))
        return tuple(names)

    def launch(self, stream: int, /, **arguments: Any) -> None:
        """Launch on a raw stream handle. Pointers may be tensors, addresses or None (null)."""
        self._check_names(arguments)
        names = self.arguments
        if self._unbound is None:
            self._unbound = self.bind(names)
        self._unbound(stream, *(self.value_of(name, arguments[name]) for name in names))

    def bind(self, varying: tuple[str, ...], /, **fixed: Any) -> BoundLaunch:
        """Return a launcher that has the ``fixed`` arguments and takes the ``varying`` in order."""
        self._check_names([*varying, *fixed])
        return BoundLaunch(self, varying, fixed)

    def _check_names(self, names: Iterable[str]) -> None:
        if sorted(names) != sorted(self.arguments):
            raise InputError(
                explain(
                    f"arguments of {self.entry.key}",
                    expected=sorted(self.arguments),
                    found=sorted(names),
                    remedy="pass each argument once, by name",
                )
            )

    def value_of(self, name: str, value: Any) -> Any:
        """Return what the argument ``name`` becomes in the packed arguments: a number, an address,
        or a ``Matrix`` for a tensor map. Raises InputError for a tensor of another type or device.
        """
        kind = self._types.get(name, "")
        if value is None and kind.startswith("ptr:"):
            return 0
        if hasattr(value, "data_ptr"):
            self._check_tensor(name, kind, value)
            if any(recipe.argument == name for recipe in self.entry.contract.tensor_maps):
                rows, columns = value.shape
                return Matrix(value.data_ptr(), rows, columns, value.stride(0))
            return value.data_ptr()
        return value

    def _check_tensor(self, name: str, kind: str, tensor: Any) -> None:
        mapped = {recipe.argument: recipe.dtype for recipe in self.entry.contract.tensor_maps}
        element = kind.partition(":")[2] or mapped.get(name, "")
        found = (str(tensor.dtype).removeprefix("torch."), tensor.device.type, tensor.device.index)
        expected = (_TORCH_NAMES.get(element), "cuda", self.device)
        if found != expected:
            raise InputError(
                explain(
                    f"argument {name} of {self.entry.key}",
                    expected=expected,
                    found=found,
                    remedy="convert or move the tensor",
                )
            )

    def enter_thread(self) -> None:
        """Prepare the calling thread, once, for launches of this kernel. Raises DriverError in a
        forked child.
        """
        if not hasattr(self._local, "entered"):
            driver.refuse_fork()
            driver.adopt_thread(self.device)
            self._local.entered = True

    def forget_threads(self) -> None:
        """Make every thread call ``enter_thread`` again before its next launch."""
        self._local = threading.local()


class BoundLaunch:
    """A kernel with some of its arguments fixed. Call it with a raw stream and the varying ones."""

    __slots__ = (
        *("__weakref__", "_axes", "_fixed", "_kernel", "_launch", "_layout", "_local", "_maps"),
        *("_order", "_pack_into", "_positions", "_spare", "_template", "keep"),
    )

    def __init__(
        self, kernel: LoadedKernel, varying: tuple[str, ...], fixed: Mapping[str, Any]
    ) -> None:
        contract = kernel.entry.contract
        layout = self._layout = ArgumentLayout(contract, varying)
        positions = {name: index for index, name in enumerate((*varying, *fixed))}
        self._kernel, self._positions = kernel, positions
        self._launch = kernel._launch_kernel
        self._local = threading.local()
        self._fixed = tuple(kernel.value_of(name, value) for name, value in fixed.items())
        self.keep = tuple(fixed.values())  # the tensors behind the addresses
        self._pack_into = layout.pack_into
        self._order = selector([positions[name] for name in layout.changing])
        values = (0,) * len(varying) + self._fixed
        try:
            self._template = layout.pack(*(values[positions[name]] for name in layout.packed))
        except (struct.error, OverflowError, TypeError) as error:
            raise self._refused(values, error) from error
        self._axes = []
        for index, axis in enumerate(contract.grid):
            if axis.argument is None:
                continue
            cap = 2**31 - 1
            if axis.form == "ceil_capped_at_sms":
                extent = contract.cluster[index]
                cap = max(kernel.multiprocessors // extent, 1) * extent
            self._axes.append((index, positions[axis.argument], axis.divisor, axis.value, cap))
        self._maps = [
            (index, positions[recipe.argument]) for index, recipe in enumerate(layout.maps)
        ]
        # For the first thread that launches; there is seldom another.
        self._spare = [LaunchBlock(contract, layout, self._template)]
        _launchers.add(self)

    def __call__(self, stream: int, *varying: Any) -> None:
        """Launch on a raw stream handle with the varying arguments, as ``value_of`` gives them.

        Raises InputError for a value that does not fit its type, DriverError if the launch fails.
        """
        values = varying + self._fixed
        kernel = self._kernel
        try:
            block = self._local.block
        except AttributeError:
            block = self._block()
        try:
            self._pack_into(block.arguments, 0, *self._order(values))
        except (struct.error, OverflowError, TypeError) as error:
            raise self._refused(values, error) from error
        for index, position, divisor, value, cap in self._axes:
            extent = -(-values[position] // divisor) * value
            block.words32[index] = extent if extent < cap else cap
        for index, position in self._maps:
            block.maps[index].hold(values[position])
        block.words64[STREAM_WORD] = stream
        (status,) = self._launch(block.config, kernel.function, block.pointers, 0)
        if status:
            raise self._failed(status, values)

    def _block(self) -> LaunchBlock:
        """The calling thread's block, on its first launch: the one that is there, or a new one."""
        kernel = self._kernel
        kernel.enter_thread()
        try:
            block = self._spare.pop()
        except IndexError:
            block = LaunchBlock(kernel.entry.contract, self._layout, self._template)
        self._local.block = block
        return block

    def forget_blocks(self) -> None:
        """Make every thread build a new block for its next launch."""
        self._local = threading.local()

    def _named(self, values: tuple[Any, ...]) -> dict[str, Any]:
        return {name: values[self._positions[name]] for name in self._layout.packed}

    def _refused(self, values: tuple[Any, ...], error: Exception) -> InputError:
        entry = self._kernel.entry
        types = {p.name: p.type for p in entry.contract.parameters}
        return InputError(
            explain(
                f"arguments of {entry.key}",
                expected={name: types[name] for name in self._layout.packed},
                found=f"{self._named(values)} ({error})",
                remedy="pass values of these types",
            )
        )

    def _failed(self, status: Any, values: tuple[Any, ...]) -> DriverError:
        return DriverError(
            explain(
                f"launch of {self._kernel.entry.key} on cuda:{self._kernel.device}",
                expected="CUDA_SUCCESS",
                found=f"{getattr(status, 'name', status)} ({int(status)}) with "
                f"{self._named(values)}",
                remedy=driver.remedy(status),
            )
        )


_kernels: weakref.WeakSet[LoadedKernel] = weakref.WeakSet()
_launchers: weakref.WeakSet[BoundLaunch] = weakref.WeakSet()


def _forget_after_fork() -> None:
    """A forked child takes the slow path on its first launch, where the fork is refused."""
    for kernel in list(_kernels):
        kernel.forget_threads()
    for launcher in list(_launchers):
        launcher.forget_blocks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
