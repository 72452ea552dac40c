"""Tables of labels: which row is about which file, classes, patients, and tables that cannot be used."""

import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfuncta_jax.datasets import DataError, open_dataset
from medfuncta_jax.datasets.label_table import ordered_classes, read_label_table
from medfuncta_jax.settings import DataSettings
from tests.real_data import REAL, needs_real

NAMES = ["a/scan é 1.nii.gz", "a/scan 2.nii.gz", "b/c/x.v2.png", "p7/t1.nii.gz", "p7/t2.nii.gz"]


def _read(tmp_path, text, names=NAMES, label_column="", patient_column="", encoding="utf-8", name="table.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return read_label_table(path, names, label_column=label_column, patient_column=patient_column)


def test_names_by_path_file_stem_and_folder(tmp_path, caplog):
    text = "id,label\na/scan e\u0301 1.nii.gz,ill\nscan 2,well\nx.v2,well\np7,ill\np7/t2,well\nabsent,ill\n"
    with caplog.at_level(logging.WARNING):
        table = _read(tmp_path, text)
    assert table.classes == ("ill", "well")
    assert [table.classes[table.labels[name]] for name in NAMES] == ["ill", "well", "well", "ill", "well"]
    assert table.task == "binary-class"
    assert table.patients is None
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "1 rows are for no signal that is there"
    ]


def test_files_without_a_label(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        table = _read(tmp_path, "file;grade\nt1;3\nt2;n/a\nscan 2;10\nx;\n", label_column="grade")
    assert table.labels == {"p7/t1.nii.gz": 0, "a/scan 2.nii.gz": 1}
    assert table.classes == ("3", "10")
    assert "3 of 5 signals have no label (-1)" in caplog.text


def test_patients_only_and_a_spreadsheet_in_utf8_with_mark(tmp_path, caplog):
    text = 'site\tname\tpatient\nA\tscan 2\t"p 1"\nB\tx.v2.png\tp 1\nC\tt1\t\nD\tt2\tp 2\n\t\t\n'
    with caplog.at_level(logging.WARNING):
        table = _read(tmp_path, text, patient_column="patient", encoding="utf-8-sig")
    assert table.classes == ()
    assert table.task == "none"
    assert table.patients["a/scan 2.nii.gz"] == table.patients["b/c/x.v2.png"] == "patient p 1"
    assert len(set(table.patients.values())) == 4
    assert "2 signals have no patient stated" in caplog.text


NOTHING = ["", "NA", "na", "N/A", "n/a", "nan", "NaN", "NULL", "null", "<NA>", "#N/A", "None"]


@pytest.mark.parametrize("nothing", NOTHING)
def test_a_label_that_says_that_there_is_none_is_no_class(tmp_path, caplog, nothing):
    text = f"file,grade,patient\nt1,ill,p1\nt2,{nothing},p1\nscan 2,well,p2\nx,well,p3\n"
    with caplog.at_level(logging.WARNING):
        table = _read(tmp_path, text, label_column="grade")
    assert table.classes == ("ill", "well")
    assert table.labels == {"p7/t1.nii.gz": 0, "a/scan 2.nii.gz": 1, "b/c/x.v2.png": 1}
    assert "2 of 5 signals have no label (-1)" in caplog.text  # and one without a row


@pytest.mark.parametrize("nothing", NOTHING)
def test_patients_of_whom_nothing_is_said_are_alone(tmp_path, caplog, nothing):
    names = [f"{i}.png" for i in range(9)]
    rows = [f"{i},{'a' if i % 2 else 'b'},{nothing}" for i in range(9)]
    with caplog.at_level(logging.WARNING):
        table = _read(tmp_path, "\n".join(["file,kind,patient", *rows, ""]), names=names, patient_column="patient")
    assert len(set(table.patients.values())) == 9
    assert "9 signals have no patient stated" in caplog.text
    assert table.classes == ()  # patients alone were asked for


def test_further_spellings_of_nothing(tmp_path):
    text = "file,label\nt1,ill\nt2,Unknown\nscan 2,-\nx,none\n"
    path = tmp_path / "table.csv"
    path.write_text(text)
    plain = read_label_table(path, NAMES, label_column="label", patient_column="")
    assert plain.classes == ("-", "Unknown", "ill", "none")  # "none" may be a finding
    more = read_label_table(path, NAMES, label_column="label", patient_column="", no_value=("unknown", "-"))
    assert more.classes == ("ill", "none")


def test_the_option_reaches_tables_and_rows(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [
        f"{i},{i + 1}.5,{['ill', 'well', 'missing', 'NA'][i % 4]},{'p1' if i < 4 else 'missing'}" for i in range(12)
    ]
    (tmp_path / "data" / "all.csv").write_text("\n".join(["a,b,label,patient", *rows, ""]))
    options = {"layout": "row", "length": 4, "label_column": "label", "patient_column": "patient"}
    source = DataSettings("series_folder", str(tmp_path), tuple((options | {"no_value": ("missing",)}).items()))
    data = open_dataset(source, data_dir=str(tmp_path / "data"))
    assert data.classes == ("ill", "well")
    labels = {one["id"]: one["label"] for split in data.splits.values() for one in split}
    assert [labels[f"all.csv:{line:06d}"] for line in range(2, 14)] == [0, 1, -1, -1] * 3
    place = {one["id"]: name for name, split in data.splits.items() for one in split}
    assert len({place[f"all.csv:{line:06d}"] for line in range(2, 6)}) == 1


@pytest.mark.parametrize(
    ("last", "cut"), [("t2,Ma", True), ("t2,Male", False), ("t2,Other", False), ("t2,", False), ("t2,M\n", False)]
)
def test_a_last_line_that_is_cut_makes_no_class(tmp_path, last, cut):
    rows = [f"n{i},{'Male' if i % 2 else 'Female'}" for i in range(8)]
    text = "\n".join(["file,label", *rows, "t1,Male", last])
    if cut:
        with pytest.raises(DataError, match=r"line 11 has no line break, .* 'Ma' looks cut beside 'Male'"):
            _read(tmp_path, text)
    else:
        table = _read(tmp_path, text)
        assert table.classes[table.labels["p7/t1.nii.gz"]] == "Male"


def test_order_of_classes():
    assert ordered_classes(["10", "9", "-1"]) == ("-1", "9", "10")
    assert ordered_classes(["10", "9", "b"]) == ("10", "9", "b")
    assert ordered_classes(["9", "1" * 5000]) == ("1" * 5000, "9")  # longer than Python turns into a number


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no table with two columns"),
        ("file\nscan 2\n", "no table with two columns"),
        ("file,sex\nscan 2,M\n", "no column 'label', it has 'file', 'sex'; name one with"),
        ("file,label,label\nscan 2,M,F\n", "several columns 'label'"),
        ("file,label\nscan 2,M,3\n", "line 2 has 3 cells, the header has 2"),
        ("file,label\nscan 2,M\nscan 2,M\n", "lines 2 and 3 are both for 'scan 2'"),
        ("file,label\nnothing.png,M\n", "no row names a signal: rows are like 'nothing.png'"),
        ("file,label\n", "no row names a signal: rows are like none"),
        ('file,label\n"scan 2,M\n', "not a readable table"),
    ],
)
def test_bad_table_is_named_in_one_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        _read(tmp_path, text)
    assert "table.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


