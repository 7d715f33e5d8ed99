"""A file of prompts with answers in, the same file with scores out; after a kill at any byte, the job goes on.

Knows `scorer`, `opening` and records; nothing of layers, schemes or kernels.
"""
