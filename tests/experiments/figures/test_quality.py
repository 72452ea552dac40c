"""Curves of quality: a line a method, with intervals."""

import pytest

from experiments import figures
from tests.experiments.figures.conftest import assert_picture


def quality(mean, spread=0.5):
    interval = {"psnr": [mean - spread, mean + spread], "ssim": [mean / 50 - 0.01, mean / 50 + 0.01]}
    return {"psnr": mean, "ssim": mean / 50, "interval": interval}


def test_quality_is_drawn_with_a_line_a_method_in_both_panels(tmp_path, drawn):
    points = [{"fraction": part, "field": quality(30 + part), "linear": quality(20 + part)} for part in (0.01, 0.1)]
    points.append({"fraction": 1.0, "field": quality(33)})
    ticks = {0.01: "1%", 0.1: "10%", 0.11: "no room", 1: "all"}
    path = figures.draw_quality(tmp_path / "q.png", points, along="fraction", label="part", ticks=ticks)
    assert_picture(path, width=700)
    for axes in drawn[0].axes:
        field, linear = axes.lines
        assert field.get_xdata().tolist() == [0.01, 0.1, 1.0]
        assert linear.get_xdata().tolist() == [0.01, 0.1]
    assert [text.get_text() for text in drawn[0].axes[1].get_xticklabels()] == ["1%", "10%", "all"]
    assert drawn[0].axes[0].lines[0].get_ydata().tolist() == [30.01, 30.1, 33]
    assert drawn[0].axes[0].get_legend().get_texts()[1].get_text() == "linear interpolation"


@pytest.mark.parametrize("marked", [2, 100])
def test_quality_at_a_single_place(tmp_path, marked):
    points = [{"scale": 2, "field": quality(30), "linear": quality(31), "cubic": quality(32)}]
    path = figures.draw_quality(
        tmp_path / "q.png", points, along="scale", label="resolution", ticks={2: "2x\n64x64x64"}, marked=marked
    )
    assert_picture(path, width=700)
