"""One record of evidence: which device ran the oracle suite on which cubin, and what came out.

A record says what was run (cubin, source, toolchain and suite), where (device, driver, torch), and
for every case its seed, the digests of its inputs and ids, and the worst errors. Inputs and ids can
be recomputed without a GPU; ``make test`` does so for a sample of the committed records.

A record counts only while it is *current*: made with the suite as it is now, for every case of it.
A record of another suite is stale: it can still be read, and it proves nothing.

``Record`` is about a cubin that ran itself. ``emulation_record`` has the record of a cubin whose
PTX ran with some of its instructions in software; ``Examined`` is what the two have in common.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from router_runtime.errors import FormatError
from router_runtime.evidence.cases import SUITE_VERSION
from router_runtime.evidence.suite import cases_of, cases_sha256
from router_runtime.format.codec import canonical_json, decode, parse_json
from router_runtime.format.contract import Constants
from router_runtime.format.manifest import Entry, artifact_name
from router_runtime.format.target import Target

FORMAT_VERSION = 2

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEXT = re.compile(r"[ -~]*[!-~][ -~]*")


@dataclass(frozen=True, slots=True)
class CaseRecord:
    """The result of one case of the suite.

    Attributes:
        name: The case's, which is unique among the cases of a kernel.
        seed: From which its inputs were drawn.
        inputs_sha256: Digest of the inputs.
        rows: Tokens, or rows of scores, that were compared.
        clear: Rows whose ids the mathematics determines fully. In the others some keys are closer
            to each other than the error bound.
        reordered: Rows in which such keys were ranked in another allowed order than the oracle's.
        ids_sha256: Digest of the ids of the clear rows.
        worst: Name of an error -> its largest value, see ``verification.judge.Verdict``. An error
            that has a bound is given as a fraction of it.

    """

    name: str
    seed: int
    inputs_sha256: str
    rows: int
    clear: int
    reordered: int
    ids_sha256: str
    worst: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Examined:
    """An entry, and the oracle suite's run of its code on one device.

    Attributes:
        entry: ``Entry.key`` of the cubin, for readers: digests identify it.
        kernel: The entry's.
        constants: The entry's. With the limits, they determine the cases.
        limits: Those of the entry's contract: quantity -> least and largest value.
        target: The entry's.
        file: The cubin's file name.
        sha256: The cubin's digest.
        source_sha256: Digest of the sources, constants and flags that it was compiled from.
        toolchain_sha256: Digest of the compilers' packages and flags.
        suite_version: ``SUITE_VERSION`` of the suite that ran.
        cases_sha256: Digest of the kernel's cases in that suite.
        device: Name of the GPU, as the driver gives it.
        compute_capability: Of the GPU: major, minor.
        driver: The CUDA version of the driver, such as 13000 for 13.0.
        torch: Version of the torch that computed what is expected.
        cases: The result of every case, in the suite's order.

    """

    entry: str
    kernel: str
    constants: Constants
    limits: Mapping[str, tuple[int, int]]
    target: str
    file: str
    sha256: str
    source_sha256: str
    toolchain_sha256: str
    suite_version: int
    cases_sha256: str
    device: str
    compute_capability: tuple[int, int]
    driver: int
    torch: str
    cases: tuple[CaseRecord, ...]

    @property
    def current(self) -> bool:
        """Return whether the record was made with the suite as it is now."""
        return self.of_this_suite

    @property
    def of_this_suite(self) -> bool:
        """Return whether the suite that ran is the one that this runtime has."""
        here = (SUITE_VERSION, cases_sha256(self.kernel))
        return (self.suite_version, self.cases_sha256) == here

    @property
    def stem(self) -> str:
        """Return how the name of the record's file starts: the cubin's name, then the device's."""
        device = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return f"{self.file.removesuffix('.cubin')}.{device}"

    def matches(self, entry: Entry) -> bool:
        """Return whether the record is about this very cubin.

        The digest identifies the cubin; its sources do not matter. Kernel, constants and limits
        determine the cases, so they must be the entry's too.
        """
        return (
            self.sha256 == entry.sha256
            and self.kernel == entry.kernel
            and dict(self.constants) == dict(entry.constants)
            and dict(self.limits) == dict(entry.contract.limits)
        )


@dataclass(frozen=True, slots=True)
class Record(Examined):
    """One cubin on one device of its target. ``format_version`` is that of the file."""

    format_version: int = FORMAT_VERSION

    @property
    def file_name(self) -> str:
        """Return the name under which the record is stored."""
        return f"{self.stem}.json"

    def same_sources(self, entry: Entry) -> bool:
        """Return whether the record is about a cubin of the sources, constants and flags of which
        this entry is made.
        """
        return (self.kernel, self.source_sha256) == (entry.kernel, entry.source_sha256)

    def concerns(self, entry: Entry) -> bool:
        """Return whether the record is about this cubin or about one of the same sources."""
        return self.sha256 == entry.sha256 or self.same_sources(entry)


