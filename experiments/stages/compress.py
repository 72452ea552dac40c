"""Compression of signals as latents (COIN++), beside JPEG and JPEG 2000: --mode=compress."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.runtime.progress import Progress, log
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunError, write_json
from medfuncta_jax import metrics
from medfuncta_jax.batched import decode_latents
from medfuncta_jax.checkpoint import load_field
from medfuncta_jax.codec import fit_codec
from medfuncta_jax.latent_store import load_latents
from medfuncta_jax.settings import SettingsError

_FILE = "compression.json"
_CONVENTIONS = {
    "bits": "of a signal's whole code, over the points of its grid; the field and the codec are shared and not counted",
    "headers": "of image files not counted either: what follows the first start of scan (JPEG) or of data (JPEG 2000)",
    "psnr": "mean over signals, dB, of reconstructions clipped to [0, 1]",
}


@dataclass(frozen=True)
class CompressSettings:
    """Rate and distortion of quantised and entropy-coded latents (--mode=compress).

    Attributes:
      bits: numbers of bits, 1 to 16, of a latent entry before entropy coding.
      spread: bins span this many standard deviations to both sides of each entry's mean.
      signals: maximum number of test signals, evenly spaced over the split.
      beside: directories of other finished runs on the same data, to draw their curves too.
    """

    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    spread: float = 3.0
    signals: int = 256
    beside: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.bits or not all(1 <= bits <= 16 for bits in self.bits):
            raise SettingsError(f"bits must be 1 to 16, got {self.bits}")
        if not self.spread > 0:
            raise SettingsError(f"spread must be above 0, got {self.spread}")
        if self.signals < 1:
            raise SettingsError(f"signals must be at least 1, got {self.signals}")


def compress(run: Run) -> None:
    """Write `compression.json` and `figures/rate_distortion.png` from the stored latents.

    `compression.json` holds the curves of "field" and, for images, "JPEG" and "JPEG 2000": points of `bits_per_point`,
    `psnr` and `ssim`, and for files `bits_per_point_of_file`, which includes headers.

    Raises:
      CheckpointError, LatentStoreError: nothing to compress yet.
      RunError: the coder is not installed, or a run to be drawn beside this one has no such file.
      Interrupted: a stop was asked for; nothing is written.
    """
    if importlib.util.find_spec("constriction") is None:
        raise RunError("--mode=compress needs the package constriction; pip install 'medfuncta_jax[compress]'")
    from experiments import figures  # imported late, because every start reads this stage's settings

    dataset, directory, wanted = run.dataset, run.directory, run.settings.compress
    field, params = load_field(directory.path)
    store = load_latents(directory.latents, splits=("train", "test"), field=directory.path)
    split, latents = dataset.splits["test"], store["test"].latents
    if store["test"].ids != split.annotations().ids:
        raise RunError(f"the test latents in {directory.latents} are of other data; run --mode=extract again")
    rows = split.complete(wanted.signals)
    signals, points, train = split.signals(rows), math.prod(dataset.grid), np.asarray(store["train"].latents)

    def quality(images: np.ndarray) -> dict[str, float]:
        values = metrics.signal_metrics(images.reshape(signals.shape), signals)
        return {name: float(np.mean(np.asarray(values[name]), dtype=np.float64)) for name in ("psnr", "ssim")}

    def decoded(some: np.ndarray) -> np.ndarray:
        return decode_latents(field, params, some, dataset.grid, batch_size=run.settings.fit.batch_size)

    curves: dict[str, list[dict[str, Any]]] = {"field": []}
    with Progress("compress", total=len(wanted.bits), unit="rates") as progress:
        for bits in sorted(set(wanted.bits)):
            codec = fit_codec(train, bits=bits, spread=wanted.spread)
            codes = [codec.encode(latent) for latent in latents[rows]]
            images = decoded(np.stack([codec.decode(code) for code in codes]))
            rate = 8 * float(np.mean([len(code) for code in codes])) / points
            curves["field"].append({"bits": bits, "bits_per_point": rate, **quality(images)})
            run.stop.check("nothing of the compression is kept")
            progress.advance(note=f"{bits} bits: {curves['field'][-1]['psnr']:.2f} dB")
    if len(dataset.grid) == 2 and dataset.channels in (1, 3):
        for name, (levels, save) in _CODECS.items():
            curves[name] = [{**point, **quality(images)} for point, images in _as_files(signals, levels, save)]
            run.stop.check("nothing of the compression is kept")
    uncompressed = quality(decoded(np.asarray(latents[rows])))
    result = {"signals": len(rows), "latent_dim": train.shape[1], "spread": wanted.spread, "curves": curves}
    folder = directory.results("compress")
    write_json(folder / _FILE, {**result, "uncompressed": uncompressed, "conventions": _CONVENTIONS})
    drawn = {"this field" if wanted.beside else "field": curves["field"]}
    drawn |= {Path(other).name: _of_run(Path(other)) for other in wanted.beside}
    drawn |= {name: curve for name, curve in curves.items() if name != "field"}
    figures.draw_rate_distortion(
        folder / "figures" / "rate_distortion.png",
        {name: [(point["bits_per_point"], point["psnr"]) for point in curve] for name, curve in drawn.items()},
        unit="bits per " + {1: "sample", 2: "pixel", 3: "voxel"}[len(dataset.grid)],
    )
    last = curves["field"][-1]
    log.info(
        "compress: %.2f bits a point at %.2f dB (%.2f dB from the latents as they are), %s",
        last["bits_per_point"], last["psnr"], uncompressed["psnr"], folder / _FILE,
    )  # fmt: skip


def _of_run(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((path / _FILE).read_text())["curves"]["field"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path / _FILE} is absent or damaged; run --mode=compress for that run first") from error


def _jpeg(image: Image.Image, file: io.BytesIO, quality: int) -> None:
    image.save(file, format="JPEG", quality=quality, optimize=True)


def _jpeg_2000(image: Image.Image, file: io.BytesIO, psnr: int) -> None:
    image.save(file, format="JPEG2000", quality_mode="dB", quality_layers=[psnr], irreversible=True, no_jp2=True)


_CODECS: dict[str, tuple[tuple[int, ...], Callable[[Image.Image, io.BytesIO, int], None]]] = {
    "JPEG": ((5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95), _jpeg),
    "JPEG 2000": ((20, 22, 24, 26, 28, 30, 32, 34, 36, 40, 44, 48), _jpeg_2000),
}
# The marker that ends a file's headers: start of scan, start of data.
_HEADER_ENDS = {"JPEG": b"\xff\xda", "JPEG 2000": b"\xff\x93"}


def _as_files(signals: np.ndarray, levels: tuple[int, ...], save: Callable[..., None]) -> list[tuple[dict, np.ndarray]]:
    """The mean sizes for each level, and the images [n, *grid, D] in [0, 1] read back."""
    marker = _HEADER_ENDS["JPEG" if save is _jpeg else "JPEG 2000"]
    points = int(np.prod(signals.shape[1:-1]))
    pixels = np.rint(np.clip(signals, 0, 1) * 255).astype(np.uint8)
    results = []
    for level in levels:
        images, whole, data = [], [], []
        for one in pixels:
            file = io.BytesIO()
            save(Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one), file, level)
            content = file.getvalue()
            whole.append(len(content))
            data.append(len(content) - content.index(marker))
            images.append(np.asarray(Image.open(io.BytesIO(content)), np.float32).reshape(one.shape) / 255)
        sizes = {"bits_per_point": data, "bits_per_point_of_file": whole}
        point = {"level": level, **{name: 8 * float(np.mean(some)) / points for name, some in sizes.items()}}
        results.append((point, np.stack(images)))
    return results
