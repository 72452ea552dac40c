"""Made-up latent stores, and a made-up run to extract one from."""

import json

import jax
import numpy as np

import medfuncta_jax as mf
from medfuncta_jax.checkpoint import save_field
from medfuncta_jax.datasets import Dataset, Split
from medfuncta_jax.latent_file import file_name, file_rows, write_file
from medfuncta_jax.latent_store import field_checksum

LENGTHS = {"train": 10, "val": 3, "test": 4}


def split_arrays(name, *, latent_dim=6, dtype="float32", tasks=None, affines=False):
    """All arrays of one split."""
    n = LENGTHS[name]
    rng = np.random.default_rng(len(name))
    return {
        "latents": rng.normal(size=(n, latent_dim)).astype(dtype),
        "labels": rng.integers(0, 2, size=(n,) if tasks is None else (n, tasks)),
        "ids": [f"{name}/Ü {i}.nii.gz" for i in range(n)],
        "psnr": rng.uniform(20, 40, n).astype(np.float32),
        "affines": rng.normal(size=(n, 4, 4)) if affines else None,
    }


def about(name, **changes):
    """What a file of the split says."""
    settings = mf.Settings.from_dict({"data": {"source": "made up"}, "model": {"layers": 3, "width": 8}}).to_dict()
    return {
        "split": name, "splits": LENGTHS, "field_sha256": "0" * 64, "grid": [5, 4], "channels": 1,
        "classes": ["normal", "other"], "task": "binary-class",
        "data": {"source": "made up", "title": "noise", "licence": "CC BY 4.0"},
        "settings": json.loads(json.dumps(settings)),
    } | changes  # fmt: skip


def write_store(folder, *, signals_per_file=4, splits=tuple(LENGTHS), changes=None, **options):
    """Write a store; returns the arrays of every split."""
    written = {}
    for name in splits:
        arrays = split_arrays(name, **options)
        rows = file_rows(LENGTHS[name], signals_per_file)
        for part, some in enumerate(rows):
            of_file = {key: None if array is None else array[some.start : some.stop] for key, array in arrays.items()}
            path = folder / file_name(name, part, len(rows))
            write_file(path, about(name, **(changes or {})), some, **of_file)
        written[name] = arrays
    return written


def made_up_dataset(grid, *, channels=1, affines=False, lengths=None):
    """Smooth random signals on a grid, with labels, and affines where asked for."""
    rng = np.random.default_rng(0)
    coords = mf.grid(grid).reshape(*grid, len(grid))
    splits = {}
    for name, n in (lengths or LENGTHS).items():
        records = []
        for i in range(n):
            waves = np.stack([np.sin(coords @ rng.normal(size=len(grid)) * 3 + i) for _ in range(channels)], -1)
            record = {"signal": (0.5 + 0.4 * waves).astype(np.float32), "label": i % 2, "id": f"{name}-{i}"}
            if affines:
                record["affine"] = np.diag([2.0, 3.0, 1.5, 1]) + np.eye(4, k=3) * rng.normal()
            records.append(record)
        splits[name] = Split(records, (*grid, channels), "float32")
    return Dataset(
        "made up", tuple(grid), channels, ("even", "odd"), splits, "binary-class",
        {"source": "made up", "title": "waves", "licence": "not known", "folder": "/somewhere", "files": {"a": [1, 2]}},
    )  # fmt: skip


def write_field(run_path, settings, dataset, *, seed=0):
    """An exported field that has not been trained, whose latents still fit a little."""
    field = mf.Field(settings.model, len(dataset.grid), dataset.channels)
    params = field.init(jax.random.key(seed))
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    for name in params:
        if name.startswith("modulation"):  # so that two steps make a difference
            params[name]["kernel"] *= 30
    save_field(run_path / "field.safetensors", field, params, {})
    return field, params


def write_latents(run_path, settings, dataset):
    """A store of the field of a run for a data set, with latents that were not fitted, which takes no compiler."""
    rng = np.random.default_rng(1)
    for name, split in dataset.splits.items():
        known = split.annotations()
        described = about(
            name, splits={name: len(split) for name, split in dataset.splits.items()}, grid=list(dataset.grid),
            channels=dataset.channels, classes=list(dataset.classes), task=dataset.task,
            field_sha256=field_checksum(run_path), settings=json.loads(json.dumps(settings.to_dict())),
        )  # fmt: skip
        write_file(
            run_path / "latents" / file_name(name, 0, 1), described, range(len(split)),
            latents=rng.normal(size=(len(split), settings.model.latent_dim), scale=0.01).astype(np.float32),
            labels=known.labels, ids=known.ids, psnr=np.full(len(split), 20.0), affines=known.affines,
        )  # fmt: skip
