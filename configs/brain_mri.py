"""Brain MRI (BraTS 2023 adult glioma, native T1) at 32x32x32 with the settings of the paper (MedFuncta, MIDL 2026).

Command:   python -m experiments.main --config=configs/brain_mri.py --workdir=runs/brain --data_dir=BRATS
           BRATS holds the case folders of BraTS 2023. Other sequences: --config.data.sequence=t2f; other sizes:
           --config.data.size=64. Variants: brain_mri.py:cpu for two cores, and brain_mri.py:folder for any folder of
           NIfTI volumes (--config.data.pattern='**/*.nii.gz').
Hardware:  published: one A100 of 40 GB, 250,000 iterations.
Result:    published, test set: PSNR 39.191 dB, MSE 0.130e-3, SSIM 0.993. Not trained to the end here.
           folder_cpu, 2 cores: IXI T1, 12 heads: 28.8 dB, SSIM 0.901 after 444 s (measured; the mean head has 23.0
           dB); hippocampus, 67 volumes, P = 64: 23.2 dB, 0.804 after 387 s (measured; PCA with 64 components: 22.5 dB).
"""

from configs import base


def get_config(variant=""):
    base.require_variant(variant, "cpu", "folder", "folder_cpu")
    if not variant.startswith("folder"):
        return base.volumes(base.get_config("brats", sequence="t1n", size=32), variant)
    # 32 voxels of 8 mm: the published field of view of 256 mm, averaged by 8.
    config = base.get_config("nifti_folder", pattern="**/*.nii*", grid=(32, 32, 32), spacing=8.0)
    config = base.volumes(config, "cpu" if variant == "folder_cpu" else "")
    if variant == "folder_cpu":
        config.train.batch_size = 8  # folders hold tens of volumes
    return config
