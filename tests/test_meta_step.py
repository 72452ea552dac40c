import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import medfuncta_jax as mf
from medfuncta_jax import meta_step
from medfuncta_jax.augmentation import resized_and_moved
from medfuncta_jax.context import random_context
from medfuncta_jax.training_state import Trainable

FIELD = mf.Field(mf.ModelSettings(layers=4, width=16, latent_dim=6, omega_first=15.0, omega_last=40.0), 2, 1)
COORDS = mf.grid((6, 6))


def make_settings(**groups):
    inner = {"steps": 3, "step_size": 0.5, "selection_ratio": 0.5, "remat": "none"} | groups.pop("inner", {})
    train = {"steps": 50, "batch_size": 4, "learning_rate": 1e-3} | groups.pop("train", {})
    return mf.Settings.from_dict({"data": {"source": "any"}, "inner": inner, "train": train})


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    context = random_context(jax.random.key(2), points=36, selection_ratio=0.5, steps=3, signals=4)
    return FIELD.init(jax.random.key(0), jnp.float64), rng.uniform(size=(4, 36, 1)), context


def test_no_loop_of_an_update_carries_gradient_in_weights_that_read_latents():
    """They are most of the parameters: a loop over steps or micro-batches carries the weights alone."""
    field = mf.Field(mf.ModelSettings(layers=5, width=8, latent_dim=13), 2, 1)
    settings = make_settings(train={"micro_batch": 1, "points_per_chunk": 9}, inner={"remat": "steps"})
    state, signals = meta_step.init(field, settings, jax.random.key(0)), np.zeros((4, 36, 1), np.float32)
    update = jax.jit(functools.partial(meta_step.update, meta_step.Training(field, settings, (6, 6))))
    compiled = update.lower(state, signals, jax.random.key(1)).compile().as_text()
    carried = [line.split(" while(")[0].count("f32[13,8]") for line in compiled.splitlines() if " while(" in line]
    assert max(carried) == len(field.latent_layers())


@functools.lru_cache
def compiled_update(settings):
    return jax.jit(functools.partial(meta_step.update, meta_step.Training(FIELD, settings, (6, 6))))


def run_updates(settings, signals, count, state=None):
    update = compiled_update(settings)
    state = state or meta_step.init(FIELD, settings, jax.random.key(0))
    history = []
    for _ in range(count):
        state, metrics = update(state, jnp.asarray(signals, jnp.float32), jax.random.key(1))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


@pytest.mark.some(2)
@pytest.mark.parametrize("learned", ["none", "scalar", "per_latent"])
def test_updates_learn(problem, learned):
    settings = make_settings(inner={"learned_step_size": learned}, train={"step_size_learning_rate": 0.05})
    state, history = run_updates(settings, problem[1], 40)
    assert int(state.step) == 40
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    if learned == "none":
        assert state.trainable.log_step_size is None
    else:
        assert state.trainable.log_step_size.shape == (() if learned == "scalar" else (6,))
        assert np.abs(np.asarray(state.trainable.log_step_size) - np.log(0.5)).min() > 1e-3


def test_learned_step_sizes_stay_in_their_range(problem):
    for bounds, expected in (((0.6, 2.0), 0.6), ((0.01, 0.4), 0.4), ((0.1, 1.0), 0.5)):
        settings = make_settings(inner={"learned_step_size": "per_latent", "step_size_range": bounds})
        trainable = meta_step.init(FIELD, settings, jax.random.key(0)).trainable
        np.testing.assert_allclose(meta_step.step_size(trainable, settings.inner), expected, rtol=1e-6)


def test_update_uses_meta_loss(problem):
    """The loss of an update is `meta_loss` on the context that key and step give."""
    settings = make_settings()
    _, history = run_updates(settings, problem[1], 1)
    start = meta_step.init(FIELD, settings, jax.random.key(0)).trainable.field
    key = jax.random.fold_in(jax.random.key(1), 0)
    context = random_context(key, points=36, selection_ratio=0.5, steps=3, signals=4)
    expected = mf.meta_loss(FIELD, start, problem[1], context, inner=mf.InnerLoop(step_size=0.5), coords=COORDS)
    np.testing.assert_allclose(history[0]["loss"], expected, rtol=1e-5)


def test_updates_are_reproducible_and_resume(problem):
    settings = make_settings(inner={"learned_step_size": "per_latent"})
    whole, _ = run_updates(settings, problem[1], 6)
    half, _ = run_updates(settings, problem[1], 3)
    resumed, _ = run_updates(settings, problem[1], 3, state=half)
    chex.assert_trees_all_close(whole, resumed, rtol=0, atol=0)


