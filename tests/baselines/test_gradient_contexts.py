import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import meta_step
from medfuncta_jax.baselines import gradient_contexts
from medfuncta_jax.baselines.gradient_contexts import gradient_norms
from medfuncta_jax.training_state import Trainable
from tests import plain_field

COORDS = mf.grid((5, 4))
KINDS = {"shift": {}, "basis": {"layers": 3}, "scale": {"modulate_scale": True, "modulate_first_layer": True}}
INNER = mf.InnerLoop(steps=2, step_size=0.3, selection_ratio=0.35)  # 7 points


def problem(kind):
    sizes = {"layers": 4, "width": 8, "latent_dim": 6, "omega_first": 15.0, "omega_last": 30.0}
    field = mf.Field(mf.ModelSettings(**sizes | KINDS[kind]), 2, 2)
    signals = np.random.default_rng(0).uniform(size=(4, 20, 2))
    return field, field.init(jax.random.key(0), jnp.float64), jnp.asarray(signals)


@pytest.mark.some(2)
@pytest.mark.parametrize("channel_loss", ["mean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_contexts_of_the_points_with_the_largest_gradients(kind, channel_loss):
    """Each point's gradient in the last layer one by one, and steps on the points chosen by them."""
    field, params, signals = problem(kind)
    last = f"layer_{field.model.layers}"

    @jax.jit
    def norms_one_by_one(latents):
        def errors(layer):
            return jnp.square(field.apply({**params, last: layer}, latents, COORDS) - signals).sum(-1)

        each = jax.jacobian(errors)(params[last])
        return jnp.sqrt(sum(jnp.square(leaf).sum(range(2, leaf.ndim)) for leaf in jax.tree.leaves(each)))

    @jax.jit
    def latents_after(rows):
        return plain_field.meta_loss(field, params, COORDS, signals, rows, INNER.step_size, channel_loss=channel_loss)[
            1
        ]

    latents, rows = jnp.zeros((4, 6)), []
    for _ in range(2):
        norms = norms_one_by_one(latents)
        np.testing.assert_allclose(gradient_norms(field, params, latents, COORDS, signals), norms, rtol=1e-10)
        rows.append(np.argsort(-np.asarray(norms), axis=1)[:, :7])
        latents = latents_after(np.stack(rows, axis=1))
    found = gradient_contexts.gradient_contexts(
        field, params, jnp.asarray(COORDS), signals, inner=dataclasses.replace(INNER, channel_loss=channel_loss),
        step_size=0.3,
    )  # fmt: skip
    np.testing.assert_array_equal(found, np.stack(rows, axis=1))


@pytest.mark.some(1)
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_an_update_is_that_of_the_chosen_contexts(micro_batch):
    field, params, signals = problem("shift")
    settings = mf.Settings.from_dict(
        {"data": {"source": "any"}, "inner": {"steps": 2, "step_size": 0.3, "selection_ratio": 0.35},
         "train": {"batch_size": 4, "micro_batch": micro_batch, "method": "gradient_contexts"}}
    )  # fmt: skip
    state = meta_step.start(field, Trainable(params, None), settings.train)
    training = meta_step.Training(field, settings, (5, 4))
    _, metrics = jax.jit(lambda state: gradient_contexts.update(training, state, signals, jax.random.key(1)))(state)
    rows = gradient_contexts.gradient_contexts(field, params, jnp.asarray(COORDS), signals, inner=INNER, step_size=0.3)
    expected = mf.meta_loss(field, params, signals, rows, inner=INNER, coords=COORDS)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-9)
