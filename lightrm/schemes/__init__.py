"""Quantization as arithmetic: what a scheme's name means, and how numbers become integers. No kernels, no modules."""
