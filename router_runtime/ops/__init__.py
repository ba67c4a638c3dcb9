"""The custom ops ``torch.ops.dsv4.*``: schemas and registration."""
