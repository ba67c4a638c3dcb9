"""Routers from checkpoints: both naming schemes, mappings and files, and every refusal by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from router_runtime import spec
from router_runtime.checkpoint.configs import config_fields
from router_runtime.checkpoint.tensors import gate_tensors
from router_runtime.errors import InputError
from router_runtime.routing.config import RouterConfig
from router_runtime.routing.router import Router

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

H, E, K, V, LAYERS, HASHED = 64, 16, 4, 30, 6, 2
CONFIG = RouterConfig(H, E, K, 1.5)
SIZES = {"hidden_size": H, "num_experts": E, "top_k": K, "vocab_size": V}

#: As released: what the published config.json says of routing, on a small model.
RELEASED = {
    "model_type": "deepseek_v4",
    "hidden_size": H,
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "num_hidden_layers": LAYERS,
    "num_hash_layers": HASHED,
    "vocab_size": V,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
}

SCHEMES = {
    "huggingface": ("model.layers.{}.mlp.gate", "e_score_correction_bias"),
    "original": ("layers.{}.ffn.gate", "bias"),
}


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> tuple[str, str]:
    return SCHEMES[request.param]


def checkpoint(scheme: tuple[str, str]) -> dict[str, Tensor]:
    """Every gate of the small model, and other tensors around them."""
    gate, bias = scheme
    tensors = {"embed.weight": torch.zeros(V, H)}
    for layer in range(LAYERS):
        generator = torch.Generator().manual_seed(layer)
        name = gate.format(layer)
        tensors[f"{name}.weight"] = torch.randn(E, H, generator=generator).bfloat16()
        if layer < HASHED:
            table = torch.randint(0, E, (V, K), generator=generator)
            tensors[f"{name}.tid2eid"] = table
        else:
            tensors[f"{name}.{bias}"] = torch.randn(E, generator=generator)
        experts = name.replace("gate", "experts")
        tensors[f"{experts}.0.gate_proj.weight"] = torch.zeros(8, H)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], files: int) -> Path:
    """A checkpoint's folder, its tensors spread over ``files`` files, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    where = {name: f"model-{index % files:05}.safetensors" for index, name in enumerate(names)}
    for file in set(where.values()):
        own = {name: tensors[name] for name in names if where[name] == file}
        safetensors.save_file(own, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(RELEASED))
    return folder


def hidden(tokens: int = 5) -> Tensor:
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(99)).bfloat16()


# --- configurations ---


def test_a_released_configuration() -> None:
    assert RouterConfig.from_hf(RELEASED) == CONFIG
    assert RouterConfig.from_hf(RELEASED, layer=HASHED) == CONFIG
    assert RouterConfig.from_hf(RELEASED | {"norm_topk_prob": False}).renormalize is False
    for layer in range(LAYERS):
        fields = config_fields(RELEASED, layer)
        assert fields["mode"] == ("hash_gate" if layer < HASHED else "dense")
        assert fields.get("vocab_size") == (V if layer < HASHED else None)


def test_hash_layers_have_their_own_mode() -> None:
    config = RouterConfig.from_hf(RELEASED, layer=0)
    assert config == RouterConfig(H, E, K, 1.5, mode="hash_gate", vocab_size=V)


def test_transformers_own_configuration(tmp_path: Path) -> None:
    """The object, its dict, and the files that it writes say the same."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    released = {name: value for name, value in RELEASED.items() if name != "model_type"}
    config = transformers.DeepseekV4Config(**released)
    config.save_pretrained(tmp_path)
    for source in (config, config.to_dict(), tmp_path, str(tmp_path / "config.json")):
        for layer in range(LAYERS):
            assert config_fields(source, layer) == config_fields(RELEASED, layer)
    kinds = ["moe", "hash_moe", *["moe"] * (LAYERS - 2)]
    config = transformers.DeepseekV4Config(**released, mlp_layer_types=kinds)
    modes = [config_fields(config, layer)["mode"] for layer in range(LAYERS)]
    assert modes == ["dense", "hash_gate", *["dense"] * (LAYERS - 2)]


def test_a_model_with_a_vision_tower() -> None:
    """V4.1 nests the language model's entries, and has no hash layers."""
    inner = {name: value for name, value in RELEASED.items() if name != "num_hash_layers"}
    inner |= {"model_type": "deepseek_v41", "gate_temp": 1.0}
    outer = {
        "model_type": "deepseek_v41",
        "text_config": inner,
        "vision_config": {"hidden_size": 8},
    }
    assert RouterConfig.from_hf(outer, layer=0) == CONFIG


