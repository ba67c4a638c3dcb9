"""The suite passes the oracle as a kernel, and fails every way of being wrong that we could think
of: a suite that cannot fail proves nothing.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from router_runtime import spec
from router_runtime.evidence import cases as suite
from router_runtime.evidence.suite import cases_of, cases_sha256
from router_runtime.format.scoring import scoring_constants
from router_runtime.verification import checks, inputs
from router_runtime.verification.bounds import TOLERANCES
from router_runtime.verification.examine import examine
from router_runtime.verification.reference import Oracle
from router_runtime.verification.trial import Trial
from tests.oracle.writing import write

DENSE, GATE = "dense_router_decode", "hash_gate"
SHAPES = {
    "hash_router": ({}, {"top_k": (1, 8)}),
    "topk_select": ({}, {"row_length": (1, 300), "top_k": (1, 8)}),
    "activation_topk": ({}, {"experts": (1, 64), "top_k": (1, 8)}),
    GATE: ({"HIDDEN": 128, "EXPERTS": 24, "TOP_K": 4, "IMAGES": 1}, {"tokens": (1, 64)}),
    DENSE: ({"HIDDEN": 128, "EXPERTS": 24, "TOP_K": 4}, {"tokens": (1, 64)}),
}


def largest(limits):
    return limits.get("tokens", (1, 300))[1]


def runner(outputs):
    """A Run that writes what ``outputs(case, inputs)`` returns."""

    def for_case(case):
        def run(given, values, ids, **more):
            write(given, outputs(case, given), values, ids, **more)

        return run

    return for_case


def problems(subject, for_case):
    """Every problem that the suite finds, until the first case that has some."""
    for case in cases_of(*subject):
        given = inputs.make_inputs(case)
        found = examine(Trial(case, given, "cpu"), for_case(case), largest(subject[2])).problems
        if found:
            return [f"{case.name}: {problem}" for problem in found]
    return []


def test_the_oracle_passes(subject, outputs):
    clear = rows = 0
    for case in cases_of(*subject):
        given = inputs.make_inputs(case)
        verdict = examine(
            Trial(case, given, "cpu"), runner(outputs)(case), min(largest(subject[2]), 130)
        )
        assert verdict.problems == ()
        assert all(error <= 1 for error in verdict.worst.values())
        clear, rows = clear + verdict.clear, rows + verdict.rows
        # What evidence is recomputed from agrees with what was judged: logical ids.
        ids, is_clear = Oracle(case, given).expected_ids
        assert int(is_clear.sum()) == verdict.clear
        assert torch.equal(ids[is_clear], outputs(case, given)[-1][is_clear])
    # A suite of ambiguous rows would check nothing.
    assert clear > 0.9 * rows


def test_the_sizes_asked_for_are_there():
    cases = suite.cases("activation_topk", {}, {"experts": (1, 1024), "top_k": (1, 32)})
    assert {1, 2, 63, 64, 65, 1000} <= {case.sizes["tokens"] for case in cases}
    cases = suite.cases(DENSE, {"HIDDEN": 128, "EXPERTS": 24, "TOP_K": 4}, {"tokens": (1, 64)})
    assert {1, 2, 63, 64} <= {case.sizes["tokens"] for case in cases}
    assert max(case.sizes["tokens"] for case in cases) == 64
    cases = suite.cases("topk_select", {}, {"row_length": (1, 65536), "top_k": (1, 32)})
    assert {1, 1024, 65535, 65536} <= {case.sizes["row_length"] for case in cases}
    assert {1, 32} <= {case.sizes["top_k"] for case in cases}
    assert all(case.sizes["top_k"] <= case.sizes["row_length"] for case in cases)


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="add its cases"):
        suite.cases("topk_selct", {}, {})


def test_tolerances_are_those_of_the_design():
    assert TOLERANCES["LOGIT"] == 2.0**-20
    assert TOLERANCES["SCORE"] == 4e-7
    assert TOLERANCES["SCORE_UNDERFLOW"] == 4e-23
    assert TOLERANCES["SIGMOID_UNDERFLOW"] == 2.0**-149


def test_dense_kernels_get_the_same_inputs():
    constants = SHAPES[DENSE][0]
    decode = suite.cases(DENSE, constants, {"tokens": (1, 64)})
    prefill = {c.name: c for c in suite.cases("dense_router_prefill", constants, {})}
    assert {65, 129, 257, 1000} <= {case.sizes["tokens"] for case in prefill.values()}
    for case in decode:
        if case.name in prefill:
            assert prefill[case.name].seed == case.seed
        else:  # one of 65 tokens for the other kernel
            assert case.serving
            assert case.sizes["tokens"] == 64
    digests = [
        inputs.digest(inputs.make_inputs(case)) for case in (decode[0], prefill[decode[0].name])
    ]
    assert digests[0] == digests[1]


# --- stored logits -----------------------------------------------------------------------------


def with_logits(outputs, change, *, weights=False):
    """Problems of a dense kernel that stores logits, changed by ``change``."""
    for case in suite.cases(DENSE, *SHAPES[DENSE]):
        given = inputs.make_inputs(case)

        def run(given, values, ids, *logits, case=case, **more):
            z = spec.dense_logits(given["hidden_states"], given["weight"], 128)
            write(given, outputs(case, given), values, ids, **more)
            for stored in logits:
                stored.copy_(z)
                change(stored)
                if weights:
                    values.view(torch.int32)[:, 0] ^= 1

        verdict = examine(Trial(case, given, "cpu"), run, 64, logits=True)
        if verdict.problems:
            return verdict.problems
        assert verdict.worst["logit"] <= 1
    return ()


def flush_one(logits):
    logits.view(-1)[-1] = element_after(logits)


def change_nan(logits):
    logits[logits.isnan()] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z.mul_(1 + 2.0**-12), "logits out of bounds"),
        (lambda z: z.copy_(z.bfloat16()), "logits out of bounds"),
        (lambda z: z.copy_(z.roll(1, dims=1)), "logits out of bounds"),
        (lambda z: z.clamp_(-spec.LOGIT_MAX, spec.LOGIT_MAX), "logits out of bounds"),
        (change_nan, "logits out of bounds"),
        (flush_one, "not written"),
        (lambda z: element_after(z).fill_(0), "outside its output logits"),
    ],
    ids=["scaled", "bf16", "rolled", "clamped", "other NaN", "unwritten", "beyond"],
)
def test_wrong_logits_are_caught(change, message, outputs):
    assert with_logits(outputs, lambda logits: None) == ()
    found = with_logits(outputs, change)
    assert any(message in problem for problem in found), found


def test_logits_that_change_the_weights_are_caught(outputs):
    found = with_logits(outputs, lambda z: None, weights=True)
    assert "storing logits changes the other outputs" in found


# --- wrong kernels -----------------------------------------------------------------------------


def swapped(ids):
    """A copy with ranks 0 and 1 exchanged."""
    order = [1, 0, *range(2, ids.shape[1])]
    return ids[:, order] if ids.shape[1] > 1 else ids


def higher_id_first(case, given):
    """Ties to the higher id."""
    if case.kernel == "topk_select":
        scores = given["scores"].flip(1)
        values, ids = spec.topk_select(scores, given["top_k"])
        return values, scores.shape[1] - 1 - ids
    if case.kernel == "activation_topk":
        logits, bias = given["logits"].flip(1), given["bias"].flip(0)
    else:
        logits = spec.dense_logits(given["hidden_states"], given["weight"].flip(0))
        bias = given["bias"].flip(0)
    k = case.sizes["top_k"]
    weights, ids = spec.activation_topk(logits, bias, k, given["scale"], bool(given["renormalize"]))
    return weights, logits.shape[1] - 1 - ids


def routed(change_logits=None, *, scores=None, ids=None, weights=None, report=lambda ids: ids):
    """The oracle for scoring kernels with some of its steps replaced."""

    def outputs(case, given):
        if case.kernel == "activation_topk":
            logits = given["logits"]
        else:
            logits = spec.dense_logits(given["hidden_states"], given["weight"])
        bias = given["bias"]
        if change_logits is not None:
            logits = change_logits(logits)
        s = (scores or spec.expert_scores)(logits)
        keys = spec.selection_keys(s, bias, logits)
        chosen = spec.topk_select(keys, case.sizes["top_k"])[1]
        if ids is not None:
            chosen = ids(chosen)
        picked = s.gather(1, chosen.long())
        if weights is not None:
            step = SimpleNamespace(keys=keys.gather(1, chosen.long()), picked=picked, given=given)
            return weights(step), chosen
        found = spec.routing_weights(picked, given["scale"], bool(given["renormalize"]))
        return found, report(chosen)

    return outputs


def naive_softplus(logits):
    """log(1 + exp(z)) in fp32: wrong by 3e-2 at -16."""
    z = logits.nan_to_num(nan=-torch.inf, posinf=spec.LOGIT_MAX, neginf=-spec.LOGIT_MAX)
    return torch.where(z > 20, z, (1 + z.clamp(max=20).exp()).log()).sqrt()


def flushed(logits):
    """Scores flushed to zero with the softplus, as under -ftz."""
    scores = spec.expert_scores(logits)
    return torch.where(scores * scores < 2.0**-126, torch.zeros_like(scores), scores)


SCORING_MUTANTS = {
    "naive softplus": routed(scores=naive_softplus),
    "no renormalisation": routed(
        weights=lambda s: spec.routing_weights(s.picked, s.given["scale"], False)
    ),
    "always renormalised": routed(
        weights=lambda s: spec.routing_weights(s.picked, s.given["scale"], True)
    ),
    "scale forgotten": routed(
        weights=lambda s: spec.routing_weights(s.picked, 1.0, bool(s.given["renormalize"]))
    ),
    "bias in the weights": routed(
        weights=lambda s: spec.routing_weights(s.keys.nan_to_num().abs(), s.given["scale"], True)
    ),
    "ids in another order": routed(ids=swapped),
    "weights in another order": routed(
        weights=lambda s: spec.routing_weights(
            s.picked, s.given["scale"], bool(s.given["renormalize"])
        ).flip(1)
    ),
    "NaN as a large logit": routed(lambda z: z.nan_to_num(nan=100.0, posinf=1e38, neginf=-1e38)),
    "infinities not clamped": routed(scores=lambda z: torch.nn.functional.softplus(z).sqrt()),
    "ids shifted by one": routed(report=lambda ids: ids + 1),
    "negative ids": routed(report=lambda ids: -1 - ids),
    "one expert k times": routed(ids=lambda ids: ids[:, :1].expand_as(ids)),
}


@pytest.mark.parametrize("kernel", ["activation_topk", DENSE])
@pytest.mark.parametrize("mutant", SCORING_MUTANTS)
def test_wrong_scoring_is_caught(kernel, mutant):
    assert problems((kernel, *SHAPES[kernel]), runner(SCORING_MUTANTS[mutant]))


def by(scoring, temperature=1.0):
    """The oracle with that rule in place of the case's."""

    def scores(logits):
        return spec.expert_scores(logits, scoring, temperature)

    return routed(scores=scores)


