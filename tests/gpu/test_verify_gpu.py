"""Every entry that loads here passes the oracle suite, and its evidence recomputes on the CPU."""

from __future__ import annotations

from router_runtime.evidence import cases as suite
from router_runtime.evidence.store import load_evidence
from router_runtime.verification import inputs
from router_runtime.verification.judge import clear_ids_sha256
from router_runtime.verification.reference import Oracle


def test_every_entry_passes(verification):
    print("\n".join(verification.lines))
    assert verification.passed, "\n".join(verification.lines)


def test_recorded_evidence_recomputes(verification):
    records = load_evidence(verification.folder / "evidence").records
    assert records
    for record in records:
        recorded = {case.name: case for case in record.cases}
        for case in suite.cases(record.kernel, record.constants, record.limits)[::5]:
            given = inputs.make_inputs(case)
            assert recorded[case.name].inputs_sha256 == inputs.digest(given)
            ids, clear = Oracle(case, given).expected_ids
            assert recorded[case.name].ids_sha256 == clear_ids_sha256(ids, clear)