SUBJECTS = {
    "case": ("id,sex\nIXI132-hh-1415_t1,M\nixi162-HH-1548_T1.NII.GZ,F\n", {0: "M", 1: "F"}),
    "beginning": ("participant_id,sex\nIXI132,M\nixi162-HH,F\nIXI1,M\nIXI162,M\n", {0: "M", 1: "F"}),
    "number": ("IXI_ID,SEX_ID,AGE\n132,1,58\n162,2,50\n1415,2,9\n1,2,7\n", {0: "1", 1: "2"}),
}


@pytest.mark.parametrize("way", SUBJECTS)
def test_rows_for_subjects(tmp_path, caplog, way):
    text, expected = SUBJECTS[way]
    names = ["IXI132-HH-1415_T1.nii.gz", "IXI162-HH-1548_T1.nii.gz", "IXI174-HH-1571_T1.nii.gz"]
    column = text.split("\n")[0].split(",")[1]
    with caplog.at_level(logging.WARNING):
        table = _read(tmp_path, text, names, label_column=column)
    assert {name: table.classes[label] for name, label in table.labels.items()} == {
        names[i]: value for i, value in expected.items()
    }
    assert f"rows are matched by {way}: " in caplog.text
    assert "is 'IXI132-HH-1415_T1.nii.gz'; 2 of 3 files have a row" in caplog.text


def test_rows_for_folders_of_subjects_keep_the_files_of_one_together(tmp_path):
    names = [f"sub-{i:03d}/ses-{k}/sub-{i:03d}_ses-{k}_T1w.nii.gz" for i in (1, 2, 11) for k in (1, 2)]
    for ids in (["SUB-001", "SUB-002", "SUB-011"], ["1", "2", "11"], ["sub-001", "sub-002", "sub-011"]):
        text = "\n".join(["subject,label", *(f"{one},{'abc'[i]}" for i, one in enumerate(ids))])
        table = _read(tmp_path, text, names)
        assert [table.classes[table.labels[name]] for name in names] == list("aabbcc")
        assert len(set(table.patients.values())) == 3
        assert all(table.patients[names[2 * i]] == table.patients[names[2 * i + 1]] for i in range(3))


def test_an_exact_name_leaves_no_room_for_guesses(tmp_path):
    table = _read(tmp_path, "id,label\n1,a\nscan 20,b\n2,c\n", ["scan 20.png", "scan 2.png", "scan 1.png"])
    assert table.labels == {"scan 20.png": 1}