#: How an entry says that it scores, and how a faulty kernel does.
OTHER_RULES = {
    "sigmoid for sqrtsoftplus": (("sqrtsoftplus", 1.0), by("sigmoid")),
    "sqrtsoftplus for sigmoid": (("sigmoid", 1.0), by("sqrtsoftplus")),
    "temperature forgotten": (("sigmoid", 1.7), by("sigmoid")),
    "temperature inverted": (("sigmoid", 1.7), by("sigmoid", 1 / 1.7)),
    "temperature of a part in a million": (("sqrtsoftplus", 1.7), by("sqrtsoftplus", 1.70001)),
    "an inexact division": (
        ("sigmoid", 1.0),
        routed(scores=lambda z: spec.expert_scores(z, "sigmoid") * (1 + 1e-6)),
    ),
    "a sigmoid of NaN": (("sigmoid", 1.0), routed(scores=lambda z: z.sigmoid().nan_to_num(0.5))),
}


@pytest.mark.parametrize("kernel", ["activation_topk", DENSE])
@pytest.mark.parametrize("mutant", OTHER_RULES)
def test_scoring_by_another_rule_is_caught(kernel, mutant):
    rule, outputs = OTHER_RULES[mutant]
    constants, limits = SHAPES[kernel]
    assert problems((kernel, {**constants, **scoring_constants(*rule)}, limits), runner(outputs))


