"""Import of the authors' PyTorch files: shared weights become a field, MedNF's folders of latents a latent store.

    python -m experiments.tools.import_release --weights=best.model --omega_first=10 --omega_increment=5 --out=runs/a
    python -m experiments.tools.import_release --weights=ChestNF/model.pt --latents=ChestNF --out=runs/chest_nf

Writes OUT/field.safetensors and OUT/latents/, for `mf.load_field(OUT)` and `mf.load_latents(OUT)`. The command needs
PyTorch 2.6 or newer. Sizes are read off the shapes. Flags give the values that a file lacks: a state dict
(`best.model`, `stepXXXX.model`) does not hold its frequencies, a pickled network (`model.pt`) does.

A state dict may lie in a checkpoint, e.g. `{"state_dict": ...}`, in any floating precision. No code in a file is ever
run (see `torch_files.py`), and the authors' source is not needed.

Exit codes: 0 done; 1 refused, with one line that names the file and the remedy; 2 a flag is wrong.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.runtime import command
from experiments.runtime.progress import Progress
from experiments.tools.torch_files import FIRST, ReleaseError, as_array, load, read_weights
from medfuncta_jax.checkpoint import FIELD_FILE, CheckpointError, load_field, save_field
from medfuncta_jax.coordinates import grid
from medfuncta_jax.datasets.dataset import SPLITS
from medfuncta_jax.field import STEP_SIZE, Field, Params, field_from_layers
from medfuncta_jax.latent_file import file_name, write_file
from medfuncta_jax.latent_store import field_checksum
from medfuncta_jax.meta_step import exported_params
from medfuncta_jax.settings import InnerSettings, ModelSettings
from medfuncta_jax.training_state import Trainable

# This package's names of a layer's parts and arrays, and the release's.
_PARTS = {"layer": "linear", "modulation": "modulate_shift_layer", "scale": "modulate_scale_layer"}
_ARRAYS = {"kernel": "weight", "bias": "bias"}

# Tolerance of coordinates in float32, and the number along an axis above which neighbours in half precision are equal.
_SINGLE, _MERGING = 1e-5, 256

Arrays = Mapping[str, np.ndarray]


def field_of(
    arrays: Arrays,
    attributes: Mapping[str, Any],
    *,
    omega_first: float | None = None,
    omega_increment: float | None = None,
    residual: bool | None = None,
    step_size: float = STEP_SIZE,
) -> tuple[Field, Params, tuple[int, ...] | None]:
    """A field from the release's arrays.

    Args:
      arrays: floating, by the release's names with any prefix: `layers.0.linear.weight` [out, in] and so on.
      attributes: plain attributes of a pickled network by dotted name, e.g. `layers.0.w0`; empty for a state dict.
      omega_first, omega_increment: w_1 and w_{k+1} - w_k; required if `attributes` lack them.
      residual: residual connections; None takes the attribute, and without one the release's default, True.
      step_size: the inner step size alpha that the weights were trained with.
    Returns:
      (field, params, grid): float32, the latent in the scale of `fit_latent`'s default step size; the shape of the
      training grid, None if it is not stored.
    Raises:
      ReleaseError: keys that are missing or unknown, shapes that do not fit, frequencies unknown or contradictory.
    """
    prefixes = [key.removesuffix(FIRST) for key in arrays if key.endswith(FIRST)]
    if len(prefixes) != 1:
        raise ReleaseError(
            f"{len(prefixes)} networks in it: one key must end in {FIRST}; it holds {_listed(arrays) or 'no arrays'}"
        )
    (prefix,) = prefixes
    hidden = {key: int(found[1]) for key in arrays if (found := re.match(re.escape(prefix) + r"layers\.(\d+)\.", key))}
    layers = max(hidden.values()) + 2  # and the last layer, which has no number
    places = [f"{prefix}layers.{k}" for k in range(layers - 1)] + [f"{prefix}last_layer"]
    omegas = _omegas([attributes.get(f"{place}.w0") for place in places], omega_first, omega_increment)
    if residual is None:
        residual = bool(attributes.get(f"{prefix}enable_skip_connections", True))
    modulation = next((key for key in hidden if key.endswith("modulate_shift_layer.weight")), None)
    if modulation is None:
        raise ReleaseError(f"no latent enters it: {places[1]}.modulate_shift_layer.weight is missing")
    for key in (prefix + FIRST, modulation):
        if arrays[key].ndim != 2:
            raise ReleaseError(f"{key} has shape {arrays[key].shape}, expected [out, in]")
    width, coord_dims = arrays[prefix + FIRST].shape
    model = ModelSettings(
        layers=layers, width=width, latent_dim=arrays[modulation].shape[1],
        omega_first=omegas[0], omega_last=omegas[-1], residual=residual, offset=0.5,
        modulate_first_layer=f"{places[0]}.modulate_shift_layer.weight" in arrays,
        modulate_scale=any("modulate_scale_layer" in key for key in hidden),
    )  # fmt: skip
    channels = arrays.get(f"{places[-1]}.linear.bias", np.zeros(1)).size
    shapes = Field(model, coord_dims, channels).layer_shapes()

    theirs = {}
    for name in shapes:
        layer, _, array = name.partition("/")
        part, _, k = layer.partition("_")
        theirs[name] = f"{places[int(k) - 1]}.{_PARTS[part]}.{_ARRAYS[array]}"
    missing = [key for key in theirs.values() if key not in arrays]
    if missing:
        raise ReleaseError(f"missing keys: {_listed(missing)}")
    # The release also stores modulations of its last layer, which its network never reads, and the training grid.
    coords = prefix.removesuffix("model.") + "grid"
    idle = {f"{places[-1]}.{_PARTS[part]}.{array}" for part in ("modulation", "scale") for array in _ARRAYS.values()}
    unknown = [key for key in arrays if key not in {*theirs.values(), *idle, coords}]
    if unknown:
        raise ReleaseError(f"unknown keys: {_listed(unknown)}")
    for name, key in theirs.items():
        if arrays[key].shape != shapes[name][::-1]:  # [out, in] there, [in, out] here
            raise ReleaseError(f"{key} has shape {arrays[key].shape}, its neighbours ask for {shapes[name][::-1]}")
        if not np.isfinite(arrays[key]).all():
            raise ReleaseError(f"{key} holds values that are not finite")
    named = {name: np.asarray(arrays[key], np.float32).T for name, key in theirs.items()}
    field, params = field_from_layers(vars(model), named)
    params = exported_params(field, Trainable(params, None), InnerSettings(step_size=step_size))
    return field, params, _grid_shape(arrays[coords], coords) if coords in arrays else None


def _omegas(stored: Sequence[float | None], first: float | None, increment: float | None) -> Sequence[float]:
    """w_1 to w_K from the stored values of the layers, from the flags, or from both if they agree."""
    known = [omega for omega in stored if omega is not None]
    asked = None if first is None or increment is None else [first + k * increment for k in range(len(stored))]
    if not known:
        if asked is None:
            raise ReleaseError(
                "a state dict does not hold its frequencies: give --omega_first and --omega_increment, w0 and "
                "w0_increment of its training (the release's configs: 10 and 10 for series, 10 and 5 for the rest)"
            )
        return asked
    if len(known) < len(stored) or not np.allclose(known, np.linspace(known[0], known[-1], len(known)), rtol=1e-6):
        raise ReleaseError(f"its frequencies {known} do not rise by one increment a layer, as a field's do")
    if asked is not None and not np.allclose(known, asked, rtol=1e-6):
        raise ReleaseError(
            f"its frequencies are {known[0]:g} to {known[-1]:g}, the flags say {first:g} to {asked[-1]:g}"
        )
    return known


def _grid_shape(points: np.ndarray, key: str) -> tuple[int, ...] | None:
    """The sizes of a stored grid; None if half precision does not separate its points."""
    shape = tuple(len(np.unique(axis)) for axis in points.T)
    tolerance = _tolerance(points)
    if math.prod(shape) != len(points) and tolerance > _SINGLE and max(shape) > _MERGING:
        return None
    if math.prod(shape) != len(points) or not np.allclose(points, grid(shape), atol=tolerance):
        raise ReleaseError(f"{key} {points.shape} is no grid from -1 to 1 along every axis")
    return shape


def _tolerance(points: np.ndarray) -> float:
    """Tolerance of numbers of 1 and less, by their common precision: bfloat16, float16 or more."""
    whole = np.ascontiguousarray(points, np.float32)
    if not (whole.view(np.uint32) & 0xFFFF).any():
        return 2.0**-8
    return 2.0**-11 if np.array_equal(whole, whole.astype(np.float16)) else _SINGLE


def _listed(names: Any, most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def count_datapoints(folder: Path) -> int:
    """The number of `datapoint_I.pt` in a folder of MedNF.

    Raises:
      ReleaseError: none, or an index is left out.
    """
    names = {path.name for path in folder.glob("datapoint_*.pt")}
    if not names:
        raise ReleaseError(f"{folder} holds no datapoint_0.pt; --latents names the folder with train/, val/ and test/")
    for i in range(len(names)):
        if f"datapoint_{i}.pt" not in names:
            raise ReleaseError(
                f"{folder}/datapoint_{i}.pt is missing, among {len(names)} others; download the set again"
            )
    return len(names)


def read_datapoints(folder: Path, count: int, *, latent_dim: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Latents and labels of `datapoint_0.pt` to `datapoint_{count - 1}.pt`, in this order.

    Args:
      latent_dim: P; None takes that of the first file.
    Returns:
      latents float32 [n, P], in the release's scale; labels int64 [n], or [n, tasks].
    Raises:
      ReleaseError: names the file that is damaged, has no latent or no label, or others than the files before it.
    """
    latents: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    with Progress(f"import {folder.name}", total=count, unit="latents") as progress:
        for i in range(count):
            path = folder / f"datapoint_{i}.pt"
            content = load(path)
            for key in ("modulations", "label"):
                if not isinstance(content, Mapping) or key not in content:
                    raise ReleaseError(f"{path} has no {key!r}; expected a dict of modulations and label")
            latent, label = (as_array(content[key]) for key in ("modulations", "label"))
            expected = (latent_dim,) if latent_dim else (latents[0] if latents else latent.reshape(-1)).shape
            if latent.shape != expected or not np.isfinite(latent).all():
                state = f"has shape {latent.shape}" if latent.shape != expected else "is not finite"
                raise ReleaseError(f"{path}: its latent {state}, expected {expected[0]} finite numbers")
            label = label.reshape(-1)
            shape = labels[0].shape if labels else label.shape
            if label.shape != shape or not label.size or not np.array_equal(label, label.astype(np.int64)):
                raise ReleaseError(f"{path}: label {label.tolist()} is not {shape[0]} whole number(s)")
            latents.append(latent.astype(np.float32))
            labels.append(label.astype(np.int64))
            progress.advance()
    stacked = np.stack(labels)
    return np.stack(latents), stacked[:, 0] if stacked.shape[1] == 1 else stacked


