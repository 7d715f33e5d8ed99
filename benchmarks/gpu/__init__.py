"""The suite for a machine with a card: `python -m benchmarks.gpu`."""
