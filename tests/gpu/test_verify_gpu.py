"""Every entry that loads here passes the oracle suite, and its evidence recomputes on the CPU."""

from __future__ import annotations

from router_runtime.evidence.store import load_evidence
from router_runtime.evidence.suite import cases_of
from router_runtime.verification import inputs
from router_runtime.verification.judge import clear_ids_sha256
from router_runtime.verification.reference import Oracle
from router_runtime.verification.report import timing_table
from router_runtime.verification.timing import Gpu, time_models


def test_every_entry_passes(verification):
    print("\n".join(verification.lines))
    assert verification.passed, "\n".join(verification.lines)


def test_recorded_evidence_recomputes(verification):
    records = load_evidence(verification.folder / "evidence").records
    assert records
    for record in records:
        recorded = {case.name: case for case in record.cases}
        for case in cases_of(record.kernel, record.constants, record.limits)[::5]:
            given = inputs.make_inputs(case)
            assert recorded[case.name].inputs_sha256 == inputs.digest(given)
            ids, clear = Oracle(case, given).expected_ids
            assert recorded[case.name].ids_sha256 == clear_ids_sha256(ids, clear)


def test_every_model_is_timed(verification):
    timings = list(time_models(verification.folder, Gpu(), (1, 4096)))
    print("\n".join(timing_table(timings)))
    assert timings
    for timing in timings:
        assert timing.error is None
        assert timing.entries
        assert 0 < timing.router_us < 1e4
        assert 0 < timing.torch_mm_us < 1e4
