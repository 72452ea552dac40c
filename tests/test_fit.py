import jax
import jax.numpy as jnp
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import fit
from medfuncta_jax.chunks import chunk_of

MODEL = mf.ModelSettings(layers=4, width=24, latent_dim=8, omega_first=15.0, omega_last=40.0)


@pytest.fixture(scope="module")
def field():
    return mf.Field(MODEL, coord_dims=2, channels=1)


@pytest.fixture(scope="module")
def params(field):
    return field.init(jax.random.key(0), jnp.float64)


@pytest.fixture(scope="module")
def signals():
    return np.random.default_rng(0).uniform(size=(4, 6, 5, 1))


def test_grid_equals_explicit_coords(field, params, signals):
    on_grid = mf.fit_latent(field, params, signals)
    coords = mf.grid((6, 5))
    for given in (coords, np.broadcast_to(coords, (4, 30, 2))):
        explicit = mf.fit_latent(field, params, signals.reshape(4, 30, 1), coords=given)
        np.testing.assert_allclose(explicit.latents, on_grid.latents, rtol=1e-10, atol=1e-13)
    assert on_grid.latents.shape == (4, 8)
    assert on_grid.losses.shape == (4, 20)
    assert (on_grid.losses[:, -1] < on_grid.losses[:, 0]).all()


