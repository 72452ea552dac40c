"""The argument of every stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.runtime.interruption import StopRequest
from experiments.runtime.run_directory import RunDirectory
from medfuncta_jax.datasets import Dataset

if TYPE_CHECKING:  # the settings of stages are in their modules, which import this one
    from experiments.settings import RunSettings


@dataclass(frozen=True)
class Run:
    """A run that a stage works on.

    Attributes:
      directory: the run's directory, with the settings asked for.
      stop: whether the user has asked the run to stop.
      data: signals, with the requested labels if the stage uses labels; None for a stage without `needs_data`.
      data_dir: the folder of the source's files; for `apply` the new file or folder.
      out: the folder for results, if the user names one.
    """

    directory: RunDirectory
    stop: StopRequest
    data: Dataset | None = None
    data_dir: str | None = None
    out: str | None = None

    @property
    def settings(self) -> RunSettings:
        """The settings asked for."""
        return self.directory.settings

    @property
    def dataset(self) -> Dataset:
        """`data`, for stages that need it."""
        if self.data is None:
            raise ValueError("this stage was started without the data set")
        return self.data
