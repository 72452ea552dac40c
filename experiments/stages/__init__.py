"""What a mode of the launcher runs.

A stage is one module here with a function of the same name that takes a `Run`, one line in `STAGES`, and, if it has
settings of its own, a dataclass of them, which is one line in `experiments/settings.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.runtime.run import Run

# Settings of the data that say labels, which are joined to the signals by their ids.
LABELS = ("data.labels", "data.label_column", "data.no_value")


@dataclass(frozen=True)
class Stage:
    """What is to be known of a stage before it runs.

    Attributes:
      needs_data: it reads the dataset of the run; other stages need nothing but the directory.
      by_all: it is run by all processes together; other stages by the first alone.
      by_labels: it goes by the labels asked for, which need not be those of training.
      beside: it writes what no other stage reads, and may run beside others.
      depends: settings that its results depend on beside those of the latents, or the beginnings of their names.
        Results with others than the run was begun with lie in `variants/`.
      writes: files and folders that it leaves in the directory of a run; of those that end in "/", each entry is a
        result.
    """

    needs_data: bool = True
    by_all: bool = False
    by_labels: bool = False
    beside: bool = False
    depends: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


STAGES = {
    "train": Stage(by_all=True, writes=("field.safetensors", "metrics.jsonl", "tensorboard", "checkpoints")),
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

# Those of --mode=all, in this order.
ALL = ("train", "extract", "evaluate")


def function_of(stage: str) -> Callable[[Run], object]:
    """The function of a stage. Its module is imported by now and not before, as plots and splines take a second."""
    return getattr(importlib.import_module(f"experiments.stages.{stage}"), stage)
