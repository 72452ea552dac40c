"""Distances of masks against a plain statement, the U-Net, and the stage on real hippocampus masks."""

import dataclasses
import itertools
import json
import shutil
from types import SimpleNamespace

import jax
import nibabel
import numpy as np
import pytest
from PIL import Image

import medfuncta_jax as mf
from experiments.runtime.interruption import Interrupted, StopRequest
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunDirectory, RunError, write_json
from experiments.settings import RunSettings
from experiments.stages.extract import ExtractSettings, extract
from experiments.stages.segment import SegmentSettings, segment
from experiments.stages.segment_methods import Case, Masks, field_masks, with_copies
from experiments.stages.segmentation_scores import hausdorff_95, scores
from experiments.stages.unet import UNet, UNetTraining, _Convolution, fit_unet
from medfuncta_jax import segmentation
from medfuncta_jax.datasets import DataError, mask_reader
from medfuncta_jax.latent_file import LatentStoreError
from medfuncta_jax.settings import DataSettings, SettingsError
from tests.experiments.conftest import run
from tests.real_data import REAL, needs_real


def _distances(a, b, spacing):
    """The 95 % Hausdorff distance, point by point."""

    def edge(some):
        points = [tuple(at) for at in np.argwhere(some)]
        inside = set(points)
        steps = [tuple(sign * (k == axis) for k in range(some.ndim)) for axis in range(some.ndim) for sign in (1, -1)]
        return [p for p in points if any(tuple(np.add(p, step)) not in inside for step in steps)]

    edges = [np.array(edge(some)) * spacing for some in (a, b)]
    ways = []
    for one, other in itertools.permutations(edges):
        ways.append(np.percentile(np.linalg.norm(one[:, None] - other[None], axis=-1).min(1), 95))
    return max(ways)


def test_hausdorff_distances_are_those_of_every_pair_of_boundary_points():
    rng = np.random.default_rng(0)
    for shape, spacing in (((9, 7), (1.0, 1.0)), ((6, 8, 5), (0.5, 2.0, 1.3))):
        for chance in (0.1, 0.5, 0.9):
            a, b = rng.random((2, *shape)) < chance
            assert hausdorff_95(a, b, spacing) == pytest.approx(_distances(a, b, spacing))
    block = np.zeros((12, 12), bool)
    block[2:6, 2:6] = True
    assert hausdorff_95(block, np.roll(block, 3, 1), (5.0, 2.0)) == 6
    assert hausdorff_95(block, block, (5.0, 2.0)) == 0
    assert np.isnan(hausdorff_95(block, np.zeros_like(block), (1.0, 1.0)))


def test_scores_leave_out_what_is_not_there_and_count_what_is_missed():
    masks, found = np.zeros((2, 3, 6, 6), int)
    masks[0, :2, :2], found[0, :2, :2] = 1, 1
    masks[1, 3:, 3:] = 1
    found[2, 0, 0] = 2
    table, by_signal = scores(found, masks, np.ones((3, 2)), names=("a", "b"), resamples=50, seed=0)
    assert table["a"]["dice"]["mean"] == 0.5
    assert (table["a"]["signals"], table["a"]["missed"], table["a"]["hd95"]["mean"]) == (2, 1, 0)
    assert (table["b"]["signals"], table["b"]["missed"], table["b"]["hd95"]) == (0, 1, None)
    np.testing.assert_array_equal(by_signal, [1, 0, 0])
    assert table["mean"]["dice"]["mean"] == pytest.approx(1 / 3)


