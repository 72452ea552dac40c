"""The store: files of consecutive signals, opened lazily, merged, and checked."""

import json
import pickle
import shutil

import grain
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import medfuncta_jax as mf
from medfuncta_jax.checkpoint import CheckpointError
from medfuncta_jax.latent_file import LatentStoreError, file_rows
from tests.latent_stores import LENGTHS, about, split_arrays, write_store


def refused(folder, *parts, **options):
    """Loading ends in one line that says all of `parts`."""
    with pytest.raises(LatentStoreError) as caught:
        mf.load_latents(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


@pytest.fixture
def folder(tmp_path):
    write_store(tmp_path / "latents")
    return tmp_path / "latents"


@pytest.mark.parametrize("options", [{}, {"affines": True}, {"tasks": 3}, {"dtype": "float16"}])
@pytest.mark.parametrize("signals_per_file", [1, 4, 100])
def test_what_is_written_is_read(tmp_path, options, signals_per_file):
    written = write_store(tmp_path / "latents", signals_per_file=signals_per_file, **options)
    for place in (tmp_path, tmp_path / "latents"):
        store = mf.load_latents(place, verify=True)
        assert list(store) == ["train", "val", "test"]
        for name, split in store.items():
            for key in ("latents", "labels", "psnr"):
                found = np.asarray(getattr(split, key))
                np.testing.assert_array_equal(found, written[name][key])
                assert found.dtype == written[name][key].dtype
            assert split.ids == tuple(written[name]["ids"])
            assert split.about == about(name)
            assert len(split) == LENGTHS[name]
            if options.get("affines"):
                np.testing.assert_array_equal(split.affines, written[name]["affines"])
            else:
                assert split.affines is None


def test_safetensors_alone_reads_a_file(folder):
    arrays = load_file(folder / "train-00001-of-00003.safetensors")
    expected = split_arrays("train")
    np.testing.assert_array_equal(arrays["latents"], expected["latents"][4:8])
    assert [row.tobytes().rstrip(b"\0").decode() for row in arrays["ids"]] == expected["ids"][4:8]


@settings(deadline=None, derandomize=True, database=None)
@given(length=st.integers(1, 50), size=st.integers(1, 60))
def test_every_row_is_in_one_file(length, size):
    rows = file_rows(length, size)
    assert [row for some in rows for row in some] == list(range(length))
    assert {len(some) for some in rows[:-1]} <= {size}


INDICES = [
    0, -1, np.int64(9), slice(None), slice(2, 9), slice(-3, None), slice(None, None, -1), slice(1, 10, 3), slice(5, 2),
    [], [3], [9, 0, 9, -2], np.array([[1, 2], [8, 0]]), np.arange(10)[::-1], np.arange(10) % 3 == 0, np.zeros(10, bool),
]  # fmt: skip


@pytest.mark.parametrize("rows", INDICES, ids=str)
def test_rows_are_taken_as_numpy_does(folder, rows):
    expected = split_arrays("train")["latents"]
    latents = mf.load_latents(folder)["train"].latents
    taken = latents[rows]
    # An empty list is of floats for numpy.
    np.testing.assert_array_equal(taken, expected[rows if np.size(rows) or isinstance(rows, slice) else slice(0, 0)])
    assert taken.dtype == expected.dtype
    taken[...] = 0  # a copy
    np.testing.assert_array_equal(latents, expected)


@pytest.mark.parametrize("rows", [10, -11, [0, 10], 0.5, "a", np.zeros(3, bool), (0, 1)])
def test_rows_that_are_not_there(folder, rows):
    with pytest.raises(IndexError):
        mf.load_latents(folder)["train"].latents[rows]


def test_latents_are_an_array_for_others(folder):
    latents, expected = mf.load_latents(folder)["train"].latents, split_arrays("train")["latents"]
    assert (latents.shape, latents.ndim, latents.dtype) == (expected.shape, 2, expected.dtype)
    np.testing.assert_array_equal(jnp.asarray(latents), expected)
    assert np.asarray(latents, np.float64).dtype == np.float64
    assert len(list(latents)) == len(latents) == 10
    with pytest.raises(ValueError, match="copy"):
        np.asarray(latents, copy=False)


def test_a_source_of_examples(folder):
    split, expected = mf.load_latents(folder)["train"], split_arrays("train")
    for i in (0, 7, -1, np.int32(3)):
        example = split[i]
        np.testing.assert_array_equal(example.pop("latent"), expected["latents"][i])
        assert example == {
            "label": expected["labels"][i], "id": expected["ids"][i], "psnr": pytest.approx(expected["psnr"][i]),
        }  # fmt: skip
    assert [example["id"] for example in split.__getitems__([4, 1])] == [expected["ids"][4], expected["ids"][1]]
    assert [example["id"] for example in split] == expected["ids"]
    with pytest.raises(IndexError):
        split[10]
    batch = grain.MapDataset.source(split).shuffle(seed=0).batch(10)[0]
    np.testing.assert_array_equal(np.sort(batch["latent"], 0), np.sort(expected["latents"], 0))


def test_examples_with_an_affine_or_several_labels(tmp_path):
    written = write_store(tmp_path, affines=True, tasks=3)["val"]
    example = mf.load_latents(tmp_path)["val"][2]
    np.testing.assert_array_equal(example["affine"], written["affines"][2])
    np.testing.assert_array_equal(example["label"], written["labels"][2])


def test_other_processes_share_a_split_by_its_files(folder):
    split = mf.load_latents(folder)["train"]
    split.psnr  # noqa: B018  (read before)
    there = pickle.dumps(split)
    np.testing.assert_array_equal(pickle.loads(there).latents, split.latents)
    write_store(folder, changes={"field_sha256": "1" * 64})
    with pytest.raises(LatentStoreError, match="written anew since the store was opened"):
        pickle.loads(there)


def test_an_open_store_stays_what_it_was(folder):
    split, expected = mf.load_latents(folder)["train"], split_arrays("train")["latents"]
    write_store(folder, latent_dim=7)
    np.testing.assert_array_equal(split.latents, expected)


def test_nothing_there(tmp_path):
    refused(tmp_path, "no latents in", "extract them first")


def test_a_missing_file_is_named(folder):
    (folder / "train-00001-of-00003.safetensors").unlink()
    (folder / ".train-00001-of-00003.partial77.safetensors").write_bytes(b"half")
    refused(folder, "train-00001-of-00003.safetensors is missing", "still being written", "extract again")
    (folder / "train-00000-of-00003.safetensors").unlink()
    refused(folder, "train-00000-of-00003.safetensors and 1 more are missing")
    assert mf.load_latents(folder, splits=("test", "val")).keys() == {"test", "val"}


def test_a_missing_split_is_named(tmp_path):
    write_store(tmp_path, splits=("train",))
    refused(tmp_path, "no latents of a split 'val'", "still being written")
    refused(tmp_path, "no latents of a split 'tset'", "none of that name", splits=("tset",))
    assert list(mf.load_latents(tmp_path, splits=("train",))) == ["train"]


def test_two_layouts_are_named(folder):
    write_store(folder, signals_per_file=5)
    refused(folder, "more than once", "train-00000-of-00002.safetensors and train-00000-of-00003.safetensors")


def test_a_copy_in_another_place_is_named(folder):
    shutil.copy(folder / "train-00000-of-00003.safetensors", folder / "train-00001-of-00003.safetensors")
    refused(folder, "train-00001-of-00003.safetensors holds rows 0 to 4", "where row 4", "remove it")
    shutil.copy(folder / "val-00000-of-00001.safetensors", folder / "test-00000-of-00001.safetensors")
    refused(folder, "test-00000-of-00001.safetensors", "of split 'val'", splits=("test",))


def test_files_of_another_store_are_named(folder, tmp_path):
    name = "train-00001-of-00003.safetensors"
    write_store(tmp_path / "field", changes={"field_sha256": "1" * 64})
    shutil.copy(tmp_path / "field" / name, folder)
    refused(folder, f"{name} has latents of another field than", "extract again")
    write_store(tmp_path / "settings", changes={"settings": {}})
    shutil.copy(tmp_path / "settings" / name, folder)
    refused(folder, f"{name} has other settings")
    write_store(tmp_path / "half", dtype="float16")
    shutil.copy(tmp_path / "half" / name, folder)
    refused(folder, f"{name} has other dtype")


def test_latents_and_field_belong_together(folder, tmp_path):
    (tmp_path / "field.safetensors").write_bytes(b"another field")
    for field in (tmp_path, tmp_path / "field.safetensors"):
        refused(folder, "of-00001.safetensors holds latents of another field than", field=field)
    with pytest.raises(CheckpointError, match="no trained field"):
        mf.load_latents(folder, field=tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_file_cut_off_is_named_at_opening(folder, keep):
    path = folder / "val-00000-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "val-00000-of-00001.safetensors is damaged", "remove it")


@pytest.mark.parametrize("header", [{}, {"about": "{"}, {"about": "[]"}, {"about": '{"rows": [0, 3]}'}])
def test_a_file_of_something_else_is_named(folder, header):
    from safetensors.numpy import save_file

    arrays = {name: np.zeros((3, 2), np.float32) for name in ("latents", "labels", "ids", "psnr")}
    save_file(arrays, folder / "val-00000-of-00001.safetensors", metadata=header)
    refused(folder, "val-00000-of-00001.safetensors is damaged")


def test_any_changed_byte_is_found_by_verify(folder):
    path = folder / "test-00000-of-00001.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    in_header = whole.index(b"CC BY 4.0")
    for place in (in_header, start, (start + len(whole)) // 2, len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert len(mf.load_latents(folder, splits=("test",))["test"].latents[:]) == 4  # only headers are read
        refused(folder, "test-00000-of-00001.safetensors is damaged (its checksum differs)", verify=True)
    path.write_bytes(whole)
    mf.load_latents(folder, verify=True)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for place in ("a", "b"):
        write_store(tmp_path / place, affines=True)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_the_header_says_what_the_file_holds(folder):
    raw = (folder / "train-00002-of-00003.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    said = json.loads(header["__metadata__"]["about"])
    assert said["rows"] == [8, 10]
    assert {key: value for key, value in said.items() if key not in ("rows", "sha256")} == about("train")
