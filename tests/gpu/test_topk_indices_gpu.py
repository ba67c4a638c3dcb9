"""``topk_indices``, and what ``topk_select`` leaves to its kernel, on the GPU."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

import router_runtime as rt
from router_runtime import spec
from router_runtime.evidence.suite import cases_of
from router_runtime.verification.inputs import make_inputs
from router_runtime.verification.judge import judge
from router_runtime.verification.prng import Random
from router_runtime.verification.reference import Oracle
from router_runtime.verification.trial import copied
from tests.gpu.graphs import captured

#: What the op takes, whatever variant serves it.
LIMITS = {"row_length": (1, 2**21), "top_k": (1, 4096)}
INPUTS = ("row_starts", "row_ends", "page_table", "requests", "offsets")
ops = torch.ops.dsv4


def options(given):
    """The keyword arguments of a call with the inputs of a case."""
    found = {name: given[name] for name in INPUTS if name in given}
    found |= {name: bool(given[name]) for name in ("sorted", "nan_first")}
    return found | ({"page_size": given["page_size"]} if "page_table" in given else {})


@pytest.mark.parametrize("score_bytes", [4, 2])
def test_every_case_of_the_suite(score_bytes):
    """By whichever variant serves the size; each form of the op."""
    for case in cases_of("topk_indices", {"SCORE_BYTES": score_bytes, "SAMPLES": 2048}, LIMITS):
        inputs = make_inputs(case)
        given = copied(inputs, "cuda")
        scores, k = given["scores"], given["top_k"]
        slots, ids = ops.topk_indices.with_ids(scores, k, **options(given))
        oracle = Oracle(case, inputs)
        values = oracle.selected[0]  # the op returns none
        verdict = judge(oracle, values, ids.cpu(), slots=slots.cpu())
        assert not verdict.problems, f"{case.name}: {verdict.problems}"
        assert torch.equal(ops.topk_indices(scores, k, **options(given)), slots), case.name
        out = torch.full_like(ids, 7)
        ops.topk_indices.out(scores, k, **options(given), ids_out=out)
        assert torch.equal(out, ids), case.name


@pytest.mark.parametrize("columns", [33, 4096, 65536, 65537, 300000, 2**21])
def test_topk_select_beyond_its_kernel(columns, same):
    random, rows = Random(columns), 3 if columns < 10**6 else 1
    for scores in (
        random.normal(rows, columns),
        random.bits(rows, columns),
        random.integers(-2, 3, rows, columns).float(),
    ):
        for k in (1, 32, 33, 1024, 4096):
            if k <= columns:
                found = ops.topk_select(scores.cuda(), k)
                same([each.cpu() for each in found], spec.topk_select(scores, k))


def ragged(rows, columns, seed=1):
    random = Random(seed)
    starts = random.integers(0, columns // 2, rows)
    return {
        "row_starts": starts.int().cuda(),
        "row_ends": (starts + random.integers(0, columns // 2, rows)).int().cuda(),
        "page_table": random.integers(0, 2**20, rows + 2, columns // 64 + 1).int().cuda(),
        "page_size": 64,
        "requests": random.integers(0, rows + 2, rows).int().cuda(),
        "offsets": random.integers(0, 99, rows).int().cuda(),
    }


def oracle(scores, k, given, **order):
    ids = spec.topk_indices(scores, k, given["row_starts"], given["row_ends"], **order)
    names = ("page_table", "page_size", "requests", "offsets")
    return spec.slots(ids, **{name: given[name] for name in names}), ids


@pytest.mark.parametrize(("rows", "columns"), [(1, 262144), (3, 20000), (64, 131072), (300, 9000)])
def test_lengths_change_between_replays(rows, columns):
    """A captured graph has the lengths, the scores and the pages that are there at its replay; the
    lengths at its capture are all 0.
    """
    scores = Random(2).normal(rows, columns).cuda()
    given = ragged(rows, columns)
    lengths = {name: given[name].clone() for name in ("row_starts", "row_ends")}
    for each in lengths:
        given[each].zero_()
    graph, found = captured(lambda: ops.topk_indices.with_ids(scores, 512, **given), warmups=2)
    graph.replay()
    assert (found[1] == -1).all()
    for turn in range(4):
        for name, length in lengths.items():
            given[name].copy_(length.roll(turn))
        given["page_table"].add_(turn)
        scores.copy_(scores.roll(777 * turn, 1))
        for each in found:
            each.fill_(7)
        graph.replay()
        slots, ids = oracle(scores, 512, given)
        assert torch.equal(found[1], ids)
        assert torch.equal(found[0], slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9, 24, 64, 200])
def test_rows_whose_last_cta_has_a_chunk_less(rows, dtype):
    """Clusters of 2, 4 or 8 CTAs, each of 16 warps that read a chunk each. Of the shorter rows the
    last CTA has 15 chunks and the others 16, of the longest all have 16. A kernel whose last warp
    waits for a chunk that it does not have would never end.
    """
    scores = Random(5).normal(rows, 2**18).to(dtype).cuda()
    values = 16 // dtype.itemsize
    for ctas in (2, 4, 8):
        for chunk in (256, 128):
            whole = ctas * (15 * chunk + 1)
            for vectors in (whole - ctas + 1, whole - 1, whole):
                ends = torch.full((rows,), values * vectors, dtype=torch.int32, device="cuda")
                found = ops.topk_indices(scores, 512, row_ends=ends)
                assert torch.equal(found, spec.topk_indices(scores, 512, None, ends)), vectors


@contextlib.contextmanager
def waiting_is_an_error():
    """torch raises for a call that waits for the device. It warns that it may miss some."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_no_call_waits_for_the_device():
    scores, given = Random(2).normal(9, 5000).cuda(), ragged(9, 5000)
    rt.topk_indices(scores, 300, **given)
    torch.cuda.synchronize()
    with waiting_is_an_error():
        found = rt.topk_indices(scores, 300, sorted=True, **given)
        rt.topk_select(scores, 300)
    assert torch.equal(found, oracle(scores, 300, given, in_rank_order=True)[0])


