"""Kernels for NVIDIA's cards: `cuda_passes` and `cuda_products` launch Triton's kernels, one family a file.

All of them run in Triton's interpreter too, where their twins prove them, and compile without a card.
"""