def import_weights(path: Path, out: Path, *, shape: tuple[int, ...] | None, **options: Any) -> str:
    """Write OUT/field.safetensors.

    Args:
      path: `best.model`, `stepXXXX.model` or `model.pt`.
      shape: shape of the training grid, if the file does not hold it.
      options: keywords of `field_of`.
    Returns:
      One line that describes the field.
    """
    arrays, attributes = read_weights(path)
    try:
        field, params, stored = field_of(arrays, attributes, **options)
        if stored and shape and stored != shape:
            raise ReleaseError(f"its grid is {_times(stored)}, --grid says {_times(shape)}")
    except ValueError as error:
        raise ReleaseError(f"{path}: {error}") from error
    shape = stored or shape
    if shape and len(shape) != field.coord_dims:
        raise ReleaseError(f"--grid {_times(shape)} has {len(shape)} axes, the field of {path} {field.coord_dims}")
    imported_from = {"file": path.name, "sha256": field_checksum(path), "step_size": options["step_size"]}
    about = {"grid": list(shape) if shape else None, "imported_from": imported_from}
    save_field(out / FIELD_FILE, field, params, about)
    model = field.model
    return (
        f"{out / FIELD_FILE}: {model.layers} layers of {model.width}, latent of {model.latent_dim}, {field.coord_dims} "
        f"coordinate(s), {field.channels} channel(s), omega {model.omega_first:g} to {model.omega_last:g}, "
        f"first layer {'' if model.modulate_first_layer else 'not '}modulated, "
        f"{'with' if model.residual else 'without'} residual connections, grid {_times(shape) if shape else 'unknown'}"
    )


