"""Time series of the user's own: files and tables, lengths and scales, and text that is no series."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfuncta_jax.datasets import DataError, open_dataset, series_folder
from medfuncta_jax.datasets.dataset import Skipped
from medfuncta_jax.datasets.series_folder import resampled
from medfuncta_jax.datasets.volumes import resample
from medfuncta_jax.settings import DataSettings, SettingsError
from medfuncta_jax.units import Units
from tests.datasets.skips import assert_only_skipped
from tests.real_data import REAL, needs_real


def _open(tmp_path, folder=None, **options):
    source = DataSettings("series_folder", str(tmp_path / "cache"), tuple(sorted(options.items())))
    return open_dataset(source, data_dir=str(folder or tmp_path / "data"))


def _everything(data):
    return {one["id"]: one for split in data.splits.values() for one in split}


@pytest.fixture
def folder(tmp_path):
    """Six signals of two channels and a column of times, one in each dialect."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i, (suffix, delimiter, end) in enumerate([("csv", ",", "\n"), ("csv", ";", "\r\n"), ("tsv", "\t", "\n")] * 2):
        rows = [["time", "ecg é", "resp"]] + [[t / 10, np.sin(t + i), 5 * np.cos(t)] for t in range(20 + i)]
        text = end.join(delimiter.join(map(str, row)) for row in rows)
        (folder / f"patient {i}.{suffix}").write_bytes(text.encode("utf-8-sig" if i == 1 else "utf-8"))
    return folder


def test_files_of_several_channels(tmp_path, folder):
    data = _open(tmp_path, length=20, fit="crop", scale="channel", columns=("ecg é", "2"))
    assert (data.grid, data.channels, data.classes) == ((20,), 2, ())
    found = _everything(data)
    assert set(found) == {path.name for path in folder.iterdir()}
    for i in range(6):
        suffix = "tsv" if i % 3 == 2 else "csv"
        wave = np.stack([np.sin(np.arange(20 + i) + i), 5 * np.cos(np.arange(20 + i))], 1)
        expected = (wave - wave.min(0)) / np.ptp(wave, axis=0)
        np.testing.assert_allclose(found[f"patient {i}.{suffix}"]["signal"], expected[:20], atol=1e-6)


