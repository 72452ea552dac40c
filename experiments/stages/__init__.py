"""The stages that the launcher's modes run.

A stage is one module here with a function of the same name that takes a `Run`, one line in `STAGES`, and, if it has
settings, a dataclass of them, with one line in `experiments/settings.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.runtime.run import Run

# Settings of labels, which are joined to the signals by their ids.
LABELS = ("data.labels", "data.label_column", "data.no_value")


@dataclass(frozen=True)
class Stage:
    """Properties of a stage that are needed before it runs.

    Attributes:
      needs_data: the stage reads the dataset of the run; other stages need only the directory.
      by_all: all processes run the stage together; the first alone runs other stages.
      by_labels: the stage uses the labels asked for, which need not be those of training.
      beside: no other stage reads its results, and it may run beside others.
      depends: settings that its results depend on beside those of the latents, or the beginnings of their names.
        Results with other values than the run's first ones lie in `variants/`.
      writes: files and folders that the stage writes in the directory of a run; each entry of a folder with "/" at the
        end is a result.
    """

    needs_data: bool = True
    by_all: bool = False
    by_labels: bool = False
    beside: bool = False
    depends: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


STAGES = {
    "train": Stage(
        by_all=True, writes=("omega.json", "field.safetensors", "metrics.jsonl", "tensorboard", "checkpoints")
    ),
    "extract": Stage(by_all=True, writes=("latents",)),
    "evaluate": Stage(depends=("evaluate.",), writes=("evaluation.json", "evaluation.csv", "figures")),
    "apply": Stage(needs_data=False, beside=True, writes=("applied/",)),
    "curves": Stage(depends=("curves.", "evaluate.resamples"), writes=("curves.json",)),
    "compress": Stage(depends=("compress.",), writes=("compression.json",)),
    "classify": Stage(
        by_labels=True, depends=("classify.", *LABELS), writes=("classification.json", "classification.md")
    ),
    "regress": Stage(by_labels=True, depends=("regress.", "data.labels"), writes=("regression.json", "regression.md")),
    "inverse": Stage(depends=("inverse.", "evaluate.resamples"), writes=("inverse.json",)),
    "generate": Stage(depends=("generate.",), writes=("flows", "generation.json", "generated/")),
    "segment": Stage(
        depends=("segment.", "evaluate.resamples"), writes=("segmentation.json", "segmentation", "segmented/")
    ),
    "report": Stage(
        by_labels=True, beside=True,
        depends=("evaluate.", "curves.", "classify.", "compress.", "inverse.", "generate.", "segment.",
                 *LABELS),
        writes=("report.html",),
    ),
    "decode": Stage(needs_data=False, beside=True, writes=("decoded/",)),
}  # fmt: skip

# The stages of --mode=all, in this order.
ALL = ("train", "extract", "evaluate")


def function_of(stage: str) -> Callable[[Run], object]:
    """The function of a stage. Its module is imported only here, because plots and splines take a second."""
    return getattr(importlib.import_module(f"experiments.stages.{stage}"), stage)