def import_latents(folder: Path, out: Path, *, shape: tuple[int, ...] | None, step_size: float) -> list[str]:
    """Write OUT/latents/ for the splits that `folder` holds, in the scale of the field in OUT if there is one.

    Returns:
      A line for each split.
    """
    counts = {name: count_datapoints(folder / name) for name in SPLITS if (folder / name).is_dir()}
    if not counts:
        raise ReleaseError(f"{folder} holds none of train/, val/ and test/; --latents names the folder that does")
    field = load_field(out)[0] if (out / FIELD_FILE).exists() else None
    about = {
        "splits": counts,
        "field_sha256": field_checksum(out) if field else None,
        "grid": list(shape) if shape else None,
        "channels": field.channels if field else None,
        "classes": [],
        "data": {"source": "MedNF", "folder": folder.name},
    }
    lines = []
    for name, count in counts.items():
        latents, labels = read_datapoints(folder / name, count, latent_dim=field.model.latent_dim if field else None)
        # Row p of every modulation of the field is scaled by r, and its latents by 1 / r (see `exported_params`).
        latents /= np.float32(math.sqrt(step_size / STEP_SIZE))
        file = _write_latents(out / "latents", name, latents, labels, about)
        lines.append(f"{file}: {count} latents of {latents.shape[1]}, labels {labels.min()} to {labels.max()}")
    return lines


