"""MedFuncta's network with first-order meta-gradients (Finn et al. 2017), 10 dB below second order in the paper.

Command:   python -m experiments.main --config=configs/baselines/first_order_maml.py --workdir=runs/NAME
           [--data_dir=DIR]; for two cores `:cpu` (PneumoniaMNIST 28x28) and `:cpu_1d` (ECG).
Hardware:  as `medfuncta.py`, less memory: no second derivatives.
Result:    the paper reports more than 10 dB below second order, and instability. Not trained to the end here.
           cpu: test PSNR 24.9 dB after 2291 updates, 50 s on one core (measured, mean of 3 seeds).
"""

from configs import base


def get_config(variant=""):
    config = base.compared(variant)
    config.inner.update(first_order=True)
    return base.compared_size(config, variant)
