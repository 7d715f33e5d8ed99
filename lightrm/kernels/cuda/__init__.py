"""Kernels for NVIDIA cards: `cuda_passes`, `cuda_attention` and `cuda_products` launch the Triton kernels of
`triton_*`.

All kernels also run in Triton's interpreter, where tests compare them with the references, and compile without a card.
"""
