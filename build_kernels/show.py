"""What the commands print about models, entries and builds: as text, and as data for ``--json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from build_kernels import dispatch
from build_kernels.catalog.models import ANY, MODELS
from build_kernels.catalog.targets import DEFAULT_TARGETS, TARGETS
from build_kernels.standings import Standing
from router_runtime.format.codec import encode
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.format.target import Target


def facts(entry: Entry, manifest: Manifest, tool: str) -> str:
    """Return what a built entry is and uses, a line for each fact."""
    contract, used = entry.contract, entry.resources
    grid = ", ".join(
        str(axis.value)
        if axis.form == "constant"
        else f"{axis.form}({axis.argument} / {axis.divisor}) * {axis.value}"
        for axis in contract.grid
    )
    rows = {
        "entry": entry.key,
        "file": f"{entry.file}, {entry.size} bytes",
        "sha256": entry.sha256,
        "source": entry.source_sha256,
        "commit's source": manifest.source_sha256,
        "assembler": tool,
        "symbol": entry.symbol,
        "numerics": entry.numerics or "none",
        "constants": ", ".join(f"{name}={value}" for name, value in entry.constants.items()),
        "grid": grid,
        "block": contract.block,
        "cluster": contract.cluster,
        "dependent launch": "yes" if contract.programmatic_dependent_launch else "no",
        "limits": ", ".join(f"{k} {low}..{high}" for k, (low, high) in contract.limits.items()),
        "microseconds": ", ".join(f"{tokens}: {found:g}" for tokens, found in entry.latency)
        or "not measured",
        "registers": used.registers,
        "spills": f"{used.spill_stores} B stored, {used.spill_loads} B loaded",
        "local memory": f"{used.local_memory} B a thread",
        "shared memory": f"{used.static_shared_memory} B static, "
        f"{contract.dynamic_shared_memory} B dynamic",
    }
    lines = [f"{name + ':':18}{value}" for name, value in rows.items()]
    lines.append("parameters")
    for parameter, (offset, size) in zip(
        contract.parameters, contract.parameter_layout(Target.parse(entry.target)), strict=True
    ):
        lines.append(f"  {offset:4} {size:4} {parameter.type:10} {parameter.name}")
    return "\n".join(lines)


def table(entries: Sequence[Entry]) -> str:
    """Return built entries as a table."""
    head = ("kernel", "model", "target", "variant", "regs", "spills", "shared", "bytes", "digest")
    lines = [
        (
            entry.kernel,
            entry.model or ANY,
            entry.target,
            entry.variant,
            str(entry.resources.registers),
            str(entry.resources.spill_stores + entry.resources.spill_loads),
            str(entry.resources.static_shared_memory + entry.contract.dynamic_shared_memory),
            str(entry.size),
            entry.sha256[:16],
        )
        for entry in entries
    ]
    return dispatch.aligned([head, *lines], right=range(4, 8))


def built(entries: Iterable[Entry], statuses: Mapping[str, str]) -> list[dict[str, object]]:
    """Return built entries as data."""
    return [
        {
            "key": entry.key,
            "file": entry.file,
            "sha256": entry.sha256,
            "bytes": entry.size,
            "registers": entry.resources.registers,
            "spill_bytes": entry.resources.spill_stores + entry.resources.spill_loads,
            "status": statuses.get(entry.key),
        }
        for entry in entries
    ]


def catalog_data(
    artifacts: Mapping[str, str], evidence: Mapping[str, Standing]
) -> dict[str, object]:
    """Return the models, the targets and the entries of the full plan as data.

    Args:
        artifacts: The key of each entry -> how the built artifacts relate to it.
        evidence: The key of each entry of the plan -> its standing. A built entry that the sources
            do not build any more has none.

    """
    none = {"status": None, "stale_model": False}
    return {
        "models": encode(MODELS),
        "targets": [{"name": each, "default": each in DEFAULT_TARGETS} for each in TARGETS],
        "entries": [
            {"key": key, "artifacts": state, **encode(evidence.get(key, none))}
            for key, state in artifacts.items()
        ],
    }


def catalog_text(artifacts: Mapping[str, str], evidence: Mapping[str, Standing]) -> str:
    """Return the same as text; of entries that are built as the sources say, key and status."""
    lines = ["models"]
    lines += [
        f"  {model.name}: hidden {model.hidden}, experts {model.experts}, top_k {model.top_k}, "
        f"scale {model.scale}, hash layers {model.hash_layers}, vocab {model.vocab}, "
        f"{model.scoring}, gate temperature {model.gate_temperature:g}"
        for model in MODELS
    ]
    lines.append("targets")
    lines += [
        f"  {target}" + ("" if target in DEFAULT_TARGETS else " (only on request)")
        for target in TARGETS
    ]
    lines.append("entries")
    rows = [
        (
            f"  {key}",
            str(evidence.get(key, "-")),
            "" if state in (BUILT, NOT_BUILT) else f"({state})",
        )
        for key, state in artifacts.items()
    ]
    return "\n".join([*lines, dispatch.aligned(rows)])


#: How built artifacts relate to an entry of the plan, where they do not differ from it.
BUILT, NOT_BUILT = "built", "not built"
