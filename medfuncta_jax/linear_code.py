"""Parameters to begin training with: those of the best linear code of the training signals.

Two copies of a network of half the width are joined: their outputs are subtracted, and the latent shifts them in
opposite directions. All terms of even order in the latent then cancel, and to third order

    f(x; phi) = mean(x) + J(x) M phi,        J = 2 df/ds at phi = 0, [N D, U]

with s the phases that a latent adds to the U modulated units of one copy. First the hidden layers learn functions J
that hold the signals: Adam on what remains of random training signals y after the best code of U numbers, which needs
no inner loop (variable projection, Golub and Pereyra 1973),

    min_s |y - J s|^2 / (N D) + ridge |s|^2 / 2

Then, in closed form, the M [U, P] is taken with which codes of P numbers lose the least of the training signals Y (less
their mean), with the same penalty on phases (reduced-rank ridge regression, Mukherjee and Zhu 2011):

    H = 2 J^T J / (N D) + ridge I,    M = H^{-1/2} V,    V: the P leading left singular vectors of H^{-1/2} J^T Y.

Without the penalty and with enough units these codes are those of a principal component analysis (PCA); the penalty
makes them smooth. As M^T H M = I, an inner step of size 1 is a damped Gauss-Newton step (see `conditioning`), and one
step fits a signal. The output weights are so large that training signals add phases of a given root mean square: the
smaller it is, the more linear is the field. Such antisymmetric networks are those of Chizat et al. 2019 and Zhang et
al. 2020.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from medfuncta_jax.arrays import Array, as_array, points_of
from medfuncta_jax.conditioning import check_conditioning, phase_jacobian
from medfuncta_jax.field import STEP_SIZE, Field, Params
from medfuncta_jax.product import FULL
from medfuncta_jax.settings import SettingsError

# The penalty on phases: `ridge` as part of the mean of the diagonal of 2 J^T J / (N D).
_RIDGE = 2e-5
# White noise that is added to the signals, as part of their energy: fewer signals than P leave directions open, and
# these become smooth ones.
_NOISE = 1e-6
# The penalty on the weights that give the mean signal, as part of the mean square of hidden units.
_MEAN_RIDGE = 1e-5
# An update of the hidden layers: the peak rate of Adam, and the points for each unit and the signals that it sees.
_RATE, _POINTS_A_UNIT, _SIGNALS = 1e-4, 8, 256
# Entries of the Jacobian, and values of signals, in memory at once.
_CHUNK = 1 << 24


def linear_start(
    field: Field,
    signals: Array,
    key: jax.Array,
    *,
    coords: Array | None = None,
    updates: int = 300,
    step_size: float = STEP_SIZE / 0.15,
    phase: float = 0.02,
    after: Callable[[float], None] = lambda loss: None,
) -> Params:
    """The shared parameters of a field that is the best linear code of `signals`, to begin training with.

    Args:
      field: its modulations are linear in one latent vector, its width is even, and the latent has at most half as many
        entries as the network has modulated units.
      signals: training signals, floating, [n, *grid, D], or [n, N, D] at `coords`; a few times P are enough.
      key: draws the initial hidden layers, and the signals and points of updates.
      coords: [N, C]; None for the grid over [-1, 1].
      updates: of the hidden layers, at least 0.
      step_size: the inner step size that is to be a Gauss-Newton step. At the default, default steps of `fit_latent`
        are 0.15 of one, so that fits from a tenth of the points do not diverge (see `InnerSettings.fit_ratio`).
      phase: root mean square, over signals and units, of the phases that the latents of `signals` add, in radians.
      after: called after every update with its loss, the mean squared error of codes of U numbers.
    Returns:
      Parameters as from `Field.init`, float32.
    Raises:
      SettingsError: a field that is none of these.
      ValueError: shapes that do not belong together, integer signals, values that are not finite, or an option out of
        its range.
    """
    half = halved(field)
    if updates < 0 or min(step_size, phase) <= 0:
        raise ValueError(
            f"updates must be at least 0, step_size and phase above 0, got {updates}, {step_size}, {phase}"
        )
    signals = as_array("signals", signals)
    points = np.asarray(points_of(signals, coords, coord_dims=field.coord_dims, channels=field.channels), np.float32)
    if points.ndim != 2:
        raise ValueError(f"coords must be [N, C], the same for all signals, got shape {points.shape}")
    values = np.asarray(signals).reshape(len(signals), len(points), field.channels)
    if not (finite := np.isfinite(values).all((1, 2))).all():
        raise ValueError(f"signal {finite.argmin()} holds values that are not finite; leave it out")
    hidden_key, sign_key, update_key = jax.random.split(key, 3)
    params, (last, width) = half.init(hidden_key), (half.end_layers()[1], half.model.width)
    signs = jax.random.rademacher(sign_key, (width, field.channels), jnp.float32)
    params[last] = {"kernel": signs / np.sqrt(width), "bias": jnp.zeros(field.channels)}
    for name in half.latent_layers():
        params[name] = jax.tree.map(jnp.zeros_like, params[name])

    params = _updated(half, params, points, values, update_key, updates, after)
    mean, cross, gram = _sums(half, params, points, values)
    directions, scale = _best_code(gram, cross, half.model.latent_dim, phase)
    return field.rescaled(_joined(half, params, mean, scale, directions), jnp.asarray(step_size**-0.5))


def halved(field: Field) -> Field:
    """One of the two networks that a linear start joins.

    Raises:
      SettingsError: the field is none that can be started so.
    """
    model = field.model
    if type(field) is not Field:
        raise SettingsError("a linear start is one of a plain field: use train.start='random', or train.method='meta'")
    check_conditioning(field)
    if model.width % 2:
        raise SettingsError(f"a linear start joins two networks: model.width must be even, got {model.width}")
    half = dataclasses.replace(field, model=dataclasses.replace(model, width=model.width // 2))
    units = _units(half)
    if model.latent_dim > units:
        least = 2 * math.ceil(model.latent_dim / len(half.latent_layers()))
        raise SettingsError(
            f"a linear start chooses {model.latent_dim} directions (model.latent_dim) among {units}, half of the "
            f"modulated units: model.width must be at least {least}"
        )
    return half


def _units(half: Field) -> int:
    return half.model.width * len(half.latent_layers())


def _updated(
    half: Field,
    params: Params,
    points: np.ndarray,
    values: np.ndarray,
    key: jax.Array,
    updates: int,
    after: Callable[[float], None],
) -> Params:
    """Parameters after updates of the hidden layers, with `after` as in `linear_start`."""
    of_points, of_latents = half.split(params)
    last = half.end_layers()[1]
    hidden = {name: layer for name, layer in of_points.items() if name != last}
    fixed = {**of_latents, last: params[last]}
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, max(1, updates)))
    shown = min(len(points), max(1, _POINTS_A_UNIT * _units(half) // half.channels))
    mean = values.mean(0)

    def loss_of(hidden: Params, coords: jax.Array, targets: jax.Array) -> jax.Array:
        """For targets [n, D, B]."""
        jacobian = 2 * phase_jacobian(half, {**fixed, **hidden}, coords).reshape(-1, _units(half))
        targets = targets.reshape(len(jacobian), -1)
        gram = jnp.matmul(jacobian.T, jacobian, precision=FULL)
        ridge = _RIDGE * jnp.trace(gram) / len(gram) * jnp.eye(len(gram))
        cross = jnp.matmul(jacobian.T, targets, precision=FULL)
        phases = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram + ridge), cross)
        return (jnp.square(targets).sum() - (cross * phases).sum()) / targets.size  # the minimum itself

    @jax.jit
    def update(hidden: Params, moments: optax.OptState, coords: jax.Array, targets: jax.Array):
        loss, gradient = jax.value_and_grad(loss_of)(hidden, coords, targets)
        changes, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(hidden, changes), moments, loss

    moments = optimizer.init(hidden)
    draws = np.random.default_rng(np.asarray(jax.random.bits(key, (4,), np.uint32)))
    for _ in range(updates):
        rows = draws.choice(len(values), min(_SIGNALS, len(values)), replace=False)
        places = draws.choice(len(points), shown, replace=False)
        targets = (values[rows][:, places] - mean[places]).astype(np.float32).transpose(1, 2, 0)
        hidden, moments, loss = update(hidden, moments, points[places], targets)
        after(float(loss))
    return {**fixed, **hidden}


def _sums(
    half: Field, params: Params, points: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sums over points that all else follows from, of `values` [n, N, D].

    Returns:
      (mean, cross, gram): the output weights and bias [H + 1, D] that give the mean signal at phi = 0; J^T Y / (N D)
      [U, n], of signals less that; J^T J / (N D) [U, U]. J is that of both copies.
    """

    @jax.jit
    def parts(coords: jax.Array) -> tuple[jax.Array, jax.Array]:
        at_zero = half.modulations(half.split(params)[1], jnp.zeros((1, half.model.latent_dim)))
        variables, module = {"params": half.split(params)[0]}, half.module
        features = module.apply(variables, coords[None], method="features")
        hidden = cast(jax.Array, module.apply(variables, at_zero, features, method="last_hidden"))[0]
        return jnp.pad(hidden, ((0, 0), (0, 1)), constant_values=1), 2 * phase_jacobian(half, params, coords)

    channels, count = half.channels, len(points) * half.channels
    of_outputs = of_outputs_and_mean = gram = joint = cross = np.zeros(())
    chunk = max(1, _CHUNK // (channels * max(_units(half), len(values))))
    for first in range(0, len(points), chunk):
        chosen = slice(first, first + chunk)
        outputs, jacobian = (np.asarray(each, np.float64) for each in parts(points[chosen]))
        rest = values[:, chosen].astype(np.float64) - half.model.offset  # [n, points, D]
        of_outputs = of_outputs + outputs.T @ outputs
        of_outputs_and_mean = of_outputs_and_mean + outputs.T @ rest.mean(0)
        joint = joint + np.einsum("ndu,nh->duh", jacobian, outputs, optimize=True)
        flat = jacobian.reshape(-1, jacobian.shape[-1])
        gram = gram + flat.T @ flat
        cross = cross + flat.T @ rest.reshape(len(values), -1).T
    penalty = _MEAN_RIDGE * np.trace(of_outputs) / len(of_outputs)
    mean = np.linalg.solve(of_outputs + penalty * np.eye(len(of_outputs)), of_outputs_and_mean)
    return mean, (cross - np.einsum("duh,hd->u", joint, mean)[:, None]) / count, gram / count


def _best_code(gram: np.ndarray, cross: np.ndarray, size: int, phase: float) -> tuple[np.ndarray, float]:
    """The phases [U, P] that each entry of a latent adds, and the factor of the output weights."""
    ridge = 2 * _RIDGE * np.trace(gram) / len(gram)
    values, vectors = np.linalg.eigh(2 * gram + ridge * np.eye(len(gram)))
    whitening = vectors / np.sqrt(np.maximum(values, ridge))  # [U, U], H^{-1/2} up to a rotation
    codes = whitening.T @ (2 * cross)  # [U, n], the best of U numbers
    moments = codes @ codes.T / codes.shape[1]
    noise = whitening.T @ gram @ whitening
    moments += _NOISE * np.trace(moments) / np.trace(noise) * noise
    leading = np.linalg.eigh(moments)[1][:, ::-1][:, :size]
    directions = whitening @ leading
    added = directions @ (leading.T @ codes)  # phases of the training signals
    scale = float(np.sqrt(np.square(added).mean())) / phase or 1.0  # 1 if all signals are alike
    return directions / scale, scale


def _joined(half: Field, params: Params, mean: np.ndarray, scale: float, directions: np.ndarray) -> Params:
    """Both copies as one network."""
    (first, last), modulated = half.end_layers(), half.latent_layers()
    joined, kernels = {}, np.split(directions, len(modulated))
    for name, layer in params.items():
        kernel, bias = (np.asarray(layer[part], np.float64) for part in ("kernel", "bias"))
        if name == first:
            joined[name] = np.concatenate([kernel, kernel], 1), np.tile(bias, 2)
        elif name == last:
            joined[name] = np.concatenate([mean[:-1] / 2 + scale * kernel, mean[:-1] / 2 - scale * kernel]), mean[-1]
        elif name in modulated:
            position = modulated.index(name)
            shifts = kernels[position].T / half.module.omega(half.module.first_modulated + position)
            joined[name] = np.concatenate([shifts, -shifts], 1), np.tile(bias, 2)
        else:
            joined[name] = np.kron(np.eye(2), kernel), np.tile(bias, 2)
    return {
        name: {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
        for name, (kernel, bias) in joined.items()
    }
