"""The command line: ``build-kernels build | check | list | inspect | release | ...``."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from build_kernels import dispatch, evidence, lock, publish, show
from build_kernels.build import build
from build_kernels.catalog.model_file import read_model
from build_kernels.catalog.models import MODELS, Model
from build_kernels.catalog.rules import check_distinct
from build_kernels.compile import instructions, toolchain
from build_kernels.compile.sources import PACKAGE
from build_kernels.emulation.emulate import emulate
from build_kernels.errors import BuildError, unknown
from build_kernels.outdated import DIFFERS, differences_from_lock, outdated
from build_kernels.plan import Selection, plan
from build_kernels.progress import Screen
from build_kernels.release import compare_text, signing
from build_kernels.release.builds import open_build
from build_kernels.release.compare import difference
from build_kernels.release.rebuild import rebuild as rebuild_release
from build_kernels.release.release import release
from build_kernels.release.requirements import check_verified_names
from build_kernels.standings import standings
from build_kernels.tuning import candidates, choice, model_text
from build_kernels.tuning import folder as tuning_folder
from build_kernels.tuning.record import Tuning, read_figures, read_tuning
from router_runtime.errors import RouterRuntimeError
from router_runtime.evidence.release import description, verify
from router_runtime.evidence.store import EVIDENCE_NAME
from router_runtime.format import cubin, system_errors
from router_runtime.format.codec import encode
from router_runtime.format.manifest import MANIFEST_NAME
from router_runtime.format.output import guarded_output
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


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
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


def _model_file_option(help_text: str) -> Callable[[_F], _F]:
    return click.option(
        "--model-file",
        "model_files",
        multiple=True,
        type=click.Path(path_type=Path),
        help=help_text,
    )


_quiet_option = click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON object."
)
_keep_going_option = click.option(
    "--keep-going", "-k", is_flag=True, help="After an error, compile the other kernels too."
)


def _screen(quiet: bool, as_json: bool = False) -> Screen:
    """Where the progress of a build is shown; a result in JSON is alone on standard output."""
    return Screen(None if quiet else sys.stderr if as_json else sys.stdout)


def _json(document: object) -> None:
    click.echo(json.dumps(document, indent=1))


@main.command("build")
@click.option("--target", "targets", multiple=True, help="Only this target; repeatable.")
@click.option("--model", "models", multiple=True, help="Only this model; repeatable.")
@click.option("--kernel", "kernels", multiple=True, help="Only this kernel; repeatable.")
@_model_file_option("Only a model of your own, as TOML; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to build into, or to add to.")
@click.option("--update-lock", is_flag=True, help="Record the digests in artifacts.lock.")
@_keep_going_option
@_quiet_option
@_json_option
@_jobs_option
def build_command(
    targets: tuple[str, ...],
    models: tuple[str, ...],
    kernels: tuple[str, ...],
    model_files: tuple[Path, ...],
    out: Path | None,
    update_lock: bool,
    keep_going: bool,
    quiet: bool,
    as_json: bool,
    jobs: int,
) -> None:
    """Build every kernel for every model and target, or a selection into a folder of its own.

    A folder that holds a build of the same sources keeps its other entries. Without --keep-going,
    the first error ends the build.
    """
    selection = Selection(targets, models, kernels, tuple(map(read_model, model_files)))
    selection.check()
    folder = out or ARTIFACTS
    if folder is None:
        raise BuildError("expected --out outside of a checkout, found none; next: add --out DIR")
    own = _same(folder, ARTIFACTS)
    if own and selection.partial:
        raise BuildError(
            "expected --out with another folder for a build that is not the full one, found "
            f"{'none' if out is None else out}: artifacts/ always holds the full plan; next: add "
            "--out DIR"
        )
    if update_lock and (selection.partial or ARTIFACTS is None):
        raise BuildError(
            "expected --update-lock with a full build in a checkout, found a selection or an "
            "installed package; next: make lock-cubins"
        )
    started = time.monotonic()
    with _screen(quiet, as_json) as screen:
        manifest = build(
            selection.jobs(),
            folder,
            jobs,
            screen.step,
            # A folder of its own starts with the cubins that artifacts/ already has.
            reuse=[ARTIFACTS] if ARTIFACTS else [],
            beside=None if own else selection,
            evidence=None if own or ARTIFACTS is None else ARTIFACTS / EVIDENCE_NAME,
            keep_going=keep_going,
        )
    if update_lock and ARTIFACTS is not None:
        lock.write(ARTIFACTS / lock.LOCK_NAME, lock.of(manifest))
    path = None if ARTIFACTS is None else ARTIFACTS / lock.LOCK_NAME
    differing = [] if path is None else differences_from_lock(manifest, path, own)
    statuses, known = evidence.summary(folder, manifest)
    if as_json:
        entries = show.built(manifest.entries, statuses)
        _json({"folder": str(folder), "entries": entries, "differs_from_lock": differing})
    elif not quiet:
        if not screen.changing:
            click.echo(show.table(manifest.entries))
        if differing:
            click.echo("differs from artifacts.lock:\n  " + "\n  ".join(differing))
            click.echo("next: if the change is meant, make lock-cubins, and commit the lock")
        click.echo(f"evidence: {known}")
        click.echo(
            f"{len(manifest.entries)} cubins, {sum(entry.size for entry in manifest.entries)} "
            f"bytes, {time.monotonic() - started:.1f} s, in {folder}"
        )


@main.command("check")
@_keep_going_option
@_quiet_option
@_jobs_option
def check_command(keep_going: bool, quiet: bool, jobs: int) -> None:
    """Rebuild everything from nothing and compare it with artifacts/artifacts.lock."""
    if ARTIFACTS is None:
        raise BuildError(
            "expected a checkout with artifacts/artifacts.lock, found an installed package; "
            "next: git clone the repository and run the command there"
        )
    recorded = lock.read(ARTIFACTS / lock.LOCK_NAME)
    with (
        tempfile.TemporaryDirectory(prefix="build-kernels-check-") as folder,
        _screen(quiet) as screen,
    ):
        manifest = build(plan(), Path(folder), jobs, screen.step, keep_going=keep_going)
    found = lock.differences(recorded, lock.of(manifest))
    if found:
        raise BuildError(
            "expected the build that artifacts.lock records, found:\n  "
            + "\n  ".join(found)
            + "\nnext: if the change is meant, make lock-cubins, and commit the lock"
        )
    if not quiet:
        click.echo(f"{len(manifest.entries)} cubins are what artifacts.lock records")


@main.command("tune")
@click.argument("models", nargs=-1)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for the candidates."
)
@click.option("--target", default="sm_90a", show_default=True, help="What to build for.")
@click.option(
    "--candidates",
    "count",
    type=click.IntRange(min=0),
    default=4,
    show_default=True,
    help="Of each class: so many of those that are predicted to be the fastest.",
)
@click.option("--classes", help="Only the variants for batches of these sizes, such as 4096,16384.")
@click.option(
    "--division",
    "given",
    multiple=True,
    help="A candidate in any case: 4096:128x64:2:1 (TOKENS:EXPERTSxTOKENS:CLUSTER_T:SPLIT_K of "
    "swap_ab), 16384:2:1:1 (TOKENS:CLUSTER_E:CLUSTER_T:PASSES of tile), for one model MODEL/...; "
    "repeatable.",
)
@click.option(
    "--figures",
    type=click.Path(path_type=Path),
    help="Build nothing: write the fastest of what a GPU measured in the folder OUT into the model "
    "files, and print it as rows of the catalog for the catalog's models.",
)
@_quiet_option
@_jobs_option
def tune_command(
    models: tuple[str, ...],
    out: Path,
    target: str,
    count: int,
    classes: str | None,
    given: tuple[str, ...],
    figures: Path | None,
    quiet: bool,
    jobs: int,
) -> None:
    """Build other divisions of the dense kernels of MODELS, to be timed on a GPU.

    MODELS: names of the catalog or model files; none: every model of the catalog. The folder is
    timed where the GPU is: python -m tests.bench.tune --artifacts OUT
    """
    if _same(out, ARTIFACTS):
        raise BuildError("expected a folder of its own, found artifacts/; next: --out build/tune")
    if figures is not None:
        built = publish.current(out)
        tuning = read_tuning(out)
        found = choice.choose(tuning, () if built is None else built.entries, read_figures(figures))
        _apply(tuning, found, models)
        return
    started = time.monotonic()
    with _screen(quiet) as screen:
        tuning, manifest = tuning_folder.make(
            _named(models),
            out,
            target,
            _batches(classes),
            count,
            [candidates.parsed(text) for text in given],
            jobs,
            screen.step,
            reuse=[] if ARTIFACTS is None else [ARTIFACTS],
        )
    constants = {entry.key: entry.constants for entry in manifest.entries}
    if not quiet:
        click.echo(tuning_folder.text(tuning, constants.__getitem__))
        click.echo(
            f"{len(manifest.entries)} cubins, {time.monotonic() - started:.1f} s, in {out}; "
            f"next, on a GPU of {target}: python -m tests.bench.tune --artifacts {out}"
        )


def _apply(tuning: Tuning, choices: list[choice.Choice], models: tuple[str, ...]) -> None:
    """Write the choices for models of one's own into their files, and print the others."""
    catalog = [each for each in choices if each.trial.model in {model.name for model in MODELS}]
    known = {model.name for model in MODELS}
    files = {read_model(Path(name)).name: Path(name) for name in models if name not in known}
    for model in tuning.models:
        own = [each for each in choices if each.trial.model == model.name]
        if model.name in known or not own:
            continue
        if model.name not in files:
            raise BuildError(
                f"expected the TOML file of the model {model.name!r}, whose candidates the folder "
                f"holds, found {', '.join(models) or 'none'}; next: give that file before --out"
            )
        path = files[model.name]
        now = read_model(path)
        if dataclasses.replace(now, measured=()) != dataclasses.replace(model, measured=()):
            raise BuildError(
                f"{path}: expected the model that the folder was made for, {model.shape()}, found "
                f"{now.shape()}; next: .venv/bin/python -m build_kernels tune "
                f"{path} --out with a new folder"
            )
        text = path.read_text(encoding="utf-8")
        text = model_text.rewritten(path.name, text, now, own, tuning.target)
        publish.write_file(path, text.encode())
        click.echo(f"wrote {path}; next: build-kernels build --model-file {path} --out DIR")
    if catalog:
        click.echo(choice.catalog_rows(catalog, tuning.target))


