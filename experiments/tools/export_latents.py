"""Export of a latent store to other layouts.

    python -m experiments.tools.export_latents --workdir=runs/quickstart --format=npz --out=quickstart_npz

`npz` writes one `SPLIT.npz` for numpy. `mednf` writes the layout of the published MedNF sets, one
`SPLIT/datapoint_I.pt` a signal, each a dict of `modulations` (float32 [P]) and `label` (int64 [1], or [tasks]); it
needs torch. `tfds` writes array_record files for `tfds.builder_from_directory(OUT).as_data_source("train")`, which
needs no TensorFlow. README.md beside the files describes their content. Memory does not grow with the store, and OUT
appears only when it is complete.

Exit codes: 0 done; 1 refused or failed, with one line that says why; 2 a flag is wrong; 75 stopped.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from absl import app, flags

from experiments.runtime import command
from experiments.runtime.interruption import StopRequest
from experiments.runtime.progress import Progress
from experiments.tools.latent_card import Form, latent_card
from medfuncta_jax.latent_file import LatentStoreError
from medfuncta_jax.latent_store import LatentSplit, load_latents

FORMATS = tuple(name for name in get_args(Form) if name != "store")

# Latents held in memory at once, and examples in one array_record file.
_AT_ONCE = 4096

log = logging.getLogger("medfuncta")

Step = Callable[[int], None]


class ExportError(Exception):
    """The command cannot go on; the one-line message says why."""


def export_latents(store: Mapping[str, LatentSplit], form: Form, out: Path, *, stop: StopRequest) -> None:
    """Write every split of a store to a new folder.

    Args:
      store: from `load_latents`.
      form: "npz", "mednf" or "tfds".
      out: the folder; made whole or not at all.
      stop: checked between blocks of signals.
    Raises:
      ExportError: `out` is there already, or torch is needed and absent.
      Interrupted: a stop was asked for; nothing is left.
    """
    if out.exists():
        raise ExportError(f"{out} is there already; name another --out or remove it")
    write = {"npz": _write_npz, "mednf": _write_mednf, "tfds": _write_tfds}[form]
    staging = out.with_name(f".{out.name}.partial{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        with Progress(f"export {form}", total=sum(map(len, store.values())), unit="latents") as progress:

            def step(count: int) -> None:
                progress.advance(count)
                stop.check("nothing was exported")

            write(store, staging, step)
        (staging / "README.md").write_text(latent_card(store, form))
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _blocks(split: LatentSplit) -> Iterator[slice]:
    return (slice(start, min(start + _AT_ONCE, len(split))) for start in range(0, len(split), _AT_ONCE))


def _write_npz(store: Mapping[str, LatentSplit], out: Path, step: Step) -> None:
    for name, split in store.items():
        # The file is as numpy writes it, but the latents are never in memory as a whole.
        small: dict[str, Any] = {"labels": split.labels, "psnr": split.psnr, "ids": np.asarray(split.ids, np.str_)}
        small["about"] = np.asarray(json.dumps(split.about))
        if split.affines is not None:
            small["affines"] = split.affines
        path = out / f"{name}.npz"
        np.savez(path, allow_pickle=False, **small)
        with zipfile.ZipFile(path, "a") as archive, archive.open("latents.npy", "w", force_zip64=True) as member:
            described = np.lib.format.dtype_to_descr(split.latents.dtype)
            header = {"descr": described, "fortran_order": False, "shape": split.latents.shape}
            np.lib.format.write_array_header_1_0(member, header)
            for rows in _blocks(split):
                member.write(split.latents[rows].tobytes())
                step(rows.stop - rows.start)


def _write_mednf(store: Mapping[str, LatentSplit], out: Path, step: Step) -> None:
    try:
        import torch
    except ImportError as error:
        raise ExportError("--format=mednf writes torch files, and torch is not installed: pip install torch") from error
    for name, split in store.items():
        (out / name).mkdir()
        labels = split.labels.reshape(len(split), -1)
        for rows in _blocks(split):
            for i, latent in zip(range(rows.start, rows.stop), split.latents[rows].astype(np.float32), strict=True):
                # Cloned: torch saves the whole array that a tensor is a part of.
                point = {"modulations": torch.from_numpy(latent).clone(), "label": torch.tensor(labels[i])}
                torch.save(point, out / name / f"datapoint_{i}.pt")
                step(1)


def _write_tfds(store: Mapping[str, LatentSplit], out: Path, step: Step) -> None:
    import tensorflow_datasets as tfds

    features, first = tfds.features, next(iter(store.values()))
    raw = features.Encoding.BYTES
    described = {
        "latent": features.Tensor(shape=first.latents.shape[1:], dtype=first.latents.dtype, encoding=raw),
        "label": features.Tensor(shape=first.labels.shape[1:], dtype=np.int64),
        "id": features.Text(),
        "psnr": features.Scalar(np.float32),
    }
    if first.affines is not None:
        described["affine"] = features.Tensor(shape=(4, 4), dtype=np.float64, encoding=raw)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(name="latents", version="1.0.0", data_dir=str(out), module_name=__name__),
        features=features.FeaturesDict(described),
        metadata=tfds.core.MetadataDict(first.about),
        disable_shuffling=True,
    )
    # The writer writes one example after the other. A builder would sort a split in memory, and above 1 GB with
    # TensorFlow.
    writer = tfds.core.SequentialWriter(info, _AT_ONCE, file_format="array_record")
    writer.initialize_splits(list(store))
    for name, split in store.items():
        for rows in _blocks(split):
            writer.add_examples({name: split.__getitems__(range(rows.start, rows.stop))})
            step(rows.stop - rows.start)
    writer.close_all()


def define_flags() -> None:
    """Define the command's flags, not at import, because other commands share some names."""
    flags.DEFINE_string("workdir", None, "Run directory, or its latents folder; only read.")
    flags.DEFINE_enum("format", "npz", FORMATS, "Layout to write.")
    flags.DEFINE_string("out", None, "Folder to make; it must not be there yet.")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    try:
        command.parse(argv, required=("workdir", "out"), example="--workdir=runs/quickstart --out=exported")
    except flags.Error as error:
        return command.refuse(error, code=2)
    options = flags.FLAGS
    out = Path(str(options.out)).expanduser().absolute()

    def export() -> None:
        with StopRequest() as stop:
            store = load_latents(Path(str(options.workdir)).expanduser())
            export_latents(store, options.format, out, stop=stop)
        log.info("%s: %s", out, ", ".join(f"{len(split)} {name}" for name, split in store.items()))

    return command.carry_out(
        export,
        refusals=(ExportError, LatentStoreError),
        place=out,
        when_stopped="stopped at once; nothing was exported",
    )


if __name__ == "__main__":
    define_flags()
    app.define_help_flags()
    sys.exit(main(sys.argv))
