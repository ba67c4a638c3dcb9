"""GPU tests run against what this machine can load, with evidence made by this very run.

The artifacts are copied to a temporary folder and verified there with ``record``, so that every
entry that passes the oracle suite is usable, the checkout stays untouched, and nothing depends on
evidence recorded elsewhere.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from router_runtime.device.artifact_store import find_artifacts
from router_runtime.errors import RouterRuntimeError
from router_runtime.format.advice import ARTIFACTS_VARIABLE
from router_runtime.format.manifest import MANIFEST_NAME, loads
from router_runtime.format.scoring import CONSTANTS as SCORING
from router_runtime.format.scoring import SQRT_SOFTPLUS, scoring_constants
from router_runtime.format.target import Target

HERE = Path(__file__).parent

if importlib.util.find_spec("torch") is None:
    # The builder's environment has nothing that these tests could import.
    collect_ignore_glob = ["test_*.py"]


def _reason_to_skip() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return f"no GPU that torch {torch.__version__} can use"
    try:
        folder = find_artifacts()
    except RouterRuntimeError as error:
        return str(error)
    capability = torch.cuda.get_device_capability()
    entries = loads((folder / MANIFEST_NAME).read_bytes()).entries
    if not any(Target.parse(entry.target).runs_on(*capability) for entry in entries):
        return f"no entry of {folder} is built for compute capability {capability}"
    return None


def pytest_collection_modifyitems(items):
    here = [item for item in items if HERE in item.path.parents]
    if not here:
        return
    # The oracle suite is judged first, so that a run that is cut off has told its result.
    items.sort(key=lambda item: item.path != HERE / "test_verify_gpu.py")
    reason = _reason_to_skip()
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@dataclass(frozen=True)
class Verification:
    passed: bool
    lines: tuple[str, ...]
    folder: Path


@pytest.fixture(scope="session", autouse=True)
def verification(tmp_path_factory):
    """The oracle suite on every entry that loads here; its folder serves all other tests."""
    from router_runtime.verification import verify

    source, folder = find_artifacts(), tmp_path_factory.mktemp("artifacts")
    shutil.copy(source / MANIFEST_NAME, folder)
    for cubin in source.glob("*.cubin"):
        shutil.copy(cubin, folder)
    lines: list[str] = []
    passed = verify.run(folder, True, lines.append).passed
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ARTIFACTS_VARIABLE, str(folder))
        yield Verification(passed, tuple(lines), folder)


def _constants(folder, kernel):
    """What a Router requests of every model for which this machine can run that kernel, sorted."""
    import torch

    capability = torch.cuda.get_device_capability()
    names = ("HIDDEN", "EXPERTS", "TOP_K", *SCORING)
    found = {
        tuple(entry.constants[name] for name in names)
        for entry in loads((folder / MANIFEST_NAME).read_bytes()).entries
        if entry.kernel == kernel and Target.parse(entry.target).runs_on(*capability)
    }
    return [dict(zip(names, values, strict=True)) for values in sorted(found)]


def _models(folder, kernel):
    """(hidden, experts, top_k) of those that score by sqrtsoftplus, with the temperature 1."""
    plain = scoring_constants(SQRT_SOFTPLUS, 1.0)
    return [
        tuple(int(each[name]) for name in ("HIDDEN", "EXPERTS", "TOP_K"))
        for each in _constants(folder, kernel)
        if plain.items() <= each.items()
    ]


@pytest.fixture(scope="session")
def all_models(verification):
    """The constants of every dense model that this machine can serve, however it scores."""
    return _constants(verification.folder, "dense_router_decode")


@pytest.fixture(scope="session")
def models(verification):
    """The shapes of every dense router that this machine can serve."""
    return _models(verification.folder, "dense_router_decode")


@pytest.fixture(scope="session")
def gate_models(verification):
    """The same for mode hash_gate."""
    return _models(verification.folder, "hash_gate")


@pytest.fixture(scope="session")
def make_router(models):
    """Routers of the first model (or another), with weights drawn from a seed."""
    import torch

    from router_runtime import Router, RouterConfig
    from router_runtime.verification.prng import Random

    def make(seed=1, model=None, scale=1.5, image_bias=None, **options):
        hidden, experts, top_k = model or models[0]
        random = Random(seed)
        weight = (random.normal(experts, hidden) * 2.0**-6).bfloat16()
        bias = random.normal(experts) * 0.125
        config = RouterConfig(hidden, experts, top_k, scale, **options)
        tensors = {"weight": weight, "bias": bias, "image_bias": image_bias}
        return Router(config, **tensors, device=torch.device("cuda"))

    return make


@pytest.fixture
def draw():
    """Hidden states on the GPU, drawn from a seed."""
    from router_runtime.verification.prng import Random

    def states(tokens, hidden, seed=2):
        return Random(seed).normal(tokens, hidden).bfloat16().cuda()

    return states


@pytest.fixture
def same():
    """Asserts that two results of a router are the same bits."""
    import torch

    def check(found, expected):
        torch.cuda.synchronize()
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0].view(torch.int32), expected[0].view(torch.int32))

    return check
