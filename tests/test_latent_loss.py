import jax
import numpy as np

from medfuncta_jax.latent_loss import contrastive_loss


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