def test_the_unet_learns_what_a_grey_value_tells():
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 2, (40, 21))  # a grid that does not halve evenly
    shapes = (0.2 + 0.6 * masks + 0.05 * rng.standard_normal(masks.shape)).astype(np.float32)[..., None]
    training = UNetTraining((4, 8), batch_size=6, learning_rate=1e-2)
    keys = {"classes": 2, "key": jax.random.key(0), "training": training}
    steps = []
    fit = fit_unet(
        shapes[:32], masks[:32], shapes[32:], masks[32:], steps=60, after=lambda step, *_: steps.append(step), **keys
    )
    assert steps == list(range(6, 61, 6))
    assert fit.val_dice > 0.8
    seen = np.zeros((1, 21), bool)
    blind = fit.labels(shapes[32:], seen)
    np.testing.assert_array_equal(blind, np.broadcast_to(blind[:1], blind.shape))  # nothing else is read
    # The number of updates is of the time that they take.
    timed = fit_unet(shapes[:32], masks[:32], shapes[32:], masks[32:], seconds=1e-9, **keys)
    assert timed.steps == 1
    # The products are a convolution.
    x = rng.random((2, 4, 5, 3, 2)).astype(np.float32)
    values, params = jax.jit(_Convolution(3).init_with_output)(jax.random.key(0), x)
    kernel = params["params"]["kernel"].reshape(3, 3, 3, 2, 3)
    of_xla = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), "SAME", dimension_numbers=("NXYZC", "XYZIO", "NXYZC"))
    np.testing.assert_allclose(values, of_xla, atol=1e-5)
    volume = jax.eval_shape(UNet((2, 3), 3).init_with_output, jax.random.key(0), np.ones((2, 3, 4, 5, 2)))
    assert volume[0].shape == (2, 3, 4, 5, 3)


FEW = SegmentSettings(
    masks="labelsTr", methods=("head", "unet"), observed=(1.0, 0.2), hidden=(16,), steps=20, signals=4, points=100,
    unet_widths=(4,), unet_steps=4, field_steps=3, operator_steps=10, scale=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory):
    """A run directory with a field that is not trained, latents of it, and its data: sixteen real volumes at 10^3."""
    if not REAL.is_dir():
        pytest.skip("no shared/data beside the checkout")
    base = tmp_path_factory.mktemp("hippocampus")
    for folder in ("imagesTr", "labelsTr"):
        (base / "data" / folder).mkdir(parents=True)
        for file in sorted((REAL / "hippocampus" / folder).glob("*.nii.gz"))[:16]:
            shutil.copy(file, base / "data" / folder)
    data = DataSettings("nifti_folder", str(base / "cache"), (("grid", (10, 10, 10)), ("pattern", "imagesTr/*")))
    model = mf.ModelSettings(layers=3, width=24, latent_dim=8)
    settings = RunSettings(
        data=data, model=model, fit=mf.FitSettings(steps=3, batch_size=2), extract=ExtractSettings(), segment=FEW
    )
    field = mf.Field(model, 3, 1)
    directory = RunDirectory(base / "run", settings)
    mf.save_field(directory.path / "field.safetensors", field, field.init(jax.random.key(0), np.float32), {})
    dataset = mf.open_dataset(data, data_dir=str(base / "data"))
    with StopRequest() as stop:
        extract(Run(directory, stop, dataset, str(base / "data")))
    return base, dataset, settings


def _segment(hippocampus, workdir=None, stop=None, **changed):
    base, dataset, settings = hippocampus
    settings = dataclasses.replace(settings, segment=dataclasses.replace(settings.segment, **changed))
    with StopRequest() as request:
        directory = RunDirectory(workdir or base / "run", settings)
        return segment(Run(directory, stop or request, dataset, str(base / "data")))


@pytest.fixture(scope="module")
def segmented(hippocampus):
    return _segment(hippocampus)


def test_the_stage_scores_and_writes_masks(hippocampus, segmented):
    base, dataset, _ = hippocampus
    count = len(dataset.splits["test"])
    stored = json.loads((base / "run" / "segmentation.json").read_text())
    assert stored == json.loads(json.dumps(segmented))
    assert segmented["structures"] == {"1": 1, "2": 2}
    assert segmented["unit"] == "mm"
    assert list(segmented["methods"]) == ["head", "unet"]
    assert segmented["methods"]["unet"]["updates"] == 4
    assert list(segmented["difference"]["head"]) == ["1", "0.2"]
    assert segmented["methods"]["head"]["finer"]["grid"] == [20, 20, 20]
    for of in segmented["methods"].values():
        assert of["seconds"] > 0
        for table in of["observed"].values():
            assert table["1"]["signals"] == count
            assert 0 <= table["mean"]["dice"]["mean"] <= 1
    assert (base / "run" / "figures" / "segmentation.png").stat().st_size > 20_000
    affines = dataset.splits["test"].annotations().affines
    for folder, grid, step in (("head", 10, 1), ("unet", 10, 1), ("head-20x20x20", 20, 0.5)):
        files = sorted((base / "run" / "segmented" / folder).glob("*.nii.gz"))
        assert len(files) == count
        assert files[0].name.startswith("0-hippocampus_")
        mask = nibabel.load(files[0])
        assert mask.shape == (grid,) * 3
        assert mask.get_data_dtype() == np.uint8
        assert set(np.unique(mask.dataobj)) <= {0, 1, 2}
        # Both grids have one middle.
        middle = [affine[:3, :3] @ np.full(3, (n - 1) / 2) + affine[:3, 3]
                  for affine, n in ((mask.affine, grid), (affines[0], 10))]  # fmt: skip
        np.testing.assert_allclose(*middle)
        np.testing.assert_allclose(mask.affine[:3, :3], affines[0][:3, :3] * step)