def dumps(record: Record) -> bytes:
    """Return the canonical bytes of a record. Raises FormatError if it is not valid."""
    validate(record)
    return canonical_json(record)


def loads(data: bytes) -> Record:
    """Return the record in a file's bytes. Raises FormatError for everything that the schema does
    not allow, and for a current record without all cases of the suite. What to do about it depends
    on where the file is: ``store`` adds that.
    """
    document = parse_json(data, "evidence")
    found = document.get("format_version") if isinstance(document, dict) else None
    if found != FORMAT_VERSION or isinstance(found, bool):
        raise FormatError(f"expected evidence of format version {FORMAT_VERSION}, found {found!r}")
    record: Record = decode(Record, document, "evidence")
    validate(record)
    return record


def validate(record: Record) -> None:
    """Raise FormatError if a record breaks a rule that its types do not express."""
    require_runs_on(record.target, record)
    validate_examined(record)


def validate_examined(record: Examined) -> None:
    """Raise FormatError if a record of any kind breaks a rule of those that all kinds have.

    The cases of a current record are compared with the suite's.
    """
    digests = [record.sha256, record.source_sha256, record.toolchain_sha256, record.cases_sha256]
    for case in record.cases:
        digests += [case.inputs_sha256, case.ids_sha256]
    require_digests(digests)
    _validate_entry(record)
    require_text("device", record.device)
    require_text("torch", record.torch)
    # The driver's CUDA version as it reports it: 13000 for 13.0.
    if not 1000 <= record.driver < 1000000:
        raise FormatError(
            f"evidence: expected a driver's CUDA version such as 13000, found {record.driver}"
        )
    _validate_cases(record)


def require_digests(digests: Iterable[str]) -> None:
    """Raise FormatError for the first of these that is no SHA-256 in hexadecimal."""
    is_digest = _SHA256.fullmatch
    for digest in digests:
        if is_digest(digest) is None:
            raise FormatError(f"evidence: expected 64 lower-case hex digits, found {digest!r}")


def require_text(what: str, text: str) -> None:
    """Raise FormatError for a name or a version that is empty, long or not on one line."""
    if _TEXT.fullmatch(text) is None or len(text) > 200:
        raise FormatError(f"evidence: expected the name of its {what}, found {text!r}")


def require_runs_on(target: str, record: Examined) -> None:
    """Raise FormatError if the record's device does not run cubins for ``target``."""
    if not Target.parse(target).runs_on(*record.compute_capability):
        raise FormatError(
            f"evidence: expected a device that runs {target}, found compute capability "
            f"{record.compute_capability}"
        )


def _validate_cases(record: Examined) -> None:
    for case in record.cases:
        if not 0 <= case.clear <= case.rows or not 0 <= case.reordered <= case.rows:
            raise FormatError(
                f"evidence of case {case.name}: expected clear and reordered rows within its "
                f"{case.rows} rows, found {case.clear} and {case.reordered}"
            )
        if (
            not 0
            <= min(case.worst.values(), default=0)
            <= max(case.worst.values(), default=0)
            < math.inf
        ):
            raise FormatError(
                f"evidence of case {case.name}: expected errors of at least 0, found "
                f"{dict(case.worst)}"
            )
    if record.current:
        found = tuple((case.name, case.seed) for case in record.cases)
        expected = _suite_cases(
            record.kernel, tuple(record.constants.items()), tuple(record.limits.items())
        )
        if found != expected:
            missing = sorted({name for name, _ in expected} - {name for name, _ in found})
            raise FormatError(
                f"evidence: expected every case of the suite, in its order and with its seeds, "
                f"found {len(found)} of {len(expected)} (missing {missing[:5]})"
            )


@functools.lru_cache(maxsize=256)
def _suite_cases(
    kernel: str,
    constants: tuple[tuple[str, int | float | str], ...],
    limits: tuple[tuple[str, tuple[int, int]], ...],
) -> tuple[tuple[str, int], ...]:
    """Name and seed of every case. Cached: variants with the same limits have the same cases."""
    try:
        listed = cases_of(kernel, dict(constants), dict(limits))
        # A name has constants of the record in it, which may be no text that could be hashed.
        return tuple((case.name, case.seed) for case in listed)
    except (KeyError, ValueError) as error:
        raise FormatError(f"evidence: expected a kernel of the suite, found {error}") from error


def _validate_entry(record: Examined) -> None:
    """Raise FormatError if the record's copies of its entry's names contradict each other."""
    parts = record.entry.split("/")
    if len(parts) != 4 or (parts[0], parts[2]) != (record.kernel, record.target):
        raise FormatError(
            f"evidence: expected the entry {record.kernel}/<model>/{record.target}/<variant>, "
            f"found {record.entry!r}"
        )
    _, model, _, variant = parts
    file = artifact_name(record.kernel, model, record.target, variant, record.sha256)
    if record.file != file:
        raise FormatError(f"evidence: expected the file {file}, found {record.file!r}")
