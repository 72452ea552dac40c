"""Segmentation of a finished run's signals, from their latents, beside a U-Net on the same grid.

Masks are files beside the signals' own (`segment.masks`), brought to their grid (`datasets.mask_reader`). Methods:

  head   a classifier of points on the last hidden units of the fitted field (`medfuncta_jax.segmentation`)
  masks  a field of masks, of one channel a class, trained as that of the signals was, with squared errors (a Brier
         score, for the class of the largest channel), and an operator from the latent of a signal to that of its mask
  unet   a small U-Net, trained for as long as the longest of the others (`unet.py`)

Each is asked for the masks of test signals of which all points or a part of them were observed, at random.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from experiments.runtime.progress import Progress, log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import write_json
from experiments.stages.decode import claim
from experiments.stages.features import digest, matching_latents, require_distinct
from experiments.stages.segment_files import finer_grid, folders_of, keep, read_kept, read_masks, write_masks
from experiments.stages.segment_methods import (
    PARTS,
    Case,
    Masks,
    Result,
    field_masks,
    head_masks,
    latents_of_parts,
    unet_masks,
    with_copies,
)
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.coordinates import inner_samples
from medfuncta_jax.datasets.dataset import SPLITS
from medfuncta_jax.latent_store import field_checksum
from medfuncta_jax.segmentation import HeadTraining
from medfuncta_jax.settings import SettingsError

JSON_FILE, FOLDER = "segmentation.json", "segmentation"
_PICTURED = 6
_TITLES = {"head": "head on the field", "masks": "field of masks", "unet": "U-Net"}
# Settings that the masks of one method alone depend on.
_SETTINGS = {
    "head": ("hidden", "steps", "signals", "points", "learning_rate", "weight_decay", "detail"),
    "masks": ("field_steps", "operator_steps"),
    "unet": ("unet_widths", "unet_batch", "unet_learning_rate", "unet_steps"),
}
_CONVENTIONS = {
    "dice": "2 |A and B| / (|A| + |B|) of each test signal; a structure that neither shows is left out",
    "hd95": "larger of the two 95 % percentiles of distances from one boundary to the other, in `unit`; of signals "
    "where both show the structure, and `missed` says where only one does",
    "interval": "percentile bootstrap of the mean over signals, 95 %",
    "observed": (
        "the part of the points that was seen, at random: one set for training signals, another for those of "
        "validation and test. Latents are fitted to these alone, and the head reads residuals of these alone. The "
        "U-Net sees 0 elsewhere and a channel that says where, and is trained on random sets of these sizes; a method "
        "on latents is trained on those of every size"
    ),
    "seconds": "of training with its validation and compiling, and of the fits of latents to copies and to parts of "
    "the points. The U-Net's updates last as long as the longest of the others took, if segment.unet_steps is 0. That "
    "the field and its latents were there before counts for no method",
    "chosen": "of ten states of each training the one with the best mean Dice on whole validation signals",
    "difference": "mean Dice of each signal less that of the U-Net",
    "finer": "at the fine samples between the outermost ones of the training grid, against masks at that resolution",
}


@dataclass(frozen=True)
class SegmentSettings:
    """Masks of signals from a finished run's latents (--mode=segment), beside a U-Net.

    Attributes:
      masks: the folder of the mask files, or a glob, relative to the data directory. A mask has the name of its
        signal's file, in another folder, on the same pixels or voxels; 0 is background.
      labels: values of the structures in them; () is all above 0 in the masks of training signals.
      names: of the structures, in the order of `labels`; () names them by their values.
      methods: "head", "masks" and "unet".
      observed: parts of the points that are seen, in (0, 1]; results of the first one are drawn and written.
      copies: changed copies of each training signal and its mask, which every method is trained on too.
      augmentation: how much they are resized and moved, in [0, 1], see `train.augmentation`.
      scale: how many times finer than the training grid the head answers too, 1 for not at all.
      hidden, steps, signals, points, learning_rate, weight_decay, detail: of the head and its training, see
        `HeadTraining`; () is a head on latents alone.
      field_steps: updates of the field of masks; none where the run is a linear start without updates.
      operator_steps: updates of the operator on latents.
      unet_widths, unet_batch, unet_learning_rate: of the U-Net, see `UNetTraining`.
      unet_steps: its updates; 0 takes as many as last as long as the other methods took.
    """

    masks: str = ""
    labels: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    methods: tuple[Literal["head", "masks", "unet"], ...] = ("head", "masks", "unet")
    observed: tuple[float, ...] = (1.0, 0.25, 0.1)
    copies: int = 0
    augmentation: float = 0.1
    scale: int = 1
    hidden: tuple[int, ...] = (128, 128)
    steps: int = 1000
    signals: int = 8
    points: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    detail: tuple[float, ...] = (0.0, 1.0, 2.0)
    field_steps: int = 600
    operator_steps: int = 2000
    unet_widths: tuple[int, ...] = (8, 16, 32)
    unet_batch: int = 1
    unet_learning_rate: float = 1e-2
    unet_steps: int = 0

    def __post_init__(self):
        for name in ("methods", "observed"):
            require_distinct(name, getattr(self, name))
        if len(set(self.labels)) < len(self.labels) or min(self.labels, default=1) < 1:
            raise SettingsError(f"labels must be different values above 0, got {self.labels}")
        if self.names and (len(self.names) != len(self.labels) or len(set(self.names)) < len(self.names)):
            raise SettingsError(f"names must be one for each of labels = {self.labels}, got {self.names}")
        if not all(0 < part <= 1 for part in self.observed):
            raise SettingsError(f"observed must be in (0, 1], got {self.observed}")
        for name in ("hidden", "unet_widths"):
            if min(getattr(self, name), default=0 if name == "unet_widths" else 1) < 1:
                raise SettingsError(f"{name} must be numbers of at least 1, got {getattr(self, name)}")
        for name in ("scale", "steps", "signals", "points", "field_steps", "operator_steps", "unet_batch"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("copies", "unet_steps"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.augmentation <= 1:
            raise SettingsError(f"augmentation must be in [0, 1], got {self.augmentation}")
        for name in ("learning_rate", "unet_learning_rate"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} must be above 0, got {getattr(self, name)}")
        if not all(width >= 0 for width in self.detail):
            raise SettingsError(f"detail must be widths of at least 0, got {self.detail}")
        if not self.weight_decay >= 0:
            raise SettingsError(f"weight_decay must not be negative, got {self.weight_decay}")

    @property
    def training(self) -> HeadTraining:
        """That of the head."""
        return HeadTraining(
            self.hidden, self.steps, self.signals, self.points, self.learning_rate, self.weight_decay, self.detail
        )  # fmt: skip


def segment(run: Run) -> dict[str, Any]:
    """Write `segmentation.json`, a picture, and the masks of test signals to `segmented/METHOD/`; returns the first.

    Each method's masks are kept beside the latents, in `segmentation/`, as soon as it is done, under a name for all
    that they depend on.

    Raises:
      SettingsError: no masks are named.
      DataError: masks without a signal or signals without a mask, or masks that cannot be used.
      CheckpointError, LatentStoreError: no field, no latents, latents that are incomplete or of another field.
      RunError: latents of other data, or `segmented/` holds masks of others.
      Interrupted: a stop was asked for; finished methods are kept.
    """
    from experiments import figures  # imported late, because every start reads this stage's settings
    from experiments.stages.segmentation_scores import differences, scores

    began, settings, dataset = time.monotonic(), run.settings, run.dataset
    wanted, folder = settings.segment, run.directory.results("segment")
    network = load_field(run.directory.path)
    stored = {name: np.asarray(split.latents, np.float32) for name, split in matching_latents(run).items()}
    masks = read_masks(run)
    names = wanted.names or tuple(str(value) for value in masks.values)
    made_of = _made_of(run, stored, masks)
    kept_in = run.directory.results("extract") / FOLDER
    kept = {name: kept_in / f"{name}-{made_of[name][:16]}.npz" for name in wanted.methods}
    done: dict[str, Result] = {name: one for name, path in kept.items() if (one := read_kept(path)) is not None}
    # The U-Net comes last: it is given as long as the others took.
    left = sorted((name for name in wanted.methods if name not in done), key=lambda name: name == "unet")
    written = {name: folders_of(folder / "segmented", name, masks) for name in wanted.methods}
    for name, places in written.items():
        for place in places:
            claim(place, {"made_of": made_of[name]}, kind="masks of other latents or settings")
    case = None
    total = PARTS * len(wanted.methods)
    with Progress("segment", total=total, done=total - PARTS * len(left), unit="parts of trainings") as bar:
        parts = 0

        def may_stop(note: str, part: int = 0) -> None:
            nonlocal parts
            parts += part
            bar.advance(part, note=note)
            run.stop.check(f"finished methods are in {kept_in}")

        for name in left:
            parts = 0
            for place in written[name]:  # of an earlier training of this method
                for file in [*place.glob("*.nii.gz"), *place.glob("*.png")]:
                    file.unlink()
            if case is None:
                signals = {split: dataset.splits[split].signals(slice(None)) for split in SPLITS}
                began_fits = time.monotonic()
                if wanted.copies:
                    signals["train"], stored["train"], masks.splits["train"] = with_copies(
                        run, network, signals["train"], stored["train"], masks.splits["train"], may_stop
                    )
                latents, seen = latents_of_parts(run, network, signals, stored, may_stop)
                case = Case(run, network, masks, signals, latents, seen, may_stop)
                fits = time.monotonic() - began_fits
            if name == "unet":
                done[name] = unet_masks(case, max((row["seconds"] for _, row in done.values()), default=fits))
            else:
                done[name] = {"head": head_masks, "masks": field_masks}[name](case, fits)
            keep(kept[name], *done[name])
            bar.advance(PARTS - parts, note=f"{_TITLES[name]} done")

    test = dataset.splits["test"].annotations()
    spacings = _spacings(test.affines, len(test.ids), len(dataset.grid))
    options: dict[str, Any] = {
        "names": names, "resamples": settings.evaluate.resamples, "seed": settings.seed
    }  # fmt: skip
    methods: dict[str, Any] = {}
    by_signal: dict[str, dict[str, np.ndarray]] = {}
    predictions = {name: done[name][0] for name in wanted.methods}
    for name, found in predictions.items():
        methods[name] = done[name][1] | {"observed": {}}
        by_signal[name] = {}
        for k, part in enumerate(wanted.observed):
            run.stop.check(f"finished methods are in {kept_in}")
            table, overlap = scores(found["masks"][k], masks.splits["test"], spacings, **options)
            methods[name]["observed"][f"{part:g}"], by_signal[name][f"{part:g}"] = table, overlap
        if masks.finer is not None and "finer" in found:
            inside, _ = inner_samples(dataset.grid, masks.finer.shape[1:])
            inner = (slice(None), *inside)
            methods[name]["finer"] = {"grid": list(masks.finer.shape[1:])} | scores(
                found["finer"][inner], masks.finer[inner], spacings / wanted.scale, **options
            )[0]
    result = {
        "data": dataset.about.get("title", dataset.name),
        "signals": {name: len(dataset.splits[name]) for name in SPLITS},
        "grid": list(dataset.grid),
        "unit": "pixels" if test.affines is None else "mm",
        "structures": dict(zip(names, masks.values, strict=True)),
        "methods": methods,
        "difference": differences(by_signal, settings.evaluate.resamples, settings.seed),
        "field_sha256": field_checksum(run.directory.path),
        "conventions": _CONVENTIONS,
        "settings": asdict(wanted) | {"seed": settings.seed},
    }
    write_json(folder / JSON_FILE, result)
    rows = np.unique(np.linspace(0, len(test.ids) - 1, min(_PICTURED, len(test.ids))).round().astype(int))
    first = f"{wanted.observed[0]:g}"
    figures.draw_segmentations(
        folder / "figures" / "segmentation.png", dataset.splits["test"].signals(rows), masks.splits["test"][rows],
        {_TITLES[name]: found["masks"][0][rows] for name, found in predictions.items()},
        dice={_TITLES[name]: of[first][rows] for name, of in by_signal.items()},
        names=[test.ids[row] for row in rows], structures=names,
    )  # fmt: skip
    for name, found in predictions.items():
        write_masks(written[name][0], found["masks"][0], masks.values, test.ids, test.affines)
        if "finer" in found:
            to_coarse = finer_grid(dataset.grid, found["finer"].shape[1:])
            affines = None if test.affines is None else test.affines @ to_coarse
            write_masks(written[name][1], found["finer"], masks.values, test.ids, affines)
    run.directory.set_seconds("segment", time.monotonic() - began)
    log.info("segmentation in %s, masks in %s:\n%s", folder / JSON_FILE, folder / "segmented", as_table(result))
    return result


def as_table(result: Mapping[str, Any]) -> str:
    """A line a method and part of the points: mean Dice, and Dice and distance of each structure."""
    lines = []
    for name, of in result["methods"].items():
        tables = [(f"{float(part):.0%} observed", table) for part, table in of["observed"].items()]
        if "finer" in of:
            tables.append((f"at {'x'.join(map(str, of['finer']['grid']))}", of["finer"]))
        for said, table in tables:
            cells = [
                f"{structure} {_number(table[structure]['dice'])}, {_number(table[structure]['hd95'], 2)} "
                f"{result['unit']}"
                for structure in result["structures"]
            ]
            lines.append(f"{_TITLES[name]}, {said}: Dice {_number(table['mean']['dice'])} ({'; '.join(cells)})")
    return "\n".join(lines)


def _number(value: Mapping[str, float] | None, digits: int = 3) -> str:
    return "undefined" if value is None else f"{value['mean']:.{digits}f}"


def _made_of(run: Run, latents: Mapping[str, np.ndarray], masks: Masks) -> dict[str, str]:
    """Checksums, by method, of everything that its masks depend on."""
    settings = run.settings
    wanted = asdict(settings.segment)
    shared = {
        "field_sha256": field_checksum(run.directory.path),
        "data": digest(*latents.values(), *masks.splits.values()),
        "values": masks.values,
        "fit": asdict(settings.fit),
        "seed": settings.seed,
        "observed": wanted["observed"],
    }
    if wanted["copies"]:
        shared["copies"] = (wanted["copies"], wanted["augmentation"])
    fine = {"finer": None if masks.finer is None else digest(masks.finer)}
    others = sorted(set(wanted["methods"]) - {"unet"}) if not wanted["unet_steps"] else []
    own = {name: {key: wanted[key] for key in keys} for name, keys in _SETTINGS.items()}
    apart = {"head": fine, "masks": fine, "unet": {"others": others}}  # the U-Net is given the time that they take
    return {
        name: hashlib.sha256(json.dumps([name, shared, own[name], apart[name]]).encode()).hexdigest() for name in own
    }


def _spacings(affines: np.ndarray | None, count: int, axes: int) -> np.ndarray:
    """Distances [n, C] between neighbouring points along each axis, in millimetres; 1 without an affine."""
    return np.ones((count, axes)) if affines is None else np.linalg.norm(affines[:, :3, :3], axis=1)
