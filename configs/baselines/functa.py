"""Functa (Dupont et al. 2022) on ChestMNIST at 64x64, sized as in the paper's table 5: 17.1e6 parameters.

A plain SIREN with shift modulations of every sine layer but the first. One linear map of the latent a layer equals one
map for all layers.

Command:   python -m experiments.main --config=configs/baselines/functa.py --workdir=runs/NAME
           [--data_dir=DIR]; for two cores `:cpu` (PneumoniaMNIST 28x28) and `:cpu_1d` (ECG).
Hardware:  published: one A100 of 40 GB, 25.1 GB used, 250,000 iterations.
Result:    published, test set: PSNR 34.304 dB, MSE 0.403e-3, SSIM 0.940, LPIPS 0.059. Not trained to the end here.
           cpu: test PSNR 22.0 dB after 403 updates, 50 s on one core (measured, mean of 3 seeds).
"""

from configs import base


def get_config(variant=""):
    config = base.compared(variant)
    config.model.update(layers=15, width=512, omega_first=30.0, omega_last=30.0, residual=False)
    config.inner.update(steps=3)
    config.fit.update(steps=3)
    return base.compared_size(config, variant)
