"""The forward pass, which reads like the paper: decoder, linear layers, head, positions, packed tokens.

Knows no files and no text; a weight's format is known to `kernels` alone.
"""
