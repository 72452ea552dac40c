import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.baselines.pyramid import PyramidField
from tests import plain_field


@pytest.mark.some(2)
@pytest.mark.parametrize("layers", [3, 5])
@pytest.mark.parametrize("last_width", [7, 40])
def test_a_pyramid_is_equation_1_with_layers_of_their_own_width(layers, last_width):
    model = mf.ModelSettings(
        layers=layers, width=16, latent_dim=6, omega_first=10.0, omega_last=30.0, residual=False,
        modulation_init="orthogonal",
    )  # fmt: skip
    field = PyramidField(model, 2, 1, last_width)
    params = field.init(jax.random.key(0), jnp.float64)
    shapes = field.layer_shapes()
    widths = [shapes[f"layer_{k}/kernel"][1] for k in range(1, layers)]
    assert (widths[0], widths[-1]) == (16, last_width)
    assert np.ptp(np.diff(widths)) <= 1
    assert [shapes[f"modulation_{k}/kernel"] for k in range(2, layers)] == [(6, width) for width in widths[1:]]
    rng = np.random.default_rng(0)
    latents, coords = rng.normal(size=(3, 6)), rng.uniform(-1, 1, (7, 2))
    expected = [[plain_field.value(field, params, latent, x) for x in coords] for latent in latents]
    np.testing.assert_allclose(field.apply(params, latents, coords), expected, atol=1e-12)
