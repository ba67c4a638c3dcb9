"""Signatures that a process can require."""
