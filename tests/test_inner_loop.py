import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import inner_loop


@pytest.mark.parametrize("layers", [3, 4])
def test_pruned_contexts_hold_the_points_with_the_largest_slopes(layers):
    """Slopes of each point's error in the last layer one by one, and steps on the points chosen by them."""
    model = mf.ModelSettings(layers=layers, width=10, latent_dim=5, omega_first=15.0, omega_last=30.0)
    field = mf.Field(model, coord_dims=1, channels=2)
    params, last = field.init(jax.random.key(0), jnp.float64), f"layer_{layers}"
    coords, signals = mf.grid((12,)), np.random.default_rng(0).uniform(size=(3, 12, 2))

    def errors(layer, latents):
        return jnp.square(field.apply({**params, last: layer}, latents, coords) - signals).sum(-1)

    latents = jnp.zeros((3, 5))
    for _ in range(2):
        each = jax.jacobian(errors)(params[last], latents)
        norms = jnp.sqrt(sum(jnp.square(leaf).sum(range(2, leaf.ndim)) for leaf in jax.tree.leaves(each)))
        np.testing.assert_allclose(field.slope_norms(params, latents, coords, signals), norms, rtol=1e-10)
        chosen = np.zeros((3, 12))
        np.put_along_axis(chosen, np.argsort(-np.asarray(norms), axis=1)[:, :4], 1 / 8, axis=1)  # a mean of 4 x 2
        latents = latents - 0.3 * jax.grad(lambda x, part=chosen: (errors(params[last], x) * part).sum())(latents)
    pruned = inner_loop.adapt(field, params, coords, signals, 2, step_size=0.3, pruned_to=4)
    np.testing.assert_allclose(pruned.latents, latents, rtol=1e-9, atol=1e-13)
    chunks = inner_loop.adapt(field, params, coords, signals, 2, step_size=0.3, pruned_to=4, points_per_chunk=3)
    np.testing.assert_allclose(chunks.latents, latents, rtol=1e-9, atol=1e-13)
