"""Every config reads the files that it says it reads, and trains a step on them when shrunk."""

import dataclasses
import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import medfuncta_jax as mf
from experiments.settings import RunSettings
from medfuncta_jax import meta_step
from medfuncta_jax.datasets import batches, open_dataset
from medfuncta_jax.nifti import write_volume
from medfuncta_jax.settings import DataSettings
from tests.datasets.made_up import beat_line, chest, head, medmnist_arrays, write_case, write_npz
from tests.real_data import REAL, needs_real

CONFIGS = sorted(
    path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py") if path.stem not in ("__init__", "base")
)

# The published file of each config that reads MedMNIST.
MEDMNIST = {
    "cell_microscopy": "tissuemnist",
    "chest_xray": "chestmnist",
    "colon_histopathology": "pathmnist",
    "dermatoscope": "dermamnist",
    "fundus": "retinamnist",
    "medmnist_3d": "adrenalmnist3d",
    "pneumonia_xray": "pneumoniamnist",
    "pneumonia_xray_28": "pneumoniamnist",
    "retinal_oct": "octmnist",
}
COLOURED = ("colon_histopathology", "dermatoscope", "fundus")
# The shape of a signal, [*grid, D], where it is not an image of the variant's size.
SHAPES = {
    "brain_mri": (32, 32, 32, 1),
    "ecg": (187, 1),
    "series_folder": (256, 1),
    "lung_ct": (32, 32, 32, 1),
    "medmnist_3d": (28, 28, 28, 1),
    "pneumonia_xray_28": (28, 28, 1),
    "quickstart": (32, 32, 1),
}
VARIANTS = {
    **dict.fromkeys(set(MEDMNIST) - set(SHAPES), ("", "28", "128", "224", "cpu")),
    **dict.fromkeys(("lung_ct", "medmnist_3d"), ("", "cpu")),
    "ecg": ("", "cpu", "leads", "leads_cpu"),
    "brain_mri": ("", "cpu", "folder", "folder_cpu"),
    "image_folder": ("", "64", "128", "224", "cpu"),
    "series_folder": ("", "cpu", "row", "row_cpu"),
}


def get_config(name, variant=""):
    module = importlib.import_module(f"configs.{name}")
    assert "Command:" in module.__doc__
    assert "Hardware:" in module.__doc__
    assert "Result:" in module.__doc__
    return RunSettings.from_dict((module.get_config(variant) if name in VARIANTS else module.get_config()).to_dict())


def signal_shape(name, variant):
    if variant.startswith("leads"):
        return (1000, 12)
    size = int(variant) if variant.isdigit() else 64
    return SHAPES.get(name, (size, size, 3 if name in COLOURED else 1))


@functools.lru_cache
def made_up_folder(root, source, flag, shape):
    """A few made-up signals, in files as they are published; None for the source that brings its own."""
    folder = root / (flag or source)
    match source:
        case "brats":
            for i in range(4):
                write_case(folder, f"BraTS-GLI-{i:05d}-000", head((240, 240, 155), i))
        case "ecg" if flag == "leads":
            pytest.importorskip("pydicom")
            from tests.datasets.ecg_files import write_dicoms

            write_dicoms(folder)
        case "ecg":
            folder.mkdir()
            for name in ("mitbih_train.csv", "mitbih_test.csv"):
                lines = [beat_line(f"{i % 5}.000000000000000000e+00", i) for i in range(15)]
                (folder / name).write_text("\n".join(lines))
        case "lung_ct":
            for i in range(4):
                write_volume(folder / f"LIDC-IDRI-{i:04d}.nii.gz", chest((130, 120, 110), i), np.eye(4), dtype="int16")
        case "medmnist":
            name = f"{flag}.npz" if shape[0] == 28 else f"{flag}_{shape[0]}.npz"
            image = shape if shape[-1] == 3 else shape[:-1]
            write_npz(folder, name, medmnist_arrays(image, width=14 if flag == "chestmnist" else 1))
        case "image_folder":
            for i in range(4):
                folder.mkdir(exist_ok=True)
                values = np.random.default_rng(i).integers(0, 256, (240, 250), np.uint8)
                Image.fromarray(values).save(folder / f"{i}.png")
        case "nibabel_slices":
            return None
        case "series_folder":
            folder.mkdir()
            values = np.random.default_rng(0).random((4, 300))
            if flag == "rows":
                np.savetxt(folder / "rows.csv", values, delimiter=",")
            for i, row in enumerate([] if flag == "rows" else values):
                np.savetxt(folder / f"{i}.txt", row)
        case "nifti_folder":
            for i in range(4):
                path = folder / f"site {i % 2}" / f"scan {i}.nii.gz"
                write_volume(path, head((96, 80 + i, 60), i), np.diag([2, 2, 2 + i, 1]))
    return folder


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Where made-up files and prepared data are, shared by the configs."""
    return tmp_path_factory.mktemp("configs")


@pytest.mark.some(6)
@pytest.mark.parametrize(("name", "variant"), [(name, v) for name in CONFIGS for v in VARIANTS.get(name, ("",))])
def test_config_trains_when_shrunk(name, variant, root):
    settings, shape = get_config(name, variant), signal_shape(name, variant)
    flag = next((flag for flag in ("rows", "leads") if variant.startswith(flag[:3])), MEDMNIST.get(name))
    train_one_step(settings, shape, root, made_up_folder(root, settings.data.source, flag, shape))


@pytest.mark.some(2)
@needs_real
@pytest.mark.parametrize(
    ("name", "variant", "folder"),
    [
        ("brain_mri", "folder", "ixi_t1_2mm"),
        ("ecg", "", "ecg"),
        ("medmnist_3d", "", "."),
        ("pneumonia_xray_28", "", "."),
    ],
)
def test_config_trains_on_real_files(name, variant, folder, root):
    train_one_step(get_config(name, variant), signal_shape(name, variant), root, REAL / folder)


def train_one_step(settings, shape, root, folder):
    """One update of the shrunken field, as the launcher makes it, on some of the points of the config's own data."""
    data = dataclasses.replace(settings.data, cache_dir=str(root / "cache"))
    dataset = open_dataset(data, data_dir=None if folder is None else str(folder))
    assert (*dataset.grid, dataset.channels) == shape
    coords = jnp.asarray(mf.grid(dataset.grid), jnp.float32)
    points = np.random.default_rng(0).choice(len(coords), 128, replace=False)
    with batches(dataset.splits["train"], batch_size=2, seed=settings.seed) as stream:
        signals = next(stream).reshape(2, len(coords), dataset.channels)
    assert 0 <= signals.min() < signals.max() <= 1

    settings = shrunk(settings)
    field, update = compiled_update(settings, len(dataset.grid), dataset.channels)
    before = meta_step.init(field, settings, jax.random.key(0))
    after, metrics = update(before, signals[:, points], jax.random.key(1), coords[points])
    assert np.isfinite(metrics["loss"])
    assert int(after.step) == 1
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before.trainable, after.trainable)
    assert not any(jax.tree.leaves(same)), same
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.trainable))


