"""ChestMNIST at 64x64 with the settings of the paper (MedFuncta, MIDL 2026, table 2).

Command:   python -m experiments.main --config=configs/chest_xray.py --workdir=runs/chest [--data_dir=DIR]
           Without --data_dir, or where DIR lacks chestmnist_64.npz, the file is downloaded (MD5 checked).
Hardware:  published: one A100 of 40 GB (21.5 GB used at B = 24), 250,000 iterations at 0.42 s each (B = 12).
Result:    published, test set: PSNR 40.719 dB, MSE 0.097e-3, SSIM 0.985. Not trained to the end here.
"""

from configs import base


def get_config():
    return base.get_config("medmnist", flag="chestmnist", size=64)
