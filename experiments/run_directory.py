"""The directory that holds all of a run, and nothing that is not of this run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.settings import Settings, SettingsError

# What makes two runs the same run; other groups belong to one stage, and are saved with what that stage writes.
_OF_THE_RUN = ("data", "seed", "model", "inner", "train", "fit")
# Where things lie on one machine or another, which changes no result.
_PLACES = ("data.cache_dir",)
_PLACES_FILE = "places.json"
# What trades time for memory and changes rounding alone: a run that was too large for its device can go on.
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
    """Write JSON, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(values, indent=2) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, none where there is no file; a last line cut off by a crash is left out."""
    records = []
    if file.exists():
        for line in file.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                continue
    return records


def remembered_data_dir(workdir: Path | str) -> str | None:
    """The data directory that a run was last given, None where it was given none or there is no run."""
    try:
        return json.loads((Path(workdir).expanduser() / _PLACES_FILE).read_text())["data_dir"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class RunDirectory:
    """Paths and small files of one run.

    Holds `config.json, checkpoints/, field.safetensors, metrics.jsonl, tensorboard/, latents/, decoded/,
    evaluation.json, figures/`, `seconds.json` (time spent a stage) and `places.json` (where its data is).
    """

    def __init__(self, path: Path | str, settings: Settings, *, writes: bool = True):
        """Open or make the directory.

        Args:
          path, settings: of the run.
          writes: of several processes one does; the methods of the others that write do nothing.
        Raises:
          RunError: it cannot be written, or holds a run of other settings, whose differing fields are listed.
        """
        self.path = Path(path).expanduser().absolute()
        self.settings = settings
        self.writes = writes
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
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    tensorboard = property(lambda self: self.path / "tensorboard")
    latents = property(lambda self: self.path / "latents")
    evaluation_file = property(lambda self: self.path / "evaluation.json")
    figures = property(lambda self: self.path / "figures")

    def _compare(self) -> None:
        try:
            # Settings that have come since are at their defaults, which leave a run what it was.
            stored = dict(flat(Settings.from_dict(json.loads(self.config_file.read_text())).to_dict()))
        except SettingsError as error:
            raise RunError(f"{self.config_file} is of another version ({error}); name another --workdir") from error
        except (OSError, ValueError) as error:
            raise RunError(f"{self.config_file} is damaged; remove it or name another --workdir") from error
        asked = dict(flat(self.settings.to_dict()))
        absent = "(absent)"
        differing = [
            f"{name}: {stored.get(name, absent)!r} there, {asked.get(name, absent)!r} asked for"
            for name in sorted(stored.keys() | asked.keys())
            if stored.get(name, absent) != asked.get(name, absent)
            and name not in _PLACES + _TRADES
            and name.partition(".")[0] in _OF_THE_RUN
        ]
        if differing:
            raise RunError(
                f"workdir {self.path} holds a run with another config; name another --workdir. "
                f"Differing: {'; '.join(differing)}"
            )

    def settings_of_the_run(self) -> dict[str, Any]:
        """The settings that make two runs the same run: no places, and nothing that belongs to one stage."""
        values = self.settings.to_dict()
        values["data"].pop("cache_dir")
        return {group: values[group] for group in _OF_THE_RUN}

    def remember_data_dir(self, data_dir: str | None) -> None:
        """Note where the data is, for commands that name the run alone."""
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

    def rewind_metrics(self, step: int) -> None:
        """Drop lines after `step`: a resumed run writes them again."""
        if not self.writes:
            return
        kept = [record for record in self.read_metrics() if record["step"] <= step]
        with atomic_path(self.metrics_file) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each stage so far, over all starts."""
        try:
            return json.loads((self.path / "seconds.json").read_text())
        except (OSError, ValueError):
            return {}

    def set_seconds(self, stage: str, seconds: float) -> None:
        """Note the time that a stage took."""
        if not self.writes:
            return
        write_json(self.path / "seconds.json", {**self.seconds(), stage: round(seconds, 2)})
