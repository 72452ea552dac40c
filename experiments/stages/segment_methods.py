"""The methods of `segment`: masks of test signals by the head, by a field of masks, and by the U-Net."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.runtime.run import Run
from experiments.stages.training_setup import most_signals, with_linear_start
from medfuncta_jax import latent_operator, meta_step, segmentation
from medfuncta_jax.augmentation import resized_and_moved
from medfuncta_jax.batched import decode_batches, fit_options, fit_signals
from medfuncta_jax.coordinates import grid, inner_samples
from medfuncta_jax.datasets.dataset import SPLITS
from medfuncta_jax.field import Field, Params
from medfuncta_jax.fit import fit_latent
from medfuncta_jax.latent_operator import OperatorTraining
from medfuncta_jax.segmentation import dice
from medfuncta_jax.signal_metric import signal_metric

# Validations of a training, after each of which it may stop.
PARTS = 10

# Masks of test signals by a method, and its row of results.
Result = tuple[dict[str, np.ndarray], dict[str, Any]]


class Masks(NamedTuple):
    """Label values, those of classes 1, 2 and so on; classes of all signals, uint8 [n, *grid], by split; the test
    masks on the finer grid, or None."""

    values: tuple[int, ...]
    splits: dict[str, np.ndarray]
    finer: np.ndarray | None


class Case(NamedTuple):
    """The input of a method: the run, its field, masks, signals and latents by split, those of `latents` for each part
    of the points, and the points [F, *grid] by split that were observed; `may_stop` is called now and then."""

    run: Run
    network: tuple[Field, Params]
    masks: Masks
    signals: dict[str, np.ndarray]
    latents: dict[str, np.ndarray]
    seen: dict[str, np.ndarray]
    may_stop: Callable[..., None]


def with_copies(
    run: Run, network: tuple[Field, Params], signals: np.ndarray, latents: np.ndarray, masks: np.ndarray,
    may_stop: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Training signals, their latents, and their masks, with `segment.copies` changed copies of each behind them.

    A copy is resized and moved as `train.augmentation` does it, its mask with it: each class as a channel, and the
    largest one is taken.
    """
    settings, shape = run.settings, run.dataset.grid
    channels, count = signals.shape[-1], settings.segment.copies
    one_hot = _OneHot(masks, int(masks.max()) + 1)
    size = min(settings.fit.batch_size or len(signals), len(signals))

    @jax.jit
    def changed(keys: jax.Array, both: jax.Array) -> jax.Array:
        def of_one(key: jax.Array, one: jax.Array) -> jax.Array:
            flat = one.reshape(1, -1, one.shape[-1])
            return resized_and_moved(key, flat, shape, largest=settings.segment.augmentation).reshape(one.shape)

        return jax.vmap(of_one)(keys, both)

    copies, of_copies = [], []
    for copy in range(count):
        # A key for each signal, so that batches do not matter.
        keys = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), copy), len(signals))
        for start in range(0, len(signals), size):
            may_stop(f"copies of training signals: {copy + 1} of {count}")
            rows = np.minimum(np.arange(start, start + size), len(signals) - 1)
            both = np.concatenate([signals[rows], one_hot.signals(rows)], -1)
            found = np.asarray(changed(keys[rows], both))[: len(signals) - start]
            copies.append(found[..., :channels].clip(0, 1))
            of_copies.append(found[..., channels:].argmax(-1).astype(masks.dtype))
    copied = np.concatenate(copies)
    fitted = fit_signals(
        *network, copied, after_batch=lambda _: may_stop("latents of the copies"), **fit_options(settings)
    ).latents
    return (
        np.concatenate([signals, copied]),
        np.concatenate([latents, np.asarray(fitted, latents.dtype)]),
        np.concatenate([masks, *of_copies]),
    )