def test_cases_of_another_rule_have_inputs_of_their_own():
    constants, limits = SHAPES[DENSE]
    rules = [(scoring, t) for scoring in spec.SCORINGS for t in (1.0, 0.5)]
    listed = [cases_of(DENSE, {**constants, **scoring_constants(*rule)}, limits) for rule in rules]
    assert listed[0] == cases_of(DENSE, constants, limits)
    assert len({case.seed for cases in listed for case in cases}) == sum(map(len, listed))
    for rule, cases in zip(rules, listed, strict=True):
        assert {(case.scoring, case.gate_temperature) for case in cases} == {rule}


def test_flushed_subnormals_of_a_sigmoid_are_caught():
    def flushed_sigmoid(logits):
        scores = spec.expert_scores(logits, "sigmoid")
        return torch.where(scores < 2.0**-126, torch.zeros_like(scores), scores)

    constants, limits = SHAPES["activation_topk"]
    subject = ("activation_topk", {**constants, **scoring_constants("sigmoid", 1.0)}, limits)
    assert problems(subject, runner(routed(scores=flushed_sigmoid)))


def test_a_small_error_of_given_logits_is_caught():
    """Only for kernels whose input is logits: an accumulation over the hidden dimension may be off
    by 2^-20 of its sum of magnitudes.
    """
    subject = ("activation_topk", *SHAPES["activation_topk"])
    assert problems(subject, runner(routed(lambda z: z * (1 + 2e-6))))


