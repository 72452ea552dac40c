"""The recipe for two cores, one modulated layer, beside the compared systems (`base.cpu`).

Command:   python -m experiments.main --config=configs/baselines/one_layer.py --workdir=runs/NAME
           [--data_dir=DIR]; with the sizes of the other systems `:cpu` (PneumoniaMNIST 28x28), `:cpu_1d`
           (ECG) and `:cpu_3d` (a folder of NIfTI volumes at 32x32x32).
Hardware:  2 CPU cores.
Result:    not trained to the end at 64x64; `:cpu` has a test PSNR of 36.4 dB after 240 s (5000 steps, measured).
"""

from configs import base


def get_config(variant=""):
    config = base.compared(variant, "cpu_3d")
    sizes = {"": (512, 512, 16), "cpu": (512, 256, 32), "cpu_1d": (256, 64, 64), "cpu_3d": (512, 64, 8)}
    width, latent_dim, batch_size = sizes[variant]
    return base.cpu(
        config, width=width, latent_dim=latent_dim, steps=2500, batch_size=batch_size,
        selection_ratio=config.train.selection_ratio,
    )  # fmt: skip
