"""The command line: ``build-kernels build | check | list | inspect | release | ...``."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from build_kernels import dispatch, lock, publish
from build_kernels.build import build
from build_kernels.catalog.model_file import read_model
from build_kernels.catalog.models import ANY, MODELS
from build_kernels.catalog.targets import DEFAULT_TARGETS, TARGETS
from build_kernels.compile import instructions, toolchain
from build_kernels.compile.sources import PACKAGE
from build_kernels.emulation.emulate import emulate
from build_kernels.errors import BuildError, unknown
from build_kernels.plan import plan
from build_kernels.release import compare_text, signing
from build_kernels.release.builds import open_build
from build_kernels.release.compare import difference
from build_kernels.release.rebuild import rebuild as rebuild_release
from build_kernels.release.release import release
from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence.release import description, verify
from router_runtime.format import cubin, system_errors
from router_runtime.format.manifest import MANIFEST_NAME, Entry, Manifest
from router_runtime.format.output import guarded_output
from router_runtime.format.target import Target
from router_runtime.version import __version__

_ROOT = PACKAGE.parent
#: The checkout's artifacts folder; an installed package has none.
ARTIFACTS = _ROOT / "artifacts" if (_ROOT / "pyproject.toml").is_file() else None

_F = TypeVar("_F", bound=Callable[..., None])


class _Group(click.Group):
    """A group of commands that prints the message of an error of ours and exits with 1."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        with guarded_output():
            return super().main(*arguments, **options)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (BuildError, RouterRuntimeError) as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(system_errors.explained(error)) from error


@click.group(cls=_Group)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """Compile the DeepSeek-V4 router kernels to cubins. Needs no GPU and no CUDA toolkit."""


def _jobs_option(command: _F) -> _F:
    return click.option(
        "--jobs",
        type=click.IntRange(min=1),
        default=lambda: len(os.sched_getaffinity(0)),
        show_default="all cores",
        help="Worker processes.",
    )(command)


@main.command("build")
@click.option("--target", "targets", multiple=True, help="Only this target; repeatable.")
@click.option("--model", "models", multiple=True, help="Only this model; repeatable.")
@click.option("--kernel", "kernels", multiple=True, help="Only this kernel; repeatable.")
@click.option(
    "--model-file",
    "model_files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Only a model of your own, as TOML; repeatable.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder to build into.")
@click.option("--update-lock", is_flag=True, help="Record the digests in artifacts.lock.")
@_jobs_option
def build_command(
    targets: tuple[str, ...],
    models: tuple[str, ...],
    kernels: tuple[str, ...],
    model_files: tuple[Path, ...],
    out: Path | None,
    update_lock: bool,
    jobs: int,
) -> None:
    """Build every kernel for every model and target, or a selection into a folder of its own."""
    partial = bool(targets or models or kernels or model_files)
    folder = out or ARTIFACTS
    if folder is None or (partial and _same(folder, ARTIFACTS)):
        raise BuildError(
            "expected --out for a build that is not the full one, found none: "
            "artifacts/ always holds the full plan; next: add --out DIR"
        )
    if update_lock and (partial or ARTIFACTS is None):
        raise BuildError(
            "expected --update-lock with a full build in a checkout, found a selection or an "
            "installed package; next: make lock-cubins"
        )
    work = plan(
        targets=targets,
        models=models,
        kernels=kernels,
        extra_models=[read_model(path) for path in model_files],
    )
    started = time.monotonic()
    # A folder of its own starts with the cubins that artifacts/ already has.
    manifest = build(work, folder, jobs, click.echo, reuse=[ARTIFACTS] if ARTIFACTS else [])
    click.echo(_table(manifest.entries))
    click.echo(
        f"{len(manifest.entries)} cubins, {sum(entry.size for entry in manifest.entries)} bytes, "
        f"{time.monotonic() - started:.1f} s, in {folder}"
    )
    if update_lock and ARTIFACTS is not None:
        lock.write(ARTIFACTS / lock.LOCK_NAME, lock.of(manifest))


