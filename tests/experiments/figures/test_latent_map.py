"""Latents on a plane."""

import numpy as np
import pytest
from PIL import Image

from experiments.figures import draw_latent_map


@pytest.mark.parametrize("labels", [None, np.array([0, 1, 1, -1, 11])])
@pytest.mark.parametrize("size", [1, 6])
def test_the_latent_map_is_drawn_whatever_the_labels(tmp_path, labels, size):
    rng = np.random.default_rng(0)
    path = draw_latent_map(
        tmp_path / "map.png", rng.normal(size=(9, size)), rng.normal(size=(5, size)),
        labels=labels, classes=[f"class $_{i}" for i in range(12)], psnr=np.linspace(20, 30, 5),
    )  # fmt: skip
    with Image.open(path) as image:
        assert image.width == 1600
        assert np.asarray(image).std() > 5
