"""Benchmarks against PyTorch, JAX and plain MLX. `stages` sets how MLX is loaded."""

import stages as stages
