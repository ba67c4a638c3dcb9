"""The fuzz suite on the CPU, and that it finds every kind of broken promise."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from tests.fuzz.__main__ import main
from tests.fuzz.suite import SELECTIONS, run

MODEL = (128, 24, 4)


@pytest.mark.parametrize(
    ("seed", "scoring", "temperature"),
    [(0, "sqrtsoftplus", 1.0), (1, "sigmoid", 1.0), (2, "sigmoid", 0.3), (3, "sqrtsoftplus", 7.0)],
)
def test_every_op_keeps_its_promises(seed, scoring, temperature):
    rule = {"scoring": scoring, "gate_temperature": temperature}
    counts = run("cpu", 2500, model=MODEL, rule=rule, seed=seed, largest=257)
    assert sum(counts.values()) >= 2500
    assert len(set(counts.values())) == 1


def beside(tensor, offset):
    """An element next to a tensor, in its band."""
    place = tensor.storage_offset() + (tensor.numel() if offset >= 0 else 0) + offset
    return tensor.as_strided((1,), (1,), place)


def nan_weight(given, out):
    out["weights_out"][0, 0] = torch.nan


def infinite_weight(given, out):
    out["weights_out"][-1, -1] = torch.inf


def negative_weight(given, out):
    out["weights_out"][-1, -1] = -1e-30


def repeated_id(given, out):
    ids = out.get("logical_ids_out", out["ids_out"])
    ids[:, 1:] = ids[:, :1]


def id_out_of_range(given, out):
    out.get("logical_ids_out", out["ids_out"])[0, 0] = 2000


def padding_with_weights(given, out):
    if "is_padding" in given:
        out["weights_out"][given["is_padding"]] = 0.5


def padding_with_experts(given, out):
    if "is_padding" in given:
        out.get("logical_ids_out", out["ids_out"])[given["is_padding"]] = 1


def nothing_valid_ignored(given, out):
    if "num_valid_tokens" in given:
        out["weights_out"][max(int(given["num_valid_tokens"]), 0) :] = 0.5


def another_replica(given, out):
    if "logical_ids_out" in out:
        out["ids_out"][0] += 1


def other_nan(given, out):
    if "logits_out" in out:
        out["logits_out"][0, 0] = torch.nan  # 0x7fc00000


def other_shared_id(given, out):
    if "shared_experts" in given:
        out["ids_out"][0, -1] += 1


def other_shared_weight(given, out):
    if "shared_experts" in given:
        out["weights_out"][0, -1] += 1


def counts_once_too_often(given, out):
    if "expert_load" in given:
        given["expert_load"][-1] += 1


def ignores_the_flag(given, out):
    if "record_load" in given and not given["record_load"]:
        given["expert_load"] += 1


def captures_physical_ids(given, out):
    if "captured_ids" in given and "logical_ids_out" in out:
        given["captured_ids"][: len(out["ids_out"])] = out["ids_out"][:, : out["k"]]


def captures_too_many_rows(given, out):
    captured = given.get("captured_ids", out["ids_out"])
    captured[len(out["ids_out"]) :] = 0


def writes_between_rows(given, out):
    ids = out["ids_out"]
    if ids.stride(0) > ids.shape[1] and len(ids) > 1:
        ids.as_strided((1,), (1,), ids.storage_offset() + ids.shape[1])[0] = 0


def writes_behind(given, out):
    beside(out["ids_out"], 0).fill_(0)


def writes_before(given, out):
    beside(out["weights_out"], -1).fill_(0)


def writes_to_its_input(given, out):
    given["rows"].view(torch.int16).view(-1)[:1] ^= 1


def reads_behind(given, out):
    """What it finds in the band decides a weight."""
    rows = given["rows"]
    band = beside(rows.view(torch.uint8).view(-1), 0)
    out["weights_out"][0, 0] = float(band) / 1000


def leaves_rows_unwritten(given, out):
    out["weights_out"][0] = 0
    out["weights_out"].view(torch.int32)[0] = out["poison"]


class Broken:
    """The ops, each of whose calls is followed by a fault."""

    def __init__(self, fault, only=None):
        self._fault, self._only = fault, only
        self.calls = 0

    def __getattr__(self, name):
        real = getattr(torch.ops.dsv4, name)
        if name in SELECTIONS or (self._only and name != self._only):
            return real
        broken = self

        class Op:
            def __call__(self, *arguments):
                return real(*arguments)

            def out(self, *arguments, **keywords):
                broken.calls += 1
                out = {key: value for key, value in keywords.items() if key.endswith("_out")}
                wide = keywords.get("logical_ids_out", keywords["ids_out"])
                out["k"] = wide.shape[1]
                out["poison"] = int(out["weights_out"].view(torch.int32)[0, 0])
                real.out(*arguments, **keywords)
                broken._fault({**keywords, "rows": arguments[0]}, out)

            def packed(self, *arguments, **keywords):
                return real.packed(*arguments, **keywords)

        return Op()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (nan_weight, "a weight is not finite"),
        (infinite_weight, "a weight is not finite"),
        (negative_weight, "a weight is negative"),
        (repeated_id, "an expert comes twice in a dense row"),
        (id_out_of_range, "an id is neither in range nor the sentinel"),
        (padding_with_weights, "a padding row has an expert or a weight"),
        (padding_with_experts, "a padding row has an expert or a weight"),
        (nothing_valid_ignored, "a padding row has an expert or a weight"),
        (another_replica, "a physical id is not the map's"),
        (other_nan, "a NaN logit is stored under other bits"),
        (other_shared_id, "a shared expert has another id or another weight"),
        (other_shared_weight, "a shared expert has another id or another weight"),
        (counts_once_too_often, "a load is not the number of choices of its expert"),
        (ignores_the_flag, "a load is not the number of choices of its expert"),
        (captures_physical_ids, "a captured id is not the logical one"),
        (captures_too_many_rows, "wrote between the rows of captured_ids, or behind them"),
        (writes_between_rows, "wrote between the rows of ids_out, or behind them"),
        (writes_behind, "wrote outside its outputs: ids_out"),
        (writes_before, "wrote outside its outputs: weights_out"),
        (writes_to_its_input, "wrote outside its outputs: 0"),
        (reads_behind, "depends on memory outside its inputs"),
        (leaves_rows_unwritten, "or on old outputs"),
    ],
)
def test_broken_promises_are_found(fault, message):
    with pytest.raises(AssertionError, match=message):
        run("cpu", 30000, model=MODEL, ops=Broken(fault), largest=33)


def test_a_packed_word_that_is_not_the_results_is_found():
    class Ops:
        def __getattr__(self, name):
            real = getattr(torch.ops.dsv4, name)

            class Op:
                def __call__(self, *arguments):
                    return real(*arguments)

                def out(self, *arguments, **keywords):
                    real.out(*arguments, **keywords)

                def packed(self, *arguments, **keywords):
                    return real.packed(*arguments, **keywords) ^ 1

            return real if name == "topk_select" else Op()

    with pytest.raises(AssertionError, match="a packed word is not the id and the weight"):
        run("cpu", 30000, model=MODEL, ops=Ops(), largest=33)


@pytest.mark.parametrize("name", ["hash_router", "dense_router_replay", "hash_gate"])
def test_ids_that_are_known_are_compared(name):
    def another(given, out):
        ids = out.get("logical_ids_out", out["ids_out"])
        ids[ids == 5] = 6

    with pytest.raises(AssertionError, match="not the one that was looked up or given"):
        run("cpu", 30000, model=MODEL, ops=Broken(another, name), largest=33)


def test_an_affected_next_call_is_found():
    class Lingering:
        calls = 0

        def __getattr__(self, name):
            real, ops = getattr(torch.ops.dsv4, name), self

            class Op:
                def __call__(self, *arguments):
                    weights, ids = real(*arguments)
                    return weights + float(ops.calls > 20), ids

                def out(self, *arguments, **keywords):
                    ops.calls += 1
                    real.out(*arguments, **keywords)

                def packed(self, *arguments, **keywords):
                    return real.packed(*arguments, **keywords)

            return Op() if name == "dense_router" else real

    with pytest.raises(AssertionError, match="a later call is affected"):
        run("cpu", 30000, model=MODEL, ops=Lingering(), largest=33)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda values, ids: (values, ids + 10**6), "an id is out of range"),
        (lambda values, ids: (values, ids * 0), "an id comes twice"),
        (lambda values, ids: (values + 1, ids), "a value is not the one at its id"),
        (lambda values, ids: (values.flip(1), ids.flip(1)), "values out of order"),
    ],
)
def test_broken_selections_are_found(fault, message):
    class Ops:
        def __getattr__(self, name):
            real = getattr(torch.ops.dsv4, name)
            return (lambda *given: fault(*real(*given))) if name == "topk_select" else real

    with pytest.raises(AssertionError, match=message):
        run("cpu", 3000, model=MODEL, ops=Ops(), largest=33)


def last_of_a_row(slots, ids, given):
    """A kernel that drops a score where its list of candidates is full."""
    ids[:, -1] = torch.where(ids[:, -1] > 0, ids[:, -1] - 1, ids[:, -1])


def read_beyond_the_table(slots, ids, given):
    if "page_table" in given:
        slots[(slots == -1) & (ids >= 0)] = 0


def indices_behind(slots, ids, given):
    beside(ids, 0).fill_(0)


def rows_of_scores(slots, ids, given):
    given["scores"].view(torch.int16)[-1:] ^= 1


def empty_rows_unwritten(slots, ids, given):
    ids[(ids == -1).all(dim=1)] = given["poison"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (last_of_a_row, "ids are not the oracle's"),
        (read_beyond_the_table, "slots are not the oracle's"),
        (indices_behind, "wrote outside its outputs: ids_out"),
        (rows_of_scores, "wrote outside its outputs: scores"),
        (empty_rows_unwritten, "ids are not the oracle's"),
    ],
)
def test_broken_indices_are_found(fault, message):
    class Indices:
        def out(self, scores, k, slots_out, ids_out, **given):
            poison = int(ids_out[0, 0])
            outputs = {"slots_out": slots_out, "ids_out": ids_out}
            torch.ops.dsv4.topk_indices.out(scores, k, **outputs, **given)
            given |= {"scores": scores, "poison": poison}
            inputs = {
                name: each for name, each in given.items() if name not in ("scores", "poison")
            }
            torch.ops.dsv4.topk_indices.out(
                scores, k, slots_out=slots_out, ids_out=ids_out, **inputs
            )
            fault(slots_out, ids_out, given)

    class Ops:
        def __getattr__(self, name):
            return Indices() if name == "topk_indices" else getattr(torch.ops.dsv4, name)

    with pytest.raises(AssertionError, match=message):
        run("cpu", 3000, model=MODEL, ops=Ops(), largest=33)


def test_the_command():
    options = ["--device", "cpu", "--model", "128", "24", "4"]
    few, more = (
        CliRunner().invoke(main, [*options, "--rows", rows], catch_exceptions=False)
        for rows in ("200", "2000")
    )
    found = [int(done.output.split("\n")[-2].split()[1]) for done in (few, more)]
    assert 200 <= found[0] < 2000 <= found[1]
    other = CliRunner().invoke(main, [*options, "--rows", "200", "--seed", "9"])
    assert other.output != few.output
