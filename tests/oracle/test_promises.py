"""The page of promises names only tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "router_runtime" / "PROMISES.md"


def test_every_test_on_the_page_exists():
    sources = list((ROOT / "tests").rglob("*.py"))
    files = {path.name for path in sources}
    text = "\n".join(path.read_text() for path in sources)
    defined = set(re.findall(r"^def (\w+)\(", text, re.MULTILINE))
    page = PAGE.read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| \d", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, len(rows) + 1))
    for row in rows:
        # In the columns after the promise: tests, files of tests, faults.
        names = re.findall(r"`([^`]+)`", row.split("|", 3)[3])
        assert names or "the same" in row, row
        for name in names:
            file, _, test = name.rpartition("::") if "::" in name else ("", "", name)
            if test.endswith(".py"):
                file, test = test, ""
            assert not file or Path(file).name in files, name
            assert not test or test in defined, name