def test_scales(tmp_path, folder):
    own = _everything(_open(tmp_path, columns=("1", "-1")))["patient 0.csv"]["signal"]
    assert (own[:, 0].max(), own[:, 1].max()) == (pytest.approx(0.6, abs=0.02), pytest.approx(1, abs=0.02))
    fixed = _everything(_open(tmp_path, columns=("1",), value_range=(-2, 0.5), fit="crop", length=30))
    signal = fixed["patient 0.csv"]["signal"][:, 0]
    np.testing.assert_allclose(signal[:20], np.clip((np.sin(np.arange(20)) + 2) / 2.5, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(signal[20:], 0)


def test_a_first_column_that_rises_is_time(tmp_path, folder, caplog):
    with caplog.at_level("INFO"):
        data = _open(tmp_path, length=10)
    assert "taken for time" in caplog.text
    assert data.channels == 2
    for one in (one for split in data.splits.values() for one in split):
        i, units = int(one["id"].split()[1].split(".")[0]), Units.from_json(one["units"])
        assert units.columns == ("time", "ecg é", "resp")
        step = (20 + i) / 10 * 0.1  # ten windows over 20 + i samples of 0.1
        np.testing.assert_allclose(units.time, (step / 2 - 0.05, step))
        wave = np.stack([np.sin(np.arange(20 + i) + i), 5 * np.cos(np.arange(20 + i))], 1)
        np.testing.assert_allclose(units.values(one["signal"]), resampled(wave, 10), atol=1e-5)
        assert units.shared == "channels"
    assert _open(tmp_path, length=10, columns=("time", "1", "2")).channels == 3


def test_times_that_are_not_even_are_made_even(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(3):
        times = np.cumsum(np.random.default_rng(i).uniform(0.1, 2, 400))
        values = np.interp(times, [times[0], times[150 + 50 * i], times[-1]], [0, 5, 1])  # even between its ends
        np.savetxt(tmp_path / "data" / f"{i}.csv", np.stack([times, values], 1), delimiter=",")
    data = _open(tmp_path, length=100)
    assert data.channels == 1
    for one in (one for split in data.splits.values() for one in split):
        units = Units.from_json(one["units"])
        times = units.time[0] + units.time[1] * np.arange(100)
        own = np.loadtxt(tmp_path / "data" / one["id"], delimiter=",")
        np.testing.assert_allclose(units.values(one["signal"])[:, 0], np.interp(times, *own.T), atol=0.05)


def test_blanks_between_columns_and_no_header(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(3):
        np.savetxt(tmp_path / "data" / f"{i}.txt", np.random.default_rng(i).random((9, 2)))
        np.savetxt(tmp_path / "data" / f"{i}.csv", np.random.default_rng(i).random(9))
    assert _open(tmp_path, pattern="*.txt", length=9).channels == 2
    assert _open(tmp_path, pattern="*.csv", length=9).channels == 1


@pytest.mark.parametrize(("n", "length"), [(20, 20), (100, 10), (100, 7), (10, 64), (9, 12), (2, 5)])
def test_resampling_equals_that_of_volumes(n, length):
    values = np.random.default_rng(n).random((n, 2))
    np.testing.assert_allclose(resampled(values, length), resample(values, (length,), (n / length,)), atol=1e-5)


def test_resampling_a_long_series_takes_little_memory():
    long = resampled(np.linspace(0, 1, 2_000_000)[:, None], 1000)
    np.testing.assert_allclose(long[:, 0], (np.arange(1000) + 0.5) / 1000, atol=1e-6)


@needs_real
def test_real_beats_as_a_table_of_rows(tmp_path):
    options = {"layout": "row", "pattern": "*_test.csv", "label_column": "-1", "length": 187, "value_range": (0.0, 1.0)}
    data = _open(tmp_path, REAL / "ecg", **options)
    table = np.loadtxt(REAL / "ecg" / "mitbih_test.csv", delimiter=",")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 1086, "val": 145, "test": 269}
    assert data.task == "multi-class"
    for name, one in _everything(data).items():
        row = int(name.split(":")[1]) - 1
        np.testing.assert_allclose(one["signal"][:, 0], table[row, :-1], atol=1e-6)
        assert float(data.classes[one["label"]]) == table[row, -1]


def test_rows_with_ids_labels_and_patients(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [f"p{i // 2},beat {i},{'NV'[i % 3 == 0]},{i},{i + 1},3,{'' if i % 2 else 9}" for i in range(12)]
    (tmp_path / "data" / "all.csv").write_text("\n".join(["patient,beat,class,a,b,c,d", *rows]))
    options = {"layout": "row", "length": 4, "fit": "crop", "value_range": (0.0, 20.0)}
    named = {"id_column": "beat", "label_column": "class", "patient_column": "patient"}
    data = _open(tmp_path, **options, **named)
    found = _everything(data)
    assert set(found) == {f"all.csv:beat {i}" for i in range(12)}
    place = {}
    for name, split in data.splits.items():
        for one in split:
            i = int(one["id"].split()[1])
            np.testing.assert_allclose(one["signal"][:, 0], np.array([i, i + 1, 3, 0 if i % 2 else 9]) / 20, atol=1e-6)
            assert data.classes[one["label"]] == "NV"[i % 3 == 0]
            place.setdefault(i // 2, set()).add(name)
    assert all(len(splits) == 1 for splits in place.values())
    (tmp_path / "data" / "all.csv").write_text("\n".join(rows))  # no header: the same columns by position
    by_position = _open(tmp_path, **options, id_column="1", label_column="2", patient_column="0")
    assert set(_everything(by_position)) == set(found)


def test_rows_with_a_table_of_labels(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "all.csv").write_text("\n".join(f"s{i},{i},7" for i in range(5)))
    (tmp_path / "data" / "labels.csv").write_text("\n".join(["id,label", *(f"all.csv:s{i},{i % 2}" for i in range(5))]))
    data = _open(tmp_path, layout="row", id_column="0", labels="labels.csv", length=2)
    assert {name: one["label"] for name, one in _everything(data).items()} == {f"all.csv:s{i}": i % 2 for i in range(5)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no numbers"),
        ("time,ecg,resp\n", "0 samples, a series has at least 2"),
        ("1,2,3\n", "1 samples, a series has at least 2"),
        ("1,2,3\n4,5\n", "line 2 has 2 cells, line 1 has 3"),
        ("1,2,3\n4,5,6,7\n", "line 2 has 4 cells, line 1 has 3"),
        ("1,2,3\n4,,6\n", "line 2, column 2: '' is no finite number"),
        ("1,2,3\n4,nan,6\n", "line 2, column 2: 'nan' is no finite number"),
        ("1,2,3\n4,1e999,6\n", "line 2, column 2: '1e999' is no finite number"),
        ("a,2,3\n4,5,6\n", "line 1, column 1: 'a' is no finite number"),
        ("1;2,5;3\n4;5;6\n", "line 1, column 2: '2,5' is no finite number"),
        ("1.5,2\n4,5\n", "1 channels, the first series has 2; channel counts must not be mixed"),
        ("1,2,3\n1,3,4\n", "its first column does not rise from line to line"),
        ("1,7,7\n2,7,7\n", r"the series is constant \(7\); remove it or set data\.value_range"),
        ("0,1e308,-1e308\n1,1,1\n", "cannot be scaled"),
        ("0,1e-300,0\n1,0,0\n", "cannot be scaled"),
        ('1,2,3\n"4,5,6\n', "not a readable table"),
        ("1,2,\0\n4,5,6\n", ": line 1, column 3"),
    ],
)
def test_bad_file_is_skipped_and_listed(tmp_path, folder, text, message):
    (folder / "patient x.csv").write_text(text)
    data = _open(tmp_path, length=8)
    assert data.channels == 2
    assert_only_skipped(data, "patient x.csv", rf"patient x\.csv.*{message}")


@pytest.mark.parametrize("content", [bytes(range(256)), b"<html>\nnot found\n</html>\n", b""])
def test_a_first_file_of_something_else_does_not_say_the_channels(tmp_path, folder, content):
    (folder / "a.csv").write_bytes(content)
    data = _open(tmp_path, length=8, val_fraction=0.3)
    assert data.channels == 2
    assert_only_skipped(data, "a.csv", r"a\.csv: (not text in UTF-8|line 2 has 2 cells|holds no numbers)")


def test_a_folder_without_a_series_is_refused(tmp_path, folder):
    for path in folder.iterdir():
        path.write_text("a,b\n")
    with pytest.raises(DataError, match=r"patient 0\.csv: 0 samples, a series has at least 2"):
        _open(tmp_path)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("1,2\n3,4\n5\n", {}, "line 3 has 1 cells, line 1 has 2"),
        ("a,1,2\na,3,4\nb,5,6\n", {"id_column": "0"}, "lines 1 and 2 have one id; ids must differ"),
        ("1,2\n3,4\n5,6\n", {"id_column": "name"}, "no column 'name', it has 2 columns without a header"),
        ("1,2\n3,4\n5,6\n", {"label_column": "7"}, "no column '7'"),
        ("a,b\n3,4\n5,6\n", {"label_column": "c"}, "no column 'c', it has 'a', 'b'; change data.label_column"),
        ("1\n2\n3\n", {"label_column": "0"}, "no column of samples is left"),
        ("1,2\n3,4\n", {}, "2 signals of files that match"),
        ("1,2,0\n3,4,1\n5,6,1\n", {"patient_column": "2"}, "2 patients of files that match"),
        ("1,2\n,,\n3,4\n5,6\n", {}, "line 2 has 3 cells"),
    ],
)
def test_bad_table_is_named_in_one_line(tmp_path, text, options, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "all.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        _open(tmp_path, layout="row", **options)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("cells", [",", "1,", "3,x", "3,nan", "4,4"])
def test_bad_row_is_skipped_and_listed(tmp_path, cells):
    (tmp_path / "data").mkdir()
    rows = [f"{i},{i + 1}" for i in range(9)]
    (tmp_path / "data" / "all.csv").write_text("\n".join([*rows, cells]))
    data = _open(tmp_path, layout="row", length=2)
    assert_only_skipped(data, "all.csv:000010", r"all\.csv: line 10")


def _frame(kind):
    rng = np.random.default_rng(0)
    values = rng.random((12, 13)) if kind == "decimals" else rng.integers(-99, 99, (12, 13))
    return [[repr(float(x)) if kind == "decimals" else str(x) for x in row] for row in values]


HEADERS = {
    "none": None,
    "pandas": [str(i) for i in range(13)],
    "names": [f"t{i}" for i in range(13)],
    "marked": ["# 0", *(str(i) for i in range(1, 13))],
}


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["decimals", "whole"]), header=st.sampled_from([*HEADERS]), index=st.booleans(),
    delimiter=st.sampled_from([",", ";", "\t"]), end=st.sampled_from(["\n", "\r\n"]), mark=st.booleans(),
    layout=st.sampled_from(["file", "row"]), label=st.sampled_from(["", "-1", "12"]),
)  # fmt: skip
def test_any_first_line_is_read_as_it_is_meant(kind, header, index, delimiter, end, mark, layout, label):
    """As DataFrame.to_csv writes tables, with its header or without, with its index or without."""
    rows = _frame(kind)
    lines = [[str(i), *row] if index and header != "none" else row for i, row in enumerate(rows)]
    names = HEADERS[header]
    if names is not None:
        lines = [["", *names] if index and header != "marked" else names, *lines]
    if header == "marked" and index:
        return  # an index needs a cell in the header
    text = end.join(delimiter.join(line) for line in [*lines, []])
    label = label if layout == "row" else ""
    if label == "12" and index and header not in ("none", "pandas"):
        label = "-1"
    options = series_folder.Options(
        layout=layout, length=13 - bool(label), fit="crop", value_range=(-100.0, 100.0), label_column=label
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in "abc" if layout == "file" else "a":
            (Path(folder) / f"{name}.csv").write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
        plan = series_folder.plan(options, data_dir=folder, cache_root=Path(folder))
        found = {one.id: one for split in plan.splits.values() for one in split.examples()}
    values = (np.array(rows, np.float64) + 100) / 200
    if layout == "file":
        assert plan.channels == 13
        np.testing.assert_allclose(found["a.csv"].signal[:12], values, atol=1e-6)
        return
    assert len(found) == 12
    first = 1 + (header != "none")
    for k in range(12):
        one = found[f"a.csv:{first + k:06d}"]
        np.testing.assert_allclose(one.signal[:, 0], values[k, : 13 - bool(label)], atol=1e-6)
        if label:
            assert plan.classes[one.label] == rows[k][-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0\n0.5\n0.25\n",
            r"line 1 \('0'\) could be a header or data; say which with data\.header=yes or no",
        ),
        ("0,1\n5.5,6.5\n7.5,8.5\n", r"line 1 \('0', '1'\) could be a header or data"),
        ("0.0,0.1,0.2,0.3,0.4,0.5,0.6,0.7\n" + "3,1,4,1,5,9,2,6\n" * 3, r"'0\.2', '0\.3', \.\.\.\) could be a header"),
        ("0.0,1.0,2.0\n5.5,6.5,1.5\n7.5,8.5,2.5\n", r"line 1 \('0\.0', '1\.0', '2\.0'\) could be a header or data"),
        ("0,15\n0,2\n", r"lines such as '0,15' could be one column with decimal commas, or two of whole numbers"),
        ("10,5\n11,25\n", r"lines such as '10,5' could be one column with decimal commas, or two of whole numbers"),
        ("-1,5\n1,25\n", r"lines such as '-1,5' could be one column with decimal commas"),
        ("0,05\n0,1\n", r"line 1, column 2: '05' is a part of a number with a decimal comma; write decimal points"),
        ("-0,5\n1,1\n", r"line 1, column 1: '-0' is a part of a number with a decimal comma"),
        ("0,15,0,2\n1,5,0,007\n", r"line 2, column 4: '007' is a part of a number"),
        ("v\n0,15\n0,2\n", r"line 2, column 1: '0,15' is no finite number; write decimal points"),
        ("0,15;1\n0,2;1\n", "is no finite number"),
        (",a\nx,1.5\ny,2.5\n", "its first column has no name and does not count the rows; name it in line 1"),
        ("1.25\n2.50\n3.75\n4.5", r"line 4 has no line break, and its last cell '4\.5' looks cut beside '3\.75'"),
        ("a\n1.25e-01\n2.50e-01\n3.75e-01\n4.50e-", r"line 5 has no line break, and its last cell '4\.50e-' looks cut"),
        ("1,2,3\n4,5,6\n7,8", "line 3 has 2 cells, line 1 has 3"),
    ],
)
def test_a_text_of_two_readings_or_cut_is_refused(tmp_path, text, message):
    for name in "abc":
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        _open(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("0\n0.5\n0.25\n", {"header": "yes"}, [[0.5], [0.25]]),
        ("0\n0.5\n0.25\n", {"header": "no"}, [[0], [0.5], [0.25]]),
        ("0\n0.5\n1\n", {}, [[0], [0.5], [1]]),  # no writer of decimals writes "1"
        ("0\n1\n2\n5\n", {}, [[0], [1], [2], [5]]),  # it goes on as it begins
        ("0,1,2\n1,2,3\n5,6,9\n", {}, [[0, 1, 2], [1, 2, 3], [5, 6, 9]]),
        ("0,15\n0,2\n", {"columns": ("0", "1")}, [[0, 15], [0, 2]]),
        ("0,-15\n0,2\n", {}, [[0, -15], [0, 2]]),
        ("a,b\n0,15\n0,2\n", {}, [[0, 15], [0, 2]]),
        ("0;15\n0;2\n", {}, [[0, 15], [0, 2]]),
        ("005 -0\n007 3\n", {}, [[5, 0], [7, 3]]),  # only a comma can be a decimal one
        (",a\n0,1.5\n1,2.5\n", {}, [[1.5], [2.5]]),
        ("# a b\n1 2\n3 4\n", {}, [[1, 2], [3, 4]]),
        ("1.25\n2.50\n3.75\n4.55", {}, [[1.25], [2.5], [3.75], [4.55]]),
        ("1.25\n2.50\n3.75\n4.5\n", {}, [[1.25], [2.5], [3.75], [4.5]]),
    ],
)
def test_a_text_of_one_reading_is_read(tmp_path, text, options, expected):
    for name in "abc":
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.csv").write_text(text)
    data = _open(tmp_path, length=len(expected), fit="crop", value_range=(-20.0, 20.0), **options)
    np.testing.assert_allclose(data.splits["test"][0]["signal"], (np.array(expected) + 20) / 40, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, r"data\.length must be 2 to"),
        ({"layout": "column"}, r"data\.layout must be one of"),
        ({"layout": "row", "columns": ("1",)}, "layout 'row' has one channel"),
        ({"id_column": "1"}, "id_column is of tables"),
        ({"value_range": (2.0, 1.0)}, "value_range must be two rising numbers"),
    ],
)
def test_options_out_of_range(tmp_path, folder, options, message):
    with pytest.raises(SettingsError, match=message):
        _open(tmp_path, **options)


