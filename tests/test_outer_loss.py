"""`meta_loss` against a plain statement of the method, and the inputs that it accepts."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import medfuncta_jax as mf
from medfuncta_jax.baselines.codebook import CodebookField
from medfuncta_jax.baselines.patches import PatchField
from medfuncta_jax.baselines.pyramid import PyramidField
from medfuncta_jax.context import random_context
from tests import plain_field

COORDS = mf.grid((5, 4))
FIELD = mf.Field(mf.ModelSettings(layers=4, width=16, latent_dim=6, omega_first=15.0, omega_last=40.0), 2, 1)
INNER = mf.InnerLoop(steps=2, step_size=0.3)

KINDS = {
    "shift": {},
    "no_residual": {"residual": False},
    "first": {"modulate_first_layer": True},
    "first_no_residual": {"modulate_first_layer": True, "residual": False},
    "scale": {"modulate_scale": True, "modulate_first_layer": True},
    "hidden": {"modulation_hidden": (6,)},
    "codebook": {},
    "grid": {"latent_dim": 24, "latent_grid": (2, 2)},
    "grid_first_scale": {
        "latent_dim": 24, "latent_grid": (2, 2), "modulate_first_layer": True, "modulate_scale": True
    },
    "nearest": {"latent_dim": 24, "latent_grid": (2, 3), "latent_interpolation": "nearest"},
    "patches": {"latent_dim": 24, "latent_grid": (2, 2), "latent_interpolation": "nearest"},
    "pyramid": {"residual": False},
    "basis": {"layers": 3},
    "basis_no_residual": {"layers": 3, "residual": False},
}  # fmt: skip

FIELDS = {
    "codebook": functools.partial(CodebookField, vectors=4, entries=2), "patches": PatchField,
    "pyramid": functools.partial(PyramidField, last_width=5),
}  # fmt: skip

CONTEXTS = {
    "own": {},
    "own, all kept": {"remat": "none"},
    "own, half kept": {"remat": "layers"},
    "shared": {"context": "shared", "remat": "layers"},
    "few shared": {"context": "few"},
    "all": {"context": "all", "remat": "layers"},
    "all in chunks": {"context": "all", "points_per_chunk": 6},
    "own in chunks": {"points_per_chunk": 3, "remat": "layers"},
    "shared, outer loss in chunks": {"context": "shared", "points_per_chunk": 12, "remat": "none"},
    "micro-batches": {"micro_batches": 4},
    "micro-batches, shared, in chunks": {"context": "shared", "micro_batches": 2, "points_per_chunk": 4},
    "first order": {"first_order": True},
    "channels summed": {"channel_loss": "sum", "step_size": 0.1},
}


def problem(kind, channels=2, **options):
    model = mf.ModelSettings(
        **({"layers": 4, "width": 8, "latent_dim": 6, "omega_first": 15.0, "omega_last": 30.0} | KINDS[kind] | options)
    )
    field = FIELDS.get(kind, mf.Field)(model, 2, channels)
    signals = np.random.default_rng(0).uniform(size=(4, 5, 4, channels))
    return field, field.init(jax.random.key(0), jnp.float64), signals


def contexts(kind):
    """As `meta_loss` takes them; and those of each signal, repeated to 20 points, which is the same mean."""
    rng = np.random.default_rng(1)
    rows = {
        "own": rng.integers(20, size=(4, 2, 10)), "shared": rng.integers(20, size=(2, 10)),
        "few": rng.integers(20, size=(2, 2)), "all": None,
    }[kind]  # fmt: skip
    each = np.arange(20)[None] if rows is None else np.tile(rows, 20 // rows.shape[-1])
    return rows, np.broadcast_to(each, (4, 2, 20))


def gradient(kind, *, context="own", **options):
    """Loss and gradients of `meta_loss` in parameters and step sizes."""
    field, params, signals = problem(kind)
    rows, inner = contexts(context)[0], dataclasses.replace(INNER, **options)

    def loss(params, alpha):
        return mf.meta_loss(field, params, signals, rows, inner=inner, step_size=alpha)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, step_sizes(inner.step_size, field))


def written_down(kind, *, context="own", step_size=INNER.step_size, channel_loss="mean", first_order=False, **_):
    """The same as the method is written down."""
    field, params, signals = problem(kind)
    alpha, rows = step_sizes(step_size, field), contexts(context)[1]
    return plain(kind, channel_loss, first_order)(params, alpha, signals.reshape(4, 20, 2), rows)


@functools.cache  # compiled once for all contexts
def plain(kind, channel_loss="mean", first_order=False):
    field = problem(kind)[0]

    def loss(params, alpha, signals, rows):
        return plain_field.meta_loss(
            field, params, COORDS, signals, rows, alpha, channel_loss=channel_loss, first_order=first_order
        )

    def value_and_gradient(*arguments):
        (value, _), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*arguments)
        return value, gradients

    return jax.jit(value_and_gradient)


def step_sizes(step_size, field):
    return jnp.linspace(0.5, 1, field.model.latent_dim) * step_size


def assert_close(actual, expected):
    """To a relative 1e-9 of the largest entry of each array."""
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9 * float(jnp.abs(other).max()))


@pytest.mark.some(4)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_method_as_it_is_written_down(kind):
    """Every kind of field, whole and in chunks."""
    assert_close(gradient(kind), written_down(kind))
    chunks = {"context": "all", "points_per_chunk": 6, "remat": "layers"}
    assert_close(gradient(kind, **chunks), written_down(kind, **chunks))


@pytest.mark.some(6)
@pytest.mark.parametrize("how", CONTEXTS)
@pytest.mark.parametrize("kind", ["shift", "basis"])
def test_every_way_to_compute_it_gives_the_same_gradient(kind, how):
    assert_close(gradient(kind, **CONTEXTS[how]), written_down(kind, **CONTEXTS[how]))


@pytest.mark.some(3)
@pytest.mark.parametrize("of", ["points", "values", "channels"])
@pytest.mark.parametrize("kind", ["shift", "basis", "scale"])
@pytest.mark.parametrize("how", ["own", "all", "all in chunks", "micro-batches", "channels summed"])
def test_weights_mask_inner_steps_and_outer_loss(kind, how, of):
    """As it is written down, whatever stands where the weight is 0."""
    field, params, signals = problem(kind)
    options = dict(CONTEXTS[how])
    rows, every = contexts(options.pop("context", "own"))
    channel_loss, step_size = options.get("channel_loss", "mean"), options.pop("step_size", INNER.step_size)
    weights = np.random.default_rng(2).uniform(size=(4, 20, 2))
    weights[:, 3:9] = 0
    if of == "points":
        weights[:] = weights[..., :1]
    if of == "channels":
        weights[:] = [[[1, 0]], [[1, 1]], [[0, 1]], [[1, 1]]]
    inner = dataclasses.replace(INNER, **options)
    given = weights[..., 0] if of == "points" else weights.reshape(4, 5, 4, 2)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def ours(params, alpha):
        return mf.meta_loss(field, params, hidden, rows, inner=inner, weights=given, step_size=alpha)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def written_down(params, alpha):
        flat = signals.reshape(4, 20, 2)
        return plain_field.meta_loss(
            field, params, COORDS, flat, every, alpha, channel_loss=channel_loss, weights=weights
        )[0]

    hidden = np.where(weights.reshape(signals.shape) > 0, signals, np.nan)
    alpha = step_sizes(step_size, field)
    assert_close(ours(params, alpha), written_down(params, alpha))
    latents = mf.inner_loop(field, params, hidden, rows, inner=inner, weights=given, step_size=alpha).latents
    meant = plain_field.meta_loss(
        field, params, COORDS, signals.reshape(4, 20, 2), every, alpha, channel_loss=channel_loss, weights=weights
    )[1]
    np.testing.assert_allclose(latents, meant, rtol=1e-9, atol=1e-12)


def test_one_signal_takes_the_features_of_its_context_from_those_of_all_points():
    field, params, signals = problem("shift")
    rows, alpha = contexts("own")[0][:1], jnp.full(6, INNER.step_size)
    four = np.tile(signals[:1].reshape(1, 20, 2), (4, 1, 1)), np.tile(rows, (4, 1, 2))
    expected = plain("shift")(params, alpha, *four)[1][0]
    for options in ({}, {"points_per_chunk": 15}, {"remat": "none"}):
        inner = dataclasses.replace(INNER, **options)

        def loss(params, inner=inner):
            return mf.meta_loss(field, params, signals[:1], rows, inner=inner)

        assert_close(jax.jit(jax.grad(loss))(params), expected)


def test_a_key_draws_the_contexts_that_inner_describes():
    field, params, signals = problem("shift")
    key = jax.random.key(7)
    for shared in (False, True):
        inner = dataclasses.replace(INNER, selection_ratio=0.5, shared_context=shared)
        rows = random_context(key, points=20, selection_ratio=0.5, steps=2, signals=None if shared else 4)
        drawn, given = (mf.meta_loss(field, params, signals, context, inner=inner) for context in (key, rows))
        np.testing.assert_array_equal(drawn, given)
    everything = dataclasses.replace(INNER, selection_ratio=1.0)
    np.testing.assert_array_equal(
        *(mf.meta_loss(field, params, signals, given, inner=everything) for given in (key, None))
    )


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", ["shift", "basis", "scale"])
def test_meta_loss_composes(kind):
    """jit, vmap, and derivatives in both modes; the second derivative is forward over reverse."""
    field, params, signals = problem(kind, layers=4 if kind == "shift" else 3)
    signals, rows = jnp.asarray(signals[:2]), contexts("own")[0][:2]
    rng, pair = np.random.default_rng(2), jnp.stack([signals, 1 - signals])
    along = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    def loss(params, step_size=0.3, signals=signals):
        return mf.meta_loss(field, params, signals, rows, inner=INNER, step_size=step_size)

    @jax.jit
    def derivatives(params):
        return {
            "gradient": jax.grad(loss, argnums=(0, 1))(params, 0.3),
            "jvp": jax.jvp(loss, (params, 0.3), (along, 1.0)),
            "jacfwd": jax.jacfwd(loss, argnums=1)(params, 0.3),
            "mapped": jax.vmap(loss, in_axes=(None, 0))(params, jnp.asarray([0.1, 0.3])),
            "mapped gradient": jax.vmap(jax.grad(loss), (None, None, 0))(params, 0.3, pair),
            "second": jax.jvp(jax.grad(loss), (params,), (along,))[1],
        }

    found, value = derivatives(params), jax.jit(loss)
    of_params, of_step_size = found["gradient"]
    expected = sum(jax.tree.leaves(jax.tree.map(lambda g, t: (g * t).sum(), of_params, along))) + of_step_size
    np.testing.assert_allclose(found["jvp"], (value(params, 0.3), expected), rtol=1e-10)
    np.testing.assert_allclose(found["jacfwd"], of_step_size, rtol=1e-10)
    np.testing.assert_allclose(found["mapped"], [value(params, alpha) for alpha in (0.1, 0.3)], rtol=1e-12)
    assert_close(jax.tree.map(lambda leaf: leaf[0], found["mapped gradient"]), of_params)
    step, gradient = 1e-6, jax.jit(jax.grad(loss))
    ahead, behind = (
        gradient(jax.tree.map(lambda leaf, d, sign=sign: leaf + sign * step * d, params, along)) for sign in (1, -1)
    )
    for one, after, before in zip(*map(jax.tree.leaves, (found["second"], ahead, behind)), strict=True):
        scale = float(jnp.abs(one).max())
        np.testing.assert_allclose(one, (after - before) / (2 * step), rtol=1e-4, atol=1e-4 * scale)


def test_a_derivative_that_meta_loss_does_not_have_is_refused():
    field, params, signals = problem("shift")
    with pytest.raises(TypeError, match="differentiated in params and step_size, not in signals"):
        jax.grad(lambda signals: mf.meta_loss(field, params, signals, None, inner=INNER))(jnp.asarray(signals))


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", ["shift", "basis", "hidden"])
def test_the_inner_loop_composes_too(kind):
    """An outer loss of one's own, by automatic differentiation, in signals as well."""
    field, params, signals = problem(kind)
    rows, inner = contexts("own")[0], dataclasses.replace(INNER, points_per_chunk=4)

    def own(params, signals):
        latents = mf.inner_loop(field, params, signals, rows, inner=inner).latents
        return jnp.square(field.apply(params, latents, COORDS) - signals.reshape(4, 20, 2)).mean()

    signals = jnp.asarray(signals)
    gradient = jax.jit(jax.grad(own, argnums=(0, 1)))(params, signals)
    alpha, each = jnp.full(6, INNER.step_size), contexts("own")[1]
    assert_close(gradient[0], plain(kind)(params, alpha, signals.reshape(4, 20, 2), each)[1][0])
    direction = jax.random.normal(jax.random.key(1), signals.shape)
    tangent = jax.jit(lambda t: jax.jvp(lambda signals: own(params, signals), (signals,), (t,))[1])(direction)
    np.testing.assert_allclose(tangent, (gradient[1] * direction).sum(), rtol=1e-9)
    result = mf.inner_loop(field, params, signals, rows, inner=INNER)
    assert result.losses.shape == (4, 2)
    latents = jax.jit(lambda signals: plain_field.meta_loss(field, params, COORDS, signals, rows, INNER.step_size)[1])(
        signals.reshape(4, 20, 2)
    )
    np.testing.assert_allclose(result.latents, latents, rtol=1e-9, atol=1e-12)