def _write_latents(folder: Path, split: str, latents: np.ndarray, labels: np.ndarray, about: dict[str, Any]) -> Path:
    """Write one split to the store; the PSNR, which MedNF lacks, is NaN."""
    file = folder / file_name(split, 0, 1)
    write_file(
        file, {**about, "split": split}, range(len(latents)), latents=latents, labels=labels,
        ids=[f"{split}/datapoint_{i}" for i in range(len(latents))], psnr=np.full(len(latents), np.nan), affines=None,
    )  # fmt: skip
    return file


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def define_flags(options: flags.FlagValues = flags.FLAGS) -> None:
    """Define the command's flags, not at import, so that tests can import this module beside other commands."""
    flags.DEFINE_string("weights", None, "State dict (best.model) or pickled network (model.pt).", flag_values=options)
    flags.DEFINE_string(
        "latents", None, "Folder of MedNF with train/, val/, test/ of datapoint_I.pt.", flag_values=options
    )
    flags.DEFINE_string("out", None, "Folder for field.safetensors and latents/; made if absent.", flag_values=options)
    flags.DEFINE_float(
        "omega_first", None, "w0 of the training; a state dict does not hold it.", 0.0, flag_values=options
    )
    flags.DEFINE_float("omega_increment", None, "w0_increment of the training.", flag_values=options)
    flags.DEFINE_bool("residual", None, "Residual connections; by default as stored, else yes.", flag_values=options)
    flags.DEFINE_float("step_size", STEP_SIZE, "inner_lr of the training.", 1e-12, flag_values=options)
    flags.DEFINE_string("grid", None, "Training grid, 64x64 for one, where no file holds it.", flag_values=options)


def main(argv: Sequence[str], options: flags.FlagValues = flags.FLAGS) -> int:
    """Run the command; returns the exit code."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    logging.getLogger("medfuncta").setLevel(logging.INFO)
    try:
        command.parse(argv, options=options)
        if not options.out or not (options.weights or options.latents):
            raise flags.Error(
                "--out and --weights or --latents are missing; e.g. --weights=best.model --out=runs/chest"
            )
        if (options.omega_first is None) != (options.omega_increment is None):
            raise flags.Error("--omega_first and --omega_increment belong together")
        if options.grid and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", options.grid):
            raise flags.Error(f"--grid={options.grid} is not of the form 64x64")
    except flags.Error as error:
        return command.refuse(error, code=2)
    out = Path(options.out).expanduser()
    shape = tuple(map(int, options.grid.split("x"))) if options.grid else None

    def import_all() -> None:
        if (out / "config.json").exists():
            raise ReleaseError(f"{out} holds a run of its own, whose field would be overwritten; name another --out")
        lines = []
        if options.weights:
            lines += [
                import_weights(
                    Path(options.weights).expanduser(), out, shape=shape, omega_first=options.omega_first,
                    omega_increment=options.omega_increment, residual=options.residual, step_size=options.step_size,
                )
            ]  # fmt: skip
        if options.latents:
            folder = Path(options.latents).expanduser()
            lines += import_latents(folder, out, shape=shape, step_size=options.step_size)
        print("\n".join(lines))

    return command.carry_out(
        import_all,
        refusals=(ReleaseError, CheckpointError),
        place=out,
        when_stopped="stopped; run the same command again",
    )


if __name__ == "__main__":
    define_flags()
    app.define_help_flags()
    sys.exit(main(sys.argv))
