"""Saving and restoring: the state of a run (Orbax), and the field that others load (one safetensors file)."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import safetensors
import safetensors.numpy

from medfuncta_jax.atomic import atomic_path
from medfuncta_jax.field import Field, Params, named_layers, params_of
from medfuncta_jax.methods import FIELDS
from medfuncta_jax.settings import ModelSettings

_log = logging.getLogger(__name__)

FIELD_FILE = "field.safetensors"
# The only entry of the file's metadata: several entries would vary in order, and so would the bytes of the same field.
_ENTRY = "field"
# Maximum time that saves in the background may delay an error.
_CLOSING_SECONDS = 5.0
# Free space in bytes that a checkpoint needs beside its arrays.
_ROOM = 1 << 20


class CheckpointError(ValueError):
    """A checkpoint or a saved field is absent, damaged or of another layout; the message names it."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint cannot be read."""


def save_field(path: Path | str, field: Field, params: Params, about: dict[str, Any]) -> None:
    """Write a field to one file that safetensors and json alone can read, in any language.

    The arrays are those of `named_layers`, in their own floating type. The file's `__metadata__` has one entry,
    "field": a JSON object of `kind` ("Field", or another name in `methods.FIELDS`), `model` (the names of
    `ModelSettings`), `coord_dims`, `channels`, further attributes of this kind, and `about`.

    Args:
      path: the .safetensors file; replaced as a whole.
      field, params: what to write; see `meta_step.exported_params` for the scale of the latent.
      about: JSON values kept beside the field: grid, settings, origin.
    Raises:
      OSError: it could not be written; what was there before is left.
    """
    described = {"kind": type(field).__name__, **asdict(field), "about": about}
    # safetensors writes the bytes in memory order, also those of a transposed array.
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in named_layers(params).items()}
    content = safetensors.numpy.save(arrays, {_ENTRY: json.dumps(described)})
    with atomic_path(path) as partial:
        partial.write_bytes(content)  # the writer of safetensors does not report a full disk as an OSError


def load_field(path: Path | str) -> tuple[Field, Params]:
    """Read a trained field.

    Args:
      path: a run directory, or a saved `field.safetensors`.
    Returns:
      (field, params), ready for `fit_latent` with its default step size and for `reconstruct`. The floating type is
      kept; float64 needs JAX's `jax_enable_x64`.
    Raises:
      CheckpointError: no such file, or one that is damaged or not a field.
    """
    field, params, _ = load_field_and_about(path)
    return field, params


def load_field_and_about(path: Path | str) -> tuple[Field, Params, dict[str, Any]]:
    """`load_field`, and the values saved beside it: grid, settings of the run, training step, validation PSNR."""
    path = Path(path)
    file = path / FIELD_FILE if path.is_dir() else path
    former = file.with_suffix(".npz")
    if former.exists() and (file == former or not file.exists()):
        raise CheckpointError(f"{former} is of a format that is no longer read; train again in a new directory")
    if not file.exists():
        raise CheckpointError(f"no trained field at {file}; train first, or name its run directory")
    try:
        with safetensors.safe_open(file, framework="np") as stored:
            metadata = stored.metadata() or {}
            if _ENTRY not in metadata:
                raise ValueError(f"its metadata have no entry {_ENTRY!r}")
            described = json.loads(metadata[_ENTRY])
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (not a mapping)
        described["model"] = ModelSettings.from_named(described["model"])
        about, kind = described.pop("about"), described.pop("kind", "Field")
        field = FIELDS[kind](**described)
        return field, params_of(field, arrays), about
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} is damaged or not a saved field ({reason}); save it again") from error


