"""Tests, and the benchmark. A package, so that no other one called tests is imported instead."""
