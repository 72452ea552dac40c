"""The wheel, outside the checkout: its one package, its commands, and what works without the extra `train`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRAIN = (
    "array_record", "grain", "importlib_resources", "matplotlib", "ml_collections", "nibabel", "orbax", "PIL",
    "tensorboardX", "tensorflow_datasets", "tqdm",
)  # fmt: skip
SMALL = {
    "model.width": 8, "model.latent_dim": 4, "model.layers": 3, "inner.steps": 2, "train.steps": 2,
    "train.batch_size": 2, "train.eval_every": 2, "train.eval_signals": 2, "fit.batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that the built wheel is installed in, without what it depends on."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed: pip install -e '.[dev]'")
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip to build the wheel with")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--target", str(folder / "site"), str(wheel)]
    subprocess.run([*pip, *install], check=True, cwd=folder)
    return folder / "site"


def run(site, where, *words, code=None):
    """Runs the console command of the installed wheel, or `code`, in the working directory `where`."""
    script = [str(site / "bin" / "medfuncta"), *words] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *script], cwd=where, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True
    )  # fmt: skip


def test_the_wheel_has_one_package_with_all_modules_of_the_commands(site):
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"bin", "medfuncta_jax"}
    for package in ("experiments", "configs"):
        files = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
        commands = site / "medfuncta_jax" / "commands"
        assert {path.relative_to(commands) for path in (commands / package).rglob("*.py")} == files


def test_the_command_trains_with_a_config_of_the_wheel_and_one_of_ones_own(site, tmp_path):
    flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
    done = run(site, tmp_path, "--config=configs/quickstart.py", "--workdir=run", "--mode=train", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 2
    assert (tmp_path / "run" / "field.safetensors").is_file()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("from configs.quickstart import get_config\n")
    done = run(site, tmp_path, "--config=configs/mine.py", "--workdir=run", "--mode=train", *flags)
    assert done.returncode == 0, done.stderr


def test_other_commands_are_named_first(site, tmp_path):
    code = "import medfuncta_jax, sys; print(medfuncta_jax.__file__, importlib.util.find_spec('experiments'))"
    done = run(site, tmp_path, code=f"import importlib.util; {code}")
    assert done.stdout.startswith(str(site)), done.stderr
    done = run(site, tmp_path, "export_latents", "--workdir=nowhere", "--format=npz", "--out=out")
    assert done.returncode == 1, done.stdout
    assert done.stderr.startswith("error: "), done.stderr
    done = run(site, tmp_path, "exprot_latents")
    assert done.returncode == 1
    assert done.stderr.startswith("error: medfuncta has no command 'exprot_latents'")


WITHOUT_TRAIN = f"import sys; sys.modules.update(dict.fromkeys({TRAIN})); "


def test_fields_and_latents_need_no_package_of_the_extra_train(tmp_path):
    code = WITHOUT_TRAIN + (
        "import jax, numpy as np, medfuncta_jax as mf; from medfuncta_jax.checkpoint import *; "
        "field = mf.Field(mf.ModelSettings(layers=3, width=8, latent_dim=4), 2, 1); "
        "params = field.init(jax.random.key(0)); signals = np.full((2, 6, 5, 1), 0.5, np.float32); "
        "fit = mf.fit_latent(field, params, signals, steps=2); "
        "assert mf.reconstruct(field, params, fit.latents, mf.grid((3, 3))).shape == (2, 9, 1)\n"
        "def refused(function):\n"
        "    try: function()\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
        "refused(lambda: mf.open_dataset('nibabel_slices'))\n"
        "refused(lambda: Checkpoints('checkpoints'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    remedy = "which is not installed: pip install 'medfuncta_jax[train]'"
    data, checkpoints = done.stdout.splitlines()
    assert data == f"DataError data sets need tensorflow_datasets, {remedy}"
    assert checkpoints == f"CheckpointError checkpoints need orbax.checkpoint, {remedy}"


@pytest.mark.parametrize(
    "start",
    [
        "import runpy; runpy.run_module('experiments.main', run_name='__main__')",
        "from medfuncta_jax.console import main; sys.argv = ['medfuncta']; main()",
    ],
)
def test_a_command_without_the_extra_says_what_to_install(start):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRAIN + start], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: ml_collections is not installed: pip install 'medfuncta_jax[train]'\n"
