"""MIT-BIH beats from CSV: the real files, the held-out part, and lines that cannot be beats."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfuncta_jax.datasets import DataError, ecg, open_dataset
from medfuncta_jax.settings import DataSettings, SettingsError
from tests.datasets.made_up import beat_line
from tests.real_data import REAL, needs_real


def _open(tmp_path, folder, **options):
    source = DataSettings("ecg", str(tmp_path / "cache"), tuple(sorted(options.items())))
    return open_dataset(source, data_dir=str(folder))


@pytest.fixture
def folder(tmp_path):
    """30 beats to train on, 5 to test, with all the ways to end a line."""
    folder = tmp_path / "data" / "kaggle download é"
    folder.mkdir(parents=True)
    lines = [beat_line(f"{i % 5}.000000000000000000e+00", i) for i in range(30)]
    (folder / "mitbih_train.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    (folder / "mitbih_test.csv").write_text("\n".join(beat_line(i, 50 + i) for i in range(5)) + "\n\n")
    return folder


@needs_real
def test_real_beats(tmp_path):
    data = _open(tmp_path, REAL)
    assert (data.grid, data.channels, data.task, data.classes) == ((187,), 1, "multi-class", ("N", "S", "V", "F", "Q"))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 5400, "val": 600, "test": 1500}
    table = np.loadtxt(REAL / "ecg" / "mitbih_train.csv", delimiter=",")
    train, val = (data.splits[name].annotations() for name in ("train", "val"))
    assert np.bincount(val.labels).tolist() == [420, 50, 70, 25, 35]
    rows = [int(name.split(":")[1]) - 1 for name in train.ids + val.ids]
    assert sorted(rows) == list(range(6000))
    np.testing.assert_array_equal(np.concatenate([train.labels, val.labels]), table[rows, -1])
    signals = np.concatenate([data.splits[name].signals(slice(None)) for name in ("train", "val")])
    np.testing.assert_allclose(signals[..., 0], table[rows, :-1], atol=1e-6)


def test_split_is_seeded_and_every_line_is_in_it(tmp_path, folder):
    data = _open(tmp_path, folder.parent)
    ids = {name: split.annotations().ids for name, split in data.splits.items()}
    assert sorted(ids["train"] + ids["val"]) == [f"mitbih_train.csv:{i:06d}" for i in range(1, 31)]
    assert sorted(data.splits["val"].annotations().labels) == [0, 1, 2, 3, 4]
    assert _open(tmp_path, folder).splits["val"].annotations().ids == ids["val"]
    assert _open(tmp_path, folder, seed=1).splits["val"].annotations().ids != ids["val"]
    assert "0.1 of each class of mitbih_train.csv, drawn with seed 42" in data.about["split_rule"]


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (
            1,
            ",".join(f"s{i}" for i in range(187)) + ",class",
            r"line 1 is a header \(it ends with 'class'\); remove it",
        ),
        (1, ",".join(map(str, range(188))), "line 1 is a header"),
        (3, beat_line(0)[14:], "line 3 has 186 columns, 187 samples and a class are needed"),
        (3, "0," + beat_line(0), "line 3 has 189 columns"),
        (3, "0.5", "line 3 has 1 columns"),
        (4, beat_line(5), "line 4: class '5' is none of 0 to 4"),
        (4, beat_line(-1), "line 4: class '-1' is none"),
        (4, beat_line("0.5"), "line 4: class '0.5' is none"),
        (4, beat_line("N"), "line 4: class 'N' is none"),
        (5, beat_line(0).replace("0.", "x.", 1), "line 5, column 1: 'x.6370' is no finite number"),
        (5, "nan" + beat_line(0)[6:], "line 5, column 1: 'nan' is no finite number"),
        (5, "1.01" + beat_line(0)[6:], "line 5, column 1: '1.01' is outside 0 to 1"),
        (5, "-1" + beat_line(0)[6:], "line 5, column 1: '-1' is outside 0 to 1"),
        (5, '"0.1"' + beat_line(0)[6:], "no finite number"),
        (5, "\x00é" + beat_line(0)[6:], "no finite number"),
    ],
)
def test_bad_line_is_named_in_one_line(tmp_path, folder, line, text, message):
    path = folder / "mitbih_train.csv"
    lines = path.read_text("utf-8-sig").splitlines()
    lines[line - 1] = text
    path.write_text("\n".join(lines), "utf-8")
    with pytest.raises(DataError, match=message) as caught:
        _open(tmp_path, folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "what"), [(b"<html>404</html>\n", "an HTML page"), (b"version https://git-lfs\n", "a Git LFS pointer")]
)
def test_what_is_no_table_is_named(tmp_path, folder, content, what):
    (folder / "mitbih_test.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"mitbih_test\.csv: {what}, no table of beats; copy the file anew"):
        _open(tmp_path, folder)


def test_rounding_is_no_error(tmp_path, folder):
    path = folder / "mitbih_test.csv"
    path.write_text("1.00000001,-1e-9" + beat_line(0)[13:])
    signal = _open(tmp_path, folder).splits["test"][0]["signal"]
    assert (signal[0, 0], signal[1, 0]) == (1, 0)


def test_files_absent_empty_or_twice(tmp_path, folder):
    with pytest.raises(DataError, match=r"no file train\.csv there or below"):
        _open(tmp_path, folder, train_file="train.csv")
    (folder / "empty.csv").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.csv: holds no beats"):
        _open(tmp_path, folder, train_file="empty.csv")
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "two.csv").write_text(beat_line(0))
    (folder / "a" / "circle").symlink_to(folder, target_is_directory=True)
    with pytest.raises(DataError, match=r"two\.csv is there 2 times"):
        _open(tmp_path, folder, train_file="two.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_file": "a/b.csv"}, r"data\.train_file must be a file name"),
        ({"test_file": "mitbih_train.csv"}, "must be two files"),
        ({"val_fraction": 1.0}, "val_fraction and test_fraction"),
        ({"format": "edf"}, r"data\.format must be one of 'csv', 'physionet'"),
    ],
)
def test_options_out_of_range(tmp_path, folder, options, message):
    with pytest.raises(SettingsError, match=message):
        _open(tmp_path, folder, **options)


CELLS = st.sampled_from(
    ["0", "1", "0.5", "-0", "1e-3", "4", "5", "nan", "inf", "", " ", "x", '"', "1_0", "\0", "é", "1e999"]
)
LINES = st.one_of(
    st.tuples(st.lists(CELLS, max_size=4), st.sampled_from([183, 186, 187, 188, 189]), CELLS).map(
        lambda parts: ",".join([*(parts[0] + ["0.25"] * 190)[: parts[1]], parts[2]]).encode()
    ),
    st.binary(max_size=60),
)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(lines=st.lists(LINES, max_size=4), end=st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_any_file_is_read_or_refused_in_one_line(lines, end):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mitbih_train.csv").write_bytes(end.join([beat_line(0).encode(), *lines]))
        (Path(folder) / "mitbih_test.csv").write_text(beat_line(1))
        refusal, examples = "", {}
        try:
            plan = ecg.plan(ecg.Options(), data_dir=folder, cache_root=Path(folder))
            examples = {name: list(split.examples()) for name, split in plan.splits.items()}
        except DataError as error:
            refusal = str(error)
    assert len(refusal.splitlines()) == (0 if examples else 1)
    for name, some in examples.items():
        assert len(some) == plan.splits[name].length
    for example in itertools.chain(*examples.values()):
        assert example.signal.shape == (187, 1)
        assert example.signal.min() >= 0
        assert example.signal.max() <= 1
        assert example.label in range(5)