def test_flushed_subnormals_are_caught():
    """Only for kernels whose input is logits: dense ones cannot reach -88 in this small shape."""
    subject = ("activation_topk", *SHAPES["activation_topk"])
    assert problems(subject, runner(routed(scores=flushed)))


def test_a_missing_epsilon_is_caught():
    def weights(step):
        total = step.picked.sum(dim=1, keepdim=True)
        share = step.picked / total if step.given["renormalize"] else step.picked
        return share * torch.tensor(step.given["scale"], dtype=torch.float32)

    subject = ("activation_topk", *SHAPES["activation_topk"])
    assert problems(subject, runner(routed(weights=weights)))


def test_a_flushed_operand_is_caught():
    """The tensor core must not flush bf16 subnormals."""

    def outputs(case, given):
        x = given["hidden_states"]
        x = torch.where(x.float().abs() < 2.0**-126, torch.zeros_like(x), x)
        return routed()(case, {**given, "hidden_states": x})

    assert problems((DENSE, *SHAPES[DENSE]), runner(outputs))


def test_bf16_logits_are_caught():
    assert problems((DENSE, *SHAPES[DENSE]), runner(routed(lambda z: z.bfloat16().float())))


@pytest.mark.parametrize("kernel", ["topk_select", "activation_topk", DENSE])
def test_wrong_tie_rule_is_caught(kernel):
    assert problems((kernel, *SHAPES[kernel]), runner(higher_id_first))


def select(key):
    def outputs(case, given):
        scores = given["scores"]
        order = key(scores).sort(dim=1, descending=True, stable=True).indices[:, : given["top_k"]]
        return scores.gather(1, order), order.int()

    return outputs


def bits_as_signed(scores):
    """A ranking by bits, in which +0 beats -0."""
    bits = torch.where(scores.isnan(), torch.full_like(scores, -torch.inf), scores)
    bits = bits.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)


