"""MedFuncta beside the compared systems: `chest_xray.py`, and a `:cpu` size that is cut as theirs are.

Command:   python -m experiments.main --config=configs/baselines/medfuncta.py --workdir=runs/NAME
           [--data_dir=DIR]; `:cpu` is PneumoniaMNIST at 28x28 for two cores.
Hardware:  HARD
Result:    RES
"""

from configs import base


def get_config(variant=""):
    config = base.compared(variant)
    config.inner.update(selection_ratio=0.25)
    config.train.update(batch_size=24, schedule="cosine")
    return base.compared_cpu(config) if variant == "cpu" else config
