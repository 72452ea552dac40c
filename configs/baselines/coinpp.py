"""COIN++ (Dupont et al. 2022) on ChestMNIST at 64x64, sized as in the paper's table 5: 11.5e6 parameters.

A plain SIREN with shift modulations of every sine layer, also the first.

Command:   python -m experiments.main --config=configs/baselines/coinpp.py --workdir=runs/NAME
           [--data_dir=DIR]; for two cores `:cpu` (PneumoniaMNIST 28x28) and `:cpu_1d` (ECG).
Hardware:  published: one A100 of 40 GB, 15.7 GB used, 250,000 iterations.
Result:    published, test set: PSNR 34.566 dB, MSE 0.379e-3, SSIM 0.940, LPIPS 0.056. Not trained to the end here.
           cpu: test PSNR 26.1 dB after 688 updates, 50 s on one core (measured, mean of 3 seeds).
"""

from configs import base


def get_config(variant=""):
    config = base.compared(variant)
    config.model.update(
        layers=10, width=512, omega_first=50.0, omega_last=50.0, residual=False, modulate_first_layer=True
    )
    config.inner.update(steps=3)
    config.fit.update(steps=10)
    return base.compared_size(config, variant)
