"""Reading .npz item by item, and refusing damaged or hostile ones."""

import io
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfuncta_jax.datasets import DataError
from medfuncta_jax.datasets.npz import npz_arrays
from tests.datasets.damage import DAMAGE, assert_refusal, damaged


def _save(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def test_items_equal_numpy(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    arrays = npz_arrays(_save(tmp_path / "a.npz", images=images, none=images[:0]))
    np.testing.assert_array_equal(arrays["images"].read(), images)
    np.testing.assert_array_equal(np.stack(list(arrays["images"].items())), images)
    assert arrays["none"].read().shape == (0, 5, 3)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["u1", "i1", "u2", "i4", "u8", "f2", "f4", "f8", "b1", "c8"]), order=st.sampled_from("<>"),
    fortran=st.booleans(), shape=st.sampled_from([(5,), (5, 1), (5, 3, 2), (1, 7), (0, 3), (2, 3, 4, 5)]),
    packed=st.booleans(),
)  # fmt: skip
def test_any_header_is_read_as_numpy_reads_it(kind, order, fortran, shape, packed):
    values = np.random.default_rng(0).integers(0, 100, shape).astype(np.dtype(kind).newbyteorder(order))
    values = np.asarray(values, order="F" if fortran else "C")
    with tempfile.TemporaryDirectory() as folder:
        (np.savez_compressed if packed else np.savez)(Path(folder) / "a.npz", values=values)
        array = npz_arrays(Path(folder) / "a.npz")["values"]
        np.testing.assert_array_equal(array.read(), values)
        items = list(array.items())
    assert len(items) == shape[0]
    for item, expected in zip(items, values, strict=True):
        np.testing.assert_array_equal(item, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", r"truncated or corrupt \.npz file \(it is an HTML page, no archive of arrays\); copy or download"),
        (b"version https://git-lfs", r"\(it is a Git LFS pointer, no archive"),
        (b"\x93NUMPY\x01\0v\0", r"\(it is a NumPy array, no archive"),
        (b"", r"\(it is an empty file, no archive"),
    ],
)
def test_what_is_no_archive_is_named(tmp_path, content, message):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        npz_arrays(tmp_path / "a.npz")


def test_texts_and_scalars_are_refused_by_their_type(tmp_path):
    for values, kind in ((np.array(["a", "bc"]), "<U2"), (np.array(3), "int64")):
        np.savez(tmp_path / "a.npz", images=values)
        with pytest.raises(DataError, match=rf"a\.npz: images is {kind} .*, no array of numbers; save it as one"):
            npz_arrays(tmp_path / "a.npz")


@pytest.mark.parametrize("kept", [0, 10, 100, 0.3, 0.6, 0.99])
def test_truncated_file(tmp_path, kept):
    path = _save(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (50, 8, 8), np.uint8))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(DataError, match=r"a\.npz: truncated or corrupt \.npz file"):
        npz_arrays(path)


def test_damage_inside_an_array_is_found_by_the_end(tmp_path):
    path = _save(tmp_path / "a.npz", images=np.random.default_rng(0).integers(0, 256, (50, 64, 64), np.uint8))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a\.npz \(images\): truncated or corrupt"):
        npz_arrays(path)["images"].read()


