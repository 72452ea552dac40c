"""Pictures of signals of every rank; not what they look like, but how they are laid out."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import figures
from tests.experiments.figures.conftest import assert_picture


def pair(*shape, seed=0):
    rng = np.random.default_rng(seed)
    signals = rng.random(shape)
    return signals, signals + 0.1 * rng.standard_normal(shape)


def draw(path, signals, reconstructions, **options):
    names = {"titles": [f"test/{i:05d}" for i in range(len(signals))], "psnr": np.linspace(20, 40, len(signals))}
    return figures.draw_reconstructions(path, signals, reconstructions, **names | options)


def pictures(figure):
    """Displayed arrays in the order of drawing, without the colour bar."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


@pytest.mark.parametrize(
    "shape",
    [
        (1, 40, 1), (3, 40, 3), (1, 1, 1),
        (1, 28, 28, 1), (8, 12, 9, 1), (2, 16, 16, 3), (2, 9, 9, 2), (1, 4, 60, 1), (1, 60, 4, 1),
        (1, 10, 12, 14, 1), (2, 9, 7, 5, 4), (1, 1, 1, 1, 1),
    ],
    ids=str,
)  # fmt: skip
def test_signals_of_every_rank(tmp_path, shape):
    path = tmp_path / "new" / "picture.png"
    assert draw(path, *pair(*shape)) == path
    assert_picture(path)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("shape", [(2, 30, 1), (2, 12, 12, 1), (1, 8, 8, 8, 1)], ids=str)
def test_values_at_the_limits(tmp_path, shape):
    signals, reconstructions = pair(*shape)
    broken = np.full_like(signals, np.nan)
    infinite = [np.inf] * shape[0]
    for other in (signals, reconstructions * 100, broken):
        assert_picture(draw(tmp_path / "picture.png", signals, other, psnr=infinite))


def test_names_that_are_long_or_hold_mathematics(tmp_path):
    titles = ["a/very/long/name/" * 20, "half of a formula $x^"]
    assert_picture(draw(tmp_path / "picture.png", *pair(2, 12, 12, 1), titles=titles))


def test_a_row_holds_input_reconstruction_and_difference_on_common_scales(tmp_path, drawn):
    signals, reconstructions = pair(2, 12, 12, 1)
    draw(tmp_path / "picture.png", signals, reconstructions, difference_max=0.2)
    clipped = np.clip(reconstructions, 0, 1)
    expected = [part[i, ..., 0] for i in range(2) for part in (signals, clipped, np.abs(signals - clipped))]
    for actual, picture in zip(pictures(drawn[0]), expected, strict=True):
        np.testing.assert_allclose(actual, picture)
    limits = [axes.images[0].get_clim() for axes in drawn[0].axes if axes.images]
    assert limits == [(0, 1), (0, 1), (0, 0.2)] * 2


def test_oriented_volumes_stand_upright_the_radiological_way(tmp_path, drawn):
    """Each picture of a RAS+ ramp is brightest on the side to which the axis grows."""
    right, anterior, superior = np.meshgrid(*[np.linspace(0, 1, n) for n in (7, 8, 9)], indexing="ij")

    def shown(ramp):
        draw(tmp_path / "picture.png", ramp[None, ..., None], ramp[None, ..., None])
        return pictures(drawn[-1])[::3]  # inputs: sagittal, coronal, axial

    sagittal, coronal, axial = shown(right)
    assert sagittal.shape == (9, 8)
    assert np.ptp(sagittal) == 0
    assert (coronal[:, 0] == 1).all()  # the patient's right on the left
    assert (axial[:, 0] == 1).all()
    sagittal, coronal, axial = shown(anterior)
    assert (sagittal[:, 0] == 1).all()  # anterior on the left
    assert coronal.shape == (9, 7)
    assert np.ptp(coronal) == 0
    assert (axial[0] == 1).all()  # anterior up
    sagittal, coronal, axial = shown(superior)
    assert (sagittal[0] == 1).all()  # superior up
    assert (coronal[0] == 1).all()
    assert axial.shape == (8, 7)
    assert np.ptp(axial) == 0


def test_other_volumes_lie_as_in_the_array(tmp_path, drawn):
    signals, _ = pair(1, 5, 6, 7, 1)
    draw(tmp_path / "picture.png", signals, signals, oriented=False)
    volume = signals[0, ..., 0]
    for actual, expected in zip(pictures(drawn[0])[::3], (volume[2], volume[:, 3], volume[:, :, 3]), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_spacing_gives_slices_their_true_proportions(tmp_path, drawn):
    signals, reconstructions = pair(1, 10, 10, 5, 1)
    draw(tmp_path / "picture.png", signals, reconstructions, spacing=(1, 1, 3))
    sides = [axes.images[0].get_extent() for axes in drawn[0].axes if axes.images][::3]
    assert [(right, bottom) for _, right, bottom, _ in sides] == [(10, 15), (10, 15), (10, 10)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"titles": ["one"]}, "numbers must be equal"),
        ({"psnr": [1.0] * 3}, "numbers must be equal"),
        ({"spacing": (1, 1, 1)}, "spacing"),
        ({"spacing": (1, 0)}, "spacing"),
        ({"difference_max": 0}, "difference_max"),
        ({"reconstructions": np.zeros((2, 12, 11, 1))}, "must be one"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path, wrong, message):
    signals, reconstructions = pair(2, 12, 12, 1)
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "picture.png", **{"signals": signals, "reconstructions": reconstructions} | wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(17, 4, 4, 1), (0, 4, 4, 1), (2, 4), (1, 2, 2, 2, 2, 1)], ids=str)
def test_numbers_and_ranks_that_cannot_be_drawn_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="must be"):
        draw(tmp_path / "picture.png", *pair(*shape))


def test_a_failure_while_writing_leaves_the_old_picture(tmp_path, monkeypatch):
    path = draw(tmp_path / "picture.png", *pair(1, 12, 12, 1))
    before = path.read_bytes()

    def fail(figure, target, **options):
        target.write_bytes(before[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        draw(path, *pair(1, 12, 12, 1, seed=1))
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_the_same_data_give_the_same_file(tmp_path):
    files = [draw(tmp_path / name, *pair(1, 12, 12, 1)).read_bytes() for name in ("a.png", "b.png")]
    assert files[0] == files[1]