def _named(models: tuple[str, ...]) -> list[Model]:
    """The models of the catalog with these names, or of these files; all, if there are none."""
    known = {model.name: model for model in MODELS}
    chosen = [known[name] if name in known else read_model(Path(name)) for name in models]
    check_distinct("models", [model.name for model in chosen], "name each model once")
    return chosen or list(MODELS)


def _batches(text: str | None) -> frozenset[int]:
    """The numbers of ``--classes``; empty without it."""
    parts = [] if text is None else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise BuildError(
            f"--classes: expected numbers of tokens, found {text!r}; next: --classes 4096,16384"
        )
    return frozenset(map(int, parts))


@main.command("list")
@click.option("--dispatch", "target", help="Show which entry serves which batch on this target.")
@click.option("--markdown", is_flag=True, help="With --dispatch: as kernels/README.md has it.")
@_json_option
def list_command(target: str | None, markdown: bool, as_json: bool) -> None:
    """Show models, targets, every entry of the full plan with its status, and which artifacts are
    outdated.
    """
    if target is not None:
        found = dispatch.rows(target, ARTIFACTS)
        if as_json:
            _json([row.data() for row in found])
        else:
            click.echo(dispatch.markdown(found) if markdown else dispatch.text(found))
        return
    if markdown:
        raise BuildError(
            "expected --markdown with --dispatch TARGET, found it alone; "
            "next: .venv/bin/python -m build_kernels list --dispatch sm_90a --markdown"
        )
    manifest = publish.current(ARTIFACTS) if ARTIFACTS else None
    built = set() if manifest is None else {entry.key for entry in manifest.entries}
    differing = {} if manifest is None else outdated(manifest)
    known = standings(plan(), ARTIFACTS)
    states = {key: show.BUILT if key in built else show.NOT_BUILT for key in known}
    states |= differing
    if as_json:
        _json(show.catalog_data(states, known))
        return
    click.echo(show.catalog_text(states, known))
    if manifest is not None and (differing or built != states.keys()):
        missing = len(states.keys() - built)
        click.echo(
            f"{DIFFERS}: {len(differing)} of {len(built)} entries, and {missing} are not built; "
            "next: make build-cubins"
        )