def test_a_model_that_scores_by_a_sigmoid() -> None:
    """Without hash layers, with the entries of such configurations."""
    config = {
        "model_type": "kimi_k2",
        "hidden_size": 7168,
        "n_routed_experts": 384,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.827,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "vocab_size": 163840,
    }
    expected = RouterConfig(7168, 384, 8, 2.827, scoring="sigmoid")
    assert RouterConfig.from_hf(config, layer=1) == expected
    assert RouterConfig.from_hf(config) == expected
    kinds = ["dense", *["sparse"] * 60]
    assert RouterConfig.from_hf(config | {"mlp_layer_types": kinds}, layer=1) == expected
    with pytest.raises(InputError, match="layer 0: expected a layer with a router"):
        RouterConfig.from_hf(config, layer=0)
    unscaled = RouterConfig.from_hf(config | {"routed_scaling_factor": None}, layer=1)
    assert unscaled == RouterConfig(7168, 384, 8, 1.0, scoring="sigmoid")
    del config["routed_scaling_factor"]
    with pytest.raises(InputError, match="expected the entry routed_scaling_factor"):
        RouterConfig.from_hf(config, layer=1)


def test_a_gate_temperature() -> None:
    found = RouterConfig.from_hf(RELEASED | {"gate_temp": 2.0}, layer=3)
    assert (found.scoring, found.gate_temperature) == ("sqrtsoftplus", 2.0)


