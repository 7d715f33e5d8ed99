"""Every figure in the README comes from a script here and a result file under `results/`."""
