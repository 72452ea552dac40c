import dataclasses
import errno
import json
import logging
import shutil
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import medfuncta_jax as mf
from medfuncta_jax import checkpoint, meta_step
from medfuncta_jax.checkpoint import FIELD_FILE, CheckpointError, Checkpoints, load_field_and_about

FIELD = mf.Field(mf.ModelSettings(layers=3, width=8, latent_dim=4, omega_first=10.0, omega_last=20.0), 2, 1)
SETTINGS = mf.Settings.from_dict({"data": {"source": "any"}, "inner": {"learned_step_size": "scalar"}})


@pytest.fixture
def state():
    return meta_step.init(FIELD, SETTINGS, jax.random.key(0))


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


def test_a_step_that_was_not_validated_is_saved_again_once_it_is(tmp_path, state):
    fill(tmp_path / "c", state, {3: 20.0, 4: None})
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(4, shifted(state, 4), val_psnr=25.0, about={"validated": True})
        checkpoints.wait()
        assert checkpoints.best_step() == 4
    fill(tmp_path / "c", state, {4: None})  # which tells less
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (4, 4)
        restored, about = checkpoints.restore(4, state)
    jax.tree.map(np.testing.assert_array_equal, restored, shifted(state, 4))
    assert about == {"validated": True}


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
    double = meta_step.init(FIELD, SETTINGS, jax.random.key(0), dtype=np.float64)
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(CheckpointError, match="another layout"):
        checkpoints.restore(1, double)


