"""Models run on data to judge them: fidelity under several schemes, sensitivity, a model card's own numbers.

Runs models through the front door and hands their scores to `judge`, which does the arithmetic.
"""