@pytest.mark.slow
def test_a_field_of_masks_and_the_others_of_the_time_they_took(hippocampus, segmented):
    """In a folder of its own, as it is another choice of methods."""
    methods = _segment(hippocampus, methods=("unet", "masks"), field_steps=40, unet_steps=0)["methods"]
    assert methods["unet"]["updates"] > 0
    assert methods["masks"]["val_dice_of_fitted_masks"] >= methods["masks"]["val_dice"] - 0.1
    assert methods["masks"]["finer"]["grid"] == [20, 20, 20]
    (folder,) = (hippocampus[0] / "run" / "variants").glob("segment.field_steps=40*/segmented/masks-20x20x20")
    assert len(list(folder.glob("*.nii.gz"))) == 4


def test_the_field_of_masks_of_a_linear_start_is_one_too():
    """At the rates of such a run a random field of masks would learn nothing."""
    settings = RunSettings.from_dict(
        {
            "data": {"source": "made up"},
            "model": {"layers": 3, "width": 64, "latent_dim": 6, "omega_first": 10.0, "omega_last": 10.0},
            "inner": {"steps": 2, "step_size": 1.0, "fit_ratio": 0.15},
            "train": {"start": "linear", "start_updates": 40, "steps": 0, "learning_rate": 1e-7},
            "fit": {"steps": 40, "batch_size": 8},
            "segment": {"operator_steps": 10, "masks": "masks"},
        }
    )
    shape, counts, rng = (12, 12), {"train": 48, "val": 8, "test": 2}, np.random.default_rng(0)
    # The latents say where a square lies.
    places = {name: rng.uniform(-0.5, 0.5, (count, 6)).astype(np.float32) for name, count in counts.items()}
    near = {name: np.abs(mf.grid(shape) - some[:, None, :2]).max(-1) < 0.4 for name, some in places.items()}
    masks = Masks((1,), {name: some.reshape(-1, *shape).astype(np.uint8) for name, some in near.items()}, None)
    field = mf.Field(settings.model, 2, 1)
    case = Case(
        SimpleNamespace(settings=settings, dataset=SimpleNamespace(grid=shape)),
        (field, field.init(jax.random.key(0), np.float32)), masks, {},
        {name: some[None] for name, some in places.items()}, {}, lambda note, part=0: None,
    )  # fmt: skip
    found, row = field_masks(case, 0.0)
    assert found["masks"].shape == (1, 2, *shape)
    assert row["updates"] == 10
    assert row["val_dice_of_fitted_masks"] > 0.75


def _kept(workdir, name):
    (file,) = (workdir / "segmentation").glob(f"{name}-*.npz")
    return file


def test_copies_are_trained_with_as_another_training(hippocampus, segmented, tmp_path, monkeypatch):
    trained, fit_head = [], segmentation.fit_head

    def spied(field, params, train, val, **options):
        trained.append((train.latents.shape[1], len(train.masks)))
        return fit_head(field, params, train, val, **options)

    monkeypatch.setattr(segmentation, "fit_head", spied)
    shutil.copytree(hippocampus[0] / "run", tmp_path / "run")
    changed = {"methods": ("head",), "copies": 2}
    assert _segment(hippocampus, tmp_path / "run", **changed)["settings"]["copies"] == 2
    assert trained == [(30, 30)]
    _segment(hippocampus, tmp_path / "run", **changed | {"augmentation": 0.2})
    assert len(trained) == 2  # the head of other copies was not taken
    _segment(hippocampus, tmp_path / "run", methods=("head",))
    assert len(trained) == 2