@main.command("check")
@_jobs_option
def check_command(jobs: int) -> None:
    """Rebuild everything from nothing and compare it with artifacts/artifacts.lock."""
    if ARTIFACTS is None:
        raise BuildError("expected a checkout with artifacts/artifacts.lock, found a package")
    recorded = lock.read(ARTIFACTS / lock.LOCK_NAME)
    with tempfile.TemporaryDirectory(prefix="build-kernels-check-") as folder:
        manifest = build(plan(), Path(folder), jobs, click.echo)
    found = lock.differences(recorded, lock.of(manifest))
    if found:
        raise BuildError(
            "expected the build that artifacts.lock records, found:\n  "
            + "\n  ".join(found)
            + "\nnext: if the change is meant, make lock-cubins, and commit the lock"
        )
    click.echo(f"{len(manifest.entries)} cubins are what artifacts.lock records")


@main.command("list")
@click.option("--dispatch", "target", help="Show which entry serves which batch on this target.")
@click.option("--markdown", is_flag=True, help="With --dispatch: as kernels/README.md has it.")
def list_command(target: str | None, markdown: bool) -> None:
    """Show models, targets, and every entry of the full plan."""
    if target is not None:
        found = dispatch.rows(target, ARTIFACTS)
        click.echo(dispatch.markdown(found) if markdown else dispatch.text(found))
        return
    if markdown:
        raise BuildError(
            "expected --markdown with --dispatch TARGET, found it alone; "
            "next: .venv/bin/python -m build_kernels list --dispatch sm_90a --markdown"
        )
    click.echo("models")
    for model in MODELS:
        click.echo(
            f"  {model.name}: hidden {model.hidden}, experts {model.experts}, top_k {model.top_k}, "
            f"scale {model.scale}, hash layers {model.hash_layers}, vocab {model.vocab}"
        )
    click.echo("targets")
    for target in TARGETS:
        default = target in DEFAULT_TARGETS
        click.echo(f"  {target}" + ("" if default else " (only on request)"))
    click.echo("entries")
    for job in plan():
        click.echo(f"  {job.key}")


@main.command("inspect")
@click.argument("entry")
@click.option("--sass", is_flag=True, help="Print the disassembly too.")
@click.option(
    "--artifacts", type=click.Path(path_type=Path), help="Folder to read instead of artifacts/."
)
def inspect_command(entry: str, sass: bool, artifacts: Path | None) -> None:
    """Show what one built ENTRY, such as topk_select/any/sm_90a/row1024, is and uses."""
    folder = artifacts or ARTIFACTS
    manifest = publish.current(folder) if folder else None
    if folder is None or manifest is None:
        raise BuildError(
            f"expected a {MANIFEST_NAME} of this version in {folder}, found none; "
            "next: make build-cubins, or --artifacts DIR"
        )
    entries = {item.key: item for item in manifest.entries}
    if entry not in entries:
        raise unknown("entry", entry, entries, "next: .venv/bin/python -m build_kernels list")
    chosen = entries[entry]
    data = publish.bytes_with_digest(folder, chosen.file, chosen.sha256)
    if data is None:
        raise BuildError(
            f"{chosen.file}: expected the cubin that the manifest names, found it altered or "
            "missing; next: make build-cubins"
        )
    facts = cubin.read(data, chosen.file)
    listing = instructions.sass(data, toolchain.nvdisasm())
    click.echo(_facts(chosen, manifest, facts.tool))
    click.echo("instructions")
    for instruction, count in instructions.census(listing).items():
        click.echo(f"  {count:6} {instruction}")
    if sass:
        click.echo(listing)


