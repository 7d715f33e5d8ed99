"""Quantization as arithmetic: what the name of a scheme means, and how numbers become integers. No kernels, no
modules."""
