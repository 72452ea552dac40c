"""Classical methods against what they must give, and the stage through the launcher."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import medfuncta_jax as mf
from experiments.runtime.interruption import StopRequest
from experiments.runtime.run import Run
from experiments.runtime.run_directory import RunDirectory, RunError, stored_settings
from experiments.settings import RunSettings
from experiments.stages import inverse
from experiments.stages import inverse_problems as problems
from medfuncta_jax.checkpoint import CheckpointError
from medfuncta_jax.latent_store import LatentStoreError

pytest.importorskip("skimage", reason="scikit-image is not installed")


def smooth(*shape):
    coords = mf.grid(shape).reshape(*shape, len(shape))
    bump = np.exp(-4 * np.square(coords - 0.1).sum(-1))
    return np.stack([bump, 0.5 * bump], -1)[None].astype(np.float32)


@pytest.mark.parametrize("name", ["slices_2", "kspace_4", "projections_30", "points_10"])
def test_classical_methods_and_total_variation_find_a_smooth_signal(name):
    signal = smooth(20, 20)
    problem = problems.problem_of(name, (20, 20), seed=0)
    linear = problems.LinearMap(problem.operator, (20, 20))
    measured = linear.forward(signal)
    assert measured.shape == (1, np.prod(problem.operator.shape), 2)
    usual = problem.classical[1](measured[0].reshape(*problem.operator.shape, 2))
    weight = 1e-5 if name == "points_10" else 3e-4  # total variation hardly sees single points
    penalised, _ = problems.total_variation(linear, measured, usual[None], weight=weight, may_stop=lambda: None)
    for found in (usual, penalised[0]):
        assert found.shape == signal.shape[1:]
        assert np.square(found - signal[0]).mean() < 6e-3


def test_total_variation_ends_where_no_other_start_ends_lower():
    """The minimum is one: two starts end in images of one value, below that of the signal and of both starts."""
    signal = smooth(16, 16)[..., :1]
    linear = problems.LinearMap(problems.problem_of("kspace_4", (16, 16), seed=0).operator, (16, 16))
    measured, weight = linear.forward(signal), 1e-2

    def value(image):
        misfit = np.square(linear.forward(image) - measured).sum() / (2 * linear.norm**2)
        steps = [np.diff(image[0, ..., 0], axis=k, append=np.take(image[0, ..., 0], [-1], k)) for k in (0, 1)]
        return misfit + weight * np.sqrt(np.square(steps).sum(0)).sum()

    starts = np.zeros_like(signal), np.random.default_rng(0).random(signal.shape).astype(np.float32)
    ends, counts = zip(*(problems.total_variation(linear, measured, start, weight=weight, may_stop=lambda: None)
                         for start in starts), strict=True)  # fmt: skip
    values = [value(end) for end in ends]
    assert max(counts) < problems.TV_STEPS
    assert values[0] == pytest.approx(values[1], rel=0.01)
    assert max(values) < min(value(signal), *map(value, starts))


@pytest.mark.parametrize("best", [1e-3, 3e-5, 0.05])
def test_the_weight_has_worse_neighbours(best):
    weight, tried = inverse.best_weight(lambda weight: -abs(np.log(weight / best)))
    assert 1 / 1.8 < weight / best < 1.8
    assert min(map(float, tried)) < weight / 3
    assert max(map(float, tried)) > weight * 3


@pytest.mark.parametrize("name", ["slices_4", "kspace_4", "projections_30", "points_10"])
def test_the_adjoint_is_that_of_the_measurements(name):
    rng = np.random.default_rng(0)
    problem = problems.problem_of(name, (16, 16), seed=0)
    linear = problems.LinearMap(problem.operator, (16, 16))
    signal = rng.normal(size=(2, 16, 16, 1)).astype(np.float32)
    measured = linear.forward(signal)
    other = rng.normal(size=measured.shape).astype(np.float32)
    np.testing.assert_allclose((measured * other).sum(), (signal * linear.adjoint(other)).sum(), rtol=1e-3)
    assert np.linalg.norm(measured) <= 1.01 * linear.norm * np.linalg.norm(signal)


def test_a_matrix_of_rays_measures_what_the_operator_does():
    problem = problems.problem_of("projections_30", (16, 16), seed=0)
    linear = problems.LinearMap(problem.operator, (16, 16))
    signal = smooth(16, 16)
    plain = np.asarray(problem.operator(linear._values(signal), np.asarray(problem.operator.coords)))
    np.testing.assert_allclose(linear.forward(signal), plain, atol=1e-4)


def test_all_of_k_space_is_the_signal_and_half_of_it_too():
    signal = smooth(12, 9)[0]
    half = np.zeros((12, 9), bool)
    half[:7] = True  # the opposite frequencies tell the rest
    for mask in (np.ones((12, 9), bool), half):
        operator = problems.operators.KSpace.of_mask(mask)
        measured = np.asarray(operator(signal.reshape(1, -1, 2), None)).reshape(2, -1, 2)
        np.testing.assert_allclose(problems.zero_filled(operator, measured), signal, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (16, 12, 10)], ids=str)
def test_a_mask_has_a_quarter_of_all_lines_and_the_centre(shape):
    mask = problems.mask_of(shape, 4, np.random.default_rng(0))
    assert mask.mean() == pytest.approx(0.25, abs=0.01)
    assert mask.flat[0]
    assert (mask.all(-1) == mask.any(-1)).all()


def test_signals_have_the_problems_of_their_grid():
    there = {shape: [name for name in problems.PROBLEMS if problems.problem_of(name, shape, seed=0)]
             for shape in ((186,), (28, 30), (8, 8, 6))}  # fmt: skip
    assert there[186,] == ["slices_2", "points_10"]
    assert there[28, 30] == ["slices_2", "slices_4", "kspace_4", "points_10"]
    assert there[8, 8, 6] == ["slices_2", "kspace_4", "points_10"]


@pytest.mark.slow
def test_the_stage(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    wanted = inverse.InverseSettings(problems=("kspace_4", "slices_2"), signals=6, steps=(5, 20), noise=0.1)
    settings = dataclasses.replace(stored_settings(workdir, RunSettings), inverse=wanted)
    dataset = mf.open_dataset("nibabel_slices", size=32)

    def start():
        with StopRequest() as stop:
            inverse.inverse(Run(RunDirectory(workdir, settings), stop, dataset))

    start()
    (written,) = workdir.glob("variants/inverse.*/inverse.json")
    result = json.loads(written.read_text())
    assert result["signals"] == 6
    kspace, slices = result["problems"].values()
    assert list(kspace["methods"]) == ["zero filling", "total variation", "field"]
    assert list(slices["methods"]) == ["linear interpolation", "total variation", "field"]
    assert kspace["measurements"] == 2 * 256
    for problem in (kspace, slices):
        assert problem["beside"] in list(problem["methods"])[:2]
        assert problem["chosen"]["steps"] in (5, 20)
        for of in problem["methods"].values():
            assert of["interval"]["psnr"][0] <= of["psnr"] <= of["interval"]["psnr"][1]
        gain = problem["methods"]["field"]["psnr"] - problem["methods"][problem["beside"]]["psnr"]
        tried = {(kind, int(count)): dB for kind in ("steps", "steps_with_prior")
                 for count, dB in problem["tried"][kind].items()}  # fmt: skip
        chosen = "steps_with_prior" if problem["chosen"]["prior"] else "steps", problem["chosen"]["steps"]
        assert tried[chosen] == max(tried.values())
        assert problem["difference"]["psnr"] == pytest.approx(gain, abs=1e-4)
    assert (written.parent / "figures" / "inverse_kspace_4.png").stat().st_size > 10_000
    # A problem that is kept is not solved again.
    kept = written.with_name("inverse.problems.json")
    values = json.loads(kept.read_text())
    values["rows"]["kspace_4"]["measurements"] = 77
    del values["rows"]["slices_2"]
    kept.write_text(json.dumps(values))
    start()
    again = json.loads(written.read_text())
    assert again["problems"]["kspace_4"]["measurements"] == 77
    assert again["problems"]["slices_2"] == slices


def test_a_run_without_training_latents_has_no_prior_and_one_with_damaged_ones_an_error(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    settings = stored_settings(workdir, RunSettings)
    field, params = mf.load_field(workdir)

    def prior(settings=settings):
        with StopRequest() as stop:
            return inverse.prior_of(Run(RunDirectory(workdir, settings), stop), field, params)

    assert prior().mean.shape == (field.model.latent_dim,)
    of_other_fits = dataclasses.replace(settings, fit=dataclasses.replace(settings.fit, steps=settings.fit.steps + 1))
    assert prior(of_other_fits) is None  # whose latents are not extracted
    (file,) = (workdir / "latents").glob("train-*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    with pytest.raises(LatentStoreError, match="is damaged"):
        prior()
    file.unlink()
    assert prior() is None


def test_no_field_is_refused(finished, tmp_path):
    directory = RunDirectory(tmp_path, stored_settings(finished, RunSettings))
    dataset = mf.open_dataset("nibabel_slices", size=32)
    with StopRequest() as stop, pytest.raises(CheckpointError, match="no trained field"):
        inverse.inverse(Run(directory, stop, dataset))


def test_a_problem_that_signals_do_not_have_is_refused(tmp_path):
    settings = {"data": {"source": "nibabel_slices"}, "inverse": {"problems": ("slices_2", "slices_4")}}
    directory = RunDirectory(tmp_path, RunSettings.from_dict(settings))
    dataset = mf.open_dataset("nibabel_slices", size=30)
    with StopRequest() as stop, pytest.raises(RunError, match="names slices_4, which signals on a grid of 30x30 do"):
        inverse.inverse(Run(directory, stop, dataset))
