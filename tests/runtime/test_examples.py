"""README.md quotes the examples as they are, and each of them runs (here on the CPU)."""

from __future__ import annotations

import re

import pytest

from tests import examples

README = (examples.ROOT / "README.md").read_text()


def test_every_example_is_listed() -> None:
    files = {path.stem for path in examples.FOLDER.glob("*.py")} - {"__init__"}
    assert files == set(examples.NEEDS)


def test_the_readme_quotes_every_example_and_nothing_else() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert sorted(blocks) == sorted(examples.quoted(name) for name in examples.NEEDS)
    for name in examples.NEEDS:
        assert f"tests/examples/{name}.py" in README


@pytest.mark.parametrize("name", examples.NEEDS)
def test_an_example_prints_one_line(name: str) -> None:
    for package in examples.missing(name):
        pytest.skip(f"{package} is not installed")
    printed = examples.run(name, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    expected = "no GPU" if name == "cuda_graph" else "on cpu"
    assert printed.startswith(name)
    assert expected in printed
    assert printed.count("\n") == 1