def latents_of_parts(
    run: Run, network: tuple[Field, Params], signals: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray],
    may_stop: Callable[[str], None],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:  # fmt: skip
    """Latents [F, n, P] by split, fitted to each part of the points, and the observed points [F, *grid], by split."""
    settings, coords = run.settings, grid(run.dataset.grid)
    fit, wanted = settings.fit, settings.segment.observed
    latents: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    seen = {name: np.zeros((len(wanted), len(coords)), bool) for name in SPLITS}
    orders = {name: np.random.default_rng([settings.seed, name != "train"]).permutation(len(coords)) for name in SPLITS}
    for k, part in enumerate(wanted):
        count = max(1, round(part * len(coords)))
        for name in SPLITS:
            seen[name][k, orders[name][:count]] = True
            if part == 1:
                latents[name].append(stored[name])
                continue
            rows = np.sort(orders[name][:count])
            values = signals[name].reshape(len(signals[name]), len(coords), -1)[:, rows]
            size, found = min(fit.batch_size or len(values), len(values)), []
            for start in range(0, len(values), size):
                may_stop(f"latents of {part:.0%} of the points")
                some = np.minimum(np.arange(start, start + size), len(values) - 1)
                fitted = fit_latent(
                    *network, values[some], coords=coords[rows], steps=fit.steps, safeguard=fit.safeguard,
                    channel_loss=settings.train.channel_loss, key=jax.random.key(settings.seed),
                    rescale_ratio=settings.inner.selection_ratio if fit.context == "rescaled" else None,
                )  # fmt: skip
                found.append(np.asarray(fitted.latents))
            latents[name].append(np.concatenate(found)[: len(values)])
    shape = run.dataset.grid
    return (
        {name: np.stack(some) for name, some in latents.items()},
        {name: some.reshape(-1, *shape) for name, some in seen.items()},
    )


def head_masks(case: Case, fits: float) -> Result:
    """Masks of test signals by the head, and its row of results."""
    began, settings = time.monotonic(), case.run.settings
    train, val = (
        segmentation.Examples(latents, case.masks.splits[name], case.signals[name], seen)
        for name, latents, seen in (
            ("train", case.latents["train"], case.seen["train"]),
            ("val", case.latents["val"][0], case.seen["val"][0]),
        )
    )
    head = segmentation.fit_head(
        *case.network, train, val, classes=len(case.masks.values) + 1, key=jax.random.key(settings.seed),
        training=settings.segment.training,
        after=lambda step, loss: case.may_stop(f"head: {step} of {settings.segment.steps} updates, loss {loss:.3f}", 1),
    )  # fmt: skip
    seconds = time.monotonic() - began

    def labels(part: int, where: Any) -> np.ndarray:
        found = []
        for start in range(0, len(case.signals["test"]), 8):
            some = slice(start, start + 8)
            observed = {"signals": case.signals["test"][some], "seen": case.seen["test"][part]}
            found.append(head.labels(case.latents["test"][part, some], where, **observed))
            case.may_stop("head: masks of test signals")
        return np.concatenate(found)

    row = _row(head.params, updates=settings.segment.steps, best=head.step, val_dice=head.val_dice, training=seconds,
               fits=fits)  # fmt: skip
    return _at_all(case, labels), row


def _at_all(case: Case, labels: Callable[[int, Any], np.ndarray]) -> dict[str, np.ndarray]:
    """Classes of test signals, uint8: `masks` [F, n, *grid] of each part of the points, and `finer` where asked for.

    Args:
      labels: for one of the F parts of the points, on a grid of these sizes or at points.
    """
    shape = case.run.dataset.grid
    found = {"masks": np.stack([labels(part, shape) for part in range(len(case.latents["test"]))])}
    if case.masks.finer is not None:
        fine = case.masks.finer.shape[1:]
        inside, coords = inner_samples(shape, fine)
        inner = labels(0, coords).reshape(-1, *(part.stop - part.start for part in inside))
        # Beyond the outermost samples of the training grid the outermost labels go on.
        edges = [(part.start, size - part.stop) for part, size in zip(inside, fine, strict=True)]
        found["finer"] = np.pad(inner, [(0, 0), *edges], mode="edge")
    return found


class _OneHot:
    """Masks [n, *grid] as signals of one channel a class, made on access."""

    def __init__(self, masks: np.ndarray, classes: int):
        self._masks, self._channels = masks, np.eye(classes, dtype=np.float32)

    def __len__(self) -> int:
        return len(self._masks)

    def signals(self, rows: np.ndarray) -> np.ndarray:
        return self._channels[self._masks[rows]]


