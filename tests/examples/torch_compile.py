"""Call routers inside ``torch.compile``: layers that hold a router each share one graph."""

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from router_runtime import Router, RouterConfig

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

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights, _ids = self.router(hidden_states)
        return hidden_states * weights.sum(dim=1, keepdim=True).bfloat16()


layers = [Layer(make_router()) for _ in range(12)]
for layer in layers:
    layer.compile(fullgraph=True, backend=backend)  # one graph for all of them
# README ends

hidden_states = torch.randn(8, 4096, dtype=torch.bfloat16, device=device)
differences = [layer(hidden_states) - layer.forward(hidden_states) for layer in layers]
largest = max(difference.abs().max().item() for difference in differences)
graphs = counters["stats"]["unique_graphs"]
print(f"torch_compile on {device}: {len(layers)} layers, {graphs} graph, off by {largest}")
