import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import inner_loop, loss


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("steps", [1, 6])
def test_normal_equations_are_the_sum_over_points(channels, steps):
    """One modulated layer: G small goes through the points, G large does not; values and second-order slopes agree."""
    model = mf.ModelSettings(layers=3, width=10, latent_dim=5, omega_first=15.0, omega_last=30.0)
    field = mf.Field(model, coord_dims=2, channels=channels)
    params = field.init(jax.random.key(0), jnp.float64)
    coords, signals = mf.grid((8, 8)), np.random.default_rng(0).uniform(size=(3, 64, channels))
    assert (2 * steps * 3 * channels * (64 - 20) >= 64 * 20) == (steps == 6)

    def outer(params, context):
        fit, _ = inner_loop.adapt(field, params, coords, signals, context, step_size=0.3)
        return jnp.square(fit.latents).sum() + fit.losses.sum()

    every_point = jnp.broadcast_to(jnp.arange(64), (steps, 64))  # rows are given, so the points are summed over
    one, other = (jax.value_and_grad(outer)(params, context) for context in (steps, every_point))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-11)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12), one[1], other[1])


def test_contrastive_loss_is_that_of_its_definition():
    """Khosla et al. 2020, equation 2, signal by signal."""
    rng = np.random.default_rng(0)
    latents, labels, tau = rng.normal(size=(7, 5)), np.array([0, 1, 0, 2, 1, 0, 3]), 0.3
    unit = latents / np.linalg.norm(latents, axis=1, keepdims=True)
    losses = []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        partners = [p for p in others if labels[p] == labels[i]]
        total = sum(np.exp(unit[i] @ unit[a] / tau) for a in others)
        if partners:
            losses.append(-np.mean([np.log(np.exp(unit[i] @ unit[p] / tau) / total) for p in partners]))
    value = jax.jit(jax.value_and_grad(loss.contrastive_loss))(latents, labels, tau)
    np.testing.assert_allclose(value[0], np.mean(losses), rtol=1e-12)
    assert np.isfinite(value[1]).all()
    assert float(loss.contrastive_loss(latents, np.arange(7), tau)) == 0