@main.command("inspect")
@click.argument("entry")
@click.option("--sass", is_flag=True, help="Print the disassembly too.")
@click.option(
    "--artifacts", type=click.Path(path_type=Path), help="Folder to read instead of artifacts/."
)
@_json_option
def inspect_command(entry: str, sass: bool, artifacts: Path | None, as_json: bool) -> None:
    """Show what one built ENTRY, such as topk_select/any/sm_90a/row1024, is and uses."""
    folder = artifacts or ARTIFACTS
    manifest = publish.current(folder) if folder else None
    known = _planned() if manifest is None else [item.key for item in manifest.entries]
    if entry not in known:
        raise unknown("entry", entry, known, "next: .venv/bin/python -m build_kernels list")
    if folder is None or manifest is None:
        raise BuildError(
            f"expected a {MANIFEST_NAME} of this version in {folder}, found none; "
            "next: make build-cubins, or --artifacts DIR"
        )
    (chosen,) = (item for item in manifest.entries if item.key == entry)
    data = publish.bytes_with_digest(folder, chosen.file, chosen.sha256)
    if data is None:
        raise BuildError(
            f"{chosen.file}: expected the cubin that the manifest names, found it altered or "
            "missing; next: make build-cubins"
        )
    tool = cubin.read(data, chosen.file).tool
    listing = instructions.sass(data, toolchain.nvdisasm())
    census = instructions.census(listing)
    differs = outdated(manifest, [chosen]).get(entry)
    if as_json:
        document = {"entry": encode(chosen), "assembler": tool, "instructions": census}
        document |= {"differs": differs} | ({"sass": listing} if sass else {})
        _json(document)
        return
    if differs is not None:
        click.echo(f"{DIFFERS}: {differs}; next: build again")
    click.echo(show.facts(chosen, manifest, tool))
    click.echo("instructions")
    for instruction, count in census.items():
        click.echo(f"  {count:6} {instruction}")
    if sass:
        click.echo(listing)


