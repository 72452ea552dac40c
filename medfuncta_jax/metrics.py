"""MSE, PSNR and SSIM of reconstructions, one number a signal, for any number of axes.

Signals lie in [0, 1], so the data range of PSNR and SSIM is 1. `signal_metrics` is the published protocol: it clips the
reconstruction to [0, 1] first; the single functions do not clip. SSIM is that of Wang et al. 2004 ("Image quality
assessment: from error visibility to structural similarity") as scikit-image computes it with `data_range=1,
gaussian_weights=True, sigma=1.5, use_sample_covariance=False`, which has no 1D or 3D counterpart in JAX. `summary`
turns the numbers of many signals into a mean with its interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medfuncta_jax.product import FULL

Array = jax.Array | np.ndarray

# The PSNR of a perfect reconstruction would be infinite, and so would every mean over it. 100 dB is an error of 1e-5
# root mean square; rounding to 8 bits alone already gives 58.9 dB, 41 dB less, so the cap changes no real figure.
PSNR_CAP = 100.0

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # (K1 * data range)^2, (K2 * data range)^2

# Values (points times channels) whose SSIM is computed at once: about 16 MB for each of some ten temporary arrays.
_VALUES_AT_ONCE = 2**22


def mse(reconstructions: Array, signals: Array, recorded: Array | None = None) -> jax.Array:
    """Mean squared error over all points and recorded channels of a signal; nothing is clipped.

    Args:
      reconstructions, signals: floating, [B, ..., D] of one shape: a grid of any rank, or [B, N, D].
      recorded: None, or [B, D] of 0 and 1, the channels that count.
    Returns:
      [B], >= 0, in the wider of the two dtypes and at least float32. NaN where a value that counts is NaN.
    Raises:
      ValueError: shapes differ, no points, or integer arrays.
    """
    return _mse(*_checked(reconstructions, signals), recorded)


def psnr(reconstructions: Array, signals: Array, recorded: Array | None = None) -> jax.Array:
    """Peak signal-to-noise ratio in dB for a data range of 1: -10 log10(mse), at most `PSNR_CAP` = 100 dB.

    Args:
      reconstructions, signals: floating, [B, ..., D] of one shape, in [0, 1]; nothing is clipped.
      recorded: as for `mse`.
    Returns:
      [B], dB. A perfect reconstruction has 100, so that means over signals stay finite. NaN where a value that
      counts is NaN.
    Raises:
      ValueError: shapes differ, no points, or integer arrays.
    """
    return _psnr(mse(reconstructions, signals, recorded))


def ssim(a: Array, b: Array) -> jax.Array:
    """Structural similarity for a data range of 1: Gaussian window of 11 points a side, sigma 1.5.

    Means and (population) covariances are taken in each channel by itself, in every window that lies wholly inside
    the grid, which is scikit-image's crop of 5 points a side; the result is the mean over windows and channels.

    An axis of fewer than 11 points, which scikit-image refuses, gets the widest odd window that fits it. So an axis of
    one point does not count (an image [28, 28, 1] has the SSIM of its [28, 28]), and where all axes are of one point
    only the luminance term is left.

    Args:
      a, b: floating, [B, *grid, D] of one shape with one to three grid axes, in [0, 1]. The order does not matter.
    Returns:
      [B], in [-1, 1], 1 where a equals b. NaN where a value is NaN.
    Raises:
      ValueError: shapes differ, no points, more than three grid axes, or integer arrays.
    """
    a, b = _checked(a, b)
    _check_rank(a)
    return _ssim(a, b)


def signal_metrics(reconstructions: Array, signals: Array, recorded: Array | None = None) -> dict[str, jax.Array]:
    """The figures of an evaluation: reconstructions are clipped to [0, 1], then compared (the paper's protocol).

    Args:
      reconstructions: floating, [B, *grid, D] with one to three grid axes, any range: the field's raw output.
      signals: the same shape, in [0, 1].
      recorded: None, or [B, D] of 0 and 1, the channels that count.
    Returns:
      {"mse": [B], "psnr": [B] in dB (see `psnr` on its cap), "ssim": [B]}, in the wider of the two dtypes.
    Raises:
      ValueError: shapes differ, no points, more than three grid axes, or integer arrays.
    """
    reconstructions, signals = _checked(reconstructions, signals)
    _check_rank(signals)
    clipped = jnp.clip(reconstructions, 0, 1)
    errors = _mse(clipped, signals, recorded)
    return {"mse": errors, "psnr": _psnr(errors), "ssim": _ssim(clipped, signals, recorded)}


def summary(values: Mapping[str, Array], *, resamples: int, seed: int) -> dict[str, Any]:
    """Mean, standard deviation and 95 % bootstrap interval of the mean, of every figure.

    The interval is the 2.5 % and 97.5 % percentile of the means of `resamples` draws of n signals with replacement
    (Efron 1979); one draw serves all figures. It covers the random choice of test signals, not the randomness of
    training.

    Args:
      values: name to [n] figures of the same n >= 1 signals.
      resamples: draws, at least 1.
      seed: seed of the draws; the same values and seed give the same interval.
    Returns:
      {name: mean, ..., "std": {name: population standard deviation}, "interval": {name: [low, high]}}, Python floats;
      a single signal's interval is its own value.
    """
    from scipy.stats import bootstrap  # takes half a second, needed by evaluations alone

    table = np.stack([np.asarray(value, np.float64) for value in values.values()])  # [figures, n]
    means, count = table.mean(-1), table.shape[-1]
    if count == 1:
        low = high = means
    else:
        interval = bootstrap(
            (table,), np.mean, axis=-1, vectorized=True, method="percentile", confidence_level=0.95,
            n_resamples=resamples, batch=max(1, _VALUES_AT_ONCE // table.size), rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
        low, high = interval.low, interval.high
    return {
        **dict(zip(values, means.tolist(), strict=True)),
        "std": dict(zip(values, table.std(-1).tolist(), strict=True)),
        "interval": {name: [float(low[k]), float(high[k])] for k, name in enumerate(values)},
    }


def _checked(a: Array, b: Array) -> tuple[jax.Array, jax.Array]:
    """Both arrays in one dtype of at least 32 bits; checks that they can be compared."""
    if a.shape != b.shape:
        raise ValueError(f"arrays to compare must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.ndim < 3 or 0 in a.shape[1:]:
        raise ValueError(f"arrays to compare must be [B, *grid, D] with points and channels, got {tuple(a.shape)}")
    for array in (a, b):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"arrays to compare must be floating, in [0, 1], got {array.dtype}")
    dtype = jnp.result_type(a.dtype, b.dtype, jnp.float32)
    return jnp.asarray(a, dtype), jnp.asarray(b, dtype)


def _check_rank(array: jax.Array) -> None:
    if array.ndim > 5:
        raise ValueError(f"SSIM needs [B, *grid, D] with one to three grid axes, got {tuple(array.shape)}")


@jax.jit
def _mse(a: jax.Array, b: jax.Array, recorded: Array | None = None) -> jax.Array:
    errors = jnp.square(a - b).mean(axis=tuple(range(1, a.ndim - 1)))  # [B, D]
    return _over_channels(errors, recorded)


def _over_channels(values: jax.Array, recorded: Array | None) -> jax.Array:
    """Means [B] over the recorded channels of values [B, D]."""
    return values.mean(-1, where=None if recorded is None else jnp.asarray(recorded) > 0)


@jax.jit
def _psnr(errors: jax.Array) -> jax.Array:
    return -10 * jnp.log10(jnp.maximum(errors, 10 ** (-PSNR_CAP / 10)))


@jax.jit
def _ssim(a: jax.Array, b: jax.Array, recorded: Array | None = None) -> jax.Array:
    """SSIM over chunks of the batch, so that memory is bounded by one signal or by _VALUES_AT_ONCE."""
    if a.shape[0] == 0:
        return jnp.zeros((0,), a.dtype)
    chunk = min(a.shape[0], max(1, _VALUES_AT_ONCE // math.prod(a.shape[1:])))
    return _over_channels(jax.lax.map(lambda pair: _signal_ssim(*pair), (a, b), batch_size=chunk), recorded)


def _signal_ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """[*grid, D], [*grid, D] -> [D].

    With s = a + b and d = a - b, var(s) + var(d) = 2 (var a + var b) and var(s) - var(d) = 4 cov(a, b), so both terms
    of SSIM are one minus a ratio that holds the difference itself. Against the textbook form this needs four filters
    instead of five, is exactly 1 where a = b, and loses few digits where the two are close.
    """
    total, difference = a + b, a - b
    # Subtracting a constant leaves a variance as it is and lowers its rounding error, about 40 times on X-rays.
    offset = total.mean(axis=tuple(range(total.ndim - 1)))  # [D]
    total = total - offset
    mean_total, mean_difference = _window_mean(total), _window_mean(difference)
    # Rounding may leave a variance just below zero.
    var_total = jnp.maximum(_window_mean(jnp.square(total)) - jnp.square(mean_total), 0)
    var_difference = jnp.maximum(_window_mean(jnp.square(difference)) - jnp.square(mean_difference), 0)
    square_total, square_difference = jnp.square(mean_total + offset), jnp.square(mean_difference)
    luminance_loss = square_difference / (0.5 * (square_total + square_difference) + _C1)
    structure_loss = var_difference / (0.5 * (var_total + var_difference) + _C2)
    # 1 - (1 - l)(1 - s): the mean is over small numbers, where float32 is most accurate.
    losses = luminance_loss + structure_loss - luminance_loss * structure_loss
    return 1 - losses.mean(axis=tuple(range(losses.ndim - 1)))


def _window_mean(values: jax.Array) -> jax.Array:
    """Gaussian mean in every window inside the grid, one axis after the other: [*grid, D] -> [*(grid - window + 1), D].

    The convolution sees [leading, 1, n, trailing], so that one kernel serves every axis and rank.
    """
    for axis in range(values.ndim - 1):
        before, (count, *after) = values.shape[:axis], values.shape[axis:]
        taps = _gaussian(min(_WINDOW, count - 1 + count % 2))
        values = jax.lax.conv_general_dilated(
            values.reshape(math.prod(before), 1, count, math.prod(after)),
            jnp.asarray(taps, values.dtype).reshape(1, 1, -1, 1),
            window_strides=(1, 1),
            padding="VALID",
            precision=FULL,  # with TF32 or bfloat16 products a variance would lose all digits
        ).reshape(*before, count - len(taps) + 1, *after)
    return values


def _gaussian(size: int) -> np.ndarray:
    """float64 [size], size odd: weights of the window, sum 1."""
    offsets = np.arange(size) - size // 2
    weights = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    return weights / weights.sum()
