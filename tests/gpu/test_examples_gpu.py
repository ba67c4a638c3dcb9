"""The examples of README.md on a GPU, with the evidence that this run has made."""

from __future__ import annotations

import pytest

from tests import examples


@pytest.mark.parametrize("name", examples.NEEDS)
def test_an_example_runs_on_the_gpu(name):
    for package in examples.missing(name):
        pytest.skip(f"{package} is not installed")
    if name == "torch_compile":
        pytest.importorskip("triton", reason="inductor needs triton")
    printed = examples.run(name)
    assert printed.startswith(name)
    assert printed.count("\n") == 1
    if name == "cuda_graph":
        assert "True" in printed
    else:
        assert "on cuda" in printed
