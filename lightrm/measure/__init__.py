"""Models run on data to judge them: fidelity under several schemes, sensitivity, a model card's own numbers.

Runs models through `load` and `RewardModel`; `judge` does the arithmetic on their scores.
"""
