import jax
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import methods

SMALL = {"layers": 4, "width": 16, "latent_dim": 8, "omega_first": 15.0, "omega_last": 15.0}


def make(model=None, **groups):
    train = {"steps": 50, "batch_size": 4, "learning_rate": 1e-3, "schedule": "constant", **groups.get("train", {})}
    inner = {"steps": 2, "step_size": 0.5, **groups.get("inner", {})}
    model = {**SMALL, **(model or {})}
    return mf.Settings.from_dict({"data": {"source": "any"}, "model": model, "inner": inner, "train": train})


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("plain", (6, 5)),
        *(("spatial", shape) for shape in ((12,), (4, 4, 3))),
        *(("patches", shape) for shape in ((12,), (6, 5), (4, 4, 3))),
        ("autodecoder", (6, 5)),
        ("codebook", (6, 5)),
        ("autodecoder on a grid", (12,)),
    ],
)
def test_every_method_learns_in_every_dimension(kind, shape):
    model = {}
    if kind == "codebook":
        model = {"codebook": 32, "codebook_features": 2}
    elif kind != "plain" and kind != "autodecoder":
        model = {"latent_grid": (2, *(1 for _ in shape[1:]))}
        model["latent_interpolation"] = "patches" if kind == "patches" else "linear"
    settings = make(model, train={"method": "autodecoder" if "autodecoder" in kind else "meta"})
    field = methods.check(settings, shape, 2)
    coords = np.asarray(mf.grid(shape), np.float32)
    update = jax.jit(methods.make_update(field, settings, coords, shape))
    state = methods.init_state(field, settings, jax.random.key(0), signals=4)
    waves = np.sin(coords.sum(-1, keepdims=True) * np.array([1.0, 2.0]))
    signals = (0.5 + waves * np.linspace(0.1, 0.4, 4)[:, None, None]).astype(np.float32)
    losses = []
    for _ in range(40):
        state, metrics = update(state, signals, jax.random.key(1), np.arange(4))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:2])


@pytest.mark.parametrize(
    ("model", "train", "shape", "message"),
    [
        ({"latent_grid": (2, 2)}, {}, (9, 9, 9), r"model.latent_grid must have 3 entries, .* got \(2, 2\)"),
        ({"latent_grid": (8,), "latent_interpolation": "patches"}, {}, (5,), r"model.latent_grid \(8,\) makes patches"),
        (
            {"latent_grid": (2,), "latent_interpolation": "patches"}, {"method": "autodecoder"}, (5,),
            "train.method=autodecoder needs model.latent_interpolation=nearest",
        ),
        ({"codebook": 4}, {}, (5,), "model.codebook needs inner.learned_step_size=none or scalar"),
        ({}, {"contrastive_weight": 1.0}, (5,), "one label a signal, these have 'none'"),
        ({}, {"contrastive_weight": 1.0, "micro_batch": 2}, (5,), "compares all signals of a batch"),
        ({}, {"method": "autodecoder", "micro_batch": 2}, (5,), "needs train.micro_batch=0"),
        ({}, {"modulation_shards": 6}, (5,), "modulation_shards = 6 does not divide the latent's 8 entries .* try 2"),
        ({}, {"method": "autodecoder", "modulation_shards": 2}, (5,), "needs train.modulation_shards=1"),
        ({}, {"method": "autodecoder", "selection_ratio": 0.5}, (5,), "needs train.selection_ratio=1.0"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(model, train, shape, message):
    settings = make(model, train=train, inner={"learned_step_size": "per_latent"} if "codebook" in model else {})
    with pytest.raises(mf.SettingsError, match=message):
        methods.check(settings, shape, 1, task="multi-class" if "micro_batch" in train else "none")
