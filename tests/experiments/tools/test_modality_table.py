from types import SimpleNamespace

import numpy as np

from experiments.tools import modality_table


class Split:
    def __init__(self, signals):
        self._signals = signals.astype(np.float32)

    def __len__(self):
        return len(self._signals)

    def signals(self, rows):
        return self._signals[rows]


def test_no_axes_leave_the_mean_and_all_axes_the_signal():
    signals = np.random.default_rng(1).uniform(size=(40, 13, 13, 1))
    mean = signals.reshape(40, -1).mean(0)
    only_mean = modality_table.linear_metrics(Split(signals), mean, np.zeros((0, 169)))
    np.testing.assert_allclose(only_mean["mse"], signals.reshape(40, -1).var(0).mean(), rtol=1e-5)
    assert modality_table.linear_metrics(Split(signals), mean, np.eye(169))["psnr"] > 90


def test_pca_gives_back_what_it_spans_and_is_left_out_where_signals_are_too_few():
    five = Split(np.random.default_rng(2).uniform(size=(5, 13, 13, 1)))
    dataset = SimpleNamespace(splits={"train": five, "test": five})
    assert modality_table.baselines(dataset, 4)["pca"]["psnr"] > 90
    assert modality_table.baselines(dataset, 5)["pca"] is None


def test_markdown_tells_failures_and_missing_pca():
    metrics = {"psnr": 30.0, "ssim": 0.9, "mse": 1e-3}
    row = {
        "grid": [4, 4], "channels": 3, "signals": {"train": 7, "test": 2}, "latent_dim": 8, "train_seconds": 9.6,
        "field": metrics, "pca": None, "mean": metrics,
    }  # fmt: skip
    text = modality_table.as_markdown({"ecg": row, "ixi_t1": {"error": "code 1"}})
    assert "| ecg | 7 / 2 | 4x4 RGB | 8 | 10 s | 1.00e-03 | 30.0 (0.900) | none | 30.0 (0.900) |" in text
    assert "| ixi_t1 | failed: code 1 |" in text
