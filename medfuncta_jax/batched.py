"""Fitting any number of signals, and decoding any number of latents, in batches that share one compiled program.

    fitted = mf.fit_signals(field, params, dataset.splits["test"], fit=mf.FitSettings(steps=20, batch_size=64))
    values = mf.decode_latents(field, params, fitted.latents, (128, 128))  # [n, 128, 128, D]

`fit_batches` and `decode_batches` yield the same batch by batch, for data that does not fit into memory and for work
that may be interrupted: a yielded batch is finished. While a device works on one batch, the host reads the next batch
and yields the previous one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medfuncta_jax import metrics, sharding
from medfuncta_jax.arrays import Array, as_array, check_signals, relative_weights
from medfuncta_jax.coordinates import grid
from medfuncta_jax.field import STEP_SIZE, Field, Params, params_dtype
from medfuncta_jax.fit import fit_latent, reconstruct
from medfuncta_jax.point_field import ChannelLoss
from medfuncta_jax.settings import FitSettings, Settings, SettingsError

# Maximum number of values decoded at once, 64 MB in float32, beside the memory of `reconstruct`.
_VALUES_AT_ONCE = 2**24

_T = TypeVar("_T")


class SignalSource(Protocol):
    """Signals that are read on access, such as a `datasets.Split`.

    It may have a method `recorded(rows)` like that of a split: channels that were not recorded take no part in a fit or
    its PSNR.
    """

    def __len__(self) -> int:
        """The number of signals."""

    def signals(self, rows: np.ndarray) -> np.ndarray:
        """The signals of some rows, floating [len(rows), *grid, D]."""


@dataclass(frozen=True)
class FittedSignals:
    """Latents and their quality, in the order of the signals.

    Attributes:
      latents: [n, P].
      psnr: [n], dB, of the reconstructions from these latents, clipped to [0, 1], in the recorded channels.
    """

    latents: np.ndarray
    psnr: np.ndarray


class Observations(NamedTuple):
    """A batch of signals.

    Attributes:
      signals: [B, *grid, D].
      weights: None, or weights of points or of values, as `fit_latent` takes them.
      recorded: None, or [B, D], 0 for a channel that was not recorded, else 1.
    """

    signals: Array
    weights: Array | None = None
    recorded: Array | None = None


def observed(source: SignalSource, rows: np.ndarray, weights: np.ndarray | None = None) -> Observations:
    """The signals of some rows, whose recorded channels count by these weights.

    Raises:
      ValueError: values that are not finite where they count, or weights that `fit_latent` refuses.
    """
    signals = source.signals(rows)
    flat = signals.reshape(len(rows), -1, signals.shape[-1])
    recorded = source.recorded(rows) if hasattr(source, "recorded") else None
    if weights is not None:
        weights = np.asarray(relative_weights(weights, *flat.shape))
    if recorded is not None:
        weights = np.broadcast_to(recorded[:, None] * (1 if weights is None else weights), flat.shape)
        relative_weights(weights, *flat.shape)  # what is left of each signal
    check_signals(flat, weights, rows=rows)
    return Observations(signals, weights, recorded)


@dataclass(frozen=True)
class FitRules:
    """The options of `fit_signals` that are static in the compiled program."""

    fit: FitSettings
    channel_loss: ChannelLoss
    selection_ratio: float
    dtype: str

    @classmethod
    def of(cls, settings: Settings, *, dtype: str) -> Self:
        """The options in a run's settings."""
        return cls(settings.fit, settings.train.channel_loss, settings.inner.selection_ratio, dtype)


