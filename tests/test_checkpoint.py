import json
import types

import jax
import numpy as np
import pytest

import medfuncta_jax as mf
from medfuncta_jax import checkpoint, meta_step
from medfuncta_jax.checkpoint import CheckpointError, Checkpoints, load_field_and_about

FIELD = mf.Field(mf.ModelSettings(layers=3, width=8, latent_dim=4, omega_first=10.0, omega_last=20.0), 2, 1)
SETTINGS = mf.Settings.from_dict({"data": {"source": "any"}, "inner": {"learned_step_size": "scalar"}})


@pytest.fixture
def state():
    return meta_step.init_state(FIELD, SETTINGS, jax.random.key(0))


def shifted(state, step):
    return jax.tree.map(lambda leaf: leaf + step, state)


def fill(directory, state, scores):
    with Checkpoints(directory) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(step, shifted(state, step), val_psnr=score, about={"seconds": float(step)})
        checkpoints.wait()


def test_newest_two_and_best_are_kept(tmp_path, state):
    fill(tmp_path / "c", state, {1: 20.0, 2: 30.0, 3: None, 4: 25.0, 5: None, 6: None})
    kept = sorted(int(folder.name) for folder in (tmp_path / "c").iterdir() if folder.name.isdigit())
    assert kept == [2, 5, 6]
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest_step() == 6
        assert checkpoints.best_step() == 2
    fill(tmp_path / "c", state, {7: 21.0, 8: None})  # a resumed run knows the best of the one before
    kept = sorted(int(folder.name) for folder in (tmp_path / "c").iterdir() if folder.name.isdigit())
    assert kept == [2, 7, 8]


@pytest.mark.parametrize("step", [2, 3])
def test_restored_is_what_was_saved_bit_for_bit(tmp_path, state, step):
    fill(tmp_path / "c", state, {2: 20.0, 3: None})
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored, about = checkpoints.restore(step, state)
    jax.tree.map(np.testing.assert_array_equal, restored, shifted(state, step))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert about == {"seconds": float(step)}


def test_nothing_there(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.best_step() is None


def test_saving_a_step_again_is_harmless(tmp_path, state):
    fill(tmp_path / "c", state, {3: 20.0})
    fill(tmp_path / "c", state, {3: 20.0})


def test_a_full_disk_is_an_os_error_before_anything_is_written(tmp_path, state, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="No space left on device"):
        fill(tmp_path / "c", state, {3: 20.0})
    assert not list((tmp_path / "c").iterdir())


def test_an_earlier_step_is_refused_aloud(tmp_path, state):
    with pytest.raises(CheckpointError, match="step 2 was refused"):
        fill(tmp_path / "c", state, {3: 20.0, 2: 20.0})


def test_another_dtype_is_refused_not_cast(tmp_path, state):
    fill(tmp_path / "c", state, {1: 20.0})
    double = meta_step.init_state(FIELD, SETTINGS, jax.random.key(0), np.float64)
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(CheckpointError, match="another layout"):
        checkpoints.restore(1, double)


def test_damaged_checkpoint_is_named(tmp_path, state):
    fill(tmp_path / "c", state, {1: 20.0})
    for file in (tmp_path / "c" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(CheckpointError, match=r"c/1 is damaged"):
        checkpoints.restore(1, state)


def test_exported_field_reads_back_by_itself(tmp_path):
    params = FIELD.init(jax.random.key(1))
    mf.export_field(tmp_path / "field.npz", FIELD, params, {"grid": [3, 4]})
    for place in (tmp_path, tmp_path / "field.npz"):
        field, again = mf.load_field(place)
        assert field == FIELD
        jax.tree.map(np.testing.assert_array_equal, params, again)
    about = load_field_and_about(tmp_path)[2]
    assert about["grid"] == [3, 4]
    assert about["model"]["layers"] == 3
    assert json.dumps(about)
    assert [file.name for file in tmp_path.iterdir()] == ["field.npz"]


def test_the_same_field_is_the_same_file(tmp_path):
    params = FIELD.init(jax.random.key(1))
    for name in ("a.npz", "b.npz"):
        mf.export_field(tmp_path / name, FIELD, params, {})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("keep", [0, 100, 1000])
def test_truncated_field_is_named(tmp_path, keep):
    file = tmp_path / "field.npz"
    mf.export_field(file, FIELD, FIELD.init(jax.random.key(1)), {})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"field.npz is damaged"):
        mf.load_field(tmp_path)


def test_missing_field_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"no trained field at .*field.npz; train first"):
        mf.load_field(tmp_path)
