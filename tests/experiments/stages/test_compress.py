"""The whole stage through the launcher, and image files as PIL reads them back."""

import json
import shutil

import numpy as np
import pytest

import medfuncta_jax as mf
from experiments.stages import compress
from tests.experiments.conftest import run

pytest.importorskip("constriction", reason="the extra compress is not installed")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["JPEG", "JPEG 2000"])
def test_more_bits_are_closer_to_the_image(name, channels):
    x = mf.grid((40, 48)).reshape(1, 40, 48, 2)
    images = 0.5 + 0.2 * np.sin(6 * x.sum(-1, keepdims=True)) + 0.1 * np.sin(9 * x[..., :1]) * np.ones(channels)
    levels, save = compress._CODECS[name]
    points = compress._as_files(images.astype(np.float32), levels, save)
    rates = [point["bits_per_point"] for point, _ in points]
    errors = [np.square(read - images).mean() for _, read in points]
    assert rates == sorted(rates)
    assert errors[-1] < 1e-4 < errors[0]
    assert all(point["bits_per_point_of_file"] > point["bits_per_point"] for point, _ in points)


def test_the_stage(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    done = run(
        workdir, mode="compress", extra=["--config.compress.bits=(8,2)", f"--config.compress.beside=('{tmp_path}',)"]
    )
    assert done.returncode == 1
    assert "compression.json is absent or damaged" in done.stderr.splitlines()[-1]
    (written,) = workdir.glob("variants/compress.*/compression.json")
    (tmp_path / "compression.json").write_text(written.read_text())
    done = run(
        workdir, mode="compress", extra=["--config.compress.bits=(8,2)", f"--config.compress.beside=('{tmp_path}',)"]
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(written.read_text())
    coarse, fine = result["curves"]["field"]
    assert (coarse["bits"], fine["bits"]) == (2, 8)
    assert coarse["psnr"] < fine["psnr"] <= result["uncompressed"]["psnr"] + 0.05
    assert result["uncompressed"]["psnr"] - fine["psnr"] < 0.5
    assert 0 < coarse["bits_per_point"] < 2 * 16 / 1024 + 64 / 1024
    assert fine["bits_per_point"] < 8 * 16 / 1024 + 64 / 1024
    assert len(result["curves"]["JPEG"]) > 5
    assert (written.parent / "figures" / "rate_distortion.png").exists()
    assert "arning" not in done.stderr
