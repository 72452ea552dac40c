"""COIN++ on patches of 32x32, ChestMNIST at 64x64, sized as in the paper's table 5: 4.5e6 parameters.

Each patch has a latent of 512, each image 2x2 patches; training is on random patches.

Command:   python -m experiments.main --config=configs/baselines/coinpp_patched.py --workdir=runs/NAME
           [--data_dir=DIR]; for two cores `:cpu` (PneumoniaMNIST 28x28) and `:cpu_1d` (ECG).
Hardware:  published: one A100 of 40 GB, 4.3 GB used, 250,000 iterations.
Result:    published, test set: PSNR 38.477 dB, MSE 0.153e-3, SSIM 0.976, LPIPS 0.014. Not trained to the end here.
           cpu: test PSNR 29.5 dB after 4895 updates, 50 s on one core (measured, mean of 3 seeds).
"""

from configs import base


def get_config(variant=""):
    config = base.compared(variant)
    config.model.update(
        layers=10, width=512, omega_first=50.0, omega_last=50.0, residual=False, modulate_first_layer=True,
        latent_grid=(2, 2), latent_interpolation="nearest",
    )  # fmt: skip
    config.train.method = "patches"
    config.inner.update(steps=3)
    config.fit.update(steps=10)
    return base.compared_size(config, variant)