@pytest.mark.some(2)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("train", [{"micro_batch": 1}, {"micro_batch": 2}, {"points_per_chunk": 5, "micro_batch": 2}])
def test_parts_of_a_batch_make_the_same_update(problem, shared, train):
    inner = {"shared_context": shared, "learned_step_size": "scalar"}
    whole, parts = (
        run_updates(make_settings(inner=inner, train={"clip_norm": 0.0} | some), problem[1], 1) for some in ({}, train)
    )
    np.testing.assert_allclose(parts[1][0]["loss"], whole[1][0]["loss"], rtol=1e-6)
    np.testing.assert_allclose(parts[1][0]["gradient_norm"], whole[1][0]["gradient_norm"], rtol=1e-4)
    # AdamW's first moment holds the gradient itself; its first step only the gradient's signs.
    first = (optax.tree.get(state.optimizer.inner_states["field"], "mu") for state, _ in (whole, parts))
    chex.assert_trees_all_close(*first, rtol=1e-3, atol=1e-7)


def test_an_update_can_see_a_part_of_the_points(problem):
    settings = make_settings(inner={"selection_ratio": 1.0}, train={"selection_ratio": 0.25})
    _, history = run_updates(settings, problem[1], 2)
    start = meta_step.init(FIELD, settings, jax.random.key(0)).trainable.field
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 1)
    rows = random_context(key, points=36, selection_ratio=0.25, steps=1)[0]
    inner = mf.InnerLoop(steps=3, step_size=0.5)
    expected = mf.meta_loss(FIELD, start, problem[1][:, rows], None, inner=inner, coords=COORDS[rows])
    np.testing.assert_allclose(history[0]["loss"], expected, rtol=1e-5)


def test_an_update_sees_changed_signals(problem):
    settings = make_settings(train={"augmentation": 0.2})
    training = meta_step.Training(FIELD, settings, (6, 6))
    state, signals = meta_step.init(FIELD, settings, jax.random.key(0)), jnp.asarray(problem[1], jnp.float32)
    one, other = (meta_step.draw(training, state, signals, jax.random.key(seed), None).signals for seed in (1, 2))
    expected = resized_and_moved(
        jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), 4), signals, (6, 6), largest=0.2
    )
    np.testing.assert_array_equal(one, expected)
    assert not np.isclose(one, signals).all((1, 2)).any()
    assert not np.isclose(one, other).all((1, 2)).any()


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_latents_are_fitted_on_the_grid_for_points_off_it(part):
    settings = make_settings(inner={"selection_ratio": 1.0}, train={"off_grid": True, "selection_ratio": part})
    training = meta_step.Training(FIELD, settings, (6, 6))
    state = meta_step.init(FIELD, settings, jax.random.key(0), dtype=jnp.float64)
    points = jnp.asarray(COORDS)
    ramps = jnp.stack([points[:, :1], points[:, 1:]])  # cubic convolution keeps a ramp, but at the border
    drawn = meta_step.draw(training, state, ramps, jax.random.key(1), None)
    on_grid = int(part * 36)
    assert drawn.coords.shape == (2 * on_grid, 2)
    np.testing.assert_array_equal(drawn.context, np.broadcast_to(np.arange(on_grid), (3, on_grid)))
    assert {tuple(point) for point in np.asarray(drawn.coords[:on_grid])} <= {tuple(point) for point in COORDS}
    moved = np.asarray(drawn.coords[on_grid:] - drawn.coords[:on_grid])
    assert 0 < np.abs(moved).max() <= 0.2 + 1e-12  # half a spacing of 2 / 5
    inside = np.abs(drawn.coords).max(1) < 0.5
    np.testing.assert_allclose(drawn.signals[0, inside, 0], drawn.coords[inside, 0], atol=1e-6)
    np.testing.assert_allclose(drawn.signals[1, inside, 0], drawn.coords[inside, 1], atol=1e-6)


def test_clipping_bounds_the_gradient_that_the_optimizer_sees():
    optimizer = meta_step.make_optimizer(make_settings(train={"clip_norm": 1.0}).train, FIELD)
    plain = optax.clip_by_global_norm(1.0)
    gradient = Trainable({"w": jnp.full(4, 100.0)}, jnp.full(3, -50.0))
    clipped, _ = plain.update(gradient, plain.init(gradient))
    np.testing.assert_allclose(optax.tree.norm(clipped), 1.0)
    state = optimizer.init(gradient)
    one, _ = optimizer.update(gradient, state, gradient)
    other, _ = optimizer.update(clipped, state, gradient)
    chex.assert_trees_all_close(one, other, rtol=1e-12)


