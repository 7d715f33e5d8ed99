"""From a checkpoint to a model in memory: read a tensor, fold, round, place; lightrm's own folders; export to GPTQ
files.

Knows layouts, schemes and the parts of a model; nothing of scoring.
"""
