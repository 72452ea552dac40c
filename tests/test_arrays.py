"""Arrays of any framework go in everywhere, and what cannot be one is refused by its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax.arrays import as_array, relative_weights

FIELD = mf.Field(mf.ModelSettings(layers=4, width=12, latent_dim=6, omega_first=15.0, omega_last=30.0), 1, 1)
PARAMS = FIELD.init(jax.random.key(0))


class OtherTensor:
    """As TensorFlow's eager tensors: known to numpy by `__array__` alone, without `ndim` or `astype`."""

    def __init__(self, values):
        self._values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return self._values if dtype is None else self._values.astype(dtype)


class TrainedTensor(OtherTensor):
    """As torch's tensors that require a gradient: numpy is refused until they are detached."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")

    def detach(self):
        return self

    def cpu(self):
        return OtherTensor(self._values)


KINDS = {
    "list": lambda values: np.asarray(values).tolist(),
    "jax": jnp.asarray,
    "tensorflow-like": OtherTensor,
    "torch-like": TrainedTensor,
}


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_any_framework_give_the_same_results(kind):
    of = KINDS[kind]
    rng = np.random.default_rng(0)
    signals, weights = rng.uniform(size=(3, 9, 1)), rng.uniform(0.5, 1, size=(3, 9))
    coords, latents, labels = mf.grid((9,)), rng.normal(size=(3, 6)), np.array([0, 1, 0])
    rows, inner = rng.integers(9, size=(2, 4)), mf.InnerLoop(steps=2)
    with jax.enable_x64(True):  # else a list of Python numbers becomes float32 in one case and not in another
        for function in (
            lambda of: mf.fit_latent(
                FIELD, PARAMS, of(signals), coords=of(coords), weights=of(weights), init=of(latents)
            ),
            lambda of: mf.reconstruct(FIELD, PARAMS, of(latents), of(coords)),
            lambda of: mf.meta_loss(FIELD, PARAMS, of(signals), of(rows), inner=inner, coords=of(coords)),
            lambda of: mf.signal_metric(FIELD, PARAMS, of(latents), of(coords), key=jax.random.key(0)),
            lambda of: (
                mf.fit_mlp(of(latents), of(labels), of(latents), of(labels), classes=2, key=jax.random.key(0)).params
            ),
        ):
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), function(of), function(np.asarray)
            )


def test_torch_tensors_are_read():
    torch = pytest.importorskip("torch", reason="torch is not a dependency")
    tensor = torch.ones(3, 2, requires_grad=True)
    np.testing.assert_array_equal(as_array("x", tensor), np.ones((3, 2)))


@pytest.mark.parametrize("value", ["text", [[1, 2], [3]], {"a": 1}, np.array(["a"]), None])
def test_what_is_no_array_is_refused_by_its_name(value):
    with pytest.raises(ValueError, match=r"^latents "):
        as_array("latents", value)


def test_only_the_ratio_of_weights_counts():
    base = np.array([[1.0, 2.0, 0.0], [4.0, 1.0, 1.0]])
    expected = base / base.max(1, keepdims=True)
    for scale in (1.0, 1e37, 1e300, 1e-300):
        np.testing.assert_allclose(relative_weights(base * scale, 2, 3, 1)[..., 0], expected, rtol=1e-12)
    traced = jax.jit(lambda weights: relative_weights(weights, 2, 3, 1))(base.astype(np.float32) * 1e37)
    np.testing.assert_allclose(traced[..., 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(relative_weights([[True, False]], 1, 2, 5), [[[1.0], [0.0]]])
    np.testing.assert_array_equal(relative_weights(2 * np.eye(2)[None], 1, 2, 2), np.eye(2)[None])  # of values
    with pytest.raises(ValueError, match=r"weights \(1, 3, 4\) must be .* or \[B, N, D\] = \(1, 4, 3\)"):
        relative_weights(np.ones((1, 3, 4)), 1, 4, 3)  # channels first
