"""The differences of two builds as text and as Markdown."""

from __future__ import annotations

from build_kernels.release.compare import Difference
from router_runtime.format.manifest import Entry


def text(found: Difference) -> str:
    """Return a difference as lines, one fact per line."""
    lines = [f"toolchain {line}" for line in found.toolchain]
    lines += [f"added     {key}: {_facts(entry)}" for key, entry in found.added.items()]
    lines += [f"removed   {key}: {_facts(entry)}" for key, entry in found.removed.items()]
    for key, changes in found.changed.items():
        lines += [f"changed   {key}", *(f"            {change}" for change in changes)]
    return "\n".join([*lines, _sum(found)])


def markdown(found: Difference) -> str:
    """Return a difference as Markdown for a pull request."""
    lines = [f"**{_sum(found)}**", ""]
    if found.toolchain:
        lines += ["Toolchain:", "", *(f"- {line}" for line in found.toolchain), ""]
    if found.added or found.removed or found.changed:
        lines += ["| | entry | what |", "| --- | --- | --- |"]
        lines += [f"| added | `{k}` | {_facts(entry)} |" for k, entry in found.added.items()]
        lines += [f"| removed | `{k}` | {_facts(entry)} |" for k, entry in found.removed.items()]
        lines += [
            f"| changed | `{key}` | {'<br>'.join(_escaped(change) for change in changes)} |"
            for key, changes in found.changed.items()
        ]
    return "\n".join(lines).rstrip()


def _facts(entry: Entry) -> str:
    used = entry.resources
    return (
        f"{entry.sha256[:16]}, {entry.size} bytes, {used.registers} registers, "
        f"{used.spill_stores + used.spill_loads} B spills, "
        f"{used.static_shared_memory + entry.contract.dynamic_shared_memory} B shared"
    )


def _sum(found: Difference) -> str:
    return (
        f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed, "
        f"{len(found.identical)} identical"
    )


def _escaped(change: str) -> str:
    return change.replace("|", "\\|").replace("<", "&lt;")
