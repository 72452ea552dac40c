"""Brain MRI volumes at 32x32x32 with the settings of the paper (MedFuncta, MIDL 2026, table 2).

Command:   python -m experiments.main --config=configs/brain_mri.py --workdir=runs/brain --data_dir=BRATS
           BRATS holds the native T1 volumes of BraTS 2023 (*-t1n.nii.gz). Other volumes: override the pattern,
           --config.data.pattern='**/*_T1.nii.gz'.
Hardware:  published: one A100 of 40 GB, 250,000 iterations.
Result:    published, test set: PSNR 39.191 dB, MSE 0.130e-3, SSIM 0.993. Not trained to the end here.
"""

from configs import base


def get_config():
    # 32 voxels of 8 mm: a field of view of 256 mm, averaged by 8, as published. A fifth for testing, seed 42; the paper
    # names no validation set, here a tenth of all volumes.
    config = base.get_config(
        "nifti_folder", pattern="**/*t1n.nii*", grid=(32, 32, 32), spacing=8.0, quantile_low=0.001, quantile_high=0.999,
        seed=42, val_fraction=0.1, test_fraction=0.2,
    )  # fmt: skip
    config.model.latent_dim = 8192
    config.model.omega_last = 300.0
    config.train.batch_size = 4
    config.train.eval_signals = 32
    config.fit.batch_size = 4
    return config
