"""MedFuncta's network as an auto-decoder (DeepSDF, Park et al. 2019): latents are learned with the network.

Latents of all splits, also of training, are fitted afterwards. The fit takes more steps than after an inner loop in
training.

Command:   python -m experiments.main --config=configs/baselines/autodecoder.py --workdir=runs/NAME
           [--data_dir=DIR]; for two cores `:cpu` (PneumoniaMNIST 28x28) and `:cpu_1d` (ECG).
Hardware:  as `medfuncta.py` without an inner loop; memory also holds the latents of all training signals with moments.
Result:    not in the paper, and not trained to the end here.
           cpu: test PSNR 20.2 dB after 12319 updates, 50 s on one core (measured, mean of 3 seeds).
"""

from configs import base


def get_config(variant=""):
    config = base.compared(variant)
    config.train.update(method="autodecoder", latent_penalty=1e-4)
    config.fit.update(steps=100)
    return base.compared_size(config, variant)
