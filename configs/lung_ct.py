"""Lung CT (LIDC-IDRI) at 32x32x32 with the settings of the paper (MedFuncta, MIDL 2026).

Command:   python -m experiments.tools.preprocess --data_dir=LIDC --out=NIFTI  (DICOM to 1 mm NIfTI, once)
           python -m experiments.main --config=configs/lung_ct.py --workdir=runs/lung --data_dir=NIFTI
           Other sizes: --config.data.size=64. Variant lung_ct.py:cpu for two cores.
Hardware:  published: one A100 of 40 GB, 250,000 iterations.
Result:    published, test set: PSNR 28.325 dB, MSE 1.561e-3, SSIM 0.913. Not trained to the end here.
"""

from configs import base


def get_config(variant=""):
    return base.volumes(base.get_config("lung_ct", size=32), variant)