def test_a_method_that_is_done_is_not_trained_again(hippocampus, segmented, tmp_path):
    base, _, _ = hippocampus
    shutil.copytree(base / "run", tmp_path / "run")
    _kept(tmp_path / "run", "unet").write_bytes(b"cut off")
    before = _kept(tmp_path / "run", "head").stat().st_mtime_ns
    masks = {name: next((tmp_path / "run" / "segmented" / name).glob("0-*")) for name in ("head", "unet")}
    ours = {name: path.read_bytes() for name, path in masks.items()}
    for path in masks.values():
        path.write_bytes(b"mine")
    again = _segment(hippocampus, tmp_path / "run")
    assert _kept(tmp_path / "run", "head").stat().st_mtime_ns == before
    assert masks["head"].read_bytes() == b"mine"
    assert masks["unet"].read_bytes() == ours["unet"]  # trained anew
    for name in ("head", "unet"):
        assert again["methods"][name]["observed"] == segmented["methods"][name]["observed"]
    write_json(masks["head"].parent / "about.json", {"made_of": "another"})
    with pytest.raises(RunError, match="holds masks of other latents or settings; move or remove that folder"):
        _segment(hippocampus, tmp_path / "run")


def test_copies_carry_their_masks_and_fit_latents_of_their_own(hippocampus):
    base, dataset, settings = hippocampus
    settings = dataclasses.replace(settings, segment=dataclasses.replace(FEW, copies=2, augmentation=0.4))
    network, stopped = mf.load_field(base / "run"), []
    rows = np.arange(3)  # the second batch of two is not full
    latents = mf.load_latents(base / "run")["train"].latents[rows]
    # Signals that show their masks: structures of half and of full brightness.
    reader = mask_reader(settings.data, data_dir=str(base / "data"))
    ids = [dataset.splits["train"].annotations().ids[row] for row in rows]
    masks = np.stack([reader(base / "data" / one.replace("images", "labels"), base / "data" / one) for one in ids])
    masks = masks.astype(np.uint8)
    signals = (masks / 2).astype(np.float32)[..., None]
    with StopRequest() as stop:
        run = Run(RunDirectory(base / "run", settings, writes=False), stop, dataset, str(base / "data"))
        given = (run, network, signals, latents, masks, stopped.append)
        some = with_copies(*given)
        wide = dataclasses.replace(settings, fit=dataclasses.replace(settings.fit, batch_size=3))
        other = Run(RunDirectory(base / "run", wide, writes=False), stop, dataset, str(base / "data"))
        for one, again in zip(some, with_copies(other, *given[1:]), strict=True):  # no chance but the seed's
            np.testing.assert_allclose(one, again, atol=1e-5)
    assert [len(one) for one in some] == [9, 9, 9]
    for before, after in zip((signals, latents, masks), some, strict=True):
        np.testing.assert_array_equal(after[:3], before)
        assert after.dtype == before.dtype
    copies, of_copies = some[0][3:, ..., 0], some[2][3:]
    assert copies.min() >= 0
    assert copies.max() <= 1
    assert len({one.tobytes() for one in some[2]}) == 9  # all differ
    # A copy's mask lies where the copy is bright, and elsewhere than that of its signal.
    where = {name: np.mean((copies > 0.25) == (other > 0)) for name, other in (
        ("own", of_copies), ("unmoved", np.concatenate([masks, masks])))}  # fmt: skip
    assert where["own"] > 0.98
    assert where["unmoved"] < 0.97
    fitted = mf.fit_latent(*network, some[0][3:5], steps=3, safeguard=True).latents
    np.testing.assert_allclose(some[1][3:5], fitted, atol=1e-5)
    assert "copies of training signals: 2 of 2" in stopped


def test_a_stop_keeps_what_is_done(hippocampus, segmented, tmp_path):
    class Stopped:
        def check(self, what):
            if "finished methods" in what:
                raise Interrupted(what)

    shutil.copytree(hippocampus[0] / "run", tmp_path / "run")
    _kept(tmp_path / "run", "unet").unlink()
    kept = _kept(tmp_path / "run", "head").read_bytes()
    with pytest.raises(Interrupted, match=r"finished methods are in .*segmentation"):
        _segment(hippocampus, tmp_path / "run", Stopped())
    assert _kept(tmp_path / "run", "head").read_bytes() == kept
    # Other settings of the U-Net leave the head as it is.
    with pytest.raises(Interrupted):
        _segment(hippocampus, tmp_path / "run", Stopped(), unet_batch=3)
    assert len(list((tmp_path / "run" / "segmentation").iterdir())) == 1