def fit_signals(
    field: Field,
    params: Params,
    signals: Array | SignalSource,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    weights: Array | None = None,
    fit: FitSettings = FitSettings(),  # noqa: B008  (frozen)
    step_size: float | Array = STEP_SIZE,
    channel_loss: ChannelLoss = "mean",
    selection_ratio: float = 1.0,
    key: jax.Array | None = None,
    dtype: Literal["float32", "float16"] | None = None,
    mesh: Mesh | None = None,
    after_batch: Callable[[FittedSignals], None] = lambda fitted: None,
) -> FittedSignals:
    """Fit one latent to each of any number of signals, `fit.batch_size` at a time.

    Each latent equals that of `fit_latent` with the same options up to rounding, for any batch size. (The defaults
    differ: `FitSettings` has the safeguard on, `fit_latent` has it off.) Repeats fill the last batch, so that one
    program serves all batches; the result leaves them out.

    Args:
      field, params: from `load_field`, `field_from_layers` or `Field.init`; the dtype of `params` is used.
      signals: [n, *grid, D], floating, in [0, 1]; or a `SignalSource`, such as a split of a dataset, which is read one
        batch at a time.
      rows: which signals, in this order, also repeated; None is all.
      weights: None, or one weight >= 0 a point of each signal that is fitted, [len(rows), N] or [len(rows), *grid], or
        one a value, with a last axis D; what has 0 is hidden from the fit, not from the PSNR.
      fit: steps, batch size and safeguard, see `FitSettings`.
      step_size: alpha, a scalar or [P]. Fields from `load_field` are scaled so that the default is right.
      channel_loss, selection_ratio: as in the field's training, see `TrainSettings` and `InnerSettings`;
        `selection_ratio` matters only with `fit.context = "rescaled"`. `fit_options` gives all of these from a run's
        settings.
      key: PRNG key for the random subsets of `fit.context = "rescaled"`; key 0 where None.
      dtype: the type of the returned latents; None is that of `params`. The PSNR is measured after rounding to this
        type.
      mesh: devices that share every batch, see `sharding.data_mesh`; None is the first local device.
      after_batch: called with the fitted signals after every batch, e.g. to show progress; an exception ends the fit.
    Raises:
      ValueError: shapes that do not belong together, no signals, rows that are not there, values that are not finite.
      SettingsError: `fit.batch_size` is 0, or not a multiple of the devices.
    """
    found = []
    for fitted in fit_batches(
        field, params, signals, rows=rows, weights=weights, fit=fit, step_size=step_size, channel_loss=channel_loss,
        selection_ratio=selection_ratio, key=key, dtype=dtype, mesh=mesh,
    ):  # fmt: skip
        found.append(fitted)
        after_batch(fitted)
    return FittedSignals(np.concatenate([one.latents for one in found]), np.concatenate([one.psnr for one in found]))


