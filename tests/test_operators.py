"""Operators against numpy, scikit-image and formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from medfuncta_jax import operators as ops


def values_on(operator, *, batch=2, channels=2):
    count = len(operator.coords)
    return np.random.default_rng(0).normal(size=(batch, count, channels))


def measured(operator, values):
    return np.asarray(operator(jnp.asarray(values), jnp.asarray(operator.coords)))


def test_pooling_is_the_mean_of_blocks():
    operator = ops.AveragePooling((12, 6, 4), (3, 2, 1))
    values = values_on(operator)
    image = values.reshape(2, 4, 3, 3, 2, 4, 1, 2)
    np.testing.assert_allclose(measured(operator, values), image.mean((2, 4, 6)).reshape(2, -1, 2), atol=1e-14)
    assert operator.shape == (4, 3, 4)


def test_a_slice_profile_has_its_width_and_keeps_constants():
    operator = ops.SliceProfile((80, 3), 0, 8, width=1.25)
    profile = operator.profiles[5]
    np.testing.assert_allclose(operator.profiles.sum(1), 1)
    above = np.flatnonzero(profile >= profile.max() / 2)
    assert above.max() - above.min() == pytest.approx(1.25 * 8, abs=1.01)
    assert (profile * np.arange(80)).sum() == pytest.approx(5.5 * 8 - 0.5)
    np.testing.assert_allclose(measured(operator, np.ones((1, 240, 1))), 1)
    values = values_on(operator)
    expected = np.einsum("mn,bnkd->bmkd", operator.profiles, values.reshape(2, 80, 3, 2)).reshape(2, -1, 2)
    np.testing.assert_allclose(measured(operator, values), expected, atol=1e-13)


@pytest.mark.parametrize("shape", [(8, 6), (4, 5, 6)], ids=str)
def test_k_space_is_that_of_numpy_and_its_whole_holds_the_energy(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    operator = ops.KSpace.of_mask(mask)
    values = values_on(operator)
    axes = tuple(range(1, 1 + len(shape)))
    spectrum = np.fft.fftn(values.reshape(2, *shape, 2), axes=axes, norm="ortho")
    found = measured(operator, values).reshape(2, *operator.shape, 2)
    np.testing.assert_allclose(found[:, 0] + 1j * found[:, 1], spectrum[:, mask], atol=1e-12)
    np.testing.assert_allclose(operator.sampled(spectrum), found, atol=1e-12)
    whole = ops.KSpace.of_mask(np.ones(shape, bool))
    np.testing.assert_allclose(np.square(measured(whole, values)).sum(), np.square(values).sum())


def test_projections_of_a_disc_are_its_chords():
    radius, n = 20.0, 64
    operator = ops.Projections((n, n), (0.0, 40.0, 90.0), 91, samples=4000)
    places = (np.asarray(operator.coords) + 1) / 2 * (n - 1) - n // 2
    disc = (np.square(places).sum(1) < radius**2).astype(float)
    found = measured(operator, disc[None, :, None]).reshape(3, 91)
    offsets = np.arange(91) - 45
    chords = 2 * np.sqrt(np.maximum(radius**2 - offsets**2, 0))
    np.testing.assert_allclose(found, np.broadcast_to(chords, (3, 91)), atol=0.05)


def test_projections_agree_with_scikit_image():
    transform = pytest.importorskip("skimage.transform", reason="scikit-image is not installed")
    from scipy.ndimage import gaussian_filter, map_coordinates

    image = gaussian_filter(np.random.default_rng(0).random((32, 32)), 2)
    angles = (0.0, 20.0, 45.0, 100.0, 170.0)
    operator = ops.Projections((32, 32), angles, 46)
    values = map_coordinates(image, ((np.asarray(operator.coords) + 1) / 2 * 31).T, order=1, mode="nearest")
    found = measured(operator, values[None, :, None]).reshape(5, 46).T
    expected = transform.radon(image, theta=angles, circle=False)
    assert np.abs(found - expected).max() < 0.05 * expected.max()
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ops.AveragePooling((9, 8), (2, 2)), "must divide the points of the grid"),
        (lambda: ops.SliceProfile((9, 8), 2, 2), "must divide axis 2"),
        (lambda: ops.SliceProfile((9, 8), 1, 2, width=0.0), "width must be above 0"),
        (lambda: ops.Projections((9, 8), (0.0,), 4), "equal sides"),
        (lambda: ops.Projections((8, 8), (), 4), "need an angle"),
        (lambda: ops.KSpace.of_mask(np.zeros((4, 4), bool)), "with a sample in it"),
        (lambda: ops.KSpace.of_mask(np.ones((4, 4))), "bool array"),
        (lambda: ops.AveragePooling((8, 8), (2, 2)) @ ops.AveragePooling((8, 8), (2, 2)), "they do not compose"),
        (lambda: ops.Projections((8, 8), (0.0,), 6) @ ops.AveragePooling((8, 8), (2, 2)), "takes no grid"),
    ],
)
def test_operators_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
