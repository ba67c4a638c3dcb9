"""Routers: what they compute, their weights, and their back ends for CPU and CUDA."""
