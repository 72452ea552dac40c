"""Meta-training: a run, in reading order from top to bottom."""

from __future__ import annotations

import functools
import math
import threading
import time
from concurrent.futures import Future, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import SummaryWriter

from experiments.runtime import processes
from experiments.runtime.interruption import Interrupted, StopRequest, leave
from experiments.runtime.memory import check_memory, return_freed
from experiments.runtime.progress import Progress, log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunDirectory, RunError
from experiments.stages.omega_search import search_omega
from experiments.stages.training_setup import constants, first_state
from medfuncta_jax import sharding
from medfuncta_jax.batched import fit_options, fit_signals
from medfuncta_jax.checkpoint import FIELD_FILE, Checkpoints, save_field
from medfuncta_jax.coordinates import grid
from medfuncta_jax.datasets import batches
from medfuncta_jax.datasets.pipeline import batch_rows
from medfuncta_jax.field import Params
from medfuncta_jax.methods import METHODS
from medfuncta_jax.product import has_tensorfloat32
from medfuncta_jax.training_state import MetaState

# Seconds between checks for a stop during a validation.
_LOOK_SECONDS = 0.1
_REMEDY = "try a lower train.learning_rate, inner.step_size or model.omega_last, or train.warmup_steps"


def train(run: Run) -> None:
    """Meta-train to `train.steps`, from the newest checkpoint if there is one, and export the best field.

    With `model.omega` "auto" the frequencies are searched first.

    Raises:
      RunError: a loss that is not finite, or a collapse; the checkpoints before it stay.
      Interrupted: a stop was asked for; the state is saved.
    """
    search_omega(run)
    settings, dataset, directory = run.directory.training_settings, run.dataset, run.directory
    config = settings.train
    method = METHODS[config.method]
    field = method.check(settings, dataset.grid, dataset.channels, task=dataset.task)
    mesh = sharding.data_mesh(modulation_shards=config.modulation_shards)
    sharding.check_batch_size(mesh, config.batch_size, "train.batch_size")
    if config.micro_batch:
        sharding.check_batch_size(mesh, config.micro_batch, "train.micro_batch")
    init_key, update_key = jax.random.split(jax.random.key(settings.seed))
    like = method.init(field, settings, init_key, signals=len(dataset.splits["train"]))
    state = sharding.place(mesh, like, sharding.layout(field, like, mesh))
    progress_so_far: dict[str, Any] = {"seconds": 0.0, "best_psnr": None, "owes_validation": False}

    with Checkpoints(directory.checkpoints) as checkpoints:
        start = 0
        if (saved := checkpoints.restore_newest(state)) is not None:
            start, state, progress_so_far = saved
        elif config.start == "linear":
            began = time.monotonic()
            state = sharding.place(
                mesh, first_state(field, settings, dataset, init_key), sharding.layout(field, like, mesh)
            )
            progress_so_far.update(seconds=time.monotonic() - began, owes_validation=True)
        loop = _Loop(settings, dataset, directory, field, mesh, checkpoints, progress_so_far)
        directory.rewind_metrics(start, validated=not loop.owes_validation)
        if start >= config.steps and not loop.owes_validation:
            return
        try:
            loop.run_from(start, state, update_key, run.stop)
        except Interrupted as interrupted:
            if loop.fit_under_way:
                leave(interrupted)
            raise


def _board(run: RunDirectory, start: int) -> SummaryWriter:
    return SummaryWriter(str(run.tensorboard), purge_step=start + 1 if start else None, write_to_disk=run.writes)