def _layout(state: Any) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [f"{jax.tree_util.keystr(path)}: {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves]


def _mend_scores(directory: Path) -> None:
    """Mark checkpoints without a readable score as not validated; Orbax would not open their directory."""
    for file in directory.glob("*/metrics/metrics"):
        try:
            json.loads(file.read_text())["val_psnr"]
        except (ValueError, KeyError, TypeError):
            _log.warning("%s is damaged; this checkpoint counts as not validated", file)
            with atomic_path(file) as partial:
                partial.write_text(json.dumps({"val_psnr": -math.inf}))


class Checkpoints:
    """The checkpoints of one run: the newest two and the best by validation PSNR, written in the background.

    A save becomes visible only when it is whole, so a process killed at any moment leaves the earlier ones.
    """

    def __init__(self, directory: Path | str):
        try:
            import orbax.checkpoint as ocp
            from orbax.checkpoint import checkpoint_managers as managers
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"checkpoints need {error.name}, which is not installed: pip install 'medfuncta_jax[train]'"
            ) from error

        self._ocp = ocp
        self._directory = Path(directory).absolute()

        _mend_scores(self._directory)

        def score(metrics):
            return metrics["val_psnr"]

        keep = managers.AnyPreservationPolicy([managers.LatestN(2), managers.BestN(get_metric_fn=score, n=1)])
        # `best_fn` makes Orbax write the metrics down: without it a resumed run would forget which step was best.
        options = ocp.CheckpointManagerOptions(preservation_policy=keep, best_fn=score, create=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: Any, *, val_psnr: float | None, about: dict[str, Any]) -> None:
        """Save in the background.

        Args:
          step: updates made. A saved step is kept as it is, unless only the new save has a validation PSNR.
          state: a pytree of arrays.
          val_psnr: validation PSNR in dB of this state, None if it was not measured.
          about: JSON values restored with the state.
        Raises:
          OSError: this or the save before it could not be written.
        """
        if step in self._manager.all_steps():
            if val_psnr is None or math.isfinite(self._manager.metrics(step)["val_psnr"]):
                return
            self._manager.delete(step)
        # Free space is checked first: on a full disk, Orbax's writers raise errors in many threads at once.
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if shutil.disk_usage(self._directory).free < needed + _ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._directory))
        # A state that was not validated must never pass for the best.
        metrics = {"val_psnr": -math.inf if val_psnr is None else val_psnr}
        about = {**about, "layout": _layout(state)}
        arguments = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state), about=self._ocp.args.JsonSave(about)
        )
        with self._write_errors():
            saved = self._manager.save(step, args=arguments, metrics=metrics)
        if not saved:
            raise CheckpointError(f"the checkpoint of step {step} was refused: {self._directory} holds later ones")

    def latest_step(self) -> int | None:
        """The newest whole checkpoint, None where there is none."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The checkpoint with the best validation PSNR, None where none was validated."""
        scored = {}
        for step in self._manager.all_steps():
            metrics = self._manager.metrics(step)
            if metrics and math.isfinite(metrics["val_psnr"]):
                scored[step] = metrics["val_psnr"]
        return max(scored, key=lambda step: (scored[step], -step)) if scored else None

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Restore one checkpoint.

        Args:
          step: a result of `latest_step` or `best_step`.
          like: a state of the same layout; the result takes its shardings, and so its device count.
        Returns:
          (state, about).
        Raises:
          CheckpointError: the checkpoint holds other shapes or dtypes, which Orbax would cast in silence.
          DamagedCheckpointError: it cannot be read.
        """
        place = self._directory / str(step)
        try:
            about = dict(
                self._manager.restore(step, args=self._ocp.args.Composite(about=self._ocp.args.JsonRestore()))["about"]
            )
            differing = sorted(set(about.pop("layout")) ^ set(_layout(like)))
            if differing:
                raise CheckpointError(
                    f"checkpoint {place} has another layout: {differing[0]}; start in a new directory"
                )
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
            )
            arguments = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(target))
            return self._manager.restore(step, args=arguments)["state"], about
        except CheckpointError:
            raise
        except Exception as error:  # damaged files raise errors of many types
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DamagedCheckpointError(
                f"checkpoint {place} is damaged ({reason}); remove that folder and run again"
            ) from error

    def restore_newest(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """Restore the newest checkpoint that can be read; damaged ones after it are logged and removed.

        Args:
          like: as in `restore`.
        Returns:
          (step, state, about), or None where there is no checkpoint.
        Raises:
          CheckpointError: as `restore`; that of the newest one if all are damaged.
        """
        damaged: list[tuple[int, DamagedCheckpointError]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, about = self.restore(step, like)
            except DamagedCheckpointError as error:
                damaged.append((step, error))
                continue
            for other, fault in damaged:
                reason = str(fault).removesuffix("; remove that folder and run again")
                _log.warning("%s; it is removed, and the one before it is taken: step %d", reason, step)
                self._manager.delete(other)  # the step will be saved again
            return step, state, about
        if damaged:
            raise damaged[0][1]
        return None

    def wait(self) -> None:
        """Block until every save is on disk; raises the error of a failed save."""
        with self._write_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Raise Orbax's many errors for a full disk as the OSError behind them."""
        try:
            yield
        except Exception as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            number = int(code.group(1))
            raise OSError(number, os.strerror(number), str(self._directory)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with self._write_errors():
                self._manager.close()
            return

        # While an error propagates, closing can only raise the same error again, and after some errors it waits for a
        # save that never ends.
        def close() -> None:
            with contextlib.suppress(Exception):
                self._manager.close()

        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(_CLOSING_SECONDS)
