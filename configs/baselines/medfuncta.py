"""MedFuncta beside the compared systems: `chest_xray.py`, and a `:cpu` size with the same reduction as theirs.

Command:   python -m experiments.main --config=configs/baselines/medfuncta.py --workdir=runs/NAME
           [--data_dir=DIR]; for two cores `:cpu` (PneumoniaMNIST 28x28), `:cpu_1d` (ECG) and
           `:cpu_3d` (a folder of NIfTI volumes at 32x32x32).
Hardware:  published: one A100 of 40 GB, 21.5 GB used at B = 24, 250,000 iterations.
Result:    published, test set: PSNR 40.719 dB, MSE 0.097e-3, SSIM 0.985, LPIPS 0.013. Not trained to the end here.
           cpu: test PSNR 30.1 dB after 484 updates, 50 s on one core (measured, mean of 3 seeds).
"""

from configs import base


def get_config(variant=""):
    config = base.compared(variant, "cpu_3d")
    config.inner.update(selection_ratio=0.25)
    config.train.update(batch_size=24, schedule="cosine")
    return base.compared_size(config, variant)
