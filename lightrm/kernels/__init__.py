"""Implementations behind `lightrm.kernels.passes`: tensors in, tensors out, no modules, no configs.

`reference` is the truth, in plain PyTorch; the others are faster and are tested against it.
"""