def test_a_column_of_ids_may_be_named(tmp_path):
    text = "file,code,label\nx,scan 1,a\ny,scan 2,b\n"
    names = ["scan 1.png", "scan 2.png"]
    path = tmp_path / "t.csv"
    path.write_text(text)
    table = read_label_table(path, names, label_column="", patient_column="", id_column="code")
    assert table.labels == {"scan 1.png": 0, "scan 2.png": 1}
    with pytest.raises(DataError, match=r"no column 'cade', it has 'file', 'code', 'label'; .*or id_column"):
        read_label_table(path, names, label_column="", patient_column="", id_column="cade")
    with pytest.raises(
        DataError, match=r"rows are like 'x', 'y', signals like 'scan 1.png', 'scan 2.png'; .*id_column"
    ):
        read_label_table(path, names, label_column="", patient_column="")


@pytest.mark.parametrize(
    ("text", "names", "message"),
    [
        ("id,label\nA1,x\na1,y\n", ["A1 .png"], "both fit 'A1 .png'"),
        ("id,label\n7,x\n007,y\n", ["s7.png"], r"lines 2 \('7'\) and 3 \('007'\) both fit 's7.png'"),
        ("id,label\n1,x\n2,y\n", ["s1_2.png", "s2_1.png"], "rows are like '1', '2', signals like 's1_2.png', 's2"),
        ("id,label\n1,x\n2,y\n", ["a_T1.png", "b_T1.png"], "no row names a signal"),
        ("id,label\nscan,x\n", ["scanner.png"], "no row names a signal"),
        ("id,label\ns1,x\n", ["s12.png"], "no row names a signal"),
    ],
)
def test_rows_that_may_be_another_subjects_are_refused(tmp_path, text, names, message):
    with pytest.raises(DataError, match=message) as caught:
        _read(tmp_path, text, names)
    assert len(str(caught.value).splitlines()) == 1


@needs_real
def test_ixis_sheet_by_number(tmp_path):
    """The sheet of IXI says 132 for IXI132-HH-1415_T1.nii.gz; its rows are those of all scans."""
    lines = (REAL / "ixi_t1_2mm" / "participants.csv").read_text().splitlines()[1:]
    sheet = ["IXI_ID,SEX_ID,AGE"] + [f"{int(line[3:6])},{line.split(',')[2]},{line.split(',')[1]}" for line in lines]
    (tmp_path / "IXI.csv").write_text("\n".join([*sheet, "2,M,35.8", "1415,F,40"]))
    options = {"labels": str(tmp_path / "IXI.csv"), "label_column": "SEX_ID", "id_column": "IXI_ID", "grid": (8, 8, 8)}
    source = DataSettings("nifti_folder", str(tmp_path / "cache"), tuple(options.items()))
    data = open_dataset(source, data_dir=str(REAL / "ixi_t1_2mm"))
    sex = {line.split(",")[0]: line.split(",")[2] for line in lines}
    found = {one["id"]: data.classes[one["label"]] for split in data.splits.values() for one in split}
    assert found == sex


def test_row_for_two_files_of_one_name_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"line 2 \('x.png'\) could be 'a/x.png' or 'b/x.png'"):
        _read(tmp_path, "file,label\nx.png,1\n", names=["a/x.png", "b/x.png"])


def test_table_in_another_encoding_or_absent(tmp_path):
    with pytest.raises(DataError, match=r"not text in UTF-8 .*save it as CSV in UTF-8"):
        _read(tmp_path, "file,label\nscan 2,m\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"absent\.csv: cannot be read \(No such file"):
        read_label_table(tmp_path / "absent.csv", NAMES, label_column="", patient_column="")


@needs_real
def test_real_participants(tmp_path):
    options = {"labels": "participants.csv", "label_column": "sex", "grid": (8, 8, 8)}
    source = DataSettings("nifti_folder", str(tmp_path), tuple(sorted(options.items())))
    data = open_dataset(source, data_dir=str(REAL / "ixi_t1_2mm"))
    assert (data.classes, data.task) == (("F", "M"), "binary-class")
    rows = [line.split(",") for line in (REAL / "ixi_t1_2mm" / "participants.csv").read_text().splitlines()[1:]]
    sex = {row[0]: row[2] for row in rows}
    found = {one["id"]: data.classes[one["label"]] for split in data.splits.values() for one in split}
    assert found == sex
    assert data.about["labels"]["file"] == "participants.csv"


TEXT = st.one_of(
    st.binary(max_size=200),
    st.lists(
        st.sampled_from(["file", "label", ",", ",", ";", "\n", "\n", "\r", '"', "scan 2", "t1", "p7", "\0", "é", " "])
    )
    .map("".join)
    .map(str.encode),
)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(text=TEXT)
def test_any_table_is_read_or_refused_in_one_line(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        path.write_bytes(b"file,label\n" + text)
        table, refusal = None, ""
        try:
            table = read_label_table(path, NAMES, label_column="", patient_column="")
        except DataError as error:
            refusal = str(error)
    assert len(refusal.splitlines()) == (0 if table else 1)
    if table:
        assert set(table.labels) <= set(NAMES)
        assert set(table.labels.values()) <= set(range(len(table.classes)))
