"""Kernels behind `lightrm.kernels.passes` and `products`: tensors in, tensors out. No modules, no configs.

`reference` is the truth, in plain PyTorch; the others are faster and are tested against it.
"""