def test_latent_loss_is_added_and_decides_what_is_decoded():
    field, params, signals = problem("shift")
    noise, rows = np.random.default_rng(3).normal(size=(4, 6)), contexts("own")[0]

    def penalised(noise, latents):
        return latents + noise, 0.5 * jnp.square(latents).mean()

    def ours(parts, params):
        inner = dataclasses.replace(INNER, micro_batches=parts)
        return mf.meta_loss(
            field, params, signals, rows, inner=inner, latent_loss=jax.tree_util.Partial(penalised, noise)
        )

    def plain(params):
        latents = mf.inner_loop(field, params, signals, rows, inner=INNER).latents
        values = field.apply(params, latents + noise, COORDS)
        return jnp.square(values - signals.reshape(4, 20, 2)).mean() + 0.5 * jnp.square(latents).mean()

    expected = jax.jit(jax.value_and_grad(plain))(params)
    for parts in (1, 2):
        assert_close(jax.jit(jax.value_and_grad(functools.partial(ours, parts)))(params), expected)


@pytest.mark.parametrize("layers", [3, 4])
def test_meta_gradient_against_finite_differences(layers):
    field = mf.Field(dataclasses.replace(FIELD.model, layers=layers), 2, 1)
    params, signals = field.init(jax.random.key(0), jnp.float64), np.random.default_rng(0).uniform(size=(4, 6, 6, 1))
    context = random_context(jax.random.key(2), points=36, selection_ratio=0.5, steps=3, signals=4)
    inner = dataclasses.replace(INNER, steps=3)

    def loss_at(params, step_size):
        return mf.meta_loss(field, params, signals, context, inner=inner, step_size=step_size)

    gradient = jax.jit(jax.grad(loss_at, argnums=(0, 1)))(params, 0.5)
    value = jax.jit(loss_at)
    rng, step = np.random.default_rng(1), 1e-6
    for _ in range(3):
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (params, 0.5 * jnp.ones(())))
        ahead, behind = (
            value(*jax.tree.map(lambda leaf, d, sign=sign: leaf + sign * step * d, (params, 0.5), direction))
            for sign in (1, -1)
        )
        actual = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
        np.testing.assert_allclose(actual, (ahead - behind) / (2 * step), rtol=2e-6)


