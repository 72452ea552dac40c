"""The config that a command names: by name, from any directory, and with the data of another source."""

import json
import os
import subprocess

import numpy as np
import pytest
from PIL import Image

from experiments.runtime import config_files
from experiments.settings import RunSettings
from tests.experiments.conftest import ROOT, command, run


@pytest.mark.parametrize(
    ("config", "file"),
    [
        ("quickstart", "configs/quickstart.py"),
        ("configs/quickstart.py", "configs/quickstart.py"),
        ("quickstart.py", "configs/quickstart.py"),
        ("coinpp:cpu", "configs/baselines/coinpp.py:cpu"),
        ("baselines/coinpp", "configs/baselines/coinpp.py"),
    ],
)
def test_shipped_configs_by_name_from_any_directory(tmp_path, monkeypatch, config, file):
    monkeypatch.chdir(tmp_path)
    assert config_files.resolved(["main", f"--config={config}", "--mode=train"])[1] == f"--config={ROOT / file}"
    assert config_files.resolved(["main", "--config", config])[2] == str(ROOT / file)


def test_a_file_of_the_users_own_goes_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.py").write_text("")
    assert config_files.found("quickstart.py:a") == "quickstart.py:a"


def test_a_run_from_another_directory(tmp_path):
    words = command(tmp_path / "run", mode="train", config="quickstart", train__steps=5, train__eval_every=5)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "field.safetensors").exists()


def test_a_source_on_the_command_line_takes_its_own_options(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(12):
        values = np.random.default_rng(i).integers(0, 256, (30, 30), np.uint8)
        Image.fromarray(values).save(tmp_path / "data" / f"{i}.png")
    flags = [f"--data_dir={tmp_path / 'data'}", "--config.data.pattern=*.png", "--config.data.seed=7"]
    words = {
        "data__source": "image_folder",
        "data__size": 16,
        "train__steps": 5,
        "train__eval_every": 5,
        "train__batch_size": 4,
    }
    done = run(tmp_path / "run", config="chest_xray:cpu", extra=flags, **words)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert {"source": "image_folder", "size": 16, "pattern": "*.png", "seed": 7}.items() <= data.items()
    assert "flag" not in data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image_folder:configs/chest_xray.py:128", {"size": 128, "channels": 0, "source": "image_folder"}),
        ("nifti_folder:configs/quickstart.py", {"grid": (32, 32, 32)}),
        ("lung_ct:configs/chest_xray.py:28", {"size": 32}),  # which has no 28
        ("medmnist:configs/medmnist_3d.py", {"flag": "adrenalmnist3d"}),
        ("medmnist:configs/quickstart.py", {"flag": ""}),
    ],
)
def test_options_that_both_sources_have_stay(text, expected):
    source, file = text.split(":", 1)
    config = config_files.get_config(f"{source}:{ROOT / file}")
    values = config.to_dict()
    assert expected.items() <= values["data"].items()
    assert RunSettings.from_dict(values).data.source == source


@pytest.mark.parametrize(
    ("keywords", "code", "message"),
    [
        (
            {"config": "quickstrat"},
            2,
            "--config=quickstrat: no such file, and no shipped config of that name, which are",
        ),
        (
            {"config": "chest_xray", "data__source": "image_folder", "data__flag": "a"},
            2,
            'unknown setting "flag"; medfuncta_jax/',
        ),
        ({"config": "quickstart", "data__source": "medmnist"}, 1, "data.flag must be a name"),
        ({"config": "image_folder:big"}, 2, "no variant 'big'; known: 64, 128, 224, cpu"),
        ({"config": "image_folder:big", "data__source": "ecg"}, 2, "no variant 'big'; known: 64, 128, 224, cpu"),
    ],
)
def test_faults_are_one_line(tmp_path, keywords, code, message):
    done = run(tmp_path / "run", **keywords)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "run").exists()
