"""`model.products` names the precision of hidden layers; everything else is full float32, on every device."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import medfuncta_jax as mf
from medfuncta_jax.baselines.codebook import CodebookField
from medfuncta_jax.baselines.contrastive import contrastive_loss
from medfuncta_jax.mlp_classifier import Mlp
from medfuncta_jax.product import has_tensorfloat32
from medfuncta_jax.signal_metric import _sum_of_squares

WIDTH = 24  # no other size is 24
MODELS = {
    "siren": {"layers": 4},
    "first layer modulated": {"layers": 4, "modulate_first_layer": True},
    "scale": {"layers": 4, "modulate_scale": True},
    "grid": {"layers": 4, "latent_grid": (2, 1)},
    "codebook": {"layers": 4, "modulation_hidden": (7,)},
    "basis": {"layers": 3},
}
HIGHEST, HIGH, DEFAULT = jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGH, jax.lax.Precision.DEFAULT


def field_of(kind, products="float32"):
    model = mf.ModelSettings(width=WIDTH, latent_dim=10, products=products, **MODELS[kind])
    return CodebookField(model, 2, 3, vectors=5, entries=2) if kind == "codebook" else mf.Field(model, 2, 3)


def products_in(jaxpr):
    """(is of a hidden layer, precision, dtype) of every product of a traced program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            sizes = [sorted(v.aval.shape) for v in (*equation.invars, *equation.outvars)]
            precision = equation.params["precision"]
            yield [WIDTH, WIDTH] in sizes, set(precision or [None]), {v.aval.dtype.name for v in equation.invars}
        for inner in jaxprs_in_params(equation.params):
            yield from products_in(inner)


def programs(field):
    """Training, fitting, reconstruction and metrics: the public functions that multiply, with their arguments."""
    params = jax.eval_shape(lambda: field.init(jax.random.key(0), jnp.float32))
    signals = np.random.default_rng(0).uniform(size=(2, 6, 6, 3)).astype(np.float32)
    latents, coords = jnp.zeros((2, 10), jnp.float32), jnp.asarray(mf.grid((6, 6)), jnp.float32)
    inner = mf.InnerLoop(steps=1, selection_ratio=0.5, shared_context=field.model.layers == 3)
    loss = lambda params: mf.meta_loss(field, params, signals, jax.random.key(1), inner=inner)  # noqa: E731
    yield jax.grad(loss), (params,)
    yield lambda params: mf.fit_latent(field, params, signals, steps=1), (params,)
    yield lambda params: mf.reconstruct(field, params, latents, coords), (params,)
    yield (
        lambda params: _sum_of_squares(
            dataclasses.replace(field, model=dataclasses.replace(field.model, products="float32")),
            params, latents, coords[:2], jnp.zeros(2, int),
        ),
        (params,),
    )  # fmt: skip


@pytest.mark.some(3)
@pytest.mark.parametrize(
    ("kind", "products"),  # all three of one kind; of the others, whose layers are the same, one
    [("siren", "float32"), *((kind, "tensorfloat32") for kind in MODELS), ("siren", "bfloat16")],
)
def test_everything_but_the_hidden_layers_is_full_float32(kind, products):
    asked = {"float32": HIGHEST, "tensorfloat32": HIGH, "bfloat16": DEFAULT}[products]
    reduced = 0
    for function, arguments in programs(field_of(kind, products)):
        found = list(products_in(jax.make_jaxpr(function)(*arguments).jaxpr))
        assert found
        for hidden, precision, types in found:
            if precision == {HIGHEST}:
                assert types == {"float32"}
            else:
                assert hidden
                assert precision == {asked}
                assert ("bfloat16" in types) == (products == "bfloat16")
                reduced += 1
    assert (reduced > 0) == (products != "float32")


def test_metrics_and_classifiers_are_full_float32():
    images = jnp.zeros((12, 12, 1), jnp.float32)
    mlp = Mlp((8,), 2)
    weights = mlp.init(jax.random.key(0), jnp.zeros((1, 5), jnp.float32))
    labels = jnp.zeros(3, int)
    for function, arguments in (
        (mf.metrics.ssim, (images, images)),
        (mlp.apply, (weights, jnp.zeros((3, 5), jnp.float32))),
        (lambda latents: contrastive_loss(latents, labels, 0.1), (jnp.ones((3, 4), jnp.float32),)),
    ):
        found = list(products_in(jax.make_jaxpr(function)(*arguments).jaxpr))
        assert found
        assert all(precision == {HIGHEST} for _, precision, _ in found)


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", ["siren", "basis"])
def test_float32_is_float32_on_the_device_at_hand(kind):
    """On a GPU whose float32 products were TF32 the meta-gradient would be 1e-3 and more off."""
    field = field_of(kind)
    params = field.init(jax.random.key(0), jnp.float64)
    signals = np.random.default_rng(0).uniform(size=(2, 16, 16, 3))
    inner = mf.InnerLoop(steps=3, step_size=0.1)
    gradients = []
    for dtype in (jnp.float32, jnp.float64):
        cast = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), params)
        loss = lambda params: mf.meta_loss(field, params, signals, None, inner=inner)  # noqa: E731
        gradients.append(jax.jit(jax.grad(loss))(cast))
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, *gradients))
    assert difference < 1e-4 * optax.tree.norm(gradients[1])


def test_gpus_have_tensorfloat32_from_compute_capability_8_on():
    for platform, capability, expected in (("gpu", "7.5", False), ("gpu", "8.0", True), ("gpu", "12.1", True)):
        device = SimpleNamespace(platform=platform, compute_capability=capability)
        assert has_tensorfloat32(device) is expected
    assert not has_tensorfloat32(SimpleNamespace(platform="cpu"))


def test_tensorfloat32_is_float32_where_there_is_none():
    device = jax.devices()[0]
    if has_tensorfloat32(device):
        pytest.skip(f"{device.device_kind} has TF32")
    results = []
    for products in ("float32", "tensorfloat32"):
        field = field_of("siren", products)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), field.init(jax.random.key(0)))
        results.append(mf.fit_latent(field, params, np.full((1, 8, 8, 3), 0.3, np.float32), steps=3).latents)
    np.testing.assert_array_equal(*results)
