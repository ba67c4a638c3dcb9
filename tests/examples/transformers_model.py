"""Let the prebuilt kernels route a DeepSeek-V4 model of Hugging Face transformers.

Needs the extra ``transformers``. The model is a small one with random weights; only the shape of
its gates is that of DeepSeek-V4 Flash, because a bf16 gate on a GPU needs a kernel of its shape.
"""

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from router_runtime.integrations.transformers import install, uninstall

device = "cuda" if torch.cuda.is_available() else "cpu"
config = DeepseekV4Config(
    vocab_size=256,
    hidden_size=4096,
    n_routed_experts=256,
    num_experts_per_tok=6,
    num_hidden_layers=2,
    num_hash_layers=1,
    moe_intermediate_size=8,
    num_attention_heads=2,
    head_dim=32,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=16,
    index_n_heads=2,
    index_head_dim=16,
    index_topk=8,
    sliding_window=16,
    max_position_embeddings=64,
    compress_ratios=[0, 0],
    partial_rotary_factor=0.5,
    pad_token_id=0,
)
torch.manual_seed(0)
with torch.device(device):
    model = DeepseekV4ForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    tokens = torch.randint(256, (1, 12))

# README begins
names = install(model)  # after the model is on its device and in its dtype
logits = model(tokens).logits
# README ends

uninstall(model)
print(f"transformers_model on {device}: {', '.join(names)} served, logits {list(logits.shape)}")
