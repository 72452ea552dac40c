"""Classical methods against what they must give, and the stage through the launcher."""

import json
import shutil

import numpy as np
import pytest

import medfuncta_jax as mf
from experiments.stages import inverse
from tests.experiments.conftest import run

pytest.importorskip("skimage", reason="scikit-image is not installed")


def smooth(*shape):
    coords = mf.grid(shape).reshape(*shape, len(shape))
    bump = np.exp(-4 * np.square(coords - 0.1).sum(-1))
    return np.stack([bump, 0.5 * bump], -1)[None].astype(np.float32)


@pytest.mark.parametrize("name", ["slices_2", "kspace_4", "projections_30", "points_10"])
def test_classical_methods_and_total_variation_find_a_smooth_signal(name):
    signal = smooth(24, 24)
    problem = inverse.problem_of(name, (24, 24), seed=0)
    linear = inverse._LinearMap(problem.operator, (24, 24))
    measured = linear.forward(signal)
    assert measured.shape == (1, np.prod(problem.operator.shape), 2)
    usual = problem.classical[1](measured[0].reshape(*problem.operator.shape, 2))
    penalised = inverse.total_variation(linear, measured, usual[None], weight=1e-3, may_stop=lambda: None)
    moved = inverse.consistent(linear, measured, np.full_like(signal, 0.2), steps=30)
    np.testing.assert_allclose(linear.forward(moved), measured, atol=0.05 * np.abs(measured).max())
    for found in (usual, penalised[0]):
        assert found.shape == signal.shape[1:]
        assert np.square(found - signal[0]).mean() < 6e-3


@pytest.mark.parametrize("name", ["slices_4", "kspace_4", "projections_30", "points_10"])
def test_the_adjoint_is_that_of_the_measurements(name):
    rng = np.random.default_rng(0)
    problem = inverse.problem_of(name, (16, 16), seed=0)
    linear = inverse._LinearMap(problem.operator, (16, 16))
    signal = rng.normal(size=(2, 16, 16, 1)).astype(np.float32)
    measured = linear.forward(signal)
    other = rng.normal(size=measured.shape).astype(np.float32)
    np.testing.assert_allclose((measured * other).sum(), (signal * linear.adjoint(other)).sum(), rtol=1e-3)
    assert np.linalg.norm(measured) <= 1.01 * linear.norm * np.linalg.norm(signal)


def test_a_matrix_of_rays_measures_what_the_operator_does():
    problem = inverse.problem_of("projections_30", (16, 16), seed=0)
    linear = inverse._LinearMap(problem.operator, (16, 16))
    signal = smooth(16, 16)
    plain = np.asarray(problem.operator(linear._values(signal), np.asarray(problem.operator.coords)))
    np.testing.assert_allclose(linear.forward(signal), plain, atol=1e-4)


def test_all_of_k_space_is_the_signal_and_half_of_it_too():
    signal = smooth(12, 9)[0]
    half = np.zeros((12, 9), bool)
    half[:7] = True  # the opposite frequencies tell the rest
    for mask in (np.ones((12, 9), bool), half):
        operator = inverse.observe.KSpace.of_mask(mask)
        measured = np.asarray(operator(signal.reshape(1, -1, 2), None)).reshape(2, -1, 2)
        np.testing.assert_allclose(inverse.zero_filled(operator, measured), signal, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 64), (16, 12, 10)], ids=str)
def test_a_mask_has_a_quarter_of_all_lines_and_the_centre(shape):
    mask = inverse.mask_of(shape, 4, np.random.default_rng(0))
    assert mask.mean() == pytest.approx(0.25, abs=0.01)
    assert mask.flat[0]
    assert (mask.all(-1) == mask.any(-1)).all()


def test_signals_have_the_problems_of_their_grid():
    there = {shape: [name for name in mf.settings.InverseSettings().problems if inverse.problem_of(name, shape, seed=0)]
             for shape in ((186,), (28, 30), (8, 8, 6))}  # fmt: skip
    assert there[186,] == ["slices_2", "points_10"]
    assert there[28, 30] == ["slices_2", "slices_4", "kspace_4", "points_10"]
    assert there[8, 8, 6] == ["slices_2", "kspace_4", "points_10"]


def test_the_stage(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    few = [
        "--config.inverse.signals=4",
        "--config.inverse.steps=(5,20)",
        "--config.inverse.problems=('kspace_4','points_10')",
    ]
    done = run(workdir, mode="inverse", extra=few)
    assert done.returncode == 0, done.stderr
    (written,) = workdir.glob("variants/inverse.*/inverse.json")
    result = json.loads(written.read_text())
    assert result["signals"] == 4
    kspace, points = result["problems"].values()
    assert list(kspace["methods"]) == ["zero filling", "total variation", "field", "field, consistent"]
    assert list(points["methods"]) == ["linear interpolation", "total variation", "field", "field, consistent"]
    assert kspace["measurements"] == 2 * 256
    for problem in (kspace, points):
        assert problem["beside"] in list(problem["methods"])[:2]
        assert problem["chosen"]["steps"] in (5, 20)
        for of in problem["methods"].values():
            assert of["interval"]["psnr"][0] <= of["psnr"] <= of["interval"]["psnr"][1]
        gain = problem["methods"]["field"]["psnr"] - problem["methods"][problem["beside"]]["psnr"]
        assert problem["difference"]["field"]["psnr"] == pytest.approx(gain, abs=1e-4)
    assert (written.parent / "figures" / "inverse_kspace_4.png").stat().st_size > 10_000
    # A problem that is kept is not solved again.
    kept = written.with_name("inverse.problems.json")
    values = json.loads(kept.read_text())
    values["rows"]["kspace_4"]["measurements"] = 77
    del values["rows"]["points_10"]
    kept.write_text(json.dumps(values))
    done = run(workdir, mode="inverse", extra=few)
    assert done.returncode == 0, done.stderr
    again = json.loads(written.read_text())
    assert again["problems"]["kspace_4"]["measurements"] == 77
    assert again["problems"]["points_10"] == points


def test_no_field_is_refused(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("field.safetensors"))
    done = run(workdir, mode="inverse")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no trained field")