class _Loop:
    """The loop's bookkeeping: logs, validations, checkpoints, and the detection of a collapse."""

    def __init__(self, settings, dataset, run, field, mesh, checkpoints, progress_so_far):
        self.settings, self.dataset, self.run, self.field, self.mesh = settings, dataset, run, field, mesh
        self.checkpoints = checkpoints
        self.best_psnr: float | None = progress_so_far["best_psnr"]
        self.seconds_before: float = progress_so_far["seconds"]
        self.owes_validation: bool = progress_so_far.get("owes_validation", False)
        self.fit_under_way = False  # a validation fit that a stop did not wait for
        self.began = time.monotonic()
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []  # metrics of updates, still on the device
        count = min(settings.train.eval_signals, len(dataset.splits["val"]))
        self.validation_rows = np.linspace(0, len(dataset.splits["val"]) - 1, count).round().astype(int)

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.began

    def run_from(self, start: int, state: MetaState, key: jax.Array, stop: StopRequest) -> None:
        settings, config = self.settings, self.settings.train
        key = sharding.replicate(self.mesh, key)
        shape = (config.batch_size, math.prod(self.dataset.grid), self.dataset.channels)
        like, rows = (
            jax.ShapeDtypeStruct(of, kind, sharding=sharding.split_over(self.mesh))
            for of, kind in ((shape, jnp.float32), (shape[:1], jnp.int32))
        )
        training = constants(self.field, settings, self.dataset, self.mesh)
        one = functools.partial(METHODS[config.method].update, training)
        update = jax.jit(one, donate_argnums=0).lower(state, like, key, rows).compile()
        log.info("train: %s", check_memory(update, "a meta-update"))
        if settings.model.products == "tensorfloat32" and not has_tensorfloat32(jax.devices()[0]):
            log.info("train: model.products=tensorfloat32 is float32 here; this device has no TF32")
        return_freed()
        with (
            batches(
                self.dataset.splits["train"], batch_size=config.batch_size, seed=settings.seed, start_step=start
            ) as stream,
            _board(self.run, start) as self.board,
            Progress("train", total=config.steps, done=start, unit="steps") as self.progress,
            stop.held(),  # the state is in memory alone
        ):
            if self.owes_validation:
                self._validate_and_save(start, state, stop)
            for step in range(start + 1, config.steps + 1):
                batch = sharding.split_batch(self.mesh, (next(stream).reshape(shape), self._rows(step)))
                state, metrics = update(state, batch[0], key, batch[1])
                if self.pending:  # one update in flight: the queue stays short, and a Ctrl-C is noticed at once
                    jax.block_until_ready(self.pending[-1][1]["loss"])
                self.pending.append((step, metrics))
                last, stopping = step == config.steps, processes.agreed(bool(stop))
                note = self._log() if step % config.log_every == 0 or last else None
                self.progress.advance(note=note)
                if step % config.eval_every == 0 or last:
                    self._log()
                    self.owes_validation = True
                    if stopping:
                        self._save(step, state, val_psnr=None)
                    else:
                        self._validate_and_save(step, state, stop)
                elif stopping or (config.checkpoint_every and step % config.checkpoint_every == 0):
                    self._log()
                    self._save(step, state, val_psnr=None)
                if stopping:
                    stop.tell(self._saved(step))
        self.checkpoints.wait()
        self.run.set_seconds("train", self.seconds())

    def _saved(self, step: int) -> str:
        """Wait for the checkpoint of `step`; returns a description of the saved state."""
        self.checkpoints.wait()
        self.run.set_seconds("train", self.seconds())
        next_is = ", and is validated first" if self.owes_validation else ""
        return f"step {step} of {self.settings.train.steps} is saved in {self.run.path}{next_is}"

    def _rows(self, step: int) -> np.ndarray:
        """The rows in the training split of the signals of update `step`."""
        size, signals = self.settings.train.batch_size, len(self.dataset.splits["train"])
        return batch_rows(signals, batch_size=size, seed=self.settings.seed, step=step - 1).astype(np.int32)

    def _log(self) -> str | None:
        """Fetch the pending metrics, refuse values that are not finite, write one record; returns the bar's note."""
        if not self.pending:
            return None
        steps = [step for step, _ in self.pending]
        values = jax.device_get([metrics for _, metrics in self.pending])
        self.pending = []
        for step, metrics in zip(steps, values, strict=True):
            if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"])):
                self.checkpoints.wait()
                kept = self.checkpoints.latest_step()
                raise RunError(
                    f"step {step}: the loss or its gradient is not finite; {_REMEDY}. "
                    + (f"The checkpoint of step {kept} is kept" if kept else "Nothing was saved before it")
                )
        loss = float(np.mean([metrics["loss"] for metrics in values]))
        # PSNR of the mean: a loss summed over channels is first divided by their number.
        channels = self.dataset.channels if self.settings.train.channel_loss == "sum" else 1
        record = {
            "step": steps[-1],
            "loss": loss,
            "psnr": -10 * math.log10(max(loss / channels, 1e-12)),
            "gradient_norm": float(np.mean([metrics["gradient_norm"] for metrics in values])),
            "learning_rate": float(values[-1]["learning_rate"]),
            "seconds": round(self.seconds(), 3),
        }
        self.run.append_metrics([record])
        for name in ("loss", "psnr", "gradient_norm", "learning_rate"):
            self.board.add_scalar(f"train/{name}", record[name], steps[-1])
        best = "" if self.best_psnr is None else f", best validation {self.best_psnr:.2f}"
        return f"PSNR {record['psnr']:.2f} dB{best}"

    def _validate_and_save(self, step: int, state: MetaState, stop: StopRequest) -> None:
        method = METHODS[self.settings.train.method]
        coords = jnp.asarray(grid(self.dataset.grid), jnp.float32)
        params = method.exported_params(self.field, state.trainable, self.settings.inner, coords)
        params = sharding.replicate(self.mesh, params)  # for the duration of a validation, also if they are split
        psnr = self._validation_psnr(params, stop)
        if psnr is None:
            self.fit_under_way = True
            self._save(step, state, val_psnr=None)
            stop.tell(self._saved(step))
        self.run.append_metrics([{"step": step, "val_psnr": psnr, "seconds": round(self.seconds(), 3)}])
        self.board.add_scalar("validation/psnr", psnr, step)
        self.progress.message(f"step {step}: validation PSNR {psnr:.2f} dB after {self.seconds():.0f} s")
        limit = self.settings.train.collapse_db
        if not math.isfinite(psnr) or (limit and self.best_psnr is not None and psnr < self.best_psnr - limit):
            self.checkpoints.wait()
            best = "" if self.best_psnr is None else f" (best {self.best_psnr:.2f} dB is kept)"
            raise RunError(f"step {step}: training collapsed to {psnr:.2f} dB validation PSNR{best}; {_REMEDY}")
        better = self.best_psnr is None or psnr > self.best_psnr
        self.best_psnr = psnr if better else self.best_psnr
        if better and self.run.writes:  # before the checkpoint that refers to it, in case of a kill
            about = {
                "grid": list(self.dataset.grid),
                "classes": list(self.dataset.classes),
                "data": self.dataset.about,
                "settings": self.settings.to_dict(),
                "step": step,
                "val_psnr": psnr,
            }
            save_field(self.run.path / FIELD_FILE, self.field, params, about)
        self.owes_validation = False
        self._save(step, state, val_psnr=psnr)

    def _validation_psnr(self, params: Params, stop: StopRequest) -> float | None:
        """Mean PSNR of the validation signals in dB; None if a stop came first, while their fit is still running.

        The fit is in a separate thread, because a compiling or running program cannot be ended. Several processes fit
        together, and notice a stop after the validation.
        """
        done: Future[float] = Future()

        def fit() -> None:
            try:
                fitted = fit_signals(
                    self.field, params, self.dataset.splits["val"], rows=self.validation_rows, mesh=self.mesh,
                    **fit_options(self.settings),
                )  # fmt: skip
                done.set_result(float(fitted.psnr.mean()))
            except BaseException as error:
                done.set_exception(error)

        if jax.process_count() > 1:
            fit()
        else:
            threading.Thread(target=fit, name="validation", daemon=True).start()
        while not wait([done], timeout=_LOOK_SECONDS).done:
            if stop:
                return None
        return done.result()

    def _save(self, step: int, state: MetaState, val_psnr: float | None) -> None:
        about = {
            "seconds": self.seconds(), "best_psnr": self.best_psnr, "owes_validation": self.owes_validation
        }  # fmt: skip
        self.checkpoints.save(step, state, val_psnr=val_psnr, about=about)
