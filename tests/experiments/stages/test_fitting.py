"""Fitting a split in padded batches drops nothing and equals fitting signal by signal."""

import jax
import numpy as np
import pytest

import medfuncta_jax as mf
from experiments.stages.fitting import fit_signals
from medfuncta_jax import metrics, sharding


class Split:
    def __init__(self, signals):
        self._signals = signals

    def signals(self, rows):
        return self._signals[rows]


@pytest.mark.parametrize("batch_size", [2, 3, 7, 100])
def test_any_batch_size(batch_size):
    settings = mf.Settings.from_dict({"data": {"source": "any"}, "fit": {"batch_size": batch_size, "steps": 3}})
    field = mf.Field(mf.ModelSettings(layers=3, width=8, latent_dim=4, omega_first=10.0, omega_last=20.0), 2, 1)
    params = field.init(jax.random.key(0))
    signals = np.random.default_rng(0).uniform(size=(9, 5, 4, 1)).astype(np.float32)
    rows, counts = np.array([8, 1, 3, 0, 2, 6, 7]), []
    fitted = fit_signals(
        field, params, Split(signals), rows, settings, sharding.data_mesh(jax.devices()[:1]),
        step_size=0.1, after_batch=lambda count, psnr: counts.append(count),
    )  # fmt: skip
    assert sum(counts) == 7
    alone = mf.fit_latent(field, params, signals[rows], steps=3, step_size=0.1)
    np.testing.assert_allclose(fitted.latents, alone.latents, rtol=1e-4, atol=1e-6)
    values = np.clip(mf.reconstruct(field, params, alone.latents, mf.grid((5, 4))), 0, 1)
    np.testing.assert_allclose(fitted.psnr, metrics.psnr(values, signals[rows].reshape(values.shape)), rtol=1e-4)


def test_the_next_batch_is_read_before_one_is_waited_for():
    settings = mf.Settings.from_dict({"data": {"source": "any"}, "fit": {"batch_size": 3, "steps": 1}})
    field = mf.Field(mf.ModelSettings(layers=3, width=8, latent_dim=4, omega_first=10.0, omega_last=20.0), 1, 1)
    signals, events = np.random.default_rng(0).uniform(size=(8, 6, 1)).astype(np.float32), []

    class Watched(Split):
        def signals(self, rows):
            events.append(("read", rows.tolist()))
            return super().signals(rows)

    fit_signals(
        field, field.init(jax.random.key(0)), Watched(signals), np.arange(8), settings, sharding.data_mesh(),
        step_size=0.1, after_batch=lambda count, psnr: events.append(("done", count)),
    )  # fmt: skip
    # The last one is filled up, so that one shape is compiled.
    assert events == [
        ("read", [0, 1, 2]), ("read", [3, 4, 5]), ("done", 3), ("read", [6, 7, 7]), ("done", 3), ("done", 2)
    ]  # fmt: skip
