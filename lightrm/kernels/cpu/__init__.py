"""Kernels for CPUs, compiled by numba: `cpu_passes` and `cpu_attention` are called, the others hold the loops.

Tensors in, tensors out; fast versions of `kernels.reference` and `kernels.integer`.
"""
