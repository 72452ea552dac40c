"""A folder of the user's own time series (CSV, TSV, TXT), with the paper's settings for ECG (MedFuncta, MIDL 2026).

Command:   python -m experiments.main --config=configs/series_folder.py --workdir=runs/NAME --data_dir=DIR
           DIR holds one file per signal, with a line per sample and a column per channel; choose with
           --config.data.columns, and the number of samples with --config.data.length=256. Variants :row for tables of a
           signal a line (with --config.data.id_column and --config.data.label_column), :cpu and :row_cpu for two cores.
Hardware:  published for ECG beats: one A100 of 40 GB, 250,000 iterations. row_cpu: 2 cores, 1117 s of training with
           other work on them.
Result:    row_cpu, 7500 heartbeats as two tables (label_column=-1, length=187), split by row: test PSNR 36.7 dB,
           MSE 0.30e-3, SSIM 0.917 (measured). The others are not trained to the end here.
"""

from configs import base


def get_config(variant=""):
    base.require_variant(variant, "cpu", "row", "row_cpu")
    layout = "row" if variant.startswith("row") else "file"
    config = base.paper_1d(base.get_config("series_folder", layout=layout))
    if variant.endswith("cpu"):
        return base.cpu(config, width=256, latent_dim=64, steps=20_000, batch_size=64)
    return config