@main.command("release")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to add the release to."
)
@click.option("--target", "targets", multiple=True, help="Only this target; repeatable.")
@click.option(
    "--key", type=click.Path(path_type=Path), help="ed25519 private key, PEM, to sign with."
)
@click.option(
    "--require-verified",
    "verified",
    multiple=True,
    help="Refuse if a digest of this target is not verified; repeatable.",
)
@click.option("--allow-dirty", is_flag=True, help="Release what no commit names; it is recorded.")
@_jobs_option
def release_command(
    out: Path,
    targets: tuple[str, ...],
    key: Path | None,
    verified: tuple[str, ...],
    allow_dirty: bool,
    jobs: int,
) -> None:
    """Build everything from nothing and make one wheel of the runtime with its cubins inside."""
    # The release tools are installed for this command and the next only.
    toolchain.check_release()
    root = _checkout()
    sign = None
    if key is not None:
        private_key = signing.private_key(
            key, root, lambda: str(click.prompt(f"Password of {key}", hide_input=True))
        )
        sign = functools.partial(signing.sign, key=private_key)
        click.echo(f"signing with the key {signing.fingerprint(private_key)}")
    started = time.monotonic()
    result = release(
        root,
        out,
        targets=targets,
        verified=verified,
        sign=sign,
        allow_dirty=allow_dirty,
        processes=jobs,
        progress=click.echo,
    )
    for path in sorted(result.folder.iterdir()):
        click.echo(f"{path.stat().st_size:10} {path.name}")
    click.echo(
        f"{'made' if result.made else 'the same bytes were there already'}, "
        f"{'signed' if result.signed else 'UNSIGNED (no --key)'}, "
        f"{time.monotonic() - started:.1f} s, in {result.folder}"
    )


@main.command("verify-release")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="ed25519 public key, PEM.")
@click.option("--rebuild", is_flag=True, help="Build the commit again and compare every byte.")
@click.option(
    "--repository",
    type=click.Path(path_type=Path, file_okay=False),
    help="The clone that --rebuild takes the commit from. Default: this checkout.",
)
@_jobs_option
def verify_release_command(
    files: tuple[Path, ...], key: Path | None, rebuild: bool, repository: Path | None, jobs: int
) -> None:
    """Check a release: FILES are its folder, or its wheel and the files beside it."""
    toolchain.check_release()
    if repository is not None and not rebuild:
        raise BuildError("expected --repository with --rebuild, found it alone")
    found = verify(files, key)
    for line in description(found):
        click.echo(line)
    if rebuild:
        rebuild_release(found, repository or _checkout(), jobs)
        click.echo("the commit gives the same bytes again")


@main.command("diff")
@click.argument("old", type=click.Path(exists=True, path_type=Path))
@click.argument("new", type=click.Path(exists=True, path_type=Path))
@click.option("--markdown", is_flag=True, help="For a pull request.")
def diff_command(old: Path, new: Path, markdown: bool) -> None:
    """Show what changed from OLD to NEW: each a release, a wheel, an artifacts folder or a built
    checkout.
    """
    found = difference(open_build(old), open_build(new))
    click.echo(compare_text.markdown(found) if markdown else compare_text.text(found))


@main.command("emulate")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to make; not artifacts/."
)
@click.option("--defects", is_flag=True, help="Make the kernels with defects too, in OUT/defects.")
@_jobs_option
def emulate_command(out: Path, defects: bool, jobs: int) -> None:
    """Make cubins for sm_90a that run the tcgen05 kernels' own PTX, those instructions in software.

    Run them on a Hopper GPU: python -m tests.emulation OUT
    """
    if _same(out, ARTIFACTS):
        raise BuildError(
            "expected a folder of its own, found artifacts/; next: --out build/emulation"
        )
    started = time.monotonic()
    reuse = [] if ARTIFACTS is None else [ARTIFACTS]
    manifest = emulate(out, jobs, click.echo, reuse=reuse, defects=defects)
    click.echo(f"{len(manifest.entries)} cubins, {time.monotonic() - started:.1f} s, in {out}")


def _checkout() -> Path:
    if ARTIFACTS is None:
        raise BuildError(
            "expected a checkout, found an installed package; next: git clone the repository and "
            "run the command there"
        )
    return _ROOT


def _facts(entry: Entry, manifest: Manifest, tool: str) -> str:
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


def _table(entries: Sequence[Entry]) -> str:
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


def _same(folder: Path, other: Path | None) -> bool:
    return other is not None and folder.resolve() == other.resolve()