def fit_batches(
    field: Field,
    params: Params,
    signals: Array | SignalSource,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    weights: Array | None = None,
    fit: FitSettings = FitSettings(),  # noqa: B008  (frozen)
    step_size: float | Array = STEP_SIZE,
    channel_loss: ChannelLoss = "mean",
    selection_ratio: float = 1.0,
    key: jax.Array | None = None,
    dtype: Literal["float32", "float16"] | None = None,
    mesh: Mesh | None = None,
) -> Iterator[FittedSignals]:
    """`fit_signals`, batch by batch and in order; a batch is yielded as soon as it is on the host."""
    source = signals if hasattr(signals, "signals") else _Whole(as_array("signals", signals))
    chosen = _rows(rows, source)
    mesh = sharding.data_mesh(jax.local_devices()[:1]) if mesh is None else mesh
    size = min(fit.batch_size, -(-len(chosen) // mesh.size) * mesh.size)
    if size < 1:
        raise SettingsError(f"fit.batch_size must be at least 1, got {fit.batch_size}")
    sharding.check_batch_size(mesh, size, "fit.batch_size")
    if weights is not None:
        shown = np.asarray(as_array("weights", weights))
        if len(shown) != len(chosen):
            raise ValueError(f"weights {shown.shape} must be [{len(chosen)}, N], one row a signal that is fitted")
    rules = FitRules(fit, channel_loss, selection_ratio, dtype or np.dtype(params_dtype(params)).name)
    params = sharding.replicate(mesh, params)
    key = jax.random.key(0) if key is None else key

    def under_way() -> Iterator[tuple[int, jax.Array, jax.Array]]:
        for start in range(0, len(chosen), size):
            places = np.minimum(np.arange(start, start + size), len(chosen) - 1)
            batch = sharding.split_batch(
                mesh, observed(source, chosen[places], None if weights is None else shown[places])
            )
            yield min(size, len(chosen) - start), *fit_batch(field, rules, params, batch, step_size, key)

    for count, latents, psnr in _one_ahead(under_way()):
        yield FittedSignals(sharding.to_host(latents)[:count], sharding.to_host(psnr)[:count])


@functools.partial(jax.jit, static_argnames=("field", "rules"))
def fit_batch(
    field: Field,
    rules: FitRules,
    params: Params,
    batch: Observations,
    step_size: float | Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Latents [B, P], and the PSNR [B] in dB of their reconstructions in all recorded channels, in one program."""
    fit, signals = rules.fit, jnp.asarray(batch.signals)
    fitted = fit_latent(
        field, params, signals, weights=batch.weights, steps=fit.steps, step_size=step_size,
        channel_loss=rules.channel_loss, safeguard=fit.safeguard,
        rescale_ratio=rules.selection_ratio if fit.context == "rescaled" else None, key=key,
    )  # fmt: skip
    rounded = fitted.latents.astype(rules.dtype)
    values = reconstruct(field, params, rounded, grid(signals.shape[1:-1]))
    return rounded, metrics.psnr(jnp.clip(values, 0, 1), signals.reshape(values.shape), batch.recorded)


def fit_options(settings: Settings) -> dict[str, Any]:
    """The keywords of `fit_signals` from a run's settings: `fit`, `channel_loss`, `selection_ratio` and `key`."""
    return {
        "fit": settings.fit,
        "channel_loss": settings.train.channel_loss,
        "selection_ratio": settings.inner.selection_ratio,
        "key": jax.random.key(settings.seed),
    }


def decode_latents(
    field: Field,
    params: Params,
    latents: Any,
    where: Sequence[int] | Array,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """Values of any number of latents on a grid or at given points, on the host; not clipped.

    Args:
      field, params: the shared network.
      latents: [n, P], an array or the `Latents` of a store, which are read one batch at a time.
      where: the points along each axis of a grid, such as (128, 128); or coordinates in [-1, 1], [N, C] or [*grid, C].
      rows: which latents, in this order; None is all.
      batch_size: latents decoded at once; fewer if they would decode to more than 2^24 values (64 MB in float32).
    Returns:
      [n, *grid, D], or [n, N, D].
    Raises:
      ValueError: shapes that do not belong together, no latents, or a batch size below 1.
    """
    batches = decode_batches(field, params, latents, where, rows=rows, batch_size=batch_size)
    return np.concatenate(list(batches))


def decode_batches(
    field: Field,
    params: Params,
    latents: Any,
    where: Sequence[int] | Array,
    *,
    rows: Sequence[int] | np.ndarray | None = None,
    batch_size: int = 64,
) -> Iterator[np.ndarray]:
    """`decode_latents`, batch by batch and in order, each [b, *grid, D] or [b, N, D]; the last one may be shorter."""
    points = np.asarray(as_array("where", where))
    if points.ndim < 2 and points.shape != (field.coord_dims,):
        raise ValueError(f"where must be {field.coord_dims} sizes of a grid, or coordinates, got {where!r}")
    shape: tuple[int, ...] = tuple(points.tolist()) if points.ndim == 1 else points.shape[:-1]
    coords = grid(shape) if points.ndim == 1 else points.reshape(-1, points.shape[-1])
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    chosen = _rows(rows, latents)
    size = max(1, min(batch_size, len(chosen), _VALUES_AT_ONCE // max(1, len(coords) * field.channels)))

    def under_way() -> Iterator[tuple[int, jax.Array]]:
        for start in range(0, len(chosen), size):
            places = np.minimum(np.arange(start, start + size), len(chosen) - 1)
            values = reconstruct(field, params, latents[chosen[places]], coords, per_signal=False)
            yield min(size, len(chosen) - start), values

    for count, values in _one_ahead(under_way()):
        yield np.asarray(values)[:count].reshape(count, *shape, field.channels)


class _Whole:
    """An array of signals as a `SignalSource`."""

    def __init__(self, array: Array):
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def signals(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self._array[rows])


def _rows(rows: Sequence[int] | np.ndarray | None, of: Sized) -> np.ndarray:
    chosen = np.arange(len(of)) if rows is None else np.asarray(rows)
    if chosen.ndim != 1 or not len(chosen):
        raise ValueError(f"at least one signal is needed, got rows of shape {chosen.shape}")
    if not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(f"rows must be whole numbers, got {chosen.dtype}")
    return chosen


def _one_ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The same items; each is yielded only after the next one is computed."""
    former = next(items)
    for item in items:
        yield former
        former = item
    yield former