def test_damaged_checkpoint_is_named(tmp_path, state):
    fill(tmp_path / "c", state, {1: 20.0})
    for file in (tmp_path / "c" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(CheckpointError, match=r"c/1 is damaged"):
        checkpoints.restore(1, state)


def _spoil(folder, how):
    """Cut or empty the files of a checkpoint, or take a part of it away."""
    kind, _, part = how.partition(" ")
    if kind == "no":
        shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()
        return
    for file in (folder / part).rglob("*") if (folder / part).is_dir() else [folder / part]:
        if file.is_file():
            file.write_bytes(b"" if kind == "empty" else file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = [
    "cut state",
    "empty state",
    "no state",
    "cut about",
    "no about",
    "cut .",
    "empty .",
    "no _CHECKPOINT_METADATA",
    "no metrics",
    "empty metrics",
]


@pytest.mark.some(4)
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, state, caplog, how):
    fill(tmp_path / "c", state, {1: 20.0, 2: 21.0, 3: None})
    _spoil(tmp_path / "c" / "3", how)
    with Checkpoints(tmp_path / "c") as checkpoints, caplog.at_level(logging.WARNING):
        step, restored, about = checkpoints.restore_newest(state)
        if how in ("no _CHECKPOINT_METADATA", "no metrics", "empty metrics"):  # the state is whole
            assert step == 3
            return
        assert step == 2
        assert about == {"seconds": 2.0}
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(shifted(state, 2)), strict=True):
            np.testing.assert_array_equal(a, b)
        assert "c/3 is damaged" in caplog.text
        assert "the one before it is taken: step 2" in caplog.text
        checkpoints.save(3, shifted(state, 3), val_psnr=None, about={"seconds": 3.0})
        checkpoints.wait()
    with Checkpoints(tmp_path / "c") as checkpoints:
        step, restored, _ = checkpoints.restore_newest(state)
        assert step == 3
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(shifted(state, 3)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_when_all_are_damaged_the_newest_is_named_and_nothing_is_removed(tmp_path, state):
    fill(tmp_path / "c", state, {1: 20.0, 2: 21.0})
    for step in "12":
        _spoil(tmp_path / "c" / step, "cut state")
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(CheckpointError, match=r"c/2 is damaged"):
        checkpoints.restore_newest(state)
    assert {path.name for path in (tmp_path / "c").iterdir()} >= {"1", "2"}


def test_an_error_is_not_held_up_by_a_save_that_never_ends(tmp_path, state, monkeypatch):
    monkeypatch.setattr(checkpoint, "_CLOSING_SECONDS", 0.1)
    never = threading.Event()

    def fails():
        with Checkpoints(tmp_path / "c") as checkpoints:
            monkeypatch.setattr(checkpoints._manager, "close", never.wait)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    never.set()


@pytest.mark.some(2)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_saved_field_reads_back_by_itself_in_its_own_type(tmp_path, dtype):
    params = FIELD.init(jax.random.key(1), jnp.dtype(dtype))
    mf.save_field(tmp_path / FIELD_FILE, FIELD, params, {"grid": [3, 4]})
    for place in (tmp_path, str(tmp_path / FIELD_FILE)):
        field, again = mf.load_field(place)
        assert field == FIELD
        jax.tree.map(np.testing.assert_array_equal, params, again)
        assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {jnp.dtype(dtype)}
    assert load_field_and_about(tmp_path)[2] == {"grid": [3, 4]}
    assert [file.name for file in tmp_path.iterdir()] == [FIELD_FILE]


@pytest.mark.some(1)
@pytest.mark.parametrize("variant", [{}, {"modulate_first_layer": True, "modulate_scale": True, "residual": False}])
def test_safetensors_and_json_alone_rebuild_the_field(tmp_path, variant):
    """What a reader without this package does: equation 1 from the names and numbers in the file."""
    field = mf.Field(
        mf.ModelSettings(**{**dataclasses.asdict(FIELD.model), "layers": 4, "offset": 0.25, **variant}), 3, 2
    )
    params = field.init(jax.random.key(2), jnp.float64)
    mf.save_field(tmp_path / FIELD_FILE, field, params, {})

    with safetensors.safe_open(tmp_path / FIELD_FILE, framework="np") as file:
        described = json.loads(file.metadata()["field"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model = described["model"]
    assert (described["coord_dims"], described["channels"]) == (3, 2)

    def linear(name, x):
        return x @ arrays[f"{name}/kernel"] + arrays[f"{name}/bias"]

    rng = np.random.default_rng(0)
    latents, coords = rng.normal(size=(2, model["latent_dim"])), rng.uniform(-1, 1, (5, described["coord_dims"]))
    omega = np.linspace(model["omega_first"], model["omega_last"], model["layers"])
    values = []
    for latent in latents:
        h = coords
        for k in range(1, model["layers"]):
            pre = linear(f"layer_{k}", h)
            if f"scale_{k}/kernel" in arrays:
                pre = pre * linear(f"scale_{k}", latent)
            if f"modulation_{k}/kernel" in arrays:
                pre = pre + linear(f"modulation_{k}", latent)
            s = np.sin(omega[k - 1] * pre)
            h = h + s if model["residual"] and k > 1 else s
        values.append(linear(f"layer_{model['layers']}", h) + model["offset"])
    np.testing.assert_allclose(mf.reconstruct(field, params, latents, coords), np.stack(values), atol=1e-12)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    np.testing.assert_allclose(mf.reconstruct(field, single, latents, coords), np.stack(values), atol=1e-5)


def test_the_same_field_is_the_same_file(tmp_path):
    params = FIELD.init(jax.random.key(1))
    turned = jax.tree.map(lambda leaf: np.asfortranarray(leaf), params)  # as an array may lie in memory
    for name, arrays in (("a", params), ("b", turned)):
        mf.save_field(tmp_path / name, FIELD, arrays, {"grid": [3, 4], "step": 5})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("keep", [0, 7, 100, 1000, -1])
def test_truncated_field_is_named(tmp_path, keep):
    file = tmp_path / FIELD_FILE
    mf.save_field(file, FIELD, FIELD.init(jax.random.key(1)), {})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"^[^\n]*field.safetensors is damaged or not a saved field[^\n]*$"):
        mf.load_field(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda kept, meta: (kept, {}), "its metadata have no entry 'field'"),
        (lambda kept, meta: (kept, {"field": "["}), "Expecting value"),
        (lambda kept, meta: (kept, {"field": "[]"}), "must be integers"),
        (lambda kept, meta: (kept, {"field": '{"model": {}}'}), "setting 'layers' is missing"),
        (lambda kept, meta: ({**kept, "layer_9/bias": kept["layer_1/bias"]}, meta), "'layer_9/bias' has no place"),
        (lambda kept, meta: ({**kept, "layer_1/bias": np.zeros(8, int)}, meta), "'layer_1/bias' is int64"),
        (lambda kept, meta: ({**kept, "layer_2/bias": np.zeros(8, np.float16)}, meta), "'layer_2/bias' is float16"),
        (lambda kept, meta: (kept, {"field": meta["field"].replace('"channels": 1', '"channels": 2')}),
         r"'layer_3/bias' has shape \(1,\)"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_field_is_named(tmp_path, change, reason):
    file = tmp_path / FIELD_FILE
    mf.save_field(file, FIELD, FIELD.init(jax.random.key(1)), {})
    with safetensors.safe_open(file, framework="np") as stored:
        arrays, about = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118
    arrays, about = change(arrays, about)
    safetensors.numpy.save_file(arrays, file, about)
    with pytest.raises(CheckpointError, match=rf"field.safetensors is damaged or not a saved field \(.*{reason}"):
        mf.load_field(tmp_path)


def test_missing_field_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"no trained field at .*field.safetensors; train first"):
        mf.load_field(tmp_path)
    (tmp_path / "field.npz").write_bytes(b"")
    for place in (tmp_path, tmp_path / "field.npz"):
        with pytest.raises(CheckpointError, match=r"field.npz is of a format that is no longer read; train again"):
            mf.load_field(place)


def test_a_full_disk_leaves_the_field_that_was_there(tmp_path, monkeypatch):
    file, params = tmp_path / FIELD_FILE, FIELD.init(jax.random.key(1))
    mf.save_field(file, FIELD, params, {})
    before = file.read_bytes()

    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint.Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        mf.save_field(file, FIELD, shifted(params, 1), {})
    assert [path.name for path in tmp_path.iterdir()] == [FIELD_FILE]
    assert file.read_bytes() == before
