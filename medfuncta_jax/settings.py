"""Settings: one tree of frozen, hashable dataclasses, built once from a config and validated there.

`Settings.from_dict(config.to_dict())` makes the settings of every run, and `to_dict` the values that are saved beside
every artefact. Defaults are the paper's 2D settings (MedFuncta, MIDL 2026, appendix B).
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
      latent_dim: P >= 1 entries of the latent, over all its places.
      latent_grid: () for a latent that is one vector; else the places along each axis of the signal, m_1, ..., m_C, and
        the latent is a vector of P / (m_1 ... m_C) entries at each (Spatial Functa, Bauer et al. 2023), flattened as
        array[m_1, ..., m_C, entries].
      latent_interpolation: how a point reads a latent grid. "linear" interpolates between places that divide [-1, 1]
        evenly, both ends included. "nearest" takes the vector of the point's cell, of m equal cells along each axis.
      modulation_hidden: widths of hidden layers (ReLU) between latent and modulations; () is a linear map.
      omega_first, omega_last: w_1 and w_K > 0 of the linear w-schedule.
      omega: "given", or "auto": the launcher replaces both by values that it finds in short trainings before the run,
        and begins the search at the given ones (see `experiments.stages.omega_search`).
      residual: h_k = h_{k-1} + s_k instead of s_k (the release; not written in the paper).
      offset: added to the output; 0.5 centres data in [0, 1] (the release).
      modulate_first_layer: the release does, the paper does not (eq. 1).
      modulate_scale: the latent also scales each layer's pre-activation.
      modulation_init: M_k starts "uniform" (the paper) or "orthogonal" with the same norm, so that all directions of
        the latent start with an effect; useful for few inner steps and a latent as large as the layer is wide.
      products: precision of the matrix products of layers 2 to K-1 and of their derivatives. "float32" is full
        float32 on every device. "tensorfloat32" rounds factors to TF32 on a GPU that has it, and is "float32"
        elsewhere. "bfloat16" rounds factors to bfloat16. Sums, and all other products, are full float32.
    """

    layers: int = 15
    width: int = 256
    latent_dim: int = 2048
    omega_first: float = 20.0
    omega_last: float = 400.0
    omega: Literal["given", "auto"] = "given"
    residual: bool = True
    offset: float = 0.5
    modulate_first_layer: bool = False
    modulate_scale: bool = False
    modulation_init: Literal["uniform", "orthogonal"] = "uniform"
    products: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
    latent_grid: tuple[int, ...] = ()
    latent_interpolation: Literal["linear", "nearest"] = "linear"
    modulation_hidden: tuple[int, ...] = ()

    def __post_init__(self):
        _require(self.layers >= 3, f"layers must be at least 3 (one modulated layer), got {self.layers}")
        _require(self.width >= 1, f"width must be at least 1, got {self.width}")
        _require(self.latent_dim >= 1, f"latent_dim must be at least 1, got {self.latent_dim}")
        _require(min(self.omega_first, self.omega_last) > 0, "omega_first and omega_last must be above 0")
        for name in ("latent_grid", "modulation_hidden"):
            _require(min(getattr(self, name), default=1) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(
            self.latent_dim % self.places == 0,
            f"latent_dim must be a multiple of the {self.places} places of latent_grid, got {self.latent_dim}",
        )

    @property
    def places(self) -> int:
        """The number of vectors in the latent."""
        return math.prod(self.latent_grid)

    @property
    def latent_features(self) -> int:
        """The entries of each vector; P for a single vector."""
        return self.latent_dim // self.places

    @classmethod
    def from_named(cls, settings: Mapping[str, Any]) -> Self:
        """From a mapping; other names are ignored, and sizes are required."""
        known = {f.name for f in fields(cls)}
        for name in ("layers", "width", "latent_dim"):
            _require(name in settings, f"setting {name!r} is missing")
        return dataclass_from_dict(cls, {name: value for name, value in settings.items() if name in known})


@dataclass(frozen=True)
class InnerSteps:
    """The steps of the inner loop.

    Attributes:
      steps: G >= 1 SGD steps on the latent.
      step_size: alpha > 0.
      selection_ratio: gamma in (0, 1], the part of the points in the context of a step.
      shared_context: one random context a step for the whole batch (the release) instead of one a signal (the paper).
      first_order: hold the inner gradients constant (first-order MAML); exact second order otherwise.
      remat: the arrays of each step that are kept for the reverse pass. "steps": the latent alone, and the step is
        computed again; "layers": two arrays a layer, its pre-activation and its gradient; "none": all, and the steps
        are unrolled, so that nothing is copied. The gradient is the same; `experiments/PERFORMANCE.md` has time and
        memory of each.
    """

    steps: int = 10
    step_size: float = 1e-2
    selection_ratio: float = 0.25
    shared_context: bool = False
    first_order: bool = False
    remat: Literal["none", "layers", "steps"] = "steps"

    def __post_init__(self):
        _require(self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        _require(self.step_size > 0, f"step_size must be above 0, got {self.step_size}")
        _require(0 < self.selection_ratio <= 1, f"selection_ratio must be in (0, 1], got {self.selection_ratio}")
        _require(
            self.remat in ("none", "layers", "steps"),
            f"remat must be one of 'none', 'layers', 'steps', got {self.remat!r}",
        )


@dataclass(frozen=True)
class InnerSettings(InnerSteps):
    """The inner loop of meta-training: `InnerSteps`, how their size is learned, and their metric.

    Attributes:
      learned_step_size: "none", "scalar" or "per_latent" (Meta-SGD, Li et al. 2017), initialised at `step_size`.
      step_size_range: (lowest, highest), to which a learned step size is clipped; () is none.
      gauss_newton_damping: 0 for steps along the gradient (the paper). Above 0 a step of size 1 is a Gauss-Newton step,
        with this damping of phases (see `conditioning`).
      fit_ratio: in (0, 1], the part of a step of training that a default step of `fit_latent` takes on the exported
        field. Gauss-Newton steps on a part r of the points of a signal converge if fit_ratio < 2 r.
    """

    learned_step_size: Literal["none", "scalar", "per_latent"] = "none"
    step_size_range: tuple[float, ...] = ()
    gauss_newton_damping: float = 0.0
    fit_ratio: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _require(
            self.gauss_newton_damping >= 0,
            f"gauss_newton_damping must not be negative, got {self.gauss_newton_damping}",
        )
        _require(0 < self.fit_ratio <= 1, f"fit_ratio must be in (0, 1], got {self.fit_ratio}")
        _require(
            self.step_size_range == ()
            or (len(self.step_size_range) == 2 and 0 < self.step_size_range[0] <= self.step_size_range[1]),
            f"step_size_range must be (lowest, highest) with 0 < lowest <= highest, or (), got {self.step_size_range}",
        )


# The systems of `medfuncta_jax.methods`.
Method = Literal["meta", "autodecoder", "codebook", "contrastive", "gradient_contexts", "patches", "pyramid"]


@dataclass(frozen=True)
class TrainSettings:
    """The outer loop.

    Attributes:
      method: "meta" differentiates through the inner loop (CAVIA); all others are systems that MedFuncta is compared
        with (see `medfuncta_jax.baselines`, and `BaselineSettings`).
      start: "random" weights (the paper), or "linear": weights whose codes of P numbers lose little of training signals
        without any meta-update (see `linear_code`).
      start_updates: updates of the hidden layers for a linear start.
      steps: meta-updates in all; 0, with a linear start, keeps the start.
      batch_size: B signals a meta-update, over all devices.
      micro_batch: signals in memory at once, a divisor of `batch_size`; gradients are accumulated. 0: all.
      points_per_chunk: points of a signal in memory at once, in each inner step and in the outer loss. 0: all.
      modulation_shards: devices that together hold one copy of the modulation weights and their moments, a divisor of
        all devices and of the latent's entries (of one place); useful if these weights, P times the width in each
        layer, fill a device. The update is the same to rounding.
      selection_ratio: in (0, 1], part of the points that a meta-update sees, drawn anew for each; contexts are drawn
        from this part. 1 (the paper): the outer loss is on every point.
      augmentation: a in [0, 1]. In a meta-update each signal is resized along each axis by a random factor within
        [1 / (1 + a), 1 + a], and moved by at most a / 4 of its extent (see `augmentation`). A linear start sees copies
        changed so, in grades up to a. 0 is the paper.
      off_grid: the outer loss is also on points between those of the grid, all moved by one random shift of at most
        half a spacing, with signals interpolated there; inner steps stay on the grid. It takes twice the points.
      optimizer: "adamw" (the paper), or "muon" for the weights of hidden layers and modulations, beside AdamW for the
        rest.
      learning_rate: beta, the peak rate of AdamW.
      muon_learning_rate: peak rate of Muon.
      schedule: "cosine" anneals to 0 over `steps`, "constant" does not.
      warmup_steps: linear warm-up from 0, counted in `steps`; a shorter run is warm-up to its end.
      weight_decay: the optimizer's, on the field's parameters.
      clip_norm: bound on the global norm of the meta-gradient; 0 is off.
      step_size_learning_rate: peak rate of Adam on the logarithm of a learned inner step size.
      latent_learning_rate: peak rate of Adam on the latents of an auto-decoder.
      latent_penalty: weight of the mean square of the latents' entries in the outer loss.
      latent_noise: standard deviation of noise added to the latents in the outer loss.
      channel_loss: squared error averaged ("mean", the release) or summed ("sum", eq. 5) over channels.
      eval_every: meta-updates between validations, each of which also saves a checkpoint.
      eval_signals: maximum number of validation signals used in training.
      checkpoint_every: meta-updates between further checkpoints; 0: only at validations.
      log_every: meta-updates between log lines.
      collapse_db: stop once validation PSNR is this far below the best so far; 0 is off.
    """

    method: Method = "meta"
    start: Literal["random", "linear"] = "random"
    start_updates: int = 300
    steps: int = 250_000
    batch_size: int = 24
    micro_batch: int = 0
    points_per_chunk: int = 0
    modulation_shards: int = 1
    selection_ratio: float = 1.0
    augmentation: float = 0.0
    off_grid: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-6
    muon_learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    step_size_learning_rate: float = 1e-3
    latent_learning_rate: float = 1e-3
    latent_penalty: float = 0.0
    latent_noise: float = 0.0
    channel_loss: Literal["mean", "sum"] = "mean"
    eval_every: int = 2500
    eval_signals: int = 256
    checkpoint_every: int = 0
    log_every: int = 100
    collapse_db: float = 6.0

    def __post_init__(self):
        least = 0 if self.start == "linear" else 1
        _require(self.steps >= least, f"steps must be at least {least}, got {self.steps}")
        for name in ("batch_size", "modulation_shards", "eval_every", "eval_signals", "log_every"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("start_updates", "micro_batch", "points_per_chunk"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        micro = self.micro_batch or self.batch_size
        _require(self.batch_size % micro == 0, f"micro_batch = {micro} does not divide batch_size = {self.batch_size}")
        _require(0 < self.selection_ratio <= 1, f"selection_ratio must be in (0, 1], got {self.selection_ratio}")
        _require(0 <= self.augmentation <= 1, f"augmentation must be in [0, 1], got {self.augmentation}")
        for name in ("learning_rate", "muon_learning_rate", "step_size_learning_rate", "latent_learning_rate"):
            _require(getattr(self, name) > 0, f"{name} must be above 0, got {getattr(self, name)}")
        unsigned = ("warmup_steps", "weight_decay", "clip_norm", "checkpoint_every", "collapse_db")
        for name in (*unsigned, "latent_penalty", "latent_noise"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True)
class BaselineSettings:
    """Settings of the systems of `medfuncta_jax.baselines`; each counts for its own `train.method` alone.

    Attributes:
      codebook_vectors: "codebook": vectors in the codebook.
      codebook_entries: "codebook": entries of a vector, a divisor of those of the latent (of one place).
      last_width: "pyramid": units of the last sine layer.
      contrastive_weight: "contrastive": factor of the contrastive loss in the outer loss.
      contrastive_temperature: "contrastive": divisor of the cosines, > 0.
    """

    codebook_vectors: int = 256
    codebook_entries: int = 8
    last_width: int = 64
    contrastive_weight: float = 1e-3
    contrastive_temperature: float = 0.1

    def __post_init__(self):
        for name in ("codebook_vectors", "codebook_entries", "last_width"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("contrastive_weight", "contrastive_temperature"):
            _require(getattr(self, name) > 0, f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class FitSettings:
    """Fitting latents at test time: validation, extraction.

    Attributes:
      steps: H >= 1 first-order steps.
      batch_size: signals fitted at once, over all devices; 0 takes the number with the most signals a second on the
        machine where the run begins (see `experiments.runtime.batch_size`).
      context: "full" steps along the gradient on every point (the paper); "rescaled" gives that gradient the norm
        of the gradient on a random subset of gamma (`inner.selection_ratio`) of the points (the release).
      safeguard: undo a step that raised a signal's loss and halve the signal's step size, so that a signal unlike the
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
class MlpSettings:
    """Training of an MLP on features, such as latents (`fit_mlp`, `fit_number_mlp`).

    Attributes:
      epochs: passes over the training signals; the one with the best validation is kept.
      batch_size: signals a step.
      learning_rate, weight_decay: AdamW's.
      hidden: widths of the hidden layers.
      dropout: part of the hidden units that are dropped in training.
    """

    epochs: int = 50
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    hidden: tuple[int, ...] = (1024, 512)
    dropout: float = 0.3

    def __post_init__(self):
        _require(min(self.hidden, default=1) >= 1, f"hidden must be at least 1, got {self.hidden}")
        for name in ("epochs", "batch_size"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(self.learning_rate > 0, f"learning_rate must be above 0, got {self.learning_rate}")
        _require(self.weight_decay >= 0, f"weight_decay must not be negative, got {self.weight_decay}")
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class DataSettings:
    """The data. `options` are the source's own settings, checked by the source (see `datasets`).

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
    """Data, network, training and fit. Attributes are the groups above, and `seed`, which fixes every random number.

    A program may add groups of its own in a subclass; `from_saved` reads what was saved with them.
    """

    data: DataSettings
    seed: int = 0
    model: ModelSettings = field(default_factory=ModelSettings)
    inner: InnerSettings = field(default_factory=InnerSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    baselines: BaselineSettings = field(default_factory=BaselineSettings)
    fit: FitSettings = field(default_factory=FitSettings)

    def __post_init__(self):
        method = self.train.method
        _require(
            not self.inner.gauss_newton_damping or method in ("meta", "contrastive", "pyramid"),
            f"inner.gauss_newton_damping must be 0 with train.method={method}, got {self.inner.gauss_newton_damping}",
        )

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

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> Self:
        """From values saved beside an artefact by this version or 0.1.

        Groups of other programs are left out, and so are removed settings if they were off.

        Raises:
          SettingsError: as `from_dict`; or an artefact of 0.1 whose method has other settings now.
        """
        known = {f.name for f in fields(cls)}
        return cls.from_dict({name: _without_retired(name, value) for name, value in values.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as `from_dict` reads them; JSON can hold them."""
        values = asdict(self)
        values["data"] |= dict(values["data"].pop("options"))
        return values


# Settings of version 0.1 that were removed, with the value at which they did nothing; None where every value did
# nothing.
_RETIRED: dict[str, dict[str, Any]] = {
    "model": {"last_width": 0, "codebook": 0, "codebook_features": None},
    "inner": {"context": "random"},
    "train": {"contrastive_weight": 0.0, "contrastive_temperature": None},
}


def _without_retired(group: str, values: Any) -> Any:
    retired = _RETIRED.get(group, {})
    if not isinstance(values, Mapping):
        return values
    return {name: value for name, value in values.items() if name not in retired or retired[name] not in (None, value)}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
