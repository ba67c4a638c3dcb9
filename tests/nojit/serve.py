"""Run every op, and every kernel that a Router may pick, in a process that can compile nothing.

``python -I -S -B serve.py SITE DEVICE [LOCK...]``, with ``SITE`` made by ``fresh.make_site`` and
the names of locks to leave open. Prints one line for each op and exits with 0; or prints what
failed or was refused and exits with 1.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

#: Sizes of a router where no model's kernels decide them.
SIZES = {"HIDDEN": 64, "EXPERTS": 16, "TOP_K": 4}
VOCAB = 100
#: No batch here is larger: what is proved does not depend on it.
MOST_TOKENS = 2048

#: Op -> mode of the Router whose number it takes.
MODES = {
    "dense_router": "dense",
    "dense_router_logits": "dense",
    "dense_router_replay": "dense",
    "hash_router": "hash",
    "hash_gate": "hash_gate",
}


def main(site: str, device: str, *without: str) -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    import lockdown  # type: ignore[import-not-found]  # the sandbox has no package tests

    sys.path[0] = site
    lockdown.enter()
    # Others' start comes before the seal: the bindings run ldconfig when they are imported or first
    # used, and a driver may run a helper that loads its kernel module, or do something once when it
    # loads machine code, which it does here for torch. Whatever this package does comes after.
    import torch

    bindings = importlib.import_module("cuda.bindings.driver")
    if device != "cpu":
        torch.cuda.init()
        bindings.cuInit(0)
        torch.zeros(1, device=device).add_(1).item()
        print(f"the driver's compilers before the seal: {lockdown.driver_compilers() or 'none'}")
    lockdown.seal(without)
    import router_runtime

    if Path(router_runtime.__file__).parent != Path(site) / "router_runtime":
        raise RuntimeError(f"expected the package of {site}, found {router_runtime.__file__}")
    from router_runtime.cli import diagnosis, screen

    found = diagnosis.diagnose(None)
    if not found.usable:
        print("\n".join(screen.lines(found)))
        return 1
    for model in models(device):
        run_ops(model, device)
    tried = lockdown.violations()
    if device != "cpu":
        tried += would_have_compiled(lockdown.driver_compilers(), ptx_in_the_driver(device))
    print("\n".join(tried))
    return 1 if tried else 0


#: An empty kernel that every device of compute capability 9.0 or more could compile.
PTX = b".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry control()\n{\n ret;\n}\n\0"
#: Results that say that this process has no compiler of PTX, by CUresult.
NO_COMPILER = {221: "CUDA_ERROR_JIT_COMPILER_NOT_FOUND", 223: "CUDA_ERROR_JIT_COMPILATION_DISABLED"}


def ptx_in_the_driver(device: str) -> int:
    """The CUresult of loading PTX after all serving, as a control: 0 if the driver compiled it."""
    import torch

    from router_runtime.device import driver

    with driver.context(torch.device(device).index) as api:
        status, library = api.cuLibraryLoadData(PTX, [], [], 0, [], [], 0)
        if not status:
            status, kernel = api.cuLibraryGetKernel(library, b"control")
        if not status:
            status, function = api.cuKernelGetFunction(kernel)
        if not status:
            (status,) = api.cuFuncLoad(function)
    return int(status)


def would_have_compiled(compilers: list[str], control: int) -> list[str]:
    """The problems of a process that had these compilers of the driver in memory after serving.

    If it then refused PTX (``control``), or had no compiler in memory, it cannot have compiled.
    """
    said = NO_COMPILER.get(control, f"CUresult {control}" if control else "compiled")
    print(f"the driver's compilers after serving: {compilers or 'none'}; PTX then: {said}")
    if not compilers or control in NO_COMPILER:
        return []
    return [f"loaded by the driver, which may have compiled with it: {name}" for name in compilers]


def models(device: str) -> list[dict[str, int]]:
    """The sizes of every dense router that the device has kernels for."""
    from router_runtime.device.artifact_store import find_artifacts, read_manifest
    from router_runtime.evidence.choice import DENSE
    from router_runtime.format.target import Target

    if device == "cpu":
        return [SIZES]
    import torch

    capability = torch.cuda.get_device_capability(device)
    found = {
        tuple(int(entry.constants[name]) for name in SIZES)
        for entry in read_manifest(find_artifacts()).entries
        if entry.kernel in DENSE and Target.parse(entry.target).runs_on(*capability)
    }
    return [dict(zip(SIZES, sizes, strict=True)) for sizes in sorted(found)]


def run_ops(model: dict[str, int], device: str) -> None:
    """Run every op of the package in every form, once per kernel that its Router may pick."""
    import torch

    from router_runtime import register_router

    names = torch._C._dispatch_get_all_op_names()
    routers: dict[str, Any] = {}
    for name in sorted(name.split("::")[1] for name in names if name.startswith("dsv4::")):
        packet, _, form = name.partition(".")
        op = getattr(getattr(torch.ops.dsv4, packet), form or "default")
        values, counts = tensors(model, device), [1, 64]
        if packet in MODES:
            mode = MODES[packet]
            if mode not in routers:
                router = make_router(mode, model, device)
                routers[mode] = (router, register_router(router))
            router, values["router_id"] = routers[mode]
            values["buffer"] = router.table if mode == "hash" else router.weight
            values["gate"], values["config"] = router.exported()
            if device != "cpu" and mode == "dense":
                counts = [n for each in router.token_ranges for n in (each.low, each.high)]
        arguments = [each for each in op._schema.arguments if not each.has_default_value()]
        if unknown := sorted({each.name for each in arguments} - set(values)):
            raise RuntimeError(f"{name}: teach {Path(__file__).name} the arguments {unknown}")
        counts = sorted({min(count, MOST_TOKENS) for count in counts})
        for tokens in counts:
            given = {key: v[:tokens] if key in BY_TOKEN else v for key, v in values.items()}
            positional = [given[each.name] for each in arguments if not each.kwarg_only]
            named = {each.name: given[each.name] for each in arguments if each.kwarg_only}
            if packet == "topk_indices" and form == "out":
                named |= {"ids_out": given["ids_out"]}
            results = op(*positional, **named)
            if results is None:
                results = [named[key] for key in ("weights_out", "ids_out") if key in named]
            elif form == "packed":  # id and weight in each word
                words = results
                weights = (words & 0xFFFF).to(torch.int16).view(torch.bfloat16)
                results = [weights, words >> 16]
            elif isinstance(results, torch.Tensor):
                results = [results]
            if any(result.shape[0] != tokens for result in results):
                raise RuntimeError(f"{name}: expected {tokens} rows")
            ids = results[min(1, len(results) - 1)]
            if not results[0].isfinite().all() or not (ids >= 0).all():
                raise RuntimeError(f"{name}: expected weights that are finite, and ids")
        print(f"ran {name} {model} with {counts} tokens")


#: Arguments with a row for each token.
BY_TOKEN = (
    *("hidden_states", "token_ids", "logits", "scores", "given_ids"),
    *("weights_out", "ids_out", "logits_out"),
)


def tensors(model: dict[str, int], device: str) -> dict[str, Any]:
    """A value for every argument of every op, by its name."""
    import torch

    hidden, experts, top_k = model["HIDDEN"], model["EXPERTS"], model["TOP_K"]
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    given_ids = normal(MOST_TOKENS, experts).argsort(1)[:, :top_k].int().contiguous()
    on_device = {
        "hidden_states": normal(MOST_TOKENS, hidden).bfloat16(),
        "token_ids": torch.arange(MOST_TOKENS) % VOCAB,
        "logits": normal(MOST_TOKENS, experts),
        "scores": normal(MOST_TOKENS, 3 * experts),
        "given_ids": given_ids,
        "bias": normal(experts),
        "expert_map": torch.arange(2 * experts, dtype=torch.int32).view(experts, 2),
        "replica_counts": torch.full((experts,), 2, dtype=torch.int32),
        "weights_out": torch.zeros(MOST_TOKENS, top_k),
        "ids_out": torch.full((MOST_TOKENS, top_k), -1, dtype=torch.int32),
        "logits_out": torch.zeros(MOST_TOKENS, experts),
    }
    sizes = {"num_experts": experts, "top_k": top_k, "k": top_k, "scale": 1.5, "renormalize": True}
    return {name: tensor.to(device) for name, tensor in on_device.items()} | sizes


def make_router(mode: str, model: dict[str, int], device: str) -> Any:
    import torch

    from router_runtime import Router, RouterConfig

    values = tensors(model, device)
    sizes = (model["HIDDEN"], model["EXPERTS"], model["TOP_K"])
    vocabulary = None if mode == "dense" else VOCAB
    config = RouterConfig(*sizes, 1.5, mode=mode, vocab_size=vocabulary)  # type: ignore[arg-type]
    weight = torch.randn(sizes[1], sizes[0]).bfloat16() * 2**-6
    given: dict[str, Any] = {
        "weight": None if mode == "hash" else weight.to(device),
        "bias": values["bias"] if mode == "dense" else None,
        "table": None if mode == "dense" else values["given_ids"][:VOCAB],
    }
    named = {name: tensor for name, tensor in given.items() if tensor is not None}
    router = Router(config, device=device, **named)
    router.set_expert_map(values["expert_map"], values["replica_counts"])
    return router


if __name__ == "__main__":
    try:
        status = main(*sys.argv[1:])
    except Exception:
        traceback.print_exc(file=sys.stdout)
        status = 1
    sys.stdout.flush()
    os._exit(status)  # libraries may tidy up after themselves at exit, which is no part of serving
