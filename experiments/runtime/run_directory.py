"""The directory of one run: its files, its settings, and the settings that identify the run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from experiments.stages import LABELS, STAGES
from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.settings import Settings, SettingsError

if TYPE_CHECKING:  # the settings of stages are in their modules, which import this one
    from experiments.settings import RunSettings

_S = TypeVar("_S", bound=Settings)
# Settings that identify a run; the others belong to stages after training, whose results have separate names.
_OF_THE_RUN = ("data", "seed", "model", "inner", "train", "baselines")
# Settings that the latents of a run depend on beside its field.
_OF_LATENTS = ("fit.", "extract.dtype")
_VARIANTS, _LONGEST_NAME = "variants", 120
# Paths on a machine, which do not change results.
_PLACES = ("data.cache_dir",)
_PLACES_FILE = "places.json"
# Settings that trade time for memory and change only rounding: a run that was too large for its device can resume.
_TRADES = (
    "inner.remat", "train.micro_batch", "train.points_per_chunk", "train.modulation_shards", "fit.batch_size"
)  # fmt: skip


class RunError(RuntimeError):
    """A run cannot start or go on; the message names the file or setting and the remedy."""


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and leaves of nested settings."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, none without a file; a last line that a crash cut off is left out."""
    records = []
    if file.exists():
        for line in file.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def stored_settings(workdir: Path | str, kind: type[_S]) -> _S | None:
    """The settings in a run's `config.json`, of type `kind`; None without a file.

    Raises:
      RunError: it is damaged, or of another version.
    """
    file = Path(workdir).expanduser() / "config.json"
    try:
        # Newer settings have their defaults, which do not change a run.
        return kind.from_saved(json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except SettingsError as error:
        raise RunError(f"{file} is of another version ({error}); name another --workdir") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{file} is damaged; remove it or name another --workdir") from error


def free_labels(settings: Settings) -> tuple[str, ...]:
    """Settings that choose labels without changing signals; none if labels are columns of the signals' own table."""
    options = dict(settings.data.options)
    return () if options.get("layout") == "row" and not options.get("labels") else LABELS


def with_labels_of(settings: _S, other: Settings) -> _S:
    """`settings` with the label settings of `other`, and so with the signals of `other`."""
    values, labels = settings.to_dict(), other.to_dict()["data"]
    for name in free_labels(other):
        short = name.partition(".")[2]
        values["data"].pop(short, None)
        if short in labels:
            values["data"][short] = labels[short]
    return type(settings).from_dict(values)


def _variant_name(values: Mapping[str, Any]) -> str:
    """A folder's name, NAME=VALUE, in characters that file systems accept; a long name is cut and gets a checksum."""
    words = []
    for name, value in sorted(values.items()):
        items = value if isinstance(value, (list, tuple)) else [value]
        words.append(f"{name}={'+'.join(map(str, items))}")
    whole = ",".join(words)
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", whole)
    if safe == whole and len(safe) <= _LONGEST_NAME:
        return safe
    return f"{safe[:_LONGEST_NAME]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def remembered_data_dir(workdir: Path | str) -> str | None:
    """The last data directory of a run; None without one, or without a run."""
    try:
        return json.loads((Path(workdir).expanduser() / _PLACES_FILE).read_text())["data_dir"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class RunDirectory:
    """Paths and small files of one run.

    Holds `config.json, signals.json` (the signals of each split), `checkpoints/, field.safetensors, metrics.jsonl,
    tensorboard/, latents/, decoded/, evaluation.json, figures/`, `seconds.json` (time per stage), `places.json` (the
    place of its data) and, where they were searched, `omega.json` (frequencies).

    Results with other settings than in `config.json` that do not identify the run lie below `variants/NAME=VALUE,.../`,
    in the same layout: the test-time fit (`fit.*`), the type of stored latents, labels, and the settings of a stage.

    Attributes:
      own: the settings in `config.json`.
      settings: the settings asked for, equal in those that identify the run.
    """

    def __init__(self, path: Path | str, settings: RunSettings, *, writes: bool = True):
        """Open or make the directory.

        Args:
          path, settings: the run's directory and settings.
          writes: whether this process writes, one of several; in the others, methods that write do nothing.
        Raises:
          RunError: it cannot be written, or holds a run of other settings, whose differing fields are listed.
        """
        self.path = Path(path).expanduser().absolute()
        self.settings = self.own = settings
        self.writes = writes
        self._differing: dict[str, Any] = {}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"workdir {self.path} cannot be made ({error.strerror}); name another --workdir") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise RunError(f"workdir {self.path} is not writable; name another --workdir")
        if self.config_file.exists():
            self._compare()
        elif writes:
            write_json(self.config_file, settings.to_dict())

    config_file = property(lambda self: self.path / "config.json")
    checkpoints = property(lambda self: self.path / "checkpoints")
    omega_file = property(lambda self: self.path / "omega.json")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    tensorboard = property(lambda self: self.path / "tensorboard")
    latents = property(lambda self: self.results("extract") / "latents")
    evaluation_file = property(lambda self: self.results("evaluate") / "evaluation.json")

    @property
    def training_settings(self) -> RunSettings:
        """The settings asked for, with the first test-time fit of the run, which validation uses."""
        own = dataclasses.replace(self.own.fit, batch_size=self.settings.fit.batch_size)
        return dataclasses.replace(self.settings, data=self.own.data, fit=own)

    def results(self, stage: str) -> Path:
        """The folder of a stage's results at the settings asked for, read by later stages.

        The folder is the run directory, or one of `variants/`, which holds all settings in `settings.json`.
        """
        groups = _OF_LATENTS + STAGES[stage].depends
        differing = {name: value for name, value in self._differing.items() if name.startswith(groups)}
        if not differing:
            return self.path
        folder = self.path / _VARIANTS / _variant_name(differing)
        if self.writes and not (folder / "settings.json").exists():
            write_json(folder / "settings.json", self.settings.to_dict())
        return folder

    def _compare(self) -> None:
        self.own = stored_settings(self.path, type(self.settings)) or self.settings
        if self.settings.model.omega == "auto" and self.own.model.omega == "given" and self.omega_file.exists():
            found = {name: getattr(self.own.model, name) for name in ("omega", "omega_first", "omega_last")}
            self.settings = dataclasses.replace(self.settings, model=dataclasses.replace(self.settings.model, **found))
        stored, asked = (dict(flat(settings.to_dict())) for settings in (self.own, self.settings))
        absent, free = "(absent)", free_labels(self.own)
        differing = [
            name
            for name in sorted(stored.keys() | asked.keys())
            if stored.get(name, absent) != asked.get(name, absent) and name not in _PLACES + _TRADES
        ]
        refused = [name for name in differing if name.partition(".")[0] in _OF_THE_RUN and name not in free]
        if refused:
            said = [
                f"{name}: {stored.get(name, absent)!r} there, {asked.get(name, absent)!r} asked for" for name in refused
            ]
            raise RunError(
                f"workdir {self.path} holds a run with another config; name another --workdir. "
                f"Differing: {'; '.join(said)}"
            )
        self._differing = {name: asked.get(name) for name in differing}

    def adopt(self, settings: RunSettings) -> None:
        """Take settings that were found for the run, in `config.json` too."""
        self.settings = settings
        if self.own.model != settings.model:
            self.own = dataclasses.replace(self.own, model=settings.model)
            if self.writes:
                write_json(self.config_file, self.own.to_dict())

    def settings_of_the_run(self) -> dict[str, Any]:
        """Settings that latents depend on: the run's without places and labels, and the test-time fit."""
        values = self.settings.to_dict()
        for name in ("data.cache_dir", *free_labels(self.own)):
            values["data"].pop(name.partition(".")[2], None)
        return {group: values[group] for group in (*_OF_THE_RUN, "fit")}

    def remember_data_dir(self, data_dir: str | None) -> None:
        """Store the data directory, for commands that name only the run."""
        if self.writes and data_dir is not None:
            place = str(Path(data_dir).expanduser().absolute())
            if place != remembered_data_dir(self.path):
                write_json(self.path / _PLACES_FILE, {"data_dir": place})

    def append_metrics(self, records: list[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl."""
        if not self.writes:
            return
        with self.metrics_file.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.metrics_file)

    def rewind_metrics(self, step: int, *, validated: bool = True) -> None:
        """Drop lines after `step`, and with `validated` False also its validation; a resumed run writes them again."""
        if not self.writes:
            return
        kept = [
            record
            for record in self.read_metrics()
            if record["step"] <= step and (validated or record["step"] < step or "val_psnr" not in record)
        ]
        with atomic_path(self.metrics_file) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each stage so far, over all starts."""
        try:
            return json.loads((self.path / "seconds.json").read_text())
        except (OSError, ValueError):
            return {}

    def set_seconds(self, stage: str, seconds: float) -> None:
        """Store the seconds of a stage."""
        if not self.writes:
            return
        write_json(self.path / "seconds.json", {**self.seconds(), stage: round(seconds, 2)})