@pytest.mark.parametrize(
    ("change", "layer", "message"),
    [
        ({"scoring_func": "softmax"}, 3, "scoring_func .*sqrtsoftplus or sigmoid, found softmax"),
        ({"topk_method": "group_limited_greedy"}, 3, "topk_method"),
        ({"n_group": 8}, 3, "n_group of the configuration: expected 1: no kernel .* found 8"),
        ({"scoring_func": "sigmoid", "n_group": 8}, 3, "n_group of the configuration: expected 1"),
        ({"scoring_func": "sigmoid", "topk_group": 4}, 3, "topk_group of the configuration"),
        ({"topk_group": 4}, None, "topk_group"),
        ({"gate_temp": 0.0}, 3, "gate_temperature: expected a number from"),
        ({"gate_temp": "warm"}, 3, "gate_temperature"),
        ({"hidden_size": None}, 3, "expected the entry hidden_size, found .*vocab_size"),
        ({"n_routed_experts": None}, 3, "n_routed_experts or num_local_experts"),
        ({"num_hash_layers": None}, 3, "the entry mlp_layer_types or num_hash_layers"),
        ({"mlp_layer_types": ["moe"] * 3}, 3, r"mlp_layer_types\[3\].*found 'nothing'"),
        ({"mlp_layer_types": ["dense"] * 6}, 3, r"mlp_layer_types\[3\].*found 'dense'"),
        ({"first_k_dense_replace": 4}, 3, "layer 3: expected a layer with a router"),
        ({}, LAYERS, "layer: expected an integer from 0 to 5, found 6"),
        ({}, -1, "layer: expected an integer"),
        ({}, True, "layer of RouterConfig.from_hf: expected int or None, found bool True"),
        ({"num_experts_per_tok": 40}, 3, "top_k: expected an integer from 1 to 16"),
    ],
)
def test_refused_configurations(change: dict[str, Any], layer: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RouterConfig.from_hf(RELEASED | change, layer=layer)


def test_configurations_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    for config in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(InputError, match="configuration: expected readable JSON at"):
            RouterConfig.from_hf(config)
    with pytest.raises(InputError, match=r"expected a transformers configuration.*found int"):
        RouterConfig.from_hf(7)


# --- tensors ---


@pytest.mark.parametrize("files", [0, 1, 3])
def test_dense_layers(scheme: tuple[str, str], files: int, tmp_path: Path) -> None:
    """From memory, from one file and from several: the router of exactly that layer."""
    tensors = checkpoint(scheme)
    source: Any = write(tmp_path, tensors, files) if files else tensors
    for layer in range(HASHED, LAYERS):
        router = Router.from_state_dict(CONFIG, source, layer, device="cpu")
        name = scheme[0].format(layer)
        expected = spec.dense_router(
            hidden(), tensors[f"{name}.weight"], tensors[f"{name}.{scheme[1]}"], K, 1.5
        )
        for found, wanted in zip(router(hidden()), expected, strict=True):
            assert torch.equal(found, wanted)
    if files == 1:
        (file,) = tmp_path.glob("*.safetensors")
        Router.from_state_dict(CONFIG, file, HASHED, device="cpu")
        (tmp_path / "model.safetensors.index.json").unlink()
        Router.from_state_dict(CONFIG, str(tmp_path), HASHED, device="cpu")


@pytest.mark.parametrize("files", [0, 2])
@pytest.mark.parametrize("mode", ["hash", "hash_gate"])
def test_hash_layers(scheme: tuple[str, str], files: int, mode: str, tmp_path: Path) -> None:
    tensors = checkpoint(scheme)
    source: Any = write(tmp_path, tensors, files) if files else tensors
    found = gate_tensors(mode, SIZES, source, 1)
    name = scheme[0].format(1)
    wanted = {"table": tensors[f"{name}.tid2eid"], "weight": tensors[f"{name}.weight"]}
    assert set(found) == ({"table"} if mode == "hash" else {"table", "weight"})
    assert all(torch.equal(found[role], wanted[role]) for role in found)


def test_a_hash_router_routes_by_its_table(scheme: tuple[str, str]) -> None:
    tensors = checkpoint(scheme)
    config = RouterConfig(H, E, K, 1.5, mode="hash", vocab_size=V)
    router = Router.from_state_dict(config, tensors, 0, device="cpu")
    table = tensors[f"{scheme[0].format(0)}.tid2eid"]
    assert torch.equal(router(torch.arange(V))[1].long(), table)


def test_the_bias_of_image_tokens() -> None:
    """Vision checkpoints have it in every layer; both of its names are known."""
    for gate, leaf in (
        ("layers.{}.ffn.gate", "bias_vl"),
        ("model.layers.{}.mlp.gate", "e_score_correction_bias_vl"),
    ):
        scheme = next(it for it in SCHEMES.values() if it[0] == gate)
        tensors = checkpoint(scheme)
        for layer, mode in ((0, "hash_gate"), (3, "dense"), (0, "hash")):
            image = torch.randn(E)
            tensors[f"{gate.format(layer)}.{leaf}"] = image
            found = gate_tensors(mode, SIZES, tensors, layer)
            if mode == "hash":
                assert set(found) == {"table"}
            else:
                assert torch.equal(found["image_bias"], image)


def test_image_tokens_of_a_dense_layer() -> None:
    tensors = checkpoint(SCHEMES["original"])
    name = "layers.3.ffn.gate"
    image = torch.zeros(E).index_fill_(0, torch.tensor([7]), 50.0)
    router = Router.from_state_dict(CONFIG, tensors | {f"{name}.bias_vl": image}, 3, device="cpu")
    mask = torch.tensor([True, False, True, False, False])
    _, ids = router(hidden(), image_mask=mask)
    assert (ids[mask][:, 0] == 7).all()
    assert torch.equal(
        ids[~mask], Router.from_state_dict(CONFIG, tensors, 3, device="cpu")(hidden())[1][~mask]
    )


def test_only_the_gates_tensors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from router_runtime.checkpoint import tensors as module

    folder = write(tmp_path, checkpoint(SCHEMES["original"]), 3)
    read: list[str] = []
    safe_open = module._safe_open()

    class Spy:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._opened = safe_open(*arguments, **options)

        def __enter__(self) -> Any:
            self._opened.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._opened.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._opened, name)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            tensor: Tensor = self._opened.get_tensor(name)
            return tensor

    monkeypatch.setattr(module, "_safe_open", lambda: Spy)
    Router.from_state_dict(CONFIG, folder, 4, device="cpu")
    assert sorted(read) == ["layers.4.ffn.gate.bias", "layers.4.ffn.gate.weight"]
    # A wrong shape is seen before anything is read.
    read.clear()
    with pytest.raises(InputError, match=r"expected shape \[8, 64\], found shape \[16, 64\]"):
        Router.from_state_dict(RouterConfig(H, 8, K, 1.5), folder, 4, device="cpu")
    assert not read


