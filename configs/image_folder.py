"""A folder of the user's own images (PNG, JPEG, TIFF), 64x64, with the settings of the paper (MedFuncta, MIDL 2026).

Command:   python -m experiments.main --config=configs/image_folder.py --workdir=runs/NAME --data_dir=DIR
           DIR holds the images, in folders of classes or of splits (train, val, test) if any; a table of labels:
           --config.data.labels=labels.csv; some of the files: --config.data.pattern='**/*.png'.
           Variants :128 and :224 (the paper's table 2), and :cpu for two cores.
Hardware:  published for ChestMNIST: one A100 of 40 GB, 250,000 iterations.
Result:    that of chest_xray.py on the same images, with the same settings. Not trained to the end here.
           cpu: that of chest_xray.py:cpu (27.25 dB after 196 s for images of six kinds); measured on PNGs of them with
           an earlier recipe alone, 2 cores, 801 s: test PSNR 26.2 dB, SSIM 0.716 on 600 of 2635.
"""

from configs import base


def get_config(variant=""):
    base.require_variant(variant, "64", "128", "224", "cpu")
    if variant == "cpu":
        return base.cpu_64(base.get_config("image_folder", size=64))
    size = int(variant or 64)
    return base.paper_2d(base.get_config("image_folder", size=size), size)
