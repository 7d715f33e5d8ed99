"""Every figure in the README and in docs/ comes from a script here and a result file under `results/`."""
