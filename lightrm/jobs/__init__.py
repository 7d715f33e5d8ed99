"""A file of prompts with answers in, the same with scores out: killed at any byte, it goes on from there.

Knows the front door (`scorer`, `opening`) and records; nothing of layers, schemes or kernels.
"""
