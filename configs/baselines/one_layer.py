"""The recipe for two cores, one modulated layer, beside the compared systems (`base.cpu`).

Command:   python -m experiments.main --config=configs/baselines/one_layer.py --workdir=runs/NAME
           [--data_dir=DIR]; with the sizes of the other systems `:cpu` (PneumoniaMNIST 28x28) and `:cpu_1d` (ECG).
Hardware:  2 CPU cores.
Result:    not trained to the end at 64x64; `:cpu` has a test PSNR of 36.4 dB after 240 s (5000 steps, measured).
"""

from configs import base


def get_config(variant=""):
    config = base.compared(variant)
    width, latent_dim, batch_size = {"": (512, 512, 16), "cpu": (512, 256, 32), "cpu_1d": (256, 64, 64)}[variant]
    return base.cpu(config, width=width, latent_dim=latent_dim, steps=2500, batch_size=batch_size)
