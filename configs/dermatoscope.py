"""DermaMNIST at 64x64, the paper's settings (MedFuncta, MIDL 2026); `:128` and `:224` take its table 2.

Command:   python -m experiments.main --config=configs/dermatoscope.py --workdir=runs/NAME [--data_dir=DIR]
           The file is downloaded (MD5 checked) unless DIR holds it. Variants: :28, :128, :224, and :cpu for two cores.
Hardware:  published: one A100 of 40 GB, 21.5 GB used at B = 24 and 64x64, 250,000 iterations.
Result:    published, test set: PSNR 40.273 dB, MSE 0.133e-3, SSIM 0.962, LPIPS 0.023.
           Published at the higher resolutions: 128: 37.072 dB, 0.906; 224: 34.752 dB, 0.920.
           Not trained to the end here. cpu, 2 cores, on 576 images of blood cells (--config.data.flag=bccdcells):
           294 s of training, test PSNR 40.2 dB, SSIM 0.938 (PCA with 512 components: 37.9 dB, 0.901).
"""

from configs import base


def get_config(variant=""):
    return base.medmnist("dermamnist", variant)
