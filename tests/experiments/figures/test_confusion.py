"""The figure of confusion matrices: drawn where it can be read, and nothing else."""

import numpy as np
import pytest
from PIL import Image

from experiments.figures.confusion import MOST_CLASSES, draw_confusion


def result(classes, panels=3, **changes):
    counts = np.random.default_rng(0).integers(0, 10, (classes, classes)) + 100 * np.eye(classes, dtype=int)
    row = {"classifier": "MLP", "features": "latents", "confusion": counts.tolist(), "val_accuracy": {"mean": 0.9},
           "accuracy": {"mean": 0.8}} | changes  # fmt: skip
    return {"classes": [f"class ${i}" for i in range(classes)], "rows": [row] * panels}


@pytest.mark.parametrize(("classes", "panels"), [(2, 1), (5, 3), (MOST_CLASSES, 4)])
def test_a_page_of_panels(tmp_path, classes, panels):
    path = draw_confusion(tmp_path / "new" / "confusion.png", result(classes, panels))
    with Image.open(path) as image:
        assert image.width == 1600 if panels > 1 else image.width < 1600
        pixels = np.asarray(image.convert("RGB"), int)
    assert (pixels.max(-1) - pixels.min(-1) > 60).any()  # colour
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 255).all()  # nothing is cut off


def test_the_same_result_gives_the_same_file(tmp_path):
    first, again = (draw_confusion(tmp_path / name, result(3)).read_bytes() for name in ("a.png", "b.png"))
    assert first == again


@pytest.mark.parametrize(
    "nothing", [result(MOST_CLASSES + 1), result(3, confusion=None), result(3, val_accuracy=None), result(3, panels=0)]
)
def test_nothing_is_drawn_where_nothing_can_be_read(tmp_path, nothing):
    assert draw_confusion(tmp_path / "confusion.png", nothing) is None
    assert not list(tmp_path.iterdir())


def test_a_class_without_members_is_an_empty_row(tmp_path):
    assert draw_confusion(tmp_path / "confusion.png", result(2, confusion=[[0, 0], [1, 3]])).exists()
