"""The forward pass that reads like the paper: decoder, linear layers, weights as held, head, positions.

Knows no files and no text; how a weight is rounded is known to `weights` alone.
"""