@pytest.mark.parametrize(
    "key",
    [bits_as_signed, lambda s: s, lambda s: s.nan_to_num(nan=0.0, posinf=9e38, neginf=-9e38)],
    ids=["+0 beats -0", "NaN first", "NaN as zero"],
)
def test_wrong_selection_is_caught(key):
    assert problems(("topk_select", *SHAPES["topk_select"]), runner(select(key)))


def test_changed_values_are_caught(outputs):
    def canonical_nan(case, given):
        values, ids = outputs(case, given)
        return torch.where(values.isnan(), torch.full_like(values, torch.nan), values), ids

    assert problems(("topk_select", *SHAPES["topk_select"]), runner(canonical_nan))


def test_ignored_stride_is_caught(outputs):
    def packed(name):
        def wrong(case, given):
            rows = given[name]
            read = rows.as_strided(rows.shape, (rows.shape[1], 1))
            return outputs(case, {**given, name: read})

        return wrong

    for kernel, name in (
        ("topk_select", "scores"),
        ("activation_topk", "logits"),
        (DENSE, "hidden_states"),
    ):
        assert problems((kernel, *SHAPES[kernel]), runner(packed(name)))


@pytest.mark.parametrize(
    "change",
    [
        lambda given: {"token_ids": given["token_ids"].int()},
        lambda given: {"token_ids": given["token_ids"].clamp(0, len(given["table"]) - 1)},
        lambda given: {"token_ids": given["token_ids"].abs()},
        lambda given: {"sentinel": -1},
        lambda given: {"table": given["table"].sort(dim=1).values},
    ],
    ids=["truncated", "clamped", "sign ignored", "sentinel ignored", "row not verbatim"],
)
def test_wrong_lookup_is_caught(change, outputs):
    def wrong(case, given):
        return outputs(case, {**given, **change(given)})

    assert problems(("hash_router", *SHAPES["hash_router"]), runner(wrong))


# --- wrong serving --------------------------------------------------------------------------------


def without(name):
    """A kernel that ignores a serving input."""

    def outputs_of(outputs):
        def wrong(case, given):
            if name not in given:
                return outputs(case, given)
            ignored = {key: value for key, value in given.items() if key != name}
            if name == "expert_map":
                logical = outputs(case, ignored)
                return *logical, logical[1]
            return outputs(case, ignored)

        return wrong

    return outputs_of


def changed(name, change):
    """A kernel that takes another value for a serving input."""

    def outputs_of(outputs):
        def wrong(case, given):
            there = name in given and case.serving
            return outputs(case, {**given, name: change(given[name])} if there else given)

        return wrong

    return outputs_of


SERVING_MUTANTS = {
    "padding ignored": without("is_padding"),
    "count ignored": without("num_valid_tokens"),
    "count off by one": changed("num_valid_tokens", lambda count: count + 1),
    "images ignored": without("image_mask"),
    "map ignored": without("expert_map"),
    "order of copies ignored": changed("replica_step", lambda _: 1),
    "start of copies ignored": changed("replica_start", lambda _: 0),
    "one replica": changed("replica_counts", torch.ones_like),
    "replay ignored": without("given_ids"),
    "given ids clamped": changed("given_ids", lambda ids: ids.clamp(min=0)),
    "given ids truncated": changed("given_ids", lambda ids: ids.int()),
    "given ids sorted": changed("given_ids", lambda ids: ids.sort(dim=1).values),
    "another sentinel": changed("sentinel", lambda _: -1),
}


@pytest.mark.parametrize("kernel", ["hash_router", "activation_topk", DENSE])
@pytest.mark.parametrize("mutant", SERVING_MUTANTS)
def test_wrong_serving_is_caught(kernel, mutant, outputs):
    if kernel == "hash_router" and mutant.startswith(("images", "replay", "given")):
        return  # it has no such inputs
    wrong = SERVING_MUTANTS[mutant](outputs)
    assert problems((kernel, *SHAPES[kernel]), runner(wrong))


