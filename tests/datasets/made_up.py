"""Made-up signals and files in the formats that the sources read; a seed gives the same ones each time."""

import nibabel
import numpy as np

# The affine of BraTS as published: left, posterior, superior.
LPS = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 239], [0, 0, 1.0, 0], [0, 0, 0, 1]])


def beat_line(label, seed=0):
    """A line of MIT-BIH's CSV files: 187 samples in [0, 1] and the class."""
    return ",".join(f"{value:.4f}" for value in np.random.default_rng(seed).random(187)) + f",{label}"


def medmnist_arrays(shape=(28, 28), n=(6, 2, 3), classes=2, width=1):
    """The arrays of a MedMNIST file: uint8 images of `shape`, and labels [n, width]."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name, count in zip(("train", "val", "test"), n, strict=True):
        arrays[f"{name}_images"] = rng.integers(0, 256, (count, *shape), np.uint8)
        arrays[f"{name}_labels"] = (np.arange(count * width).reshape(count, width) % classes).astype(np.uint8)
    return arrays


def write_npz(folder, name, arrays):
    """One file of arrays; returns the folder."""
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / name, **arrays)
    return folder


def _axes(shape):
    """The axes of a grid on [-1, 1], ready to be broadcast."""
    return np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)


def head(shape=(24, 20, 16), seed=0):
    """An MRI, int16: a ball of noise in a field of 0, as a brain without its skull."""
    noise = np.random.default_rng(seed).integers(100, 700, shape)
    return ((sum(axis**2 for axis in _axes(shape)) < 0.6) * noise).astype(np.int16)


def chest(shape, seed=0):
    """A CT, float32: a blob of tissue (50 HU) off the centre of air (-1000), smooth, far from the border."""
    centre = np.random.default_rng(seed).uniform(-0.15, 0.15, 3)
    distance = sum((axis - c) ** 2 for axis, c in zip(_axes(shape), centre, strict=True))
    return (-1000 + 1050 * np.exp(-distance / 0.04)).astype(np.float32)


def write_case(folder, case, values, affine=LPS, *, sequence="t1n", suffix=".nii.gz"):
    """One sequence of a BraTS case; returns the file."""
    path = folder / case / f"{case}-{sequence}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path