def test_a_gate_by_its_whole_name() -> None:
    tensors = {
        "mtp.0.ffn.gate.weight": torch.ones(E, H).bfloat16(),
        "mtp.0.ffn.gate.bias": torch.zeros(E),
        "drafter.gate.weight": torch.ones(E, H).bfloat16(),
        "drafter.gate.e_score_correction_bias": torch.zeros(E),
    }
    for gate in ("mtp.0.ffn.gate", "drafter.gate"):
        Router.from_state_dict(CONFIG, tensors, gate, device="cpu")
    with pytest.raises(InputError, match=r"gate of layer 0 .*similar names: \['.*gate.weight'"):
        Router.from_state_dict(CONFIG, tensors, 0, device="cpu")


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    assert name in tensors
    return {key: value for key, value in tensors.items() if key != name}


def test_refused_tensors(scheme: tuple[str, str]) -> None:
    tensors = checkpoint(scheme)
    gate = scheme[0].format(3)
    weight, bias = f"{gate}.weight", f"{gate}.{scheme[1]}"
    other = {
        "layers.3.ffn.gate.weight": tensors[weight],
        "model.layers.3.mlp.gate.weight": tensors[weight],
    }
    cases: list[tuple[Any, int, str]] = [
        (without(tensors, weight), 3, f"weight of a dense router: expected {weight} in"),
        (without(tensors, bias), 3, f"expected {bias} in .* the gate has .'{weight}'"),
        (tensors, 9, r"gate of layer 9 in the given mapping: .*similar names: \['.*gate.weight'"),
        (tensors, 0, r"found .*tid2eid: it is a hash layer; use RouterConfig.from_hf.*layer=0"),
        (tensors | {weight: tensors[weight].T}, 3, r"weight .*shape \[16, 64\], found .*64, 16\]"),
        (tensors | {bias: tensors[bias][:-1]}, 3, r"expected shape \[16\], found shape \[15\]"),
        (tensors | {weight: tensors[weight].to("meta")}, 3, "found a meta tensor"),
        (tensors | {weight: [1]}, 3, "found list"),
        (tensors | {weight: tensors[weight].to(torch.float8_e4m3fn)}, 3, "found torch.float8"),
        (tensors | other, 3, r"gate of layer 3 .*expected one of that name, found 2: \["),
        ({}, 3, "gate of layer 3"),
    ]
    for given, layer, message in cases:
        with pytest.raises(InputError, match=message):
            Router.from_state_dict(CONFIG, given, layer, device="cpu")
    hashed = scheme[0].format(0)
    for mode in ("hash", "hash_gate"):
        with pytest.raises(InputError, match=f"table of a {mode} router: .*{hashed}.tid2eid"):
            gate_tensors(mode, SIZES, without(tensors, f"{hashed}.tid2eid"), 0)
    short = SIZES | {"vocab_size": V + 1}
    with pytest.raises(InputError, match=r"tid2eid .*expected shape \[31, 4\]"):
        gate_tensors("hash", short, tensors, 0)


