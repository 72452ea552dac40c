"""RetinaMNIST at 64x64, the paper's settings (MedFuncta, MIDL 2026); `:128` and `:224` take its table 2.

Command:   python -m experiments.main --config=configs/fundus.py --workdir=runs/NAME [--data_dir=DIR]
           The file is downloaded (MD5 checked) unless DIR holds it. Variants: :28, :128, :224, and :cpu for two cores.
Hardware:  published: one A100 of 40 GB, 21.5 GB used at B = 24 and 64x64, 250,000 iterations.
Result:    published, test set: PSNR 43.151 dB, MSE 0.054e-3, SSIM 0.978, LPIPS 0.006.
           Not trained to the end here.
"""

from configs import base


def get_config(variant=""):
    return base.medmnist("retinamnist", variant)
