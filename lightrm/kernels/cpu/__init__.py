"""Kernels for CPUs, compiled by numba: `cpu_passes` is the door, the others are its loops.

Tensors in, tensors out; twins of `kernels.reference` and `kernels.integer`.
"""
