"""MedFuncta's network as an auto-decoder (DeepSDF, Park et al. 2019): latents are learned with it.

Latents of all splits are fitted afterwards, those of training too; without an inner loop in training this takes more
steps.

Command:   python -m experiments.main --config=configs/baselines/autodecoder.py --workdir=runs/NAME
           [--data_dir=DIR]; for two cores `:cpu` (PneumoniaMNIST 28x28) and `:cpu_1d` (ECG).
Hardware:  as `medfuncta.py` without an inner loop; the latents of all training signals and their moments are held too.
Result:    not in the paper, and not trained to the end here.
           cpu: test PSNR 20.2 dB after 12319 updates, 50 s on one core (measured, mean of 3 seeds).
"""

from configs import base


def get_config(variant=""):
    config = base.compared(variant)
    config.train.update(method="autodecoder", latent_penalty=1e-4)
    config.fit.update(steps=100)
    return base.compared_size(config, variant)
