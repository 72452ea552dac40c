"""PneumoniaMNIST at 28x28 with P = 256, sized for 2 CPU cores.

Command:   python -m experiments.main --config=configs/pneumonia_xray_28.py --workdir=runs/pneumonia [--data_dir=DIR]
Hardware:  2 CPU cores: 237 s of training, 15 s for the rest (measured, shared machine).
Result:    test PSNR 35.4 dB, MSE 0.37e-3, SSIM 0.966 on 624 images (measured). PCA with 256 components: 37.8 dB.
           Published, at 64x64 with P = 2048 and 250,000 iterations on an A100: 39.301 dB.
"""

from configs import base


def get_config():
    config = base.get_config("medmnist", flag="pneumoniamnist", size=28)
    # One modulated layer: the field is a sum of basis functions shared by all signals, so that a step costs a few thin
    # matrix products (see `siren.py`), and 512 units are affordable where 5 layers of 64 were.
    config.model.layers = 3
    config.model.width = 512
    config.model.latent_dim = 256
    config.model.omega_first = 30.0
    config.model.omega_last = 90.0
    config.inner.steps = 3
    config.inner.step_size = 1.0
    config.inner.learned_step_size = "per_latent"
    config.inner.selection_ratio = 1.0
    config.inner.remat = "none"
    config.train.steps = 5000
    config.train.batch_size = 32
    config.train.learning_rate = 1e-4
    config.train.step_size_learning_rate = 1e-2
    config.train.warmup_steps = 100
    config.train.weight_decay = 0.0
    # The usual norm is 0.08. Now and then an unusual image makes the inner loop diverge, and a gradient that is let
    # through at norm 1 undoes a thousand steps.
    config.train.clip_norm = 0.1
    config.train.eval_every = 1000
    config.train.eval_signals = 128
    config.fit.batch_size = 256
    return config
