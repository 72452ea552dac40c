import functools

import chex
import jax
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import meta_step
from medfuncta_jax.methods import METHODS

SMALL = {"layers": 4, "width": 16, "latent_dim": 8, "omega_first": 15.0, "omega_last": 15.0}


def make(model=None, **groups):
    train = {"steps": 50, "batch_size": 4, "learning_rate": 1e-3, "schedule": "constant", **groups.get("train", {})}
    inner = {"steps": 2, "step_size": 0.5, **groups.get("inner", {})}
    model = {**SMALL, **(model or {})}
    baselines = {"codebook_vectors": 32, "codebook_entries": 2, "last_width": 8, **groups.get("baselines", {})}
    groups = {"model": model, "inner": inner, "train": train, "baselines": baselines}
    return mf.Settings.from_dict({"data": {"source": "any"}, **groups})


KINDS = {  # model, method
    "plain": ({}, "meta"),
    "spatial": ({"latent_grid": 2}, "meta"),
    "patches": ({"latent_grid": 2, "latent_interpolation": "nearest"}, "patches"),
    "autodecoder": ({}, "autodecoder"),
    "autodecoder on a grid": ({"latent_grid": 2}, "autodecoder"),
    "codebook": ({}, "codebook"),
    "contrastive": ({}, "contrastive"),
    "gradient_contexts": ({}, "gradient_contexts"),
    "pyramid": ({"residual": False}, "pyramid"),
}


@pytest.mark.some(6)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *((kind, (6, 5)) for kind in KINDS if kind not in ("spatial", "autodecoder on a grid")),
        *((kind, shape) for kind in ("spatial", "patches") for shape in ((12,), (4, 4, 3))),
        ("autodecoder on a grid", (12,)),
    ],
)
def test_every_method_learns_in_every_dimension(kind, shape):
    model, name = KINDS[kind]
    if "latent_grid" in model:
        model = model | {"latent_grid": (2, *(1 for _ in shape[1:]))}
    settings = make(model, train={"method": name})
    method = METHODS[name]
    field = method.check(settings, shape, 2)
    coords = np.asarray(mf.grid(shape), np.float32)
    training = meta_step.Training(field, settings, shape, labels=np.array([0, 0, 1, 1]))
    update = jax.jit(functools.partial(method.update, training))
    state = method.init(field, settings, jax.random.key(0), signals=4)
    waves = np.sin(coords.sum(-1, keepdims=True) * np.array([1.0, 2.0]))
    signals = (0.5 + waves * np.linspace(0.1, 0.4, 4)[:, None, None]).astype(np.float32)
    losses = []
    for _ in range(40):
        state, metrics = update(state, signals, jax.random.key(1), np.arange(4))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_for_a_missing_channel_moves_no_weight(kind):
    model, name = KINDS[kind]
    if "latent_grid" in model:
        model = model | {"latent_grid": (2,)}
    settings = make(model, train={"method": name})
    method, shape = METHODS[name], (12,)
    field = method.check(settings, shape, 2)
    recorded = np.array([[1, 1], [1, 0], [0, 1], [1, 1]], np.float32)
    training = meta_step.Training(field, settings, shape, np.array([0, 0, 1, 1]), recorded)
    update = jax.jit(functools.partial(method.update, training))
    rng = np.random.default_rng(0)
    signals, other = rng.uniform(size=(2, 4, 12, 2)).astype(np.float32)
    after = []
    for some in (signals, np.where(recorded[:, None] > 0, signals, other), other):
        state = method.init(field, settings, jax.random.key(0), signals=4)
        for rows in ([0, 1, 2, 3], [3, 1, 0, 2]):
            state, metrics = update(state, some[rows], jax.random.key(1), np.array(rows))
        after.append((state.trainable, metrics["loss"]))
    chex.assert_trees_all_equal(after[0], after[1])
    assert after[0][1] != after[2][1]


@pytest.mark.parametrize(
    ("method", "groups", "message"),
    [
        ("meta", {"model": {"latent_grid": (2, 2)}}, r"model.latent_grid must have 1 entries, .* got \(2, 2\)"),
        ("meta", {"train": {"modulation_shards": 6}}, "shards = 6 does not divide the latent's 8 entries .* 2"),
        ("patches", {}, "model.latent_grid must say how many patches"),
        ("patches", {"model": {"latent_grid": (2,)}}, "needs model.latent_interpolation=nearest"),
        (
            "patches", {"model": {"latent_grid": (8,), "latent_interpolation": "nearest"}},
            r"model.latent_grid \(8,\) makes patches",
        ),
        (
            "patches",
            {"model": {"latent_grid": (2,), "latent_interpolation": "nearest"}, "train": {"off_grid": True}},
            "needs train.off_grid=False",
        ),
        ("codebook", {"inner": {"learned_step_size": "per_latent"}}, "needs inner.learned_step_size=none or scalar"),
        ("codebook", {"baselines": {"codebook_entries": 3}}, "must divide the latent's 8 entries, got 3"),
        ("contrastive", {}, "one label a signal, these have 'none'"),
        ("contrastive", {"task": "multi-class", "train": {"micro_batch": 2}}, "compares all signals of a batch"),
        ("gradient_contexts", {"inner": {"selection_ratio": 1.0}}, "needs inner.selection_ratio below 1"),
        ("gradient_contexts", {"train": {"off_grid": True}}, "needs train.off_grid=False"),
        ("pyramid", {}, "needs model.residual=False"),
        ("autodecoder", {"train": {"micro_batch": 2}}, "needs train.micro_batch=0"),
        ("autodecoder", {"train": {"modulation_shards": 2}}, "needs train.modulation_shards=1"),
        ("autodecoder", {"train": {"selection_ratio": 0.5}}, "needs train.selection_ratio=1.0"),
        ("autodecoder", {"train": {"off_grid": True}}, "needs train.off_grid=False"),
        ("autodecoder", {"train": {"augmentation": 0.1}}, "needs train.augmentation=0.0"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(method, groups, message):
    task = groups.pop("task", "none")
    settings = make(groups.pop("model", {}), train={"method": method, **groups.pop("train", {})}, **groups)
    with pytest.raises(mf.SettingsError, match=message):
        METHODS[method].check(settings, (5,), 1, task=task)