def test_weight_decay_leaves_the_step_size_alone():
    optimizer = meta_step.make_optimizer(
        make_settings(train={"weight_decay": 0.5, "schedule": "constant"}).train, FIELD
    )
    trainable = Trainable({"w": jnp.ones(2)}, jnp.ones(2))
    zero = jax.tree.map(jnp.zeros_like, trainable)
    changes, _ = optimizer.update(zero, optimizer.init(trainable), trainable)
    np.testing.assert_array_equal(changes.log_step_size, 0)
    np.testing.assert_allclose(changes.field["w"], -0.5 * 1e-3)


def test_muon_steps_along_all_directions_of_hidden_weights_alike():
    """Hidden and modulation weights change by matrices of singular values about the rate; all else as with AdamW."""
    chosen, plain = (
        make_settings(train={"optimizer": name, "weight_decay": 0.0, "schedule": "constant"}).train
        for name in ("muon", "adamw")
    )
    params = FIELD.init(jax.random.key(0), jnp.float64)
    gradient = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(1).normal(size=leaf.shape)), params)
    trainable, gradient = Trainable(params, jnp.ones(())), Trainable(gradient, jnp.ones(()))

    def changes(train):
        optimizer = meta_step.make_optimizer(train, FIELD)
        return optimizer.update(gradient, optimizer.init(trainable), trainable)[0]

    muon, adamw = changes(chosen), changes(plain)
    np.testing.assert_array_equal(muon.log_step_size, adamw.log_step_size)
    for name, layer in muon.field.items():
        np.testing.assert_array_equal(layer["bias"], adamw.field[name]["bias"])
        if name in FIELD.end_layers():
            np.testing.assert_array_equal(layer["kernel"], adamw.field[name]["kernel"])
            continue
        wide = max(1.0, layer["kernel"].shape[1] / layer["kernel"].shape[0]) ** 0.5
        values = np.linalg.svd(layer["kernel"], compute_uv=False) / (chosen.muon_learning_rate * wide)
        assert values.max() < 1.5, name  # three iterations come this near to 1, but for the smallest value
        assert np.sort(values)[1] > 0.5, name


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({}, {0: 1.0, 25: 0.5, 50: 0.0}),
        ({"warmup_steps": 100}, {0: 0.0, 50: 0.5}),
        ({"warmup_steps": 10}, {0: 0.0, 5: 0.5, 10: 1.0, 30: 0.5, 50: 0.0}),
        ({"schedule": "constant"}, {0: 1.0, 49: 1.0}),
    ],
)
def test_learning_rate_schedule(train, expected):
    schedule = meta_step.learning_rate_schedule(make_settings(train=train).train, 1.0)
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, atol=1e-7)


@pytest.mark.some(4)
@pytest.mark.parametrize(
    ("learned", "variant"),
    list(
        itertools.product(
            ["none", "scalar", "per_latent"],
            [{}, {"modulate_scale": True}, {"latent_grid": (3, 1)}, {"modulation_hidden": (9,)}],
        )
    ),
)
def test_exported_field_walks_the_same_path_with_half_the_step_size(learned, variant):
    model = mf.ModelSettings(layers=4, width=16, latent_dim=6, omega_first=15.0, omega_last=40.0, **variant)
    field = mf.Field(model, 2, 1)
    settings = make_settings(inner={"learned_step_size": learned, "step_size": 0.7, "fit_ratio": 0.5})
    state = meta_step.init(field, settings, jax.random.key(0), dtype=jnp.float64)
    log_step = state.trainable.log_step_size
    if log_step is not None:
        log_step = log_step + np.random.default_rng(0).normal(size=log_step.shape)
    trainable = Trainable(state.trainable.field, log_step)
    step_size = 0.5 * meta_step.step_sizes(field, trainable, settings.inner)
    exported = meta_step.exported_params(field, trainable, settings.inner)
    signals = np.random.default_rng(1).uniform(size=(2, 6, 6, 1))
    trained = mf.fit_latent(field, trainable.field, signals, step_size=step_size)
    default = mf.fit_latent(field, exported, signals)
    np.testing.assert_allclose(default.losses, trained.losses, rtol=1e-9)
    np.testing.assert_allclose(
        mf.reconstruct(field, exported, default.latents, COORDS),
        mf.reconstruct(field, trainable.field, trained.latents, COORDS),
        rtol=1e-9,
    )
