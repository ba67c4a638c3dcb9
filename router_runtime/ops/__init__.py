"""The custom ops ``torch.ops.dsv4.*``: schemas, registration and documented functions."""
