"""The emulation of tcgen05 kernels on Hopper, as far as no GPU is needed: every kernel of every
target is translated and assembled, and what the translator does not know is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from build_kernels.catalog.targets import BLACKWELL
from build_kernels.compile.worker_process import WorkerProcess
from build_kernels.contracts import declared
from build_kernels.emulation import interface
from build_kernels.emulation.assembly import assemble, model
from build_kernels.emulation.changes import Code
from build_kernels.emulation.defects import DEFECTS
from build_kernels.emulation.emulate import smallest
from build_kernels.emulation.sources import EMULATED, Source, emulated_jobs, sources
from build_kernels.emulation.statements import Statement, edited, entry, operand_list
from build_kernels.emulation.translate import translate
from build_kernels.errors import BuildError
from router_runtime.format import cubin
from tests.emulation import second_opinion


@pytest.fixture(scope="module")
def library() -> str:
    return model()


def module(body: str, target: str = "sm_100f") -> str:
    """A module with an entry function that has this body."""
    return (
        f".version 9.0\n.target {target}\n.address_size 64\n\n"
        f".visible .entry kernel(\n\t.param .u32 count\n)\n.reqntid 128, 1, 1\n{{\n{body}\n}}\n"
    )


# --- reading PTX ---


def test_statements_are_found_with_scope_guard_and_operands() -> None:
    text = module(
        "\t.reg .b32 %r<3>; // mov.b32 %r1, 0;\n"
        "$L__BB0_1:\n"
        "\t{ .reg .pred p;\nWAIT_0:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%r1 + 8], %r2;\n"
        "@!p bra WAIT_0;\n}\n"
        "\ttcgen05.ld.sync.aligned.32x32b.x2.b32 {%r1, %r2}, [%r0];\n"
        "\tret;"
    )
    found = entry(text).statements
    assert [(s.kind, s.name or s.kind) for s in found] == [
        ("directive", ".reg .b32 %r<3>"),
        ("label", "$L__BB0_1"),
        ("open", "open"),
        ("directive", ".reg .pred p"),
        ("label", "WAIT_0"),
        ("instruction", "mbarrier.try_wait.parity.shared::cta.b64"),
        ("instruction", "bra"),
        ("close", "close"),
        ("instruction", "tcgen05.ld.sync.aligned.32x32b.x2.b32"),
        ("instruction", "ret"),
    ]
    wait, branch = found[5], found[6]
    assert wait.operands == ("p", "[%r1 + 8]", "%r2")
    assert (branch.guard, branch.operands) == ("!p", ("WAIT_0",))
    assert [s.scope for s in found] == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert text.splitlines()[wait.line - 1].startswith("mbarrier.try_wait")
    assert found[8].operands == ("{%r1, %r2}", "[%r0]")
    assert found[8].registers() == {"%r0", "%r1", "%r2"}


def test_operands_are_parts_between_outer_commas() -> None:
    assert operand_list("[%r1], [%rd2, {%r3, %r4}], [%r5]") == (
        "[%r1]",
        "[%rd2, {%r3, %r4}]",
        "[%r5]",
    )
    assert operand_list("") == ()


def test_edits_keep_their_order_and_may_not_overlap() -> None:
    assert edited("abcdef", [(4, 5, "E"), (1, 1, "x"), (1, 1, "y"), (1, 3, "")]) == "axydEf"
    with pytest.raises(ValueError, match="do not overlap"):
        edited("abcdef", [(0, 3, ""), (2, 4, "")])


@pytest.mark.parametrize("text", [".version 9.0\n", module("\tret;") * 2])
def test_a_module_has_one_entry_function(text: str) -> None:
    with pytest.raises(BuildError, match="one entry function"):
        entry(text)


# --- what is refused ---


@pytest.mark.parametrize(
    "instruction",
    [
        "tcgen05.cp.cta_group::1.128x256b [%r0], %rd0;",
        "tcgen05.shift.cta_group::1.down [%r0];",
        "tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%r0], 32;",
        "tcgen05.mma.cta_group::2.kind::f16 [%r0], %rd0, %rd1, %r1, %p0;",
        "tcgen05.mma.cta_group::1.kind::tf32 [%r0], %rd0, %rd1, %r1, %p0;",
        "tcgen05.mma.cta_group::1.kind::f16 [%r0], [%r1], %rd1, %r1, %p0;",
        "tcgen05.mma.cta_group::1.kind::f16 [%r0], %rd0, %rd1, %r1, {%r1, %r1}, %p0;",
        "tcgen05.mma.cta_group::1.kind::f16 [%r0], %rd0, %rd1, %r1, %r1, %p0;",
        "tcgen05.mma.cta_group::1.kind::f16 [%r0], %rd0, %rd1, %r1, 2;",
        "tcgen05.ld.sync.aligned.16x64b.x2.b32 {%r0, %r1}, [%r2];",
        "tcgen05.ld.sync.aligned.16x256b.x2.b32 {%r0, %r1}, [%r2];",
        "tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {%r0}, [%r2], 32, 32;",
        "tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {%r0}, [%r2], 0x100000;",
        "tcgen05.ld.sync.aligned.32x32b.x1.pack::16b.b32 {%r0}, [%r2];",
        "@%p0 tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r0}, [%r2];",
        "tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.b64 [%r0];",
        "tcgen05.fence::unheard_of;",
        "ld.global.v8.b32 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%rd0], %rd1;",
        "ld.global.v8.b32 {%r0, %r1, %r2, %r3}, [%rd0];",
        "st.global.v4.b64 [variable+%r1], {%rd0, %rd1, %rd2, %rd3};",
    ],
)
def test_an_instruction_that_has_no_function_is_refused_by_name(
    instruction: str, library: str
) -> None:
    name = instruction.removeprefix("@%p0 ").split()[0].rstrip(";")
    with pytest.raises(BuildError, match=rf"line 13: .*found {re.escape(name)}"):
        translate(module(f"\t.reg .b32 %r<9>;\n\n\n\t{instruction}\n\tret;"), library)


@pytest.mark.parametrize("target", ["sm_90a", "sm_120a"])
def test_only_targets_with_these_instructions_are_translated(target: str, library: str) -> None:
    with pytest.raises(BuildError, match=f"found {target}"):
        translate(module("\tret;", target), library)


def test_what_the_assembler_does_not_know_is_an_error(library: str) -> None:
    translated = translate(module("\tunheard.of;\n\tret;"), library)
    with pytest.raises(BuildError, match=r"kernel/x: expected ptxas to assemble(.|\n)*unheard"):
        assemble(translated.ptx, "kernel/x")


# --- what an instruction becomes ---


def calls(text: str) -> list[str]:
    """The functions that the kernel of a translated module calls, in order."""
    return re.findall(r"\bcall (?:\(e_out\), )?(tc_\w+)", text[text.index(".entry kernel") :])


LOAD = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r1}, [%r2];"
WAIT = "tcgen05.wait::ld.sync.aligned;"


@pytest.mark.parametrize(
    ("body", "unwaited"),
    [
        (f"{LOAD}\nmov.b32 %r3, 0;\n{WAIT}\nmov.b32 %r4, %r1;", False),
        (f"{LOAD}\nmov.b32 %r3, 0;\nmov.b32 %r4, %r1;\n{WAIT}", True),
        (f"{LOAD}\nmov.b32 %r3, 0;\n$L: mov.b32 %r5, 0;\n{WAIT}", True),
        (f"{LOAD}\nmov.b32 %r3, 0;\nbra $L;\n$L: {WAIT}", True),
    ],
)
def test_a_load_happens_as_late_as_it_may(body: str, unwaited: bool, library: str) -> None:
    translated = translate(module(f".reg .b32 %r<9>;\n{body}\nret;"), library)
    assert bool(translated.unwaited) == unwaited
    text = translated.ptx[translated.ptx.index(".entry kernel") :]
    poisoned, between = text.index("mov.b32 %r1, 0x7fc0dead"), text.index("mov.b32 %r3, 0")
    assert poisoned < between < text.index("ld.volatile.global.b32 %r1, ")
    if "%r4" in body:
        assert text.index("ld.volatile.global.b32 %r1, ") < text.index("mov.b32 %r4, %r1")


def test_a_loop_that_waits_becomes_a_wait_and_another_test_stays(library: str) -> None:
    test = "mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r1+8], %r2;"
    head = ".reg .b32 %r<9>; .reg .pred %p<2>;\n"
    loop = translate(module(f"{head}$L: {test}\n@!%p0 bra $L;\nret;"), library).ptx
    assert calls(loop) == ["tc_enter", "tc_wait", "tc_settle"]
    assert "try_wait" not in loop[loop.index(".entry kernel") :]
    peek = translate(module(f"{head}$L: {test}\n@%p0 bra $L;\nret;"), library).ptx
    assert calls(peek) == ["tc_enter", "tc_poll", "tc_settle"]
    assert test in peek


def test_a_guard_stays_and_an_elected_thread_brings_its_warp(library: str) -> None:
    mma = "tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd0, %rd1, %r2, %p0;"
    head = ".reg .b32 %r<9>; .reg .b64 %rd<3>; .reg .pred %p<3>;\n"
    elected = f"{{ .reg .pred l; elect.sync _|l, 0xffffffff;\n@l {mma} }}"
    text = translate(module(f"{head}{elected}\nret;"), library).ptx
    assert "selp.b32 e_flags, 6, 4, l;" in text
    assert "bra $L__emulation" not in text
    alone = translate(module(f"{head}@!%p1 {mma}\nret;"), library).ptx
    assert re.search(r"@%p1 bra (\$L__emulation_\d+);(.|\n)*call tc_mma(.|\n)*\1:", alone)
    assert "mov.b32 e_flags, 0;" in alone


REGISTERS = ".reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .f64 %fd<9>; .reg .pred %p<3>;\n"


def kernel_of(body: str, library: str) -> str:
    """The translated code of a kernel."""
    text = translate(module(f"{REGISTERS}{body}\nret;"), library).ptx
    return text[text.index(".entry kernel") :]


def test_what_other_compilers_write_is_assembled(library: str) -> None:
    mma = "tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd0, %rd1, %r2"
    body = f"""
        tcgen05.alloc.cta_group::1.sync.aligned.b32 [%r1], 64;
        @%p0 tcgen05.st.sync.aligned.16x32bx2.x2.b32 [%r1], 48, {{%r2, %r3}};
        {mma}, {{%r3, %r4, 0, %r5}}, 1;
        @%p1 {mma}, 0;
        tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {{%r2}}, [%r1], 0x20;
        {WAIT}
        {{ L: mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r1], 0; @!%p0 bra.uni L; }}
        @%p1 ld.global.nc.v8.b32 {{%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}}, [%rd1+64];
        ld.global.L1::no_allocate.L2::evict_last.v4.b64 {{%rd1, %rd2, %rd3, %rd4}}, [%rd1];
        st.global.v4.f64 [%rd1+-32], {{%fd2, %fd3, %fd4, %fd5}};
        ret;"""
    assert assemble(translate(module(REGISTERS + body), library).ptx, "kernel")


def test_a_label_parts_an_instruction_from_the_election_before_it(library: str) -> None:
    mma = "@%p0 tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd0, %rd1, %r2, %p1;"
    election = "elect.sync _|%p0, -1;"
    assert "selp.b32 e_flags, 6, 4, %p0;" in kernel_of(f"{election}\n{mma}", library)
    text = kernel_of(f"{election}\n$L: {mma}\n@%p2 bra $L;", library)
    assert "e_flags, 6, 4" not in text


def test_a_mask_of_lanes_and_a_constant_reach_the_model(library: str) -> None:
    mma = "tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd0, %rd1, %r2"
    text = kernel_of(f"{mma}, {{%r3, %r4, 0, %r5}}, 1;", library)
    for word in ("%r3", "%r4", "0", "%r5"):
        assert f"or.b32 e_more, e_more, {word};" in text
    assert "selp.b32 e_more, 16, 0, e_some;" in text
    assert "mov.b32 e_more, 1; or.b32 e_flags, e_flags, e_more;" in text
    assert "mov.b32 e_more, 0; or.b32 e_flags, e_flags, e_more;" in kernel_of(f"{mma}, 0;", library)


def test_an_allocation_may_leave_out_the_state_space(library: str) -> None:
    text = kernel_of("tcgen05.alloc.cta_group::1.sync.aligned.b32 [%r1], 64;", library)
    assert "tc_alloc" in text


def test_a_store_keeps_its_guard(library: str) -> None:
    text = kernel_of("@%p0 tcgen05.st.sync.aligned.32x32b.x1.b32 [%r1], {%r2};", library)
    assert re.search(r"@!%p0 bra (\$L__emulation_\d+);(.|\n)*call (.|\n)*tc_row(.|\n)*\1:", text)


def test_the_two_parts_of_a_transfer_lie_apart(library: str) -> None:
    text = kernel_of("tcgen05.st.sync.aligned.16x32bx2.x2.b32 [%r1], 48, {%r2, %r3};", library)
    # A store of form 3, 48 columns from one part to the other, 2 columns each.
    assert f"[e_in1], {3 | 8 | 48 << 4};" in text
    assert "st.param.b32 [e_in2], 2;" in text
    load = "tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {%r2}, [%r1], 0x20;"
    assert f"[e_in1], {3 | 32 << 4};" in kernel_of(f"{load}\n{WAIT}", library)


@pytest.mark.parametrize("branch", ["bra", "bra.uni"])
def test_both_branches_of_a_loop_that_waits_are_known(branch: str, library: str) -> None:
    test = "mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r1], 0;"
    text = kernel_of(f"{{\nL: {test}\n@!%p0 {branch} L;\n}}", library)
    assert calls(text) == ["tc_enter", "tc_wait", "tc_settle"]


def test_an_access_of_256_bits_becomes_two(library: str) -> None:
    registers = [f"%r{i}" for i in range(8)]
    text = kernel_of(f"@%p1 ld.global.nc.v8.b32 {{{', '.join(registers)}}}, [%rd1+64];", library)
    assert "add.s64 e_place, %rd1, 64;" in text
    assert "ld.global.nc.v4.b32 {%r0, %r1, %r2, %r3}, [e_place+0];" in text
    assert "ld.global.nc.v4.b32 {%r4, %r5, %r6, %r7}, [e_place+16];" in text
    assert "@!%p1 bra" in text
    # The address is kept where a load overwrites its register.
    load = "ld.global.L1::no_allocate.L2::evict_last.v4.b64 {%rd1, %rd2, %rd3, %rd4}, [%rd1];"
    text = kernel_of(load, library)
    assert "ld.global.L1::no_allocate.v2.b64 {%rd1, %rd2}, [e_place+0];" in text
    assert "ld.global.L1::no_allocate.v2.b64 {%rd3, %rd4}, [e_place+16];" in text
    text = kernel_of("st.global.v4.f64 [%rd1], {%fd2, %fd3, %fd4, %fd5};", library)
    assert "st.global.v2.f64 [e_place+16], {%fd4, %fd5};" in text
    narrow = "ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%rd1];"
    assert narrow in kernel_of(narrow, library)


def test_places_in_a_source_are_no_statements() -> None:
    body = "\t.loc\t1 5 0\n$L:\n\t.loc\t1 6 9\n\t.loc\t1 7 1\n\tmov.b32 %r1, 0;\n\tret;"
    text = module(body).replace(".visible", ".weak")
    assert [s.name for s in entry(text).statements] == ["$L", "mov.b32", "ret"]


# --- the kernels ---


def test_every_target_has_kernels_to_emulate(emulated: tuple[Source, ...]) -> None:
    found = {job.key for source in emulated for job in source.jobs}
    assert found == {job.key for job in emulated_jobs()}
    for target in EMULATED:
        assert sum(job.target == target for source in emulated for job in source.jobs) >= 9
    assert all("tcgen05.mma" in source.ptx for source in emulated)


def test_every_kernel_is_translated_and_assembled(
    emulated: tuple[Source, ...], library: str
) -> None:
    def one(source: Source) -> None:
        translated = translate(source.ptx, library)
        facts = cubin.read(assemble(translated.ptx, source.jobs[0].key), source.jobs[0].key)
        assert facts.target == "sm_90a"
        assert facts.symbol == entry(source.ptx).symbol
        assert translated.unwaited == ()
        left = translated.ptx[translated.ptx.index(f".entry {facts.symbol}") :]
        assert "tcgen05." not in left
        assert set(translated.replaced) == {
            s.name for s in entry(source.ptx).statements if s.name.startswith("tcgen05.")
        }

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(one, emulated))


def test_every_target_of_the_family_has_the_same_ptx() -> None:
    """So what is emulated for one of them holds for the kernel of each."""
    jobs = [
        job
        for job in emulated_jobs(BLACKWELL)
        if (job.kernel, job.model, job.variant) == ("dense_router_decode", "dsv4-flash", "tcgen05")
    ]
    (source,) = sources(jobs, 2)
    assert [job.target for job in source.jobs] == list(BLACKWELL)


def test_the_same_source_gives_the_same_bytes(emulated: tuple[Source, ...]) -> None:
    source = min(emulated, key=lambda source: len(source.ptx))
    made = {
        hashlib.sha256(assemble(translate(source.ptx, model()).ptx, "kernel")).hexdigest()
        for _ in range(2)
    }
    assert len(made) == 1


def test_keeping_the_ptx_changes_no_byte_of_the_cubin() -> None:
    job = emulated_jobs()[0]
    first, second = WorkerProcess(job.target), WorkerProcess(job.target)
    try:
        alone = first.compile(job)
        ptx = second.ptx(job)
        assert second.compile(job) == alone
        assert entry(ptx).symbol == cubin.read(alone, job.key).symbol
    finally:
        first.close()
        second.close()


def test_the_model_has_no_settings_that_the_runner_does_not_know(library: str) -> None:
    sizes = dict(re.findall(r"^\.visible \.global .* (tc_\w+)\[(\d+)\];$", library, re.M))
    errors = len(interface.ERRORS)
    assert int(sizes["tc_counts"]) == 8 * (len(interface.COUNTS) + errors)
    assert int(sizes["tc_places"]) == 4 * errors * interface.PLACE_WORDS
    assert int(sizes["tc_settings"]) == 12
    assert {flag for flags in interface.MODES.values() for flag in flags} == set(interface.FLAGS)


# --- defects ---

WAITED = {
    "once": {"weights_full", "hidden_full", "sums_full", "peers_full"},
    "turns": {"stages_full", "hidden_empty", "weights_empty", "sums_full", "sums_empty"},
}


def instructions(source: Source) -> Iterator[Statement]:
    for statement in entry(source.ptx).statements:
        if statement.kind == "instruction":
            yield statement


def test_barriers_have_the_roles_that_their_kernels_give_them(emulated: tuple[Source, ...]) -> None:
    for form, source in smallest(emulated).items():
        roles = Code(source.ptx).roles
        waited = {
            roles.of(roles.statements[i])
            for i in range(len(roles.statements))
            if roles.statements[i].name.startswith("mbarrier.try_wait.")
        }
        split = form == "turns" and source.jobs[0].constants["SPLIT_K"] != 1
        assert waited == WAITED[form] | ({"peers_full"} if split else set()), form


def test_every_defect_changes_its_kernel(emulated: tuple[Source, ...], library: str) -> None:
    forms = {form: Code(source.ptx) for form, source in smallest(emulated).items()}
    assert set(forms) == {"once", "turns"}
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS) >= 25
    for defect in DEFECTS:
        ptx = defect.inserted(forms[defect.form])
        assert ptx is not None, defect.name
        assert ptx != forms[defect.form].ptx
        translated = translate(ptx, library)
        assert bool(translated.unwaited) == (defect.layer == "translation"), defect.name


@pytest.mark.parametrize("name", ["hidden_released_early.turns", "parity_of_weights.once"])
def test_a_kernel_with_a_defect_is_assembled(
    name: str, emulated: tuple[Source, ...], library: str
) -> None:
    (defect,) = [defect for defect in DEFECTS if defect.name == name]
    ptx = defect.inserted(Code(smallest(emulated)[defect.form].ptx))
    assert ptx is not None
    assert assemble(translate(ptx, library).ptx, name)


def test_every_layer_is_one_that_there_is() -> None:
    for defect in DEFECTS:
        kind, _, detail = defect.layer.partition(":")
        assert kind in ("translation", "error", "bits", "none"), defect.name
        assert kind != "error" or detail in interface.ERRORS, defect.name
        assert kind != "bits" or detail in ("", *interface.MODES), defect.name


# --- the second opinion ---


def test_a_kernel_without_selection_is_the_same_until_it_ends(emulated: tuple[Source, ...]) -> None:
    for form, source in smallest(emulated).items():
        whole = entry(source.ptx).statements
        cut = entry(second_opinion.without_selection(source.ptx)).statements
        end = next(i for i, statement in enumerate(cut) if statement.name == "ret")
        added = next(i for i, pair in enumerate(zip(whole, cut, strict=False)) if _differ(*pair))
        assert {s.name.partition(".")[0] for s in cut[added:end]} == {"barrier"}, form
        # What is selected is behind, so that nothing reaches it: every sum has been exchanged.
        names = [statement.name for statement in whole]
        last = "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
        exchanged = [i for i, name in enumerate(names) if name == last]
        assert bool(exchanged) == (form != "turns")
        assert all(i < added for i in exchanged)
        assert all(i < added for i, name in enumerate(names) if name.startswith("tcgen05."))
        # A wait follows each arrival at the cluster's barrier.
        cluster = [s.name.split(".")[2] for s in cut[:end] if s.name.startswith("barrier.cluster.")]
        assert cluster == ["arrive", "wait"] * (len(cluster) // 2), form


def _differ(one: Statement, other: Statement) -> bool:
    return (one.kind, one.name) != (other.kind, other.name) and one.kind != "directive"


def test_the_verifier_is_told_the_launch_that_the_contract_declares() -> None:
    (job,) = [job for job in emulated_jobs() if job.key.startswith("dense_router_decode/dsv4-pro/")]
    contract, _ = declared(job)
    told = second_opinion.request(contract, 7168, 33)
    assert told["launch"] == {
        "grid_dim": [14, 2, 1],
        "block_dim": [512, 1, 1],
        "cluster_dim": [14, 1, 1],
        "dynamic_shared_bytes": contract.dynamic_shared_memory,
    }
    described = [*told["declarations"], *told["arguments"]]
    assert sorted(d["parameter"] for d in described) == list(range(len(contract.parameters)))
    (tensor_map,) = told["tma_descriptors"]
    assert (tensor_map["global_shape"], tensor_map["swizzle"]) == ([7168, 33], "128B")
    tokens = [parameter.name for parameter in contract.parameters].index("tokens")
    assert {"parameter": tokens, "type": "u32", "value": 33} in told["arguments"]