def test_array_cut_short_inside_a_whole_archive(tmp_path):
    stored = io.BytesIO()
    np.save(stored, np.zeros((50, 8, 8), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", stored.getvalue()[:-100])
    with pytest.raises(DataError, match=r"the header of images, .* does not agree with its size"):
        npz_arrays(tmp_path / "a.npz")


def test_objects_are_never_unpickled(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="Python objects"):
        npz_arrays(path)


def test_huge_claim_in_a_header(tmp_path):
    stored = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stored, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 10**6, 10**6)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", stored.getvalue())
    with pytest.raises(DataError, match="does not agree with its size"):
        npz_arrays(tmp_path / "a.npz")


def test_missing_file_and_text_file(tmp_path):
    with pytest.raises(DataError, match=r"a\.npz: no such file"):
        npz_arrays(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_text("hello")
    with pytest.raises(DataError, match="truncated or corrupt"):
        npz_arrays(tmp_path / "a.npz")


def _with_header(path, header, payload=b"", **options):
    """An archive of one array whose header is this text."""
    text = header.encode("latin1") + b"\n"
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + payload)
    return path


def _described(descr, shape, fortran="False"):
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        (_described("'|u1'", "(1000000000000, 0)"), b""),  # a loop over nothing
        (_described("'|u1'", "(-2, -3)"), bytes(6)),
        (_described("('|u1', (3,))", "(2,)"), bytes(6)),
        (_described("[('a', '|u1'), ('b', '<f4')]", "(2,)"), bytes(10)),
        (_described("[('a', '|O')]", "(2,)"), bytes(16)),
        (_described("'|V0'", "(3,)"), b""),
        (_described("'<U2'", "(1,)"), bytes(8)),
        (_described("'<M8[s]'", "(1,)"), bytes(8)),
        ("{'descr': '|u1', 'shape': (3L", b""),
        ("(" * 9000, b""),
        ('"' * 3, b""),
    ],
)
def test_header_of_no_array_of_numbers_is_refused_in_one_line(tmp_path, header, payload):
    with pytest.raises(DataError) as caught:
        npz_arrays(_with_header(tmp_path / "a.npz", header, payload))
    assert_refusal(caught.value, "a.npz")


def test_old_spelling_of_a_header_is_read_without_a_warning(tmp_path):
    path = _with_header(tmp_path / "a.npz", _described("'|u1'", "(2L, 3L)"), b"abcdef")
    np.testing.assert_array_equal(npz_arrays(path)["images"].read(), np.frombuffer(b"abcdef", np.uint8).reshape(2, 3))


def test_sizes_that_agree_with_each_other_but_not_with_the_file(tmp_path):
    header = _described("'|u1'", "(1, 4000000000)")
    path = _with_header(tmp_path / "a.npz", header, bytes(100))
    content = bytearray(path.read_bytes())
    claimed = 4_000_000_000 + 10 + len(header) + 1
    for signature, place in ((b"PK\x01\x02", 20), (b"PK\x03\x04", 18)):
        struct.pack_into("<II", content, content.index(signature) + place, claimed, claimed)
    path.write_bytes(content)
    # Newer zipfile modules see that the entry would reach over the directory before we do.
    with pytest.raises(
        DataError, match=r"a\.npz: .*(images claims more data than the file can hold|Overlapped entries)"
    ):
        npz_arrays(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_that_other_decompressors_find(tmp_path, method):
    path = _with_header(tmp_path / "a.npz", _described("'|u1'", "(3000,)"), bytes(range(250)) * 12, compression=method)
    content = bytearray(path.read_bytes())
    content[60:140] = bytes(80)
    path.write_bytes(content)
    with pytest.raises(DataError, match="truncated or corrupt") as caught:
        npz_arrays(path)["images"].read()
    assert_refusal(caught.value, "a.npz")


HEADERS = st.builds(
    _described,
    st.sampled_from(
        ["'|u1'", "'<f4'", "'|O'", "'|b1'", "'|S3'", "'|V3'", "('|u1', (3,))", "'a'", "None", "[]", "'<c8'"]
    ),
    st.sampled_from(
        ["(3, 4)", "(12,)", "()", "(0, 4)", "(10000000000, 0)", "(-3, -4)", "(3L, 4)", "3", "(99999999999,)"]
    ),
    st.sampled_from(["False", "True", "0"]),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    header=HEADERS, size=st.sampled_from([0, 3, 12, 36, 48, 96]), method=st.sampled_from([0, 8, 12, 14]), damage=DAMAGE,
    clean=st.booleans(),
)  # fmt: skip
def test_any_archive_is_read_or_refused_in_one_line(header, size, method, damage, clean):
    with tempfile.TemporaryDirectory() as folder:
        path = _with_header(Path(folder) / "a é.npz", header, bytes(size), compression=method)
        if not clean:
            path.write_bytes(damaged(path.read_bytes(), damage))
        try:
            arrays = {key: array.read() for key, array in npz_arrays(path).items()}
        except DataError as error:
            assert_refusal(error, str(path))
            return
    for array in arrays.values():
        assert array.dtype.kind in "biufc"
        assert array.nbytes <= size
