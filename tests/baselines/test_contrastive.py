import functools

import jax
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import meta_step
from medfuncta_jax.baselines import contrastive
from medfuncta_jax.baselines.contrastive import contrastive_loss


def test_contrastive_loss_is_that_of_its_definition():
    """Khosla et al. 2020, equation 2, signal by signal."""
    rng = np.random.default_rng(0)
    latents, labels, tau = rng.normal(size=(7, 5)), np.array([0, 1, 0, 2, 1, 0, 3]), 0.3
    unit = latents / np.linalg.norm(latents, axis=1, keepdims=True)
    losses = []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        partners = [p for p in others if labels[p] == labels[i]]
        total = sum(np.exp(unit[i] @ unit[a] / tau) for a in others)
        if partners:
            losses.append(-np.mean([np.log(np.exp(unit[i] @ unit[p] / tau) / total) for p in partners]))
    value = jax.jit(jax.value_and_grad(contrastive_loss))(latents, labels, tau)
    np.testing.assert_allclose(value[0], np.mean(losses), rtol=1e-12)
    assert np.isfinite(value[1]).all()
    assert float(contrastive_loss(latents, np.arange(7), tau)) == 0


def test_labels_reach_the_outer_loss():
    """Signals that are alike cost what the contrastive loss says; without partners the update is MedFuncta's."""
    settings = mf.Settings.from_dict(
        {"data": {"source": "any"}, "inner": {"steps": 3, "step_size": 0.5, "selection_ratio": 0.5},
         "train": {"batch_size": 4, "method": "contrastive"}, "baselines": {"contrastive_weight": 0.1}}
    )  # fmt: skip
    field = mf.Field(mf.ModelSettings(layers=4, width=16, latent_dim=6, omega_first=15.0, omega_last=40.0), 2, 1)
    state = contrastive.init(field, settings, jax.random.key(0))
    signals = np.random.default_rng(0).uniform(size=(4, 36, 1)).astype(np.float32)

    def loss_of(update, labels):
        training = meta_step.Training(field, settings, (6, 6), labels)
        _, metrics = jax.jit(functools.partial(update, training))(state, signals, jax.random.key(1), np.arange(4))
        return float(metrics["loss"])

    without = loss_of(meta_step.update, None)
    alike, apart = (loss_of(contrastive.update, labels) for labels in (np.zeros(4, int), np.arange(4)))
    assert alike > without == pytest.approx(apart)