def test_order_of_points_changes_nothing(field, params, signals):
    order = np.random.default_rng(1).permutation(30)
    flat, coords = signals.reshape(4, 30, 1), mf.grid((6, 5))
    plain = mf.fit_latent(field, params, flat, coords=coords)
    shuffled = mf.fit_latent(field, params, flat[:, order], coords=coords[order])
    np.testing.assert_allclose(shuffled.latents, plain.latents, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(shuffled.losses, plain.losses, rtol=1e-11)


def test_batch_size_changes_nothing(field, params, signals):
    together = mf.fit_latent(field, params, signals)
    for i in range(4):
        alone = mf.fit_latent(field, params, signals[i : i + 1])
        np.testing.assert_allclose(alone.latents[0], together.latents[i], rtol=1e-9, atol=1e-12)


def test_zero_weight_padding_changes_nothing_whatever_it_holds(field, params, signals):
    flat, coords = signals.reshape(4, 30, 1), mf.grid((6, 5))
    padded = np.concatenate([flat, np.full((4, 7, 1), np.nan)], axis=1)
    padded_coords = np.concatenate([coords, np.zeros((7, 2))])
    weights = np.concatenate([np.ones((4, 30)), np.zeros((4, 7))], axis=1)
    plain = mf.fit_latent(field, params, flat, coords=coords)
    masked = mf.fit_latent(field, params, padded, coords=padded_coords, weights=weights)
    np.testing.assert_allclose(masked.latents, plain.latents, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(masked.losses, plain.losses, rtol=1e-11)


@pytest.mark.some(2)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("own_points", [False, True])
def test_chunks_of_points_change_nothing(field, params, signals, weighted, own_points):
    coords = np.broadcast_to(mf.grid((6, 5)), (4, 30, 2)) if own_points else mf.grid((6, 5))
    weights = np.random.default_rng(2).uniform(0, 2, (4, 30)) if weighted else None
    if weighted:
        weights[:, ::7] = 0
    fits = [
        mf.fit_latent(
            field, params, signals.reshape(4, 30, 1), coords=coords, weights=weights, safeguard=True,
            points_per_chunk=points,
        )
        for points in (30, 1, 8)
    ]  # fmt: skip
    for other in fits[1:]:
        np.testing.assert_allclose(other.latents, fits[0].latents, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(other.losses, fits[0].losses, rtol=1e-10)


def test_large_grids_go_in_chunks_of_their_own_accord(field, params):
    if jax.default_backend() != "cpu":
        pytest.skip("an accelerator takes this grid at once")
    rng, coords = np.random.default_rng(4), mf.grid((128, 128))
    signals = rng.uniform(size=(4, 128, 128, 1))
    assert chunk_of(field, None, 4, shared=True) < len(coords)
    one, other = (mf.fit_latent(field, params, signals, steps=2, points_per_chunk=points) for points in (None, 128**2))
    np.testing.assert_allclose(one.latents, other.latents, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(one.losses, other.losses, rtol=1e-10)
    latents = rng.normal(size=(4, 8))
    whole = field.apply(params, latents, coords)
    np.testing.assert_allclose(mf.reconstruct(field, params, latents, coords), whole, atol=1e-12)


def test_weights_are_relative_and_may_have_the_grids_shape(field, params, signals):
    weights = np.random.default_rng(2).uniform(0.5, 2, (4, 6, 5))
    one = mf.fit_latent(field, params, signals, weights=weights)
    other = mf.fit_latent(field, params, signals, weights=3 * weights.reshape(4, 30))
    np.testing.assert_allclose(one.latents, other.latents, rtol=1e-9, atol=1e-12)


def test_an_integer_weight_repeats_a_point(field, params):
    rng = np.random.default_rng(3)
    coords, signals = rng.uniform(-1, 1, (9, 2)), rng.uniform(size=(1, 9, 1))
    weights = np.ones((1, 9))
    weights[0, 4] = 3
    repeated = [0, 1, 2, 3, 4, 4, 4, 5, 6, 7, 8]
    one = mf.fit_latent(field, params, signals, coords=coords, weights=weights)
    other = mf.fit_latent(field, params, signals[:, repeated], coords=coords[repeated])
    np.testing.assert_allclose(one.latents, other.latents, rtol=1e-9, atol=1e-12)


def test_nothing_observed_leaves_the_latent_at_zero_where_it_is_not_refused(field, params, signals):
    """Within a compiled function nothing is known of the weights' values."""
    fit = jax.jit(lambda weights: mf.fit_latent(field, params, signals, weights=weights))(np.zeros((4, 30)))
    np.testing.assert_array_equal(fit.latents, 0)


def test_a_step_size_an_entry(field, params, signals):
    scalar = mf.fit_latent(field, params, signals, step_size=3e-2)
    vector = mf.fit_latent(field, params, signals, step_size=np.full(8, 3e-2))
    np.testing.assert_allclose(vector.latents, scalar.latents, rtol=1e-12)


def test_rescaled_steps_follow_the_full_gradient_with_the_norm_of_a_subset(field, params, signals):
    one_step = {"steps": 1, "step_size": 1.0}
    full = mf.fit_latent(field, params, signals, **one_step).latents
    rescaled = mf.fit_latent(field, params, signals, **one_step, rescale_ratio=0.5, key=jax.random.key(4)).latents
    ratio = np.linalg.norm(rescaled, axis=1) / np.linalg.norm(full, axis=1)
    np.testing.assert_allclose(rescaled, ratio[:, None] * full, rtol=1e-9)
    assert np.abs(ratio - 1).max() > 1e-3
    everything = mf.fit_latent(field, params, signals, **one_step, rescale_ratio=1.0).latents
    np.testing.assert_allclose(everything, full, rtol=1e-9, atol=1e-12)


def test_safeguard_changes_nothing_where_losses_fall(field, params, signals):
    plain = mf.fit_latent(field, params, signals)
    assert (np.diff(plain.losses, axis=1) < 0).all()
    guarded = mf.fit_latent(field, params, signals, safeguard=True)
    np.testing.assert_allclose(guarded.latents, plain.latents, rtol=1e-12)
    np.testing.assert_allclose(guarded.losses, plain.losses, rtol=1e-12)


def test_safeguard_takes_back_steps_that_diverge(field, params, signals):
    """With a step size far too large plain descent diverges; guarded, no signal ends above where it began."""
    wild = {"step_size": 30.0, "steps": 40}
    plain = mf.fit_latent(field, params, signals, **wild)
    guarded = mf.fit_latent(field, params, signals, **wild, safeguard=True)
    assert (plain.losses[:, -1] > plain.losses[:, 0]).any()
    ended = ((mf.reconstruct(field, params, guarded.latents, mf.grid((6, 5))) - signals.reshape(4, 30, 1)) ** 2).mean(1)
    assert (ended[:, 0] < guarded.losses[:, 0]).all()
    np.testing.assert_array_less(ended[:, 0], guarded.losses.min(axis=1) + 1e-12)


def test_safeguard_survives_a_step_to_infinity(field, params, signals):
    guarded = mf.fit_latent(field, params, signals, step_size=1e200, steps=5, safeguard=True)
    assert np.isfinite(guarded.latents).all()


def test_compiled_once_per_shape(field, params, signals):
    fit._fit.clear_cache()
    mf.fit_latent(field, params, signals)
    assert fit._fit._cache_size() == 1
    mf.fit_latent(field, params, signals + 0.1, step_size=0.5)
    assert fit._fit._cache_size() == 1
    mf.fit_latent(field, params, signals[:2])
    assert fit._fit._cache_size() == 2


def test_dtype_follows_the_parameters(field, signals):
    single = field.init(jax.random.key(0), jnp.float32)
    fit = mf.fit_latent(field, single, signals)
    assert fit.latents.dtype == fit.losses.dtype == jnp.float32
    assert mf.reconstruct(field, single, fit.latents, mf.grid((3, 3))).dtype == jnp.float32


@pytest.mark.some(4)
@pytest.mark.parametrize("chunk", [1, 7, 30, 1000, None])
@pytest.mark.parametrize("per_signal", [False, True])
def test_reconstruct_in_chunks(field, params, chunk, per_signal):
    latents = np.random.default_rng(5).normal(size=(3, 8))
    coords = mf.grid((6, 5))
    expected = field.apply(params, latents, coords)
    given = np.broadcast_to(coords, (3, 30, 2)) if per_signal else coords
    values = mf.reconstruct(field, params, latents, given, per_signal=per_signal, chunk=chunk)
    np.testing.assert_allclose(values, expected, atol=1e-13)


def test_reconstruct_at_another_resolution_agrees_on_shared_points(field, params):
    latents = np.random.default_rng(6).normal(size=(2, 8))
    coarse = mf.reconstruct(field, params, latents, mf.grid((5, 4))).reshape(2, 5, 4)
    fine = mf.reconstruct(field, params, latents, mf.grid((9, 7))).reshape(2, 9, 7)
    np.testing.assert_allclose(fine[:, ::2, ::2], coarse, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kw: kw.update(signals=np.zeros((2, 6, 5, 3))), "must end in the field's 1 channel"),
        (lambda kw: kw.update(signals=np.zeros((2, 30, 1))), r"must be \[B, 2 grid axes, D\]"),
        (lambda kw: kw.update(signals=np.zeros((2, 6, 5, 1), np.uint8)), "must be floating"),
        (lambda kw: kw.update(weights=np.ones((4, 29))), "weights .4, 29. must be"),
        (lambda kw: kw.update(weights=np.ones((4, 6, 5, 2))), "weights .4, 6, 5, 2. must be"),
        (lambda kw: kw.update(coords=np.zeros((30, 3))), r"coords .30, 3. must be \[N, 2\]"),
        (lambda kw: kw.update(coords=np.zeros((29, 2)), signals=np.zeros((2, 30, 1))), "N = 29"),
        (lambda kw: kw.update(coords=np.zeros((3, 30, 2)), signals=np.zeros((2, 30, 1))), r"\[2, N, 2\]"),
        (lambda kw: kw.update(steps=0), "steps must be an integer of at least 1, got 0"),
        (lambda kw: kw.update(steps=2.5), "steps must be an integer of at least 1, got 2.5"),
        (lambda kw: kw.update(signals=np.zeros((0, 6, 5, 1))), "at least one signal"),
        (lambda kw: kw.update(channel_loss="foo"), "channel_loss must be 'mean' or 'sum', got 'foo'"),
        (lambda kw: kw.update(weights=np.full((4, 30), np.nan)), "weights must be finite and not negative"),
        (lambda kw: kw.update(weights=np.full((4, 30), np.inf)), "weights must be finite and not negative"),
        (lambda kw: kw.update(weights=np.full((4, 30), -1.0)), "weights must be finite and not negative"),
        (lambda kw: kw.update(weights=np.eye(4, 30) * [[1], [1], [0], [1]]), "weights of signal 2 are all 0"),
        (lambda kw: kw.update(coords=np.full((6, 5, 2), np.nan)), "coords holds values that are not finite"),
        (lambda kw: kw.update(step_size=np.ones(7)), r"step_size .7,. must be a scalar or \[8\]"),
        (lambda kw: kw.update(init=np.zeros((4, 7))), r"latents .4, 7. must be \[B, 8\]"),
        (lambda kw: kw.update(init=np.zeros((3, 8))), r"init .3, 8. must be \[4, 8\]"),
        (lambda kw: kw.update(rescale_ratio=0.0), "rescale_ratio must be in"),
        (lambda kw: kw["signals"].__setitem__((1, 2, 3, 0), np.nan), "signal 1 holds values that are not finite"),
        (lambda kw: kw.update(signals=jnp.full((4, 6, 5, 1), jnp.nan)), "signal 0 holds values that are not finite"),
    ],
)
def test_faults_are_named(field, params, signals, change, message):
    keywords = {"signals": signals.copy()}
    change(keywords)
    with pytest.raises(ValueError, match=message):
        mf.fit_latent(field, params, **keywords)


def test_reconstruct_faults_are_named(field, params):
    with pytest.raises(ValueError, match=r"latents .2, 7. must be \[B, 8\]"):
        mf.reconstruct(field, params, np.zeros((2, 7)), mf.grid((3, 3)))
    with pytest.raises(ValueError, match=r"coords .9, 3. must be"):
        mf.reconstruct(field, params, np.zeros((2, 8)), np.zeros((9, 3)))
    # Six latents on a grid of six rows: as points for each latent, the values would be those of other places.
    with pytest.raises(ValueError, match=r"coords .6, 5, 2. may be a grid, or 5 points for each of 6 latents"):
        mf.reconstruct(field, params, np.zeros((6, 8)), mf.grid((6, 5)).reshape(6, 5, 2))


def test_fits_go_on_from_given_latents(field, params, signals):
    whole = mf.fit_latent(field, params, signals, steps=7)
    half = mf.fit_latent(field, params, signals, steps=4)
    rest = mf.fit_latent(field, params, signals, steps=3, init=half.latents)
    np.testing.assert_allclose(rest.latents, whole.latents, rtol=1e-12)
    np.testing.assert_allclose(np.concatenate([half.losses, rest.losses], axis=1), whole.losses, rtol=1e-12)


@pytest.mark.parametrize("weight", [1.0, 1e37, 1e-300, 7])
def test_equal_weights_are_no_weights(field, params, signals, weight):
    single = field.init(jax.random.key(0), jnp.float32)
    plain = mf.fit_latent(field, single, signals)
    weighted = mf.fit_latent(field, single, signals, weights=np.full((4, 30), weight))
    np.testing.assert_allclose(weighted.latents, plain.latents, rtol=1e-4, atol=1e-6)


def test_the_grid_of_coordinates_comes_back(field, params):
    latents, coords = np.random.default_rng(5).normal(size=(3, 8)), mf.grid((6, 5))
    flat = mf.reconstruct(field, params, latents, coords)
    for shape in ((6, 5), (3, 2, 5), (30,)):
        values = mf.reconstruct(field, params, latents, coords.reshape(*shape, 2), per_signal=False)
        assert values.shape == (3, *shape, 1)
        np.testing.assert_allclose(values.reshape(3, 30, 1), flat, atol=1e-13)
    assert mf.reconstruct(field, params, latents, coords.reshape(6, 5, 2)).shape == (3, 6, 5, 1)
    own = np.broadcast_to(coords.reshape(6, 5, 2), (3, 6, 5, 2))
    assert mf.reconstruct(field, params, latents, own, per_signal=True).shape == (3, 6, 5, 1)
    with pytest.raises(ValueError, match="points for each latent"):
        mf.reconstruct(field, params, latents, coords, per_signal=True)


def test_signals_on_a_grid_of_coordinates_of_their_own(field, params, signals):
    coords = mf.grid((6, 5)).reshape(6, 5, 2)
    plain = mf.fit_latent(field, params, signals)
    for given in (coords, np.broadcast_to(coords, (4, 6, 5, 2))):
        np.testing.assert_allclose(
            mf.fit_latent(field, params, signals, coords=given).latents, plain.latents, rtol=1e-9
        )


@pytest.mark.some(1)
@pytest.mark.parametrize("layers", [3, 4])
def test_fits_and_reconstructions_compose(layers):
    """jit, vmap and derivatives in both modes, of second order too, in parameters, signals and coordinates."""
    field = mf.Field(mf.ModelSettings(layers=layers, width=6, latent_dim=3, omega_first=5.0, omega_last=9.0), 1, 1)
    params = field.init(jax.random.key(0), jnp.float64)
    signals = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 5, 1)))
    coords = jnp.asarray(mf.grid((5,)))

    def error(params, signals, coords):
        latents = mf.fit_latent(field, params, signals, coords=coords, steps=2, step_size=0.3).latents
        values = mf.reconstruct(field, params, latents, coords)
        return jnp.square(values - field.apply(params, latents / 2, coords)).sum() + latents.sum()

    @jax.jit
    def derivatives(params, signals, coords, along):
        at = params, signals, coords
        return {
            "gradient": jax.grad(error, argnums=(0, 1, 2))(*at),
            "jvp": jax.jvp(error, at, along)[1],
            "jacfwd": jax.jacfwd(error, argnums=1)(*at),
            "hessian": jax.hessian(error, argnums=1)(*at),
            "mapped": jax.vmap(error, in_axes=(None, 0, None))(params, jnp.stack([signals, 1 - signals]), coords),
        }

    arguments = params, signals, coords
    along = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), arguments)
    found = derivatives(*arguments, along)
    dots = jax.tree.map(lambda g, t: (g * t).sum(), found["gradient"], along)
    np.testing.assert_allclose(found["jvp"], sum(jax.tree.leaves(dots)), rtol=1e-10)
    np.testing.assert_allclose(found["jacfwd"], found["gradient"][1], rtol=1e-9, atol=1e-12)
    hessian = found["hessian"].reshape(10, 10)
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-8, atol=1e-10)
    value, gradient, step = jax.jit(error), jax.jit(jax.grad(error, argnums=1)), 1e-6
    numerical = jnp.stack([
        (gradient(params, signals + step * e, coords)
         - gradient(params, signals - step * e, coords)).ravel() / (2 * step)
        for e in jnp.eye(10).reshape(10, 2, 5, 1)
    ])  # fmt: skip
    np.testing.assert_allclose(hessian, numerical, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        found["mapped"], [value(params, each, coords) for each in (signals, 1 - signals)], rtol=1e-11
    )


def test_values_in_another_unit_are_mentioned(field, params, signals):
    with pytest.warns(UserWarning, match=r"signals run from .* to 2.*, but fields of this package"):
        mf.fit_latent(field, params, signals * 255, steps=1)
    with pytest.warns(UserWarning, match=r"coords run from 0 to 5, but a field knows"):
        mf.reconstruct(field, params, np.zeros((1, 8)), np.stack(np.indices((6, 5)), -1).astype(float))
