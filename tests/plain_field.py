"""A plain statement of the method: one signal, one point, a Python loop, and no line of the package."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def value(field, params, latent, x):
    """f(x; phi) [D] for one latent [P] and one point x [C]."""
    model = field.model
    omega = [
        model.omega_first + k * (model.omega_last - model.omega_first) / (model.layers - 1) for k in range(model.layers)
    ]
    place_weights, x = _places(field, x)
    if "codebook" in params:
        latent = _nearest(params["codebook"]["embedding"], latent)
    codes = latent.reshape(len(place_weights), -1)
    for i in range(len(model.modulation_hidden)):
        codes = jnp.maximum(_linear(params[f"hidden_{i + 1}"], codes), 0)
    first, h = (1 if model.modulate_first_layer else 2), x
    for k in range(1, model.layers):
        u = _linear(params[f"layer_{k}"], h)
        if k >= first:
            if model.modulate_scale:
                u = u * (place_weights @ _linear(params[f"scale_{k}"], codes))
            u = u + place_weights @ _linear(params[f"modulation_{k}"], codes)
        s = jnp.sin(omega[k - 1] * u)
        h = h + s if model.residual and k > 1 else s
    return _linear(params[f"layer_{model.layers}"], h) + model.offset


def _linear(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def _nearest(vectors, latent):
    pieces = latent.reshape(-1, vectors.shape[1])
    nearest = jnp.stack([vectors[jnp.argmin(jnp.sum((vectors - piece) ** 2, axis=1))] for piece in pieces])
    return latent + jnp.reshape(nearest, latent.shape) - jax.lax.stop_gradient(latent)


def _places(field, x):
    """The part of each place of the latent grid in x, and the coordinates that the network sees."""
    model = field.model
    if not model.latent_grid:
        return np.ones(1), x
    weights, within = [], []
    for place in itertools.product(*[range(n) for n in model.latent_grid]):
        weight = 1.0
        for axis, (i, n) in enumerate(zip(place, model.latent_grid, strict=True)):
            if model.latent_interpolation == "linear":
                weight = weight * jnp.maximum(0.0, 1 - jnp.abs((x[axis] + 1) / 2 * (n - 1) - i))
            else:
                weight = weight * (jnp.clip(jnp.floor((x[axis] + 1) / 2 * n), 0, n - 1) == i)
        weights.append(weight)
    if type(field).__name__ == "PatchField":
        for axis, n in enumerate(model.latent_grid):
            cell = jnp.clip(jnp.floor((x[axis] + 1) / 2 * n), 0, n - 1)
            within.append(2 * ((x[axis] + 1) / 2 * n - cell) - 1)
        x = jnp.stack(within)
    return jnp.stack(weights), x


def loss(field, params, latent, coords, signal, channel_loss="mean", weights=None):
    """The squared error of one signal [N, D] at coords [N, C], with weights [N, D] of its values."""
    errors = jnp.square(jax.vmap(lambda x: value(field, params, latent, x))(coords) - signal)
    if weights is not None:
        errors = weights * errors / weights.mean()
    return (errors.mean(1) if channel_loss == "mean" else errors.sum(1)).mean()


def meta_loss(
    field, params, coords, signals, contexts, step_size, *, channel_loss="mean", first_order=False, weights=None
):
    """The mean outer loss over signals [B, N, D], and phi_G [B, P]; contexts [B, G, n], weights [B, N, D]."""

    coords = jnp.asarray(coords)
    weights = jnp.ones_like(signals) if weights is None else jnp.asarray(weights)

    def of_signal(signal, steps, weights):
        latent = jnp.zeros(field.model.latent_dim)
        for rows in steps:
            gradient = jax.grad(loss, argnums=2)(
                field, params, latent, coords[rows], signal[rows], channel_loss, weights[rows]
            )
            latent = latent - step_size * (jax.lax.stop_gradient(gradient) if first_order else gradient)
        return loss(field, params, latent, coords, signal, channel_loss, weights), latent

    losses, latents = jax.vmap(of_signal)(jnp.asarray(signals), jnp.asarray(contexts), weights)
    return losses.mean(), latents
