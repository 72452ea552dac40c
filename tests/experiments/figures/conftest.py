"""What is asked of every picture: it is written whole or not at all, and nothing on it is cut off."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

SIGNATURE = b"\x89PNG\r\n\x1a\n"
WIDTH = 1600


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved during a test."""
    saved = []
    save = Figure.savefig

    def remember(figure, *args, **options):
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


def assert_picture(path, width=WIDTH):
    assert path.read_bytes().startswith(SIGNATURE)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[1] == width
    assert np.ptp(pixels[..., :3]) > 0.5
    # Nothing is cut off: the outermost pixels of the page are white.
    for edge in (pixels[:3], pixels[-3:], pixels[:, :3], pixels[:, -3:]):
        assert (edge[..., :3] == 1).all()
