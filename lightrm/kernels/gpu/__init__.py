"""Triton's kernels, one family a file; `kernels.cuda` is the door that launches them.

All of them run in Triton's interpreter too, where their twins prove them, and compile without a card.
"""