def shrunk(settings):
    """Few and narrow layers, two inner steps, one update without warm-up; nothing of what one update does not use, and
    no augmentation, which needs all points of a grid."""
    return mf.Settings(
        DataSettings("any"),
        model=dataclasses.replace(settings.model, layers=min(4, settings.model.layers), width=16, latent_dim=8),
        inner=dataclasses.replace(settings.inner, steps=2),
        train=dataclasses.replace(
            settings.train, steps=1, warmup_steps=0, batch_size=2, eval_every=1, eval_signals=1, augmentation=0.0
        ),
    )


@functools.lru_cache
def compiled_update(settings, coord_dims, channels):
    """Configs that differ by their data alone share what is compiled."""
    field = mf.Field(settings.model, coord_dims, channels)

    def update(state, signals, key, coords):
        training = meta_step.Training(field, settings, shape=())  # some points of no grid
        sample = meta_step.draw(training, state, signals, key, None, coords=coords)
        found = meta_step.loss_and_gradient(training, state.trainable, sample)
        return meta_step.optimizer_step(training, state, *found)

    return field, jax.jit(update)


PAPER = {
    # config: (layers, width, B, gamma, omega_first, omega_last, P)
    ("ecg", ""): (8, 64, 64, 1.0, 20.0, 200.0, 64),
    ("chest_xray", ""): (15, 256, 24, 0.25, 20.0, 400.0, 2048),
    ("chest_xray", "128"): (15, 256, 8, 0.25, 30.0, 300.0, 8192),
    ("dermatoscope", "224"): (15, 256, 4, 0.10, 30.0, 300.0, 16384),
    ("brain_mri", ""): (15, 256, 4, 0.25, 20.0, 300.0, 8192),
    ("lung_ct", ""): (15, 256, 4, 0.25, 20.0, 300.0, 8192),
}


@pytest.mark.parametrize(("config", "expected"), PAPER.items())
def test_paper_settings(config, expected):
    """The table of hyperparameters, and what is common to all."""
    settings = get_config(*config)
    model, inner, train = settings.model, settings.inner, settings.train
    assert expected == (
        model.layers, model.width, train.batch_size, inner.selection_ratio, model.omega_first, model.omega_last,
        model.latent_dim,
    )  # fmt: skip
    assert (inner.steps, inner.step_size, settings.fit.steps) == (10, 1e-2, 20)
    assert (train.learning_rate, train.steps, train.schedule) == (3e-6, 250_000, "cosine")
    assert (model.modulate_first_layer, inner.shared_context, settings.fit.context) == (False, False, "full")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("brain_mri", "cpu, folder, folder_cpu"),
        ("chest_xray", "28, 64, 128, 224, cpu"),
        ("ecg", "cpu, leads, leads_cpu"),
    ],
)
def test_an_unknown_variant_names_the_known(name, known):
    for wrong in ("65", "folderx"):
        with pytest.raises(ValueError, match=f"no variant '{wrong}'; known: {known}$"):
            get_config(name, wrong)
