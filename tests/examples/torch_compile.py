"""Call routers inside ``torch.compile``: every layer of the model shares one graph."""

import torch
from torch import Tensor, nn

from router_runtime import Router, RouterConfig, register_router

device = "cuda" if torch.cuda.is_available() else "cpu"
# On a CPU inductor would need a C++ compiler; this back end needs none.
backend = "inductor" if device == "cuda" else "aot_eager"


def make_router() -> Router:
    config = RouterConfig(hidden_size=4096, num_experts=256, top_k=6, routed_scaling_factor=1.5)
    weight = torch.randn(256, 4096, dtype=torch.bfloat16) / 64
    return Router(config, weight=weight, bias=torch.zeros(256), device=device)


# README begins
class Layer(nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router
        register_router(router)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights, _ids = self.router(hidden_states)
        return hidden_states * weights.sum(dim=1, keepdim=True).bfloat16()


model = nn.Sequential(*(Layer(make_router()) for _ in range(3)))
compiled = torch.compile(model, fullgraph=True, backend=backend)
# README ends

hidden_states = torch.randn(8, 4096, dtype=torch.bfloat16, device=device)
difference = (compiled(hidden_states) - model(hidden_states)).abs().max().item()
print(f"torch_compile on {device}: compiled and eager differ by {difference}")
