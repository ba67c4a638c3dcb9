"""The entries that this GPU loads, for the commands of this folder that launch each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from router_runtime.device import driver
from router_runtime.device.artifact_store import find_artifacts, read_manifest
from router_runtime.device.loader import load_entry
from router_runtime.errors import ResolutionError, explain
from router_runtime.evidence.cases import Case
from router_runtime.format.manifest import Entry, Manifest
from router_runtime.format.target import Target
from router_runtime.verification.inputs import ROW_INPUT, Inputs
from router_runtime.verification.kernel_run import KernelRun

DEVICE = "cuda:0"


@dataclass(frozen=True)
class Chosen:
    """Entries of a manifest, and the folder of the cubins."""

    artifacts: Path
    manifest: Manifest
    entries: list[Entry]

    def load(self, entry: Entry) -> KernelRun:
        """Its kernel, loaded, with a workspace."""
        return KernelRun(load_entry(entry, self.manifest, self.artifacts, 0), DEVICE)


def choose(prefixes: Sequence[str]) -> Chosen:
    """The entries that this GPU loads, of them those that ``named`` picks.

    Raises:
        ResolutionError: There is no such entry.

    """
    artifacts = find_artifacts()
    manifest = read_manifest(artifacts)
    driver.initialise()
    facts = driver.device_facts(0)
    here = [
        entry
        for entry in manifest.entries
        if Target.parse(entry.target).runs_on(facts.major, facts.minor)
    ]
    entries = named(here, prefixes)
    if not entries:
        raise ResolutionError(
            explain(
                "entries to launch",
                expected=f"some of {[entry.key for entry in here]}",
                found=list(prefixes) or "none for this GPU",
                remedy="name the start of one, or run: make build-cubins",
            )
        )
    return Chosen(artifacts, manifest, entries)


def named(entries: Sequence[Entry], prefixes: Sequence[str]) -> list[Entry]:
    """Those whose key, with or without the target, starts with one of the prefixes; all of them if
    there is none.
    """
    return [
        entry
        for entry in entries
        if not prefixes
        or entry.key.startswith(tuple(prefixes))
        or entry.key.replace(f"/{entry.target}", "").startswith(tuple(prefixes))
    ]


def row_cost(case: Case) -> tuple[int, int]:
    """How much work a row of the case is, to compare cases of one kernel: with images first, then
    by the elements and what is selected of them.
    """
    elements = case.sizes.get("row_length", case.sizes.get("experts", 0))
    return case.sizes.get("images", 0), elements * case.sizes["top_k"]


def rows_of(case: Case, inputs: Inputs) -> Tensor:
    """The input with one row per token."""
    rows = inputs[ROW_INPUT[case.kernel]]
    assert isinstance(rows, Tensor)
    return rows


def new_outputs(case: Case, inputs: Inputs, logits: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What a KernelRun writes, with all its elements unset: by position, and by name."""
    shape = len(rows_of(case, inputs)), case.sizes["top_k"]
    integers = torch.int64 if inputs.get("wide_ids") else torch.int32
    ids, logical_ids = torch.empty(2, *shape, dtype=integers, device=DEVICE)
    outputs = [torch.empty(shape, device=DEVICE), ids]
    if logits:
        outputs.append(torch.empty(shape[0], case.sizes["experts"], device=DEVICE))
    by_name = {"logical_ids": logical_ids} if "expert_map" in inputs else {}
    if case.kernel == "topk_indices":
        by_name["slots"] = torch.empty(shape, dtype=torch.int32, device=DEVICE)
    return outputs, by_name


def on_device(inputs: Inputs) -> Inputs:
    """Copies on the GPU, without gaps between rows: so memcheck sees a read past the last row."""
    return {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