def _planned() -> list[str]:
    return [job.key for job in plan()]


@main.command("release")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to add the release to."
)
@click.option("--target", "targets", multiple=True, help="Only this target; repeatable.")
@_model_file_option("Add a model of your own, as TOML; repeatable.")
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
@_quiet_option
@_json_option
@_jobs_option
def release_command(
    out: Path,
    targets: tuple[str, ...],
    model_files: tuple[Path, ...],
    key: Path | None,
    verified: tuple[str, ...],
    allow_dirty: bool,
    quiet: bool,
    as_json: bool,
    jobs: int,
) -> None:
    """Build everything from nothing and make one wheel of the runtime with its cubins inside."""
    own = tuple(map(read_model, model_files))
    catalog = tuple(model.name for model in MODELS) if own else ()
    selection = Selection(targets, models=catalog, extra_models=own)
    selection.check()
    check_verified_names(verified, selection)
    # `make build-cubins` does not install the release tools: say so before anything is built.
    toolchain.check_release()
    root = _checkout()
    sign = None
    if key is not None:
        private_key = signing.private_key(
            key, root, lambda: str(click.prompt(f"Password of {key}", hide_input=True))
        )
        sign = functools.partial(signing.sign, key=private_key)
        if not quiet:
            click.echo(f"signing with the key {signing.fingerprint(private_key)}", err=as_json)
    started = time.monotonic()
    with _screen(quiet, as_json) as screen:
        result = release(
            root,
            out,
            selection=selection,
            verified=verified,
            sign=sign,
            allow_dirty=allow_dirty,
            processes=jobs,
            progress=screen.step,
        )
    sizes = {path.name: path.stat().st_size for path in sorted(result.folder.iterdir())}
    if as_json:
        done = {"made": result.made, "signed": result.signed}
        _json({"folder": str(result.folder), **done, "files": sizes})
    if as_json or quiet:
        return
    for name, size in sizes.items():
        click.echo(f"{size:10} {name}")
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
        raise BuildError(
            "expected --repository with --rebuild, found it alone; next: add --rebuild"
        )
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
@_json_option
def diff_command(old: Path, new: Path, markdown: bool, as_json: bool) -> None:
    """Show what changed from OLD to NEW: each a release, a wheel, an artifacts folder or a built
    checkout.
    """
    found = difference(open_build(old), open_build(new))
    if as_json:
        _json(encode(found))
        return
    click.echo(compare_text.markdown(found) if markdown else compare_text.text(found))


@main.command("emulate")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to make; not artifacts/."
)
@click.option("--defects", is_flag=True, help="Make the kernels with defects too, in OUT/defects.")
@_jobs_option
def emulate_command(out: Path, defects: bool, jobs: int) -> None:
    """Make cubins for sm_90a from the tcgen05 kernels' own PTX, with tcgen05 done in software.

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


def _same(folder: Path, other: Path | None) -> bool:
    return other is not None and folder.resolve() == other.resolve()
