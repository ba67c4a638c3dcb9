"""Configurations and gate tensors of released models."""
