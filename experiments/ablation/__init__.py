"""The paper's comparisons as grids of runs: `python -m experiments.ablation --help`."""
