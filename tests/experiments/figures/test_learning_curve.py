"""The learning curve, of whatever records there are."""

import numpy as np
import pytest

from experiments import figures
from tests.experiments.figures.conftest import assert_picture


def training_records(count):
    return [
        {"step": 10 * k, "loss": 0.1, "psnr": 10 + 5 * np.log1p(k), "learning_rate": 1e-3 * (1 - k / count),
         "gradient_norm": 1 / (1 + k), "seconds": 0.1 * k}
        for k in range(1, count + 1)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 3, 19, 20, 5000])
@pytest.mark.parametrize("validated", [False, True])
def test_learning_curve(tmp_path, count, validated):
    records = training_records(count)
    if validated:
        records += [{"step": 10 * k, "val_psnr": 9 + 4 * np.log1p(k)} for k in range(1, count + 1, 1 + count // 10)]
    assert_picture(figures.draw_learning_curve(tmp_path / "curve.png", records))


def test_learning_curve_of_validation_only_and_of_constants(tmp_path):
    assert_picture(figures.draw_learning_curve(tmp_path / "curve.png", [{"step": 5, "val_psnr": 20.0}]))
    still = [{"step": k, "psnr": 20.0, "gradient_norm": 1.0, "learning_rate": 0.0} for k in range(30)]
    assert_picture(figures.draw_learning_curve(tmp_path / "curve.png", still))


def test_learning_curve_marks_the_best_validation_and_takes_the_last_record_of_a_step(tmp_path, drawn):
    records = training_records(4) + [
        {"step": s, "val_psnr": v} for s, v in ((10, 20.0), (20, 99.0), (20, 25.0), (30, 24.0))
    ]
    records += [{"step": 40, "val_psnr": float("nan")}, {"step": 40, "gradient_norm": 0.0, "psnr": float("inf")}]
    figures.draw_learning_curve(tmp_path / "curve.png", records)
    labels = {line.get_label(): line.get_xydata().tolist() for line in drawn[0].axes[0].lines}
    assert labels["validation"] == [[10, 20], [20, 25], [30, 24]]
    assert labels["best validation: 25.00 dB at 20"] == [[20, 25]]
    assert [step for step, _ in labels["training"]] == [10, 20, 30]


@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": 0.1}], [{"step": 1, "psnr": float("nan")}]])
def test_nothing_to_draw(tmp_path, records):
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.draw_learning_curve(tmp_path / "curve.png", records)
    assert not list(tmp_path.iterdir())