def test_remat_keeps_the_less_the_more_it_computes_again():
    """Temporaries of the compiled gradient: a setting that changes nothing would be another's equal."""
    signals = np.zeros((2, 16, 16, 1))
    field = mf.Field(mf.ModelSettings(layers=6, width=32, latent_dim=8), 2, 1)
    params = field.init(jax.random.key(0))

    def temporaries(remat):
        inner = mf.InnerLoop(steps=10, remat=remat)

        def loss(params):
            return mf.meta_loss(field, params, signals, None, inner=inner)

        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    none, layers, steps = (temporaries(remat) for remat in ("none", "layers", "steps"))
    assert steps < 0.7 * layers < 0.5 * none


def test_no_large_array_is_transposed():
    """In the compiled gradient, neither rows of points nor a kernel of the latent."""
    field = mf.Field(mf.ModelSettings(layers=5, width=16, latent_dim=64), 2, 1)
    params, signals = field.init(jax.random.key(0)), np.zeros((2, 16, 8, 1), np.float32)
    context = np.zeros((2, 3, 32), np.int32)
    inner = mf.InnerLoop(steps=3, remat="layers")
    gradient = jax.grad(lambda params: mf.meta_loss(field, params, signals, context, inner=inner))
    text = jax.jit(gradient).lower(params).compile().as_text()
    transposed = [line for line in text.splitlines() if " transpose(" in line]
    assert " dot(" in text
    assert not [line for line in transposed if "[64,16]" in line or "[128,16]" in line or "[64,32]" in line]


