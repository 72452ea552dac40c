"""3D MedMNIST (here AdrenalMNIST3D, 28x28x28) with the paper's settings for volumes (MedFuncta, MIDL 2026).

Command:   python -m experiments.main --config=configs/medmnist_3d.py --workdir=runs/NAME [--data_dir=DIR]
           Other sets and sizes: --config.data.flag=organmnist3d --config.data.size=64. Variant :cpu for two cores.
Hardware:  the paper does not use these sets; its 3D settings took one A100 of 40 GB.
Result:    cpu, 2 cores: test PSNR 27.1 dB, SSIM 0.735 after 313 s (measured); PCA with 512 components: 26.6 dB, 0.744.
"""

from configs import base


def get_config(variant=""):
    return base.volumes(base.get_config("medmnist", flag="adrenalmnist3d", size=28), variant)
