"""Spatial Functa (Bauer et al. 2023) on ChestMNIST at 64x64, sized as in the paper's table 5: 2.1e6 parameters.

The latent is a grid of 2x2 vectors of 512, interpolated at each point; every sine layer has shift modulations, also the
first.

Command:   python -m experiments.main --config=configs/baselines/spatial_functa.py --workdir=runs/NAME
           [--data_dir=DIR]; for two cores `:cpu` (PneumoniaMNIST 28x28) and `:cpu_1d` (ECG).
Hardware:  published: one A100 of 40 GB, 10.7 GB used, 250,000 iterations.
Result:    published, test set: PSNR 32.782 dB, MSE 0.587e-3, SSIM 0.915, LPIPS 0.149. Not trained to the end here.
           cpu: test PSNR 27.0 dB after 735 updates, 50 s on one core (measured, mean of 3 seeds).
"""

from configs import base


def get_config(variant=""):
    config = base.compared(variant)
    config.model.update(
        layers=12, width=256, omega_first=20.0, omega_last=20.0, residual=False, modulate_first_layer=True,
        latent_grid=(2, 2),
    )  # fmt: skip
    config.inner.update(steps=3)
    config.train.update(learning_rate=3e-5)
    config.fit.update(steps=3)
    return base.compared_size(config, variant)
