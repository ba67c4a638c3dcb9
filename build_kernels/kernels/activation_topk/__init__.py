"""Selection and weights of routed experts from given logits (CUDA C++)."""
