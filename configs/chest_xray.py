"""ChestMNIST at 64x64, the paper's settings (MedFuncta, MIDL 2026); `:128` and `:224` take its table 2.

Command:   python -m experiments.main --config=configs/chest_xray.py --workdir=runs/NAME [--data_dir=DIR]
           The file is downloaded (MD5 checked) unless DIR holds it. Variants: :28, :128, :224, and :cpu for two cores.
Hardware:  published: one A100 of 40 GB, 21.5 GB used at B = 24 and 64x64, 250,000 iterations.
Result:    published, test set: PSNR 40.719 dB, MSE 0.097e-3, SSIM 0.985, LPIPS 0.013.
           Published at the higher resolutions: 128: 37.174 dB, 0.952; 224: 34.510 dB, 0.909.
           Not trained to the end here. cpu, 2 cores, on 1796 images of six kinds (--config.data.flag=medicalmnist):
           196 s of training, test PSNR 27.25 dB, SSIM 0.798 (PCA with 512 components: 26.1 dB, 0.703).
"""

from configs import base


def get_config(variant=""):
    return base.medmnist("chestmnist", variant)