def test_first_order_is_not_second_order():
    exact, first = (gradient("shift", context="all", first_order=order)[1][0] for order in (False, True))
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, exact, first))
    assert difference > 1e-3 * optax.tree.norm(exact)


def test_points_may_be_anywhere():
    field, params, signals = problem("shift")
    order = np.random.default_rng(5).permutation(20)
    one = mf.meta_loss(field, params, signals, None, inner=INNER)
    other = mf.meta_loss(field, params, signals.reshape(4, 20, 2)[:, order], None, inner=INNER, coords=COORDS[order])
    np.testing.assert_allclose(one, other, rtol=1e-12)
    given = mf.meta_loss(field, params, signals.tolist(), None, inner=INNER, coords=COORDS.reshape(5, 4, 2).tolist())
    chex.assert_trees_all_close(given, one, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": np.zeros((3, 3, 4), int)}, r"context .3, 3, 4. must be \[G, n\] or \[4, G, n\]"),
        ({"context": np.zeros(4, int)}, r"context .4,. must be"),
        ({"context": np.full((2, 3), 20)}, r"context holds points from 20 to 20, outside \[0, 20\)"),
        ({"context": np.full((2, 3), -1)}, "points from -1"),
        ({"context": np.zeros((2, 3))}, "context must hold integers"),
        ({"signals": np.zeros((0, 5, 4, 2))}, "at least one signal"),
        ({"signals": np.zeros((4, 5, 4, 3))}, "must end in the field's 2 channel"),
        ({"signals": np.full((4, 5, 4, 2), np.nan)}, "signal 0 holds values that are not finite"),
        ({"coords": np.zeros((19, 2))}, r"coords .19, 2. must be"),
        ({"coords": np.full((5, 4, 2), np.nan)}, "coords holds values that are not finite"),
        ({"coords": np.zeros((4, 5, 4, 2))}, "must be shared by the signals"),
        ({"step_size": np.ones(5)}, r"step_size .5,. must be a scalar or \[6\]"),
        ({"inner": mf.InnerLoop(micro_batches=3)}, "micro_batches = 3 does not divide the 4 signals"),
    ],
)
def test_faults_are_named(change, message):
    field, params, signals = problem("shift")
    arguments = {"signals": signals, "context": None, "inner": INNER} | change
    with pytest.raises(ValueError, match=message):
        mf.meta_loss(field, params, arguments.pop("signals"), arguments.pop("context"), **arguments)