def test_a_row_depends_on_itself_alone():
    """Alone and among 600 rows, which other variants serve, beside NaN and infinities."""
    columns = 30000
    scores = Random(3).normal(600, columns).cuda()
    scores[3::7], scores[4::7] = torch.nan, torch.inf
    given = ragged(600, columns)
    bounds = {name: given[name] for name in ("row_starts", "row_ends")}
    whole = rt.topk_indices(scores, 700, sorted=True, **bounds)
    for part in (slice(0, 1), slice(5, 6), slice(17, 20), slice(100, 164), slice(599, 600)):
        found = rt.topk_indices(
            scores[part], 700, sorted=True, **{name: each[part] for name, each in bounds.items()}
        )
        assert torch.equal(found, whole[part])


def test_a_chain_of_dependent_launches():
    """Each call reads what the kernel before it has just written, and the next writes over it."""
    source = Random(4).normal(40, 8, 20000).cuda()
    scores, ends = torch.empty_like(source[0]), torch.zeros(8, dtype=torch.int32, device="cuda")
    found = torch.empty(40, 8, 512, dtype=torch.int32, device="cuda")

    def chain():
        ends.zero_()
        for turn in range(40):
            scores.copy_(source[turn])
            ends.add_(499)
            ops.topk_indices.out(scores, 512, row_ends=ends, ids_out=found[turn])

    graph, _ = captured(chain)
    for _ in range(3):
        found.fill_(7)
        graph.replay()
        for turn in range(40):
            lengths = torch.full((8,), 499 * (turn + 1), device="cuda")
            assert torch.equal(found[turn], spec.topk_indices(source[turn], 512, None, lengths))


def test_two_streams_at_once():
    scores = Random(5).normal(2, 70, 60000).cuda()
    expected = [spec.topk_indices(each, 1024) for each in scores]
    rt.topk_indices(scores[0], 1024)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in scores]
    found = []
    for _ in range(20):
        for stream, each in zip(streams, scores, strict=True):
            with torch.cuda.stream(stream):
                found.append(rt.topk_indices(each, 1024))
    torch.cuda.synchronize()
    for turn, ids in enumerate(found):
        assert torch.equal(ids, expected[turn % 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype):
    scores = Random(6).normal(33, 5001).to(dtype).cuda()
    expected = rt.topk_indices(scores, 300)
    assert torch.equal(expected, spec.topk_indices(scores, 300))
    buffer = torch.full((33 * 6000 + 9,), torch.inf, dtype=dtype, device="cuda")
    for shift in range(9):
        odd = buffer[shift : shift + 33 * 6000].view(33, 6000)[:, 1:5002]
        odd.copy_(scores)
        assert torch.equal(rt.topk_indices(odd, 300), expected)
        buffer.fill_(torch.inf)
    for layout in (scores.T.contiguous().T, scores.repeat_interleave(2, dim=0)[::2]):
        assert torch.equal(rt.topk_indices(layout, 300), expected)
    one = scores[:1].expand(33, 5001)  # a row stride of zero
    assert torch.equal(rt.topk_indices(one, 300), expected[:1].expand(33, 300))
    assert rt.topk_indices(scores[:0], 300).shape == (0, 300)


@pytest.mark.filterwarnings("ignore")  # torch's own tools warn about themselves
def test_inside_torch():
    scores, given = Random(7).normal(5, 4000).cuda(), ragged(5, 4000)
    for op in (ops.topk_indices.default, ops.topk_indices.with_ids):
        torch.library.opcheck(op, (scores, 70), given)
    out = {"slots_out": torch.zeros(5, 70, dtype=torch.int32, device="cuda")}
    torch.library.opcheck(ops.topk_indices.out, (scores, 70), {**given, **out})

    def layer(scores, ends):
        return rt.topk_indices(scores * 2, 70, row_ends=ends + 1)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores, given["row_ends"]), layer(scores, given["row_ends"]))


@pytest.mark.parametrize("rows", [1, 64, 300])
def test_infinities_beside_nan_that_ranks_first(rows):
    """More NaN than are selected, and as many infinities, which fill lists and are not selected."""
    random = Random(8)
    scores = random.normal(rows, 70001)
    drawn = random.integers(0, 10, rows, 70001)
    scores[drawn == 0], scores[drawn == 1] = torch.nan, torch.inf
    scores = scores.cuda()
    found = rt.topk_indices(scores, 2048, nan_first=True)
    assert torch.equal(found, spec.topk_indices(scores, 2048, nan_first=True))
