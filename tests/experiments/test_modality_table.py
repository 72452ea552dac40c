import numpy as np
import pytest

from experiments import modality_table


class Split:
    def __init__(self, signals):
        self._signals = signals.astype(np.float32)

    def __len__(self):
        return len(self._signals)

    def signals(self, rows):
        return self._signals[rows]


@pytest.mark.parametrize("count", [10, 60])
def test_principal_components_equal_the_singular_vectors(count):
    """Through either Gram matrix: fewer signals than values, and more."""
    signals = np.random.default_rng(0).uniform(size=(count, 6, 5, 1)).astype(np.float32)
    mean, axes = modality_table.principal_components(Split(signals), 4)
    flat = signals.reshape(count, -1).astype(np.float64)
    np.testing.assert_allclose(mean, flat.mean(0))
    expected = np.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:4]
    np.testing.assert_allclose(np.abs(axes @ expected.T), np.eye(4), atol=1e-6)


def test_no_axes_leave_the_mean_and_all_axes_the_signal():
    signals = np.random.default_rng(1).uniform(size=(40, 13, 13, 1))
    mean = signals.reshape(40, -1).mean(0)
    only_mean = modality_table.linear_metrics(Split(signals), mean, np.zeros((0, 169)))
    np.testing.assert_allclose(only_mean["mse"], signals.reshape(40, -1).var(0).mean(), rtol=1e-5)
    assert modality_table.linear_metrics(Split(signals), mean, np.eye(169))["psnr"] > 90


def test_too_few_signals_have_no_components():
    with pytest.raises(ValueError, match="5 signals have no 5 principal components"):
        modality_table.principal_components(Split(np.zeros((5, 3, 1))), 5)


def test_markdown_tells_failures_and_missing_pca():
    metrics = {"psnr": 30.0, "ssim": 0.9, "mse": 1e-3}
    row = {
        "grid": [4, 4], "channels": 3, "signals": {"train": 7, "test": 2}, "latent_dim": 8, "train_seconds": 9.6,
        "field": metrics, "pca": None, "mean": metrics,
    }  # fmt: skip
    text = modality_table.as_markdown({"ecg": row, "ixi_t1": {"error": "code 1"}})
    assert "| ecg | 7 / 2 | 4x4 RGB | 8 | 10 s | 1.00e-03 | 30.0 (0.900) | none | 30.0 (0.900) |" in text
    assert "| ixi_t1 | failed: code 1 |" in text
