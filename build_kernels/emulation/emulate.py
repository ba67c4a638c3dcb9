"""A folder of cubins for sm_90a in which the tcgen05 kernels of sm_100f can be run.

Beside the emulated entries it holds the project's own dense entries for sm_90a, whose bits they are
compared with. The manifest is an ordinary one. ``emulation.json`` says what each emulated entry was
made from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_kernels import plan, publish
from build_kernels.build import make
from build_kernels.compile import instructions, toolchain
from build_kernels.compile.contract_check import check_contract
from build_kernels.emulation.assembly import assemble, model
from build_kernels.emulation.changes import Code, Form
from build_kernels.emulation.defects import DEFECTS
from build_kernels.emulation.identity import model_sha256
from build_kernels.emulation.sources import Source, emulated_jobs, sources, without_target
from build_kernels.emulation.translate import TARGET, Translation, translate
from build_kernels.entries import resources
from build_kernels.errors import BuildError
from build_kernels.out_folder import EMULATION_NAME, require_ours
from build_kernels.reuse import INPUTS_NAME, Reuse
from router_runtime.format import cubin
from router_runtime.format.manifest import Entry, Manifest, artifact_name

#: The package with ptxas.
_ASSEMBLER = "nvidia-cuda-nvcc"
#: The folder of the kernels with defects, inside the other.
DEFECTS_FOLDER = "defects"

Progress = Callable[[str], None]


def emulate(
    out: Path,
    processes: int,
    progress: Progress,
    reuse: Sequence[Path] = (),
    defects: bool = False,
) -> Manifest:
    """Make the folder and return its manifest.

    Args:
        out: Created if it does not exist.
        processes: The most processes at a time.
        progress: Called with a line for each emulated cubin, and for each defect that the kernel
            has no place for.
        reuse: Build folders whose cubins may be used again.
        defects: Make the kernels with defects too, in a folder of their own inside.

    Raises:
        BuildError: An instruction that the emulation does not have, or whatever a build raises.

    """
    tools, tool = toolchain.check(), toolchain.check_emulation()
    for folder in (out, out / DEFECTS_FOLDER):
        require_ours(folder, INPUTS_NAME)
    jobs = emulated_jobs()
    dense = sorted({job.kernel for job in jobs})
    hopper = plan.plan(targets=[TARGET], kernels=dense)
    made = make([*hopper, *jobs], Reuse((out, *reuse), tools), processes, lambda line: None)
    built = {entry.key: (entry, data) for entry, data in made}
    siblings = [built[job.key] for job in hopper]
    library, found = model(), sources(jobs, processes)
    record = {
        "model_sha256": model_sha256(),
        "ptxas": tool[_ASSEMBLER],
        "source_sha256": plan.tree_digest(),
    }
    manifest = Manifest(plan.tree_digest(), tools, ())

    def one(source: Source) -> tuple[Entry, bytes, Mapping[str, object]]:
        translated = translate(source.ptx, library)
        first = source.jobs[0]
        originals = [built[job.key][0] for job in source.jobs]
        entry, data = _entry(originals[0], siblings, translated, f"{first.variant}.{first.target}")
        progress(f"{entry.key}  {sum(translated.replaced.values())} instructions in software")
        return entry, data, _record(source.ptx, originals, translated)

    with ThreadPoolExecutor(processes) as executor:
        emulated = list(executor.map(one, found))
    _publish(out, manifest, siblings, emulated, record)
    if defects:
        broken = _defective(found, built, siblings, library, processes, progress)
        _publish(out / DEFECTS_FOLDER, manifest, siblings, broken, record)
    entries = [*(entry for entry, _ in siblings), *(entry for entry, _, _ in emulated)]
    return dataclasses.replace(manifest, entries=tuple(entries))


def smallest(found: Sequence[Source]) -> dict[Form, Source]:
    """Return, for each form, the kernel that the defects are put into.

    It is the one with the least PTX in which every defect of that form has a place. In a cluster of
    one CTA, for example, a defect of multicast copies has none.
    """
    forms: dict[Form, Source] = {}
    for source in sorted(found, key=lambda source: (len(source.ptx), source.jobs[0].key)):
        code = Code(source.ptx)
        if code.form not in forms and all(
            defect.edits(code) for defect in DEFECTS if defect.form == code.form
        ):
            forms[code.form] = source
    return forms


def _defective(
    found: Sequence[Source],
    built: Mapping[str, tuple[Entry, bytes]],
    siblings: Sequence[tuple[Entry, bytes]],
    library: str,
    processes: int,
    progress: Progress,
) -> list[tuple[Entry, bytes, Mapping[str, object]]]:
    """Return the kernels with one defect each, and those of their kind without any."""
    forms = smallest(found)
    wanted: list[tuple[Source, str, str, str]] = [
        (source, f"sound.{form}", "none", source.ptx) for form, source in forms.items()
    ]
    codes = {form: Code(source.ptx) for form, source in forms.items()}
    for defect in DEFECTS:
        ptx = defect.inserted(codes[defect.form])
        if ptx is None:
            progress(f"{defect.name}  the kernel has no place for it")
        else:
            wanted.append((forms[defect.form], defect.name, defect.layer, ptx))

    def one(
        work: tuple[Source, str, str, str],
    ) -> tuple[Entry, bytes, Mapping[str, object]]:
        source, name, layer, ptx = work
        translated = translate(ptx, library)
        original = built[source.jobs[0].key][0]
        entry, data = _entry(original, siblings, translated, name)
        progress(f"{entry.key}  {layer}")
        facts = {"defect": name, "layer": layer, "form": name.rpartition(".")[2]}
        return entry, data, {**_record(ptx, [original], translated), **facts}

    with ThreadPoolExecutor(processes) as executor:
        return list(executor.map(one, wanted))


def _entry(
    original: Entry,
    siblings: Sequence[tuple[Entry, bytes]],
    translated: Translation,
    variant: str,
) -> tuple[Entry, bytes]:
    """Return the entry for sm_90a of a translated kernel, and its cubin."""
    where = f"{original.key} as {variant}"
    data = assemble(translated.ptx, where)
    facts = cubin.read(data, where)
    (counts,) = instructions.censuses([data], TARGET, toolchain.nvdisasm())
    check_contract(original.contract, facts, counts, where)
    # The bits of the siblings are expected: their tag, so that the oracle suite compares them.
    tags = {entry.numerics for entry, _ in siblings if entry.model == original.model}
    if len(tags) > 1:
        raise BuildError(
            f"{where}: expected one numerics tag of its siblings, found {sorted(map(str, tags))}; "
            "next: give the dense entries of this model for sm_90a one tag"
        )
    sha256 = _sha256(data)
    entry = dataclasses.replace(
        original,
        target=TARGET,
        variant=variant,
        file=artifact_name(original.kernel, original.model, TARGET, variant, sha256),
        sha256=sha256,
        size=len(data),
        numerics=tags.pop() if tags else original.numerics,
        resources=resources(facts, counts),
        latency=(),
    )
    return entry, data


def _record(ptx: str, originals: Sequence[Entry], translated: Translation) -> Mapping[str, object]:
    return {
        "of": [{"entry": entry.key, "sha256": entry.sha256} for entry in originals],
        "ptx_sha256": _sha256(without_target(ptx).encode()),
        "replaced": translated.replaced,
        "unwaited": list(translated.unwaited),
    }


def _publish(
    folder: Path,
    manifest: Manifest,
    siblings: Sequence[tuple[Entry, bytes]],
    emulated: Sequence[tuple[Entry, bytes, Mapping[str, object]]],
    record: Mapping[str, object],
) -> None:
    pairs = [*siblings, *((entry, data) for entry, data, _ in emulated)]
    entries = tuple(sorted((entry for entry, _ in pairs), key=lambda entry: entry.key))
    document = {**record, "entries": {entry.key: facts for entry, _, facts in emulated}}
    text = json.dumps(document, sort_keys=True, indent=1).encode("ascii") + b"\n"
    with publish.locked(folder):
        publish.publish(
            folder,
            dataclasses.replace(manifest, entries=entries),
            {entry.file: data for entry, data in pairs},
            {},
        )
        publish.write_file(folder / EMULATION_NAME, text)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