CELLS = st.sampled_from(
    ["0", "1", "-2.5", "1e3", "1e308", "-1e308", "1e-320", "nan", "inf", "", " ", "x", '"', "1_0", "\0", "é"]
)
TEXTS = st.one_of(
    st.binary(max_size=80),
    st.tuples(st.sampled_from([",", ";", "\t", " "]), st.sampled_from(["\n", "\r\n", "\r"]), st.lists(
        st.lists(CELLS | st.sampled_from(["0.5", "2", "3"]), min_size=2, max_size=3), max_size=6
    )).map(lambda parts: parts[1].join(parts[0].join(row) for row in parts[2]).encode()),
)  # fmt: skip


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(text=TEXTS, layout=st.sampled_from(["file", "row"]), label=st.sampled_from(["", "0", "x"]))
def test_any_text_is_read_or_refused_in_one_line(text, layout, label):
    options = series_folder.Options(layout=layout, length=5, label_column=label)
    with tempfile.TemporaryDirectory() as folder:
        for name in "abc":
            (Path(folder) / f"{name}.csv").write_bytes(text if name == "b" else b"1.5,2\n3,4\n")
        refusal, examples = "", {}
        try:
            plan = series_folder.plan(options, data_dir=folder, cache_root=Path(folder))
            examples = {name: list(split.examples()) for name, split in plan.splits.items()}
        except DataError as error:
            refusal = str(error)
    assert len(refusal.splitlines()) == (0 if examples else 1)
    for name, some in examples.items():
        assert len(some) == plan.splits[name].length
    for example in itertools.chain(*examples.values()):
        if isinstance(example, Skipped):
            assert example.reason.startswith(folder)
            assert len(example.reason.splitlines()) == 1
            continue
        assert example.signal.shape == (5, plan.channels)
        assert example.signal.min() >= 0
        assert example.signal.max() <= 1
        assert -1 <= example.label < len(plan.classes) or example.label == -1
