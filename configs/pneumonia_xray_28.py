"""PneumoniaMNIST at 28x28 with P = 256, sized for 2 CPU cores.

Command:   python -m experiments.main --config=configs/pneumonia_xray_28.py --workdir=runs/pneumonia [--data_dir=DIR]
Hardware:  2 CPU cores: 51 s of training (measured).
Result:    test PSNR 38.2 dB, MSE 0.19e-3, SSIM 0.978 on 624 images (measured). PCA with 256 components: 38.1 dB.
           Published, at 64x64 with P = 2048 and 250,000 iterations on an A100: 39.301 dB.
"""

from configs import base


def get_config():
    config = base.get_config("medmnist", flag="pneumoniamnist", size=28)
    config = base.cpu(config, width=2048, latent_dim=256, steps=300, batch_size=32)
    return base.from_linear_start(config, updates=300, augmentation=0.1)