def test_what_cannot_be_segmented_is_refused(hippocampus, segmented, tmp_path):
    base, dataset, settings = hippocampus
    with pytest.raises(SettingsError, match="names no masks"):
        _segment(hippocampus, masks="")
    with pytest.raises(DataError, match=r"label 2 is beyond the classes \(1,\) \(segment.labels\)"):
        _segment(hippocampus, labels=(1,))
    with pytest.raises(DataError, match="no file beside the signals matches 'imagesTr'"):
        _segment(hippocampus, masks="imagesTr")
    shutil.copytree(base / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "latents")
    with pytest.raises(LatentStoreError, match="latents"):
        _segment(hippocampus, tmp_path / "run")
    mask = next((base / "data" / "labelsTr").iterdir())
    whole = mask.read_bytes()
    try:
        values = nibabel.load(mask)
        nibabel.save(nibabel.Nifti1Image(np.asarray(values.dataobj) * 0.5, values.affine), mask)
        with pytest.raises(DataError, match=rf"{mask.name}: a mask with the value 0.5, which is no whole number"):
            _segment(hippocampus)
        mask.unlink()
        with pytest.raises(DataError, match=rf"1 signal \(imagesTr/{mask.name}\) without a mask of the same name"):
            _segment(hippocampus)
    finally:
        mask.write_bytes(whole)
    other = dataclasses.replace(dataset, about=dataset.about | {"title": "other"})
    with pytest.raises(RunError, match="latents of other data"):
        _segment((base, other, settings))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"observed": ()}, "observed must not be empty"),
        ({"observed": (1.0, 0.0)}, r"observed must be in \(0, 1\]"),
        ({"methods": ("head", "head")}, "methods must name each once"),
        ({"labels": (0, 1)}, "labels must be different values above 0"),
        ({"labels": (1, 2), "names": ("one",)}, "names must be one for each"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"unet_widths": ()}, "unet_widths must be"),
        ({"hidden": (0,)}, "hidden must be"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"unet_steps": -1}, "unet_steps must not be negative"),
        ({"copies": -1}, "copies must not be negative"),
        ({"augmentation": 1.5}, r"augmentation must be in \[0, 1\]"),
        ({"detail": (0.0, -1.0)}, "detail must be widths of at least 0"),
    ],
)
def test_settings_are_checked(changed, message):
    with pytest.raises(SettingsError, match=message):
        SegmentSettings(**changed)


@pytest.mark.slow
@needs_real
def test_images_through_the_launcher(tmp_path):
    """Training, latents and masks of slices as PNG, with label values that are kept; then the report."""
    from nibabel import load

    for k, file in enumerate(sorted((REAL / "hippocampus" / "imagesTr").glob("*.nii.gz"))[:40]):
        image = np.asarray(load(file).dataobj, np.float32)
        mask = np.asarray(load(file.parents[1] / "labelsTr" / file.name).dataobj)
        middle = int((mask > 0).sum((0, 1)).argmax())
        for folder, values in (("scans", image[..., middle] / image.max() * 255), ("truth", mask[..., middle] * 100)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / "data" / folder / f"{k:02d}.png")
    segmented = {"masks": "truth", "steps": 30, "unet_steps": 5, "unet_widths": (4, 8), "observed": (1.0, 0.25),
                 "field_steps": 20, "operator_steps": 50, "copies": 1}  # fmt: skip
    words = [f"--data_dir={tmp_path / 'data'}", "--config.data.pattern=scans/*.png", "--config.data.size=24"]
    words += [f"--config.segment.{name}={value}" for name, value in segmented.items()]
    place = {"config": "configs/image_folder.py:cpu", "extra": words}
    for mode in ("all", "segment", "report"):
        done = run(tmp_path / "run", mode=mode, **place)
        assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "segmentation.json").read_text())
    assert result["structures"] == {"100": 100, "200": 200}
    assert result["unit"] == "pixels"
    written = np.asarray(Image.open(next((tmp_path / "run" / "segmented" / "head").glob("*.png"))))
    assert written.shape == (24, 24)
    assert set(np.unique(written)) <= {0, 100, 200}
    assert "Hausdorff distance, pixels" in (tmp_path / "run" / "report.html").read_text()
