"""Route a batch of tokens through one gate, eagerly. On a GPU if there is one, else on the CPU."""

# README begins
import torch

from router_runtime import Router, RouterConfig

device = "cuda" if torch.cuda.is_available() else "cpu"
config = RouterConfig(hidden_size=4096, num_experts=256, top_k=6, routed_scaling_factor=1.5)
weight = torch.randn(256, 4096, dtype=torch.bfloat16) / 64
bias = torch.zeros(256)
router = Router(config, weight=weight, bias=bias, device=device)

hidden_states = torch.randn(8, 4096, dtype=torch.bfloat16, device=device)
weights, ids = router(hidden_states)  # fp32 [8, 6] and int32 [8, 6], the best expert first
# README ends

chosen = ", ".join(f"{i} ({w:.3f})" for i, w in zip(ids[0].tolist(), weights[0], strict=True))
print(f"eager on {device}: experts and weights of token 0: {chosen}")
