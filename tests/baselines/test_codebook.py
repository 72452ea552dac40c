import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.baselines import codebook
from medfuncta_jax.baselines.codebook import CodebookField
from medfuncta_jax.settings import InnerSettings
from medfuncta_jax.training_state import Trainable

MODEL = mf.ModelSettings(layers=4, width=16, latent_dim=6, omega_first=10.0, omega_last=30.0)


def layers_of(params):
    """Those of the field without a codebook."""
    return {name: layer for name, layer in params.items() if name != "codebook"}


@pytest.mark.some(1)
@pytest.mark.parametrize("layers", [3, 4])
def test_a_codebook_decodes_the_nearest_vectors(layers):
    model = dataclasses.replace(MODEL, layers=layers)
    field, plain = CodebookField(model, 2, 1, vectors=5, entries=2), mf.Field(model, 2, 1)
    params = field.init(jax.random.key(0), jnp.float64)
    rng = np.random.default_rng(0)
    latents, coords = 0.2 * rng.normal(size=(3, 6)), rng.uniform(-1, 1, (7, 2))
    book = np.asarray(params["codebook"]["embedding"])
    assert book.shape == (5, 2)
    pieces = latents.reshape(3, 3, 1, 2)
    nearest = book[np.square(pieces - book).sum(-1).argmin(-1)].reshape(3, 6)
    np.testing.assert_allclose(
        field.apply(params, latents, coords), plain.apply(layers_of(params), nearest, coords), atol=1e-12
    )
    # Latent and codebook both have the gradient of the vectors that are decoded.
    expected = jax.grad(lambda z: jnp.square(plain.apply(layers_of(params), z, coords)).sum())(nearest)
    of_latents, of_params = jax.grad(lambda z, p: jnp.square(field.apply(p, z, coords)).sum(), argnums=(0, 1))(
        jnp.asarray(latents), params
    )
    np.testing.assert_allclose(of_latents, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        of_params["codebook"]["embedding"].sum(0), expected.reshape(-1, 2).sum(0), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("learned", [None, -1.0])
def test_exported_field_walks_the_same_path_with_the_default_step_size(learned):
    field = CodebookField(MODEL, 2, 1, vectors=9, entries=2)
    params, inner = field.init(jax.random.key(0), jnp.float64), InnerSettings(step_size=0.7, learned_step_size="scalar")
    trainable = Trainable(params, None if learned is None else jnp.asarray(learned))
    exported = codebook.exported_params(field, trainable, inner)
    signals = np.random.default_rng(1).uniform(size=(2, 6, 6, 1))
    trained = mf.fit_latent(field, params, signals, step_size=0.7 if learned is None else np.exp(learned))
    default = mf.fit_latent(field, exported, signals)
    np.testing.assert_allclose(default.losses, trained.losses, rtol=1e-9)


def test_a_codebook_is_saved_and_read_back(tmp_path):
    field = CodebookField(MODEL, 2, 1, vectors=9, entries=2)
    params = field.init(jax.random.key(0))
    mf.save_field(tmp_path / "field.safetensors", field, params, {})
    again, same = mf.load_field(tmp_path)
    assert again == field
    jax.tree.map(np.testing.assert_array_equal, params, same)
