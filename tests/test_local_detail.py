"""Means of residuals against sums over all pairs of points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.local_detail import at_points, detail_count, local_means, residuals

SHAPE = (6, 5, 4)
WIDTHS = (0.0, 0.8, 1.5)


def _plain(left, seen, place, width):
    """d_s of one signal [*grid, D] at a point of the grid."""
    if width == 0:
        return left[place]
    inside = np.indices(seen.shape).reshape(3, -1).T
    kernel = np.exp(-0.5 * np.square(inside - place).sum(1) / width**2) / (width * np.sqrt(2 * np.pi)) ** 3
    known = kernel * seen.reshape(-1)
    return (known @ left.reshape(len(inside), -1)) / (known.sum() + 0.02)


@pytest.fixture(scope="module")
def observed():
    rng = np.random.default_rng(0)
    seen = rng.random((2, *SHAPE)) < 0.4
    return rng.standard_normal((2, *SHAPE, 2)) * seen[..., None], seen


def test_local_means_are_sums_over_all_points(observed):
    left, seen = observed
    with jax.enable_x64(True):
        means = local_means(jnp.asarray(left), jnp.asarray(seen), WIDTHS)
    for width, found in zip(WIDTHS, means, strict=True):
        for signal in range(2):
            for place in ((0, 0, 0), (5, 4, 3), (2, 3, 1)):
                np.testing.assert_allclose(
                    found[signal][place], _plain(left[signal], seen[signal], place, width), atol=1e-12
                )


def test_details_are_means_at_a_point_and_around_it(observed):
    left, seen = observed
    widths = (0.0, 0.5, 1.0)
    with jax.enable_x64(True):
        means = local_means(jnp.asarray(left), jnp.asarray(seen), widths)
        at = at_points(means, jnp.asarray(mf.grid(SHAPE)), widths)
    assert sum(some.shape[-1] for some in at) == detail_count(widths, axes=3, channels=2) == 2 * (1 + 7 + 7)
    means = [np.asarray(some) for some in means]
    flat = [some.reshape(2, *SHAPE, 2) for some in at]
    for found, expected in zip((flat[0], flat[1], flat[8]), means, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)
    # Widths of 0.5 and 1 look one and two points further, and past the border at the border itself.
    np.testing.assert_allclose(flat[2][:, :-1], means[1][:, 1:], atol=1e-12)
    np.testing.assert_allclose(flat[2][:, -1], means[1][:, -1], atol=1e-12)
    np.testing.assert_allclose(flat[5][:, 1:], means[1][:, :-1], atol=1e-12)
    np.testing.assert_allclose(flat[10][:, :, :-2], means[2][:, :, 2:], atol=1e-12)
    np.testing.assert_allclose(flat[14][..., 2:, :], means[2][..., :-2, :], atol=1e-12)


def test_details_between_points_are_interpolated(observed):
    left, _ = observed
    means = [jnp.asarray(left, jnp.float32)]
    between = (mf.grid(SHAPE)[0] + mf.grid(SHAPE)[1]) / 2
    (found,) = at_points(means, jnp.asarray(between[None], jnp.float32), (0.0,))
    np.testing.assert_allclose(found[:, 0], (left[:, 0, 0, 0] + left[:, 0, 0, 1]) / 2, atol=1e-6)


def test_residuals_are_what_a_field_leaves_of_observed_values():
    field = mf.Field(mf.ModelSettings(layers=3, width=16, latent_dim=4, omega_first=5.0, omega_last=5.0), 2, 1)
    params, rng = field.init(jax.random.key(0)), np.random.default_rng(0)
    latents = rng.standard_normal((11, 4)).astype(np.float32)
    signals = rng.random((11, 5, 6, 1)).astype(np.float32)
    signals[3, 2, 2] = np.nan
    seen = rng.random((5, 6)) < 0.5
    seen[2, 2] = True
    left = residuals(field, params, latents, signals, seen)
    values = np.asarray(mf.reconstruct(field, params, latents, mf.grid((5, 6)))).reshape(signals.shape)
    expected = np.where(seen[..., None], np.nan_to_num(signals - values), 0)
    expected[3, 2, 2] = 0
    np.testing.assert_allclose(left, expected, atol=1e-3)
