"""A checkpoint to a model in memory: read a tensor, fold, round, place; our own folder of the result; export.

Knows layouts, schemes and the model's parts; nothing of scoring.
"""