def with_fault(outputs, fault):
    """A kernel that is right until ``fault`` changes what a launch with options has written."""

    def for_case(case):
        right = runner(outputs)(case)

        def run(given, values, ids, **more):
            before = {name: each.clone() for name, each in more.items() if hasattr(each, "clone")}
            right(given, values, ids, **more)
            if "shared_experts" in more:
                fault(values, ids, more, before)

        return run

    return for_case


def changes(name):
    """A fault: one more in the first element of an output."""

    def fault(values, ids, more, before):
        written = {"values": values, "ids": ids, **more}.get(name)
        if written is not None and written.numel():
            written[(0,) * written.dim()] += 1

    return fault


def swaps_the_shared_experts(values, ids, more, before):
    if ids.numel():
        ids[:, -2:] = ids[:, -2:].flip(1)


def writes_between_rows(values, ids, more, before):
    if ids.numel():
        ids.as_strided((1,), (1,), ids.storage_offset() + ids.shape[1]).fill_(0)


def ignores_the_flag(values, ids, more, before):
    if "record_load" in more:
        more["expert_load"] += 1


def counts_once_per_launch(values, ids, more, before):
    if "record_load" not in more:
        load, old = more["expert_load"], before["expert_load"]
        load.copy_(old + (load != old).int())


OPTION_FAULTS = {
    changes("values"): "options: other weights",
    changes("ids"): "options: other ids",
    changes("captured_ids"): "options: other captured ids",
    changes("expert_load"): "options: other loads",
    changes("packed_out"): "options: other packed words",
    swaps_the_shared_experts: "options: other ids",
    writes_between_rows: "options: wrote beside its ids",
    ignores_the_flag: "options: loads in spite of the flag",
    counts_once_per_launch: "options: other loads",
}


@pytest.mark.parametrize("kernel", ["hash_router", "activation_topk", DENSE])
@pytest.mark.parametrize(("fault", "message"), OPTION_FAULTS.items())
def test_wrong_options_are_caught(kernel, fault, message, outputs):
    found = problems((kernel, *SHAPES[kernel]), with_fault(outputs, fault))
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize("kernel", ["activation_topk", DENSE])
def test_a_mask_of_given_rows_that_is_ignored_is_caught(kernel, outputs):
    wrong = without("given_mask")(outputs)
    found = problems((kernel, *SHAPES[kernel]), runner(wrong))
    assert any("given rows: other values" in problem for problem in found), found


# --- wrong behaviour around a right result ------------------------------------------------------


def element_after(tensor):
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + tensor.numel())


def misbehave(outputs, action):
    calls = itertools.count()

    def for_case(case):
        right = runner(outputs)(case)

        def run(given, values, ids, **more):
            right(given, values, ids, **more)
            if "shared_experts" not in more:
                action(given, values, ids, next(calls))

        return run

    return for_case


def leave_last_row(_, values, ids, __):
    # What an unwritten element holds: its old content.
    values[-1] = element_after(values)
    ids[-1] = element_after(ids)


def flip_a_bit_at_times(_, values, __, call):
    if call % 2:
        values.view(torch.int32)[0, 0] ^= 1


def depend_on_batch_size(_, values, __, ___):
    if values.shape[0] > 32:
        values.view(torch.int32)[:, 0] += 1


def depend_on_position(_, values, __, ___):
    if values.shape[0] > 8:
        values.view(torch.int32)[8, 0] ^= 1


def depend_on_neighbours(given, values, _, __):
    if given["hidden_states"].isnan().any():
        values.view(torch.int32)[:, 0] ^= 1


def write_past_values(_, values, __, ___):
    element_after(values).fill_(0)


def write_past_ids(_, __, ids, ___):
    element_after(ids).fill_(0)