def test_two_names_of_one_tensor() -> None:
    tensors = {"g.weight": torch.ones(E, H).bfloat16(), "g.bias": torch.zeros(E)}
    both = tensors | {"g.e_score_correction_bias": torch.ones(E)}
    with pytest.raises(InputError, match=r"bias of gate g .*found 2: \['g.e_score.*', 'g.bias'\]"):
        Router.from_state_dict(CONFIG, both, "g", device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_float_types_only_if_exact(dtype: torch.dtype) -> None:
    tensors = checkpoint(SCHEMES["original"])
    name = "layers.3.ffn.gate"
    expected = Router.from_state_dict(CONFIG, tensors, 3, device="cpu")(hidden())
    weight = tensors[f"{name}.weight"]
    wider = weight.to(dtype)
    if torch.equal(wider.bfloat16(), weight):  # fp16 flushes the smallest of them
        found = Router.from_state_dict(CONFIG, tensors | {f"{name}.weight": wider}, 3, device="cpu")
        assert all(torch.equal(*pair) for pair in zip(found(hidden()), expected, strict=True))
    wider = wider.clone()
    wider[3, 5] = 1.001
    with pytest.raises(InputError, match=r"1 of 1024 values .*first at \[3, 5\]: 1\.00"):
        Router.from_state_dict(CONFIG, tensors | {f"{name}.weight": wider}, 3, device="cpu")


def test_biases_of_other_types() -> None:
    tensors = checkpoint(SCHEMES["original"])
    name = "layers.3.ffn.gate.bias"
    coarse = tensors[name].bfloat16()
    Router.from_state_dict(CONFIG, tensors | {name: coarse}, 3, device="cpu")
    fine = tensors[name].double() + 1e-12
    with pytest.raises(InputError, match=r"bias .*expected torch.float32, or torch.float64"):
        Router.from_state_dict(CONFIG, tensors | {name: fine}, 3, device="cpu")


def test_values_that_are_not_finite_stay_the_routers_matter() -> None:
    tensors = checkpoint(SCHEMES["original"])
    name = "layers.3.ffn.gate.weight"
    wide = tensors[name].float()
    wide[0, 0] = torch.nan
    with pytest.raises(InputError, match="weight: expected finite values"):
        Router.from_state_dict(CONFIG, tensors | {name: wide}, 3, device="cpu")


def test_damaged_checkpoints(tmp_path: Path) -> None:
    folder = write(tmp_path / "good", checkpoint(SCHEMES["original"]), 2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())

    def refused(message: str, source: Path = folder) -> None:
        with pytest.raises(InputError, match=message):
            Router.from_state_dict(CONFIG, source, 3, device="cpu")

    refused("checkpoint: expected a safetensors file", tmp_path)
    refused("checkpoint: expected a safetensors file", tmp_path / "absent")
    for bad in (
        "[]",
        "{}",
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {"a": 1}}',
    ):
        index.write_text(bad)
        refused("expected a weight_map of tensor names to plain file names")
    index.write_text("{")
    refused("index of the checkpoint: expected readable JSON")
    # The index names a file that lacks the tensor, or a file that is not there.
    name = "layers.3.ffn.gate.weight"
    own = content["weight_map"][name]
    (other,) = {*content["weight_map"].values()} - {own}
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: other}}))
    refused(f"{name} in .*{other}, found none: the index and the file disagree")
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: "gone.safetensors"}}))
    refused("checkpoint file .*gone.safetensors: expected a whole safetensors file")
    index.write_text(json.dumps(content))
    whole = (folder / own).read_bytes()
    (folder / own).write_bytes(whole[: len(whole) // 2])
    refused(f"checkpoint file .*{own}: expected a whole safetensors file")
    # Two files with one tensor and no index to choose.
    (folder / own).write_bytes(whole)
    (folder / "copy.safetensors").write_bytes(whole)
    index.unlink()
    refused(r"expected one of that name, found 2: \[.*copy.safetensors")


def test_files_without_the_package() -> None:
    """Only files need safetensors; it is the caller's."""
    root = Path(__file__).resolve().parents[2]
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "from router_runtime.checkpoint.tensors import gate_tensors\n"
        "try: gate_tensors('dense', {}, '/nowhere', 0)\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert re.search(
        r"expected the package safetensors.*pip install 'safetensors>=0.4'", done.stdout
    ), done.stderr
