"""Build routers straight from a checkpoint's files: config.json and safetensors.

Reading the files needs the extra ``safetensors``. The checkpoint here is a made one: two layers
that hold a gate and nothing else, one of them a hash layer.
"""

import json
import tempfile
from pathlib import Path

import safetensors.torch
import torch

from router_runtime import Router, RouterConfig

HIDDEN, EXPERTS, TOP_K, VOCAB = 4096, 256, 6, 1000


def write_checkpoint(folder: Path) -> None:
    """Layer 0 finds its experts by token id, layer 1 by score."""
    config = {
        "model_type": "deepseek_v4",
        "hidden_size": HIDDEN,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "routed_scaling_factor": 1.5,
        "num_hidden_layers": 2,
        "num_hash_layers": 1,
        "vocab_size": VOCAB,
    }
    (folder / "config.json").write_text(json.dumps(config))
    table = torch.rand(VOCAB, EXPERTS).topk(TOP_K).indices  # of each token: six distinct experts
    tensors = {
        "model.layers.0.mlp.gate.weight": torch.randn(EXPERTS, HIDDEN).bfloat16() / 64,
        "model.layers.0.mlp.gate.tid2eid": table,
        "model.layers.1.mlp.gate.weight": torch.randn(EXPERTS, HIDDEN).bfloat16() / 64,
        "model.layers.1.mlp.gate.e_score_correction_bias": torch.zeros(EXPERTS),
    }
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


device = "cuda" if torch.cuda.is_available() else "cpu"
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_checkpoint(folder)
    # README begins
    routers = []
    for layer in (0, 1):
        config = RouterConfig.from_hf(folder, layer=layer)  # the folder with config.json
        routers.append(Router.from_state_dict(config, folder, layer, device=device))
    # README ends

hidden_states = torch.randn(8, HIDDEN, dtype=torch.bfloat16, device=device)
token_ids = torch.arange(8, device=device)
_, hashed = routers[0](hidden_states, token_ids)
_, scored = routers[1](hidden_states)
print(
    f"checkpoint on {device}: token 0 goes to {hashed[0].tolist()} in layer 0 "
    f"({routers[0].config.mode}), to {scored[0].tolist()} in layer 1 ({routers[1].config.mode})"
)
