"""The same source on a finer grid: matched by id, at places that affines of the source confirm."""

import nibabel
import numpy as np
import pytest

from medfuncta_jax.coordinates import inner_samples
from medfuncta_jax.datasets import DataError, NoFinerGrid, finer_plan
from medfuncta_jax.settings import DataSettings


def data(source, **options):
    return DataSettings(source, options=tuple(sorted(options.items())))


def test_slices_at_a_finer_size_have_the_same_ids():
    coarse, fine = (finer_plan(data("nibabel_slices", size=16), scale, data_dir=None) for scale in (2, 3))
    assert (coarse.grid, fine.grid) == ((32, 32), (48, 48))
    names = [example.id for example in coarse.splits["test"].examples()][::5]
    found = list(fine.signals(names))
    assert [name for name, _ in found] == names
    for _, signal in found:
        assert signal.shape == (48, 48, 1)
        assert signal.dtype == np.float32
    elsewhere = [next(iter(fine.splits[split].examples())).id for split in ("train", "val")]  # kept so by a run
    assert {name for name, _ in fine.signals([*names, *elsewhere])} == {*names, *elsewhere}
    with pytest.raises(DataError, match="nibabel_slices at 48x48 holds no signal nobody"):
        list(fine.signals(["nobody"]))


@pytest.mark.parametrize("spacing", [0.0, 3.0])
def test_places_are_those_that_affines_state(tmp_path, spacing):
    rng = np.random.default_rng(0)
    for k in range(4):
        volume = nibabel.Nifti1Image(rng.random((12, 9, 11), np.float32), np.diag([2.0, 2.5, 1.5, 1]))
        nibabel.save(volume, tmp_path / f"{k}.nii")
    source = data("nifti_folder", grid=(5, 4, 6), spacing=spacing, val_fraction=0.25, test_fraction=0.25)
    coarse, fine = finer_plan(source, 1, data_dir=str(tmp_path)), finer_plan(source, 3, data_dir=str(tmp_path))
    assert fine.grid == (15, 12, 18)
    one, other = (next(iter(plan.splits["test"].examples())) for plan in (coarse, fine))
    assert one.id == other.id
    inner, coords = inner_samples(coarse.grid, fine.grid)
    indices = np.stack(np.meshgrid(*(np.arange(n)[part] for n, part in zip(fine.grid, inner, strict=True)),
                                   indexing="ij"), -1).reshape(-1, 3)  # fmt: skip
    places = np.c_[indices, np.ones(len(indices))] @ (np.linalg.inv(one.affine) @ other.affine).T  # in coarse voxels
    np.testing.assert_allclose(coords, 2 * places[:, :3] / (np.array(coarse.grid) - 1) - 1, atol=1e-9)
    assert np.abs(coords).max() <= 1


def write_set(folder, name, size):
    rng = np.random.default_rng(size)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(256, size=(3, size, size), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.zeros((3, 1), np.uint8)
    np.savez(folder / name, **arrays)
    return arrays


def test_medmnist_takes_the_nearest_size_that_is_there(tmp_path):
    source = data("medmnist", flag="pneumoniamnist", size=28)
    with pytest.raises(NoFinerGrid, match=r"pneumoniamnist_64.npz is not in .*downloads/medmnist"):
        finer_plan(source, 2, data_dir=str(tmp_path))
    arrays = write_set(tmp_path, "pneumoniamnist_64.npz", 64)
    plan = finer_plan(source, 2, data_dir=str(tmp_path))
    assert plan.grid == (64, 64)
    ((_, signal),) = plan.signals(["test-000001"])
    np.testing.assert_allclose(signal[..., 0], arrays["test_images"][1] / 255, rtol=1e-6)
    with pytest.raises(NoFinerGrid, match=r"pneumoniamnist_128.npz is not in"):
        finer_plan(source, 4, data_dir=str(tmp_path))
    with pytest.raises(NoFinerGrid, match="pneumoniamnist has no size near 896"):
        finer_plan(data("medmnist", flag="pneumoniamnist", size=224), 4, data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (data("ecg"), "the source ecg has its signals at one resolution"),
        (data("series_folder", fit="crop"), "the source series_folder has its signals at one resolution"),
        (data("nibabel_slices", size=100), "size must be 8 to 256, got 400"),
        (data("brats", size=128), "size must be one of 32, 64, 128, 256, got 512"),
    ],
)
def test_where_there_is_none_the_reason_is_said(source, reason, tmp_path):
    with pytest.raises(NoFinerGrid, match=reason):
        finer_plan(source, 4, data_dir=str(tmp_path))
