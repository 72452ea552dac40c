"""ECG beats (MIT-BIH, 187 samples) with the settings of the paper (MedFuncta, MIDL 2026).

Command:   python -m experiments.main --config=configs/ecg.py --workdir=runs/ecg --data_dir=DIR
           DIR holds mitbih_train.csv and mitbih_test.csv (188 columns, no header); raw PhysioNet records:
           --config.data.format=physionet. Variant ecg.py:cpu for two cores.
Hardware:  published: one A100 of 40 GB, 250,000 iterations. cpu: 2 cores, 237 s of training.
Result:    published, test set: PSNR 43.301 dB, MSE 0.086e-3, SSIM 0.964. Not trained to the end here.
           cpu: test PSNR 37.3 dB, MSE 0.31e-3, SSIM 0.916 (measured on 5400 training beats and 1500 test beats of
           other patients; PCA with 64 components: 36.8 dB, 0.934).
"""

from configs import base


def get_config(variant=""):
    base.require_variant(variant, "cpu")
    config = base.paper_1d(base.get_config("ecg", format="csv"))
    if variant == "cpu":
        return base.cpu(config, width=256, latent_dim=64, steps=20_000, batch_size=64)
    return config