def field_masks(case: Case, fits: float) -> Result:
    """Masks of test signals by the operator on latents and the field of masks, and its row of results."""
    began, settings, dataset = time.monotonic(), case.run.settings, case.run.dataset
    classes, wanted = len(case.masks.values) + 1, settings.segment
    keys = jax.random.split(jax.random.key(settings.seed), 4)
    one_hot = {name: _OneHot(case.masks.splits[name], classes) for name in ("train", "val")}
    # The settings of the field of signals, with other numbers of updates and channels. A start alone stays one.
    updates = wanted.field_steps if settings.train.steps else 0
    own = replace(settings, train=replace(settings.train, method="meta", steps=updates))
    field = replace(case.network[0], channels=classes)
    training = meta_step.Training(field, own, dataset.grid)
    update = jax.jit(functools.partial(meta_step.update, training), donate_argnums=0)
    state, size = meta_step.init(field, own, keys[0]), min(own.train.batch_size, len(one_hot["train"]))
    if own.train.start == "linear":
        rows = np.arange(min(len(one_hot["train"]), most_signals(dataset.grid, classes)))
        state = with_linear_start(
            field, own, state, one_hot["train"].signals(rows), keys[0],
            after=lambda loss: case.may_stop(f"field of masks: linear start, mean squared error {loss:.4f}"),
        )  # fmt: skip
    for step in range(updates):
        rows = np.random.default_rng([settings.seed, step]).permutation(len(one_hot["train"]))[:size]
        state, said = update(state, one_hot["train"].signals(rows).reshape(size, -1, classes), keys[1])
        if (step + 1) % max(1, updates // PARTS) == 0:
            note = f"field of masks: {step + 1} of {updates} updates, loss {float(said['loss']):.4f}"
            case.may_stop(note, 1)
    coords = grid(dataset.grid)
    at = jnp.asarray(coords, jnp.float32)
    params = meta_step.exported_params(field, state.trainable, own.inner, at)
    of_masks = {
        name: fit_signals(field, params, some, after_batch=lambda _: case.may_stop("latents of masks"),
                          **fit_options(settings)).latents
        for name, some in one_hot.items()
    }  # fmt: skip
    operator = latent_operator.fit_operator(
        case.latents["train"], of_masks["train"], case.latents["val"][0], of_masks["val"],
        metric=signal_metric(*case.network, case.latents["train"][0], coords, key=keys[2]),
        target_metric=signal_metric(field, params, of_masks["train"], coords, key=keys[2]), key=keys[3],
        training=OperatorTraining(steps=wanted.operator_steps),
        after=lambda step, loss: case.may_stop(f"operator: {step} of {wanted.operator_steps} updates, loss {loss:.3f}"),
    )  # fmt: skip

    def decoded(latents: np.ndarray, where: Any) -> np.ndarray:
        found = []
        for values in decode_batches(field, params, latents, where, batch_size=8):
            found.append(values.argmax(-1).astype(np.uint8))
            case.may_stop("field of masks: masks of test signals")
        return np.concatenate(found)

    def labels(latents: np.ndarray, where: Any) -> np.ndarray:
        return decoded(operator.latents(latents), where)

    truth = case.masks.splits["val"]
    qualities = {
        name: dice(some, truth, classes=classes)
        for name, some in (("operator", labels(case.latents["val"][0], dataset.grid)),
                           ("fitted", decoded(of_masks["val"], dataset.grid)))
    }  # fmt: skip
    seconds = time.monotonic() - began
    means = {name: float(np.nanmean(some)) if not np.isnan(some).all() else np.nan for name, some in qualities.items()}
    row = _row((params, operator.params), updates=updates + wanted.operator_steps, best=operator.step,
               val_dice=means["operator"], training=seconds, fits=fits)  # fmt: skip
    # How well the field shows masks that its latents are fitted to: no operator on latents is much better.
    return _at_all(case, lambda part, where: labels(case.latents["test"][part], where)), row | {
        "val_dice_of_fitted_masks": None if np.isnan(means["fitted"]) else means["fitted"]
    }  # fmt: skip


def unet_masks(case: Case, seconds: float) -> Result:
    """Masks of test signals by the U-Net, trained for so many seconds, and its row of results."""
    from experiments.stages.unet import UNetTraining, fit_unet

    began, settings, wanted = time.monotonic(), case.run.settings, case.run.settings.segment
    fit = fit_unet(
        case.signals["train"], case.masks.splits["train"], case.signals["val"], case.masks.splits["val"],
        classes=len(case.masks.values) + 1, key=jax.random.key(settings.seed),
        training=UNetTraining(wanted.unet_widths, wanted.unet_batch, wanted.unet_learning_rate, wanted.observed),
        steps=wanted.unet_steps, seconds=seconds,
        after=lambda step, steps, loss: case.may_stop(f"U-Net: {step} of {steps} updates, loss {loss:.3f}", 1),
    )  # fmt: skip
    spent = time.monotonic() - began
    found = np.stack([
        fit.labels(case.signals["test"], seen[None]) for seen in case.seen["test"]
    ])  # fmt: skip
    return {"masks": found}, _row(fit.params, updates=fit.steps, best=fit.step, val_dice=fit.val_dice,
                                  training=spent, fits=0.0)  # fmt: skip


def _row(
    params: Any, *, updates: int, best: int, val_dice: float, training: float, fits: float
) -> dict[str, Any]:  # fmt: skip
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "updates": updates,
        "best_update": best,
        "val_dice": None if np.isnan(val_dice) else val_dice,
        "seconds": round(training + fits, 2),
        "seconds_of_fits": round(fits, 2),
    }
