"""Capture one router call in a CUDA graph and replay it for other tokens. Needs a GPU."""

import torch

from router_runtime import Router, RouterConfig


def main() -> None:
    if not torch.cuda.is_available():
        print("cuda_graph: nothing to do, torch finds no GPU")
        return
    config = RouterConfig(hidden_size=4096, num_experts=256, top_k=6, routed_scaling_factor=1.5)
    weight = torch.randn(256, 4096, dtype=torch.bfloat16) / 64
    router = Router(config, weight=weight, bias=torch.zeros(256), device="cuda")
    tokens = torch.randn(8, 4096, dtype=torch.bfloat16, device="cuda")
    # README begins
    router.warmup()
    hidden_states = torch.zeros_like(tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = router(hidden_states)

    hidden_states.copy_(tokens)
    graph.replay()  # weights and ids are now those of the new tokens
    # README ends
    expected_weights, expected_ids = router(tokens)
    same = torch.equal(weights, expected_weights) and torch.equal(ids, expected_ids)
    print(f"cuda_graph: the replay gives the bits of the eager call: {same}")


main()