def clear_an_input(given, *_):
    next(value for value in given.values() if isinstance(value, torch.Tensor)).zero_()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (leave_last_row, "not written"),
        (flip_a_bit_at_times, "not deterministic"),
        (write_past_values, "outside its output values"),
        (write_past_ids, "outside its output ids"),
        (clear_an_input, "changed its input"),
    ],
)
@pytest.mark.parametrize("kernel", SHAPES)
def test_misbehaviour_is_caught(kernel, action, message, outputs):
    found = problems((kernel, *SHAPES[kernel]), misbehave(outputs, action))
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize("action", [depend_on_batch_size, depend_on_position, depend_on_neighbours])
def test_batch_dependence_is_caught(action, outputs):
    found = problems((DENSE, *SHAPES[DENSE]), misbehave(outputs, action))
    assert any("depend on its batch" in problem for problem in found), found


# --- topk_indices ------------------------------------------------------------------------------

INDEXER = (
    "topk_indices",
    {"SCORE_BYTES": 4, "SAMPLES": 512},
    {"rows": (1, 300), "row_length": (1, 5003), "top_k": (1, 512)},
)


def selected(given, **changed):
    """``(values, slots, ids)`` of the oracle with some of the inputs changed."""
    given = {**given, **changed}
    starts = given.get("row_starts")
    ids = spec.topk_indices(
        given["scores"],
        given["top_k"],
        starts,
        given.get("row_ends"),
        in_rank_order=bool(given["sorted"]),
        nan_first=bool(given["nan_first"]),
    )
    return spec.scores_at(given["scores"], ids, starts), slots_of(ids, given), ids


def slots_of(ids, given, **changed):
    given = {**given, **changed}
    names = ("page_table", "requests", "offsets")
    inputs = {name: given.get(name) for name in names}
    return spec.slots(ids, page_size=given.get("page_size", 1), **inputs)


def overflowing(given):
    """A kernel that drops the last of the scores that tie at the bound, where there are many."""
    values, slots, ids = (each.clone() for each in selected(given))
    full = (ids >= 0).all(dim=1) & (values[:, -1] == values[:, 0]) & (ids.shape[1] > 9)
    ids[full, -1] += 1
    return values, slots, ids


def counted_from_column_0(given):
    values, slots, ids = selected(given)
    if "row_starts" in given:
        starts = given["row_starts"].clamp(min=0).unsqueeze(1)
        ids = torch.where(ids >= 0, ids + starts, ids).int()
    return values, slots, ids


def with_slots(change):
    """A kernel whose ids are right and whose slots are those of changed inputs."""

    def outputs(given):
        values, _, ids = selected(given)
        return values, change(ids, given), ids

    return outputs


def page_clamped(ids, given):
    if "page_table" not in given:
        return slots_of(ids, given)
    last = given["page_table"].shape[1] * given["page_size"] - 1
    return torch.where(ids > last, slots_of(ids.clamp(max=last), given), slots_of(ids, given))


def request_clamped(ids, given):
    if "requests" not in given:
        return slots_of(ids, given)
    return slots_of(ids, given, requests=given["requests"].clamp(0, len(given["page_table"]) - 1))


def offset_on_none(ids, given):
    found = slots_of(ids, given)
    if "offsets" in given:
        found = torch.where(ids < 0, given["offsets"].unsqueeze(1) - 1, found)
    return found


@pytest.mark.parametrize(
    "outputs",
    [
        overflowing,
        counted_from_column_0,
        lambda given: selected(given, row_starts=None),
        lambda given: selected(given, row_ends=None),
        lambda given: selected(given, sorted=0),
        lambda given: selected(given, sorted=1),
        lambda given: selected(given, nan_first=0),
        lambda given: selected(given, nan_first=1),
        lambda given: selected(given, scores=given["scores"].nan_to_num(nan=-3e38)),
        lambda given: selected(
            given, scores=torch.where(given["scores"].abs() < 2.0**-126, 0.0, given["scores"])
        ),
        with_slots(lambda ids, given: ids),
        with_slots(lambda ids, given: slots_of(ids, given, requests=None)),
        with_slots(lambda ids, given: slots_of(ids, given, offsets=None)),
        with_slots(lambda ids, given: slots_of(ids, given, page_size=1)),
        with_slots(page_clamped),
        with_slots(request_clamped),
        with_slots(offset_on_none),
    ],
    ids=[
        *("overflow", "not from the row's start", "no starts", "no ends", "never by rank"),
        *("always by rank", "NaN last", "NaN first", "NaN as a number", "flushed subnormals"),
        *("no slots", "no requests", "no offsets", "no page size", "page clamped"),
        *("request clamped", "offset on none"),
    ],
)
def test_wrong_indices_are_caught(outputs):
    assert problems(INDEXER, runner(lambda case, given: outputs(given)))


