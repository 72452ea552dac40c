"""The data set card of a latent store: its content, origin, quality, and how to read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from medfuncta_jax.latent_file import file_name
from medfuncta_jax.latent_store import LatentSplit

Form = Literal["store", "npz", "mednf", "tfds"]

# Maximum number of classes in the table of counts; a longer table would not be read.
_COUNTED = 30

# Entries of sources for an unknown licence.
_NO_LICENCE = (None, "", "not known", "as its publisher says")

_LOADING: dict[Form, str] = {
    "store": """\
```python
import medfuncta_jax as mf

{split} = mf.load_latents("DIR")["{split}"]  # opens at once; latents are read as they are used
{split}.latents[:100], {split}.labels, {split}.ids, {split}.psnr  # [100, {size}], [{count}], ...
field, params = mf.load_field("field.safetensors")  # of the checksum above
images = mf.reconstruct(field, params, {split}.latents[:4], mf.grid({grid}))
```

Without this package, a file is read by `safetensors` alone (ids are UTF-8, padded with zeros):

```python
from safetensors.numpy import load_file

arrays = load_file("{file}")  # latents, labels, ids, psnr{affines}
ids = [row.tobytes().rstrip(b"\\0").decode() for row in arrays["ids"]]
```

Other layouts: `python -m experiments.tools.export_latents --workdir=DIR --format=npz|mednf|tfds --out=OTHER`.
""",
    "npz": """\
```python
import numpy as np

with np.load("{split}.npz") as arrays:
    latents, labels, ids = arrays["latents"], arrays["labels"], arrays["ids"]
```
""",
    "mednf": """\
```python
import torch

point = torch.load("{split}/datapoint_0.pt")  # of {count}
point["modulations"], point["label"]  # float32 [{size}], int64 {label_shape}
```
""",
    "tfds": """\
```python
import tensorflow_datasets as tfds

source = tfds.builder_from_directory("DIR").as_data_source("{split}")
source[0]["latent"], source[0]["label"], source[0]["id"], source[0]["psnr"]
```
""",
}


def latent_card(store: Mapping[str, LatentSplit], form: Form = "store") -> str:
    """Markdown for people; the same store gives the same text.

    Args:
      store: every split, from `load_latents`.
      form: the layout of the latents, which decides the explanation of loading.
    """
    first = next(iter(store.values()))
    about, size = first.about, first.latents.shape[1]
    data, settings = about.get("data", {}), about["settings"]
    title = data.get("title") or data.get("source", "unnamed data")
    licence = data.get("licence")
    grid = tuple(about["grid"])
    model = settings["model"]
    lines = [
        f"# Latents of {title}",
        "",
        f"One latent of {size} numbers ({first.latents.dtype}) for each signal. A neural field of MedFuncta (Friedrich "
        "et al., MIDL 2026), shared by all and modulated by a latent, gives its signal back at any resolution.",
        "",
        "| | |",
        "|---|---|",
        f"| source | {data.get('source', 'unknown')}: {title} |",
        f"| licence | {'unknown: see the source' if licence in _NO_LICENCE else licence} |",
        f"| signals | {' x '.join(map(str, grid))} points, {about['channels']} channel(s), in [0, 1] |",
        f"| split | {data.get('split_rule', 'see the source')} |",
        f"| field | {model['layers']} layers of {model['width']}, SHA-256 `{about['field_sha256']}` |",
        f"| fitted | {settings['fit']['steps']} steps, {settings['fit']['context']} context |",
        "",
        "PSNR is that of the reconstruction from the latent as stored, clipped to [0, 1].",
        "",
        "| split | signals | PSNR mean | sd | lowest |",
        "|---|---|---|---|---|",
    ]
    for name, split in store.items():
        psnr = split.psnr.astype(np.float64)
        lines.append(f"| {name} | {len(split)} | {psnr.mean():.2f} dB | {psnr.std():.2f} | {psnr.min():.2f} |")
    lines += ["", *_labels(store), "", "## Loading", ""]
    values = {
        "split": first.about["split"],
        "size": size,
        "count": len(first),
        "grid": grid,
        "file": file_name(first.about["split"], 0, len(first.files)),
        "affines": "" if first.affines is None else ", affines",
        "label_shape": list(first.labels.shape[1:]) or [1],
    }
    return "\n".join(lines) + "\n" + _LOADING[form].format(**values)


def _labels(store: Mapping[str, LatentSplit]) -> list[str]:
    """The task, and the number of signals of each class."""
    about = next(iter(store.values())).about
    classes = about["classes"]
    if not classes:
        return ["No labels (-1)."]
    said = f"Labels: {about['task']}, {len(classes)} classes"
    if len(classes) > _COUNTED:
        return [f"{said}: {', '.join(classes)}."]
    columns = np.arange(len(classes))
    counts = {
        name: (split.labels if split.labels.ndim == 2 else split.labels[:, None] == columns).sum(0)
        for name, split in store.items()
    }
    rows = [
        f"| {k} | {label} | {' | '.join(str(int(count[k])) for count in counts.values())} |"
        for k, label in enumerate(classes)
    ]
    return [f"{said}.", "", f"| label | class | {' | '.join(store)} |", f"|{'---|' * (2 + len(store))}", *rows]
