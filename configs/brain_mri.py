"""Brain MRI (BraTS 2023 adult glioma, native T1) at 32x32x32 with the settings of the paper (MedFuncta, MIDL 2026).

Command:   python -m experiments.main --config=configs/brain_mri.py --workdir=runs/brain --data_dir=BRATS
           BRATS holds the case folders of BraTS 2023. Other sequences: --config.data.sequence=t2f; other sizes:
           --config.data.size=64. Variants: brain_mri.py:cpu for two cores, and brain_mri.py:folder for any folder of
           NIfTI volumes (--config.data.pattern='**/*.nii.gz').
Hardware:  published: one A100 of 40 GB, 250,000 iterations.
Result:    published, test set: PSNR 39.191 dB, MSE 0.130e-3, SSIM 0.993. Not trained to the end here.
           folder_cpu, 2 cores, 1500 steps: IXI T1, 11 heads: 24.2 dB, SSIM 0.747 after 472 s; hippocampus, 70 volumes,
           P = 64: 20.8 dB, 0.695 after 503 s (measured; PCA with 64 components: 21.9 dB). For folders of few volumes
           add --config.train.augmentation=0.1 --config.train.optimizer=muon: hippocampus, on a newer split, 21.9 dB
           after 700 steps in 346 s, 23.1 dB after 3400 in 1825 s (measured; PCA: 22.5 dB).
"""

from configs import base


def get_config(variant=""):
    base.require_variant(variant, "cpu", "folder", "folder_cpu")
    if variant.startswith("folder"):
        # 32 voxels of 8 mm: the published field of view of 256 mm, averaged by 8.
        config = base.get_config("nifti_folder", pattern="**/*.nii*", grid=(32, 32, 32), spacing=8.0)
        variant = variant.removeprefix("folder").removeprefix("_")
    else:
        config = base.get_config("brats", sequence="t1n", size=32)
    return base.volumes(config, variant)
