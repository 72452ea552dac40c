"""An operator between latents: what it learns, and what it measures."""

import jax
import numpy as np
import pytest

from medfuncta_jax import latent_operator


def test_the_operator_finds_a_map_of_latents_and_goes_by_what_it_changes():
    """An entry of the target that hardly changes its signal counts little in the loss."""
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(2, 280, 4)).astype(np.float32)
    latents[1] = latents[0] + 0.01 * latents[1]
    targets = np.stack([100 + 3 * latents[0, :, 0] - latents[0, :, 1], rng.normal(size=280)], 1).astype(np.float32)
    metric = np.diag([1.0, 1e-4])
    training = latent_operator.OperatorTraining(
        8, 1, 0.0, steps=600, batch_size=32, learning_rate=1e-2, weight_decay=1e-3
    )

    def fitted(**changed):
        given = {"latents": latents[:, :256], "targets": targets[:256], "val_latents": latents[0, 256:],
                 "val_targets": targets[256:], "metric": np.diag([5.0, 1.0, 0.1, 0.1]), "target_metric": metric,
                 "key": jax.random.key(0), "training": training}  # fmt: skip
        return latent_operator.fit_operator(**(given | changed))

    operator = fitted()
    found = operator.latents(latents[1, 256:])
    error = np.square((found - targets[256:]) @ metric).sum(1).mean()
    assert error < 0.05 * np.square((targets[256:] - targets.mean(0)) @ metric).sum(1).mean()
    again = np.square((operator.latents(latents[0, 256:]) - targets[256:]) @ metric).sum(1).mean()
    assert operator.val_error == pytest.approx(again, rel=1e-3)
    jax.tree.map(np.testing.assert_array_equal, fitted().params, operator.params)
    for changed in ({"metric": np.eye(3)}, {"targets": targets}, {"target_metric": np.eye(4)}):
        with pytest.raises(ValueError, match="do not belong together"):
            fitted(**changed)