def test_a_row_that_depends_on_its_batch_is_caught():
    def outputs(case, given):
        values, slots, ids = selected(given)
        return values, slots, ids.flip(1) if len(ids) == 48 else ids

    found = problems(INDEXER, runner(outputs))
    assert any("bits of a token depend on its batch" in problem for problem in found)


def test_the_sample_of_a_row_is_where_the_kernel_takes_it():
    """By the formula of its source, in Python's integers."""
    case = next(
        each
        for each in cases_of(
            "topk_indices",
            {"SCORE_BYTES": 4, "SAMPLES": 2048},
            {"row_length": (1, 2**21), "top_k": (1, 2048)},
        )
        if each.pattern == "beats_sample" and each.sizes["row_length"] == 70001
    )
    scores = inputs.make_inputs(case)["scores"]
    bits = min(max((70001 // 32).bit_length(), 8), (2048).bit_length()) - 1
    columns = {
        ((i << 16 | (i * 2654435761 % 2**32 >> 16)) * 70001) >> (16 + bits)
        for i in range(1 << bits)
    }
    assert set((scores[0] > 50).nonzero().flatten().tolist()) == columns
    assert len(columns) == 2048


def test_a_kernel_without_a_sample_has_the_rows_that_beat_one():
    limits = {"row_length": (1, 8192), "top_k": (1, 2048)}
    for samples, used in ((0, 512), (1024, 1024)):
        constants = {"SCORE_BYTES": 4, "SAMPLES": samples}
        cases = cases_of("topk_indices", constants, limits)
        beating = [case for case in cases if case.pattern == "beats_sample"]
        assert {case.sizes["sample"] for case in beating} == {used}
        assert all((inputs.make_inputs(case)["scores"] > 50).any(dim=1).all() for case in beating)


def test_the_evidence_of_a_kernel_depends_on_its_own_cases():
    assert cases_sha256("topk_select") == cases_sha256("dense_router_decode")
    assert cases_sha256("topk_indices") != cases_sha256("topk_select")
    names = [case.name for case in cases_of(*INDEXER)]
    assert len(set(names)) == len(names)
    sizes = [case.sizes for case in cases_of(*INDEXER)]
    for option in ("bounded", "page_size", "requests", "offsets", "sorted", "nan_first", "padding"):
        assert any(each[option] for each in sizes)
        assert not all(each[option] for each in sizes)
    longest = {"row_length": (1, 2**21), "top_k": (1, 4096)}
    sizes = [case.sizes for case in cases_of("topk_indices", INDEXER[1], longest)]
    assert {1, 2**20, 2**21} <= {each["row_length"] for each in sizes}
    assert {1, 4096} <= {each["top_k"] for each in sizes}
    assert any(each["top_k"] > each["row_length"] for each in sizes)


def test_the_report_of_a_long_row_shows_what_is_wrong():
    expected = torch.zeros(3, 5000)
    found = expected.clone()
    found[1, 4000] = torch.nan
    expected[1, 4000] = torch.tensor(0x7FC00001, dtype=torch.int32).view(torch.float32)
    found[2, 7] = 1
    wrong = (found.view(torch.int32) != expected.view(torch.int32)).any(dim=1)
    text = checks.report(wrong, "wrong value bits", found, expected)
    assert text == (
        "wrong value bits in 2 of 3 rows; row 1, places [4000] of 1: "
        "expected [nan (0x7fc00001)], found [nan (0x7fc00000)]"
    )
    assert len(checks.report(wrong, "outside", torch.arange(15000).view(3, 5000))) < 600
