"""One DICOM file: whether it is a slice of a CT or MR, the slice's position, and its pixels, in Hounsfield units for
CT, as scaled for MR.

Honoured: the class (from the file's meta group where the data set states none, as in a DICOMDIR), modality and type of
the image; series and patient; position, orientation, spacing, rows and columns; bits allocated and stored, the high
bit, sign and byte order; padding value and its range; slope, intercept and their type; any transfer syntax for which a
decoder is installed. Old files without preamble and meta group are read too.
Ignored: file names, instance numbers, thickness, times, windows, overlays. Ignored and noted where set: MONOCHROME1
(how it is shown), a modality look-up table beside slope and intercept, and an aspect of pixels beside their spacing.

In MR, slope and intercept may be absent, padding is 0, and slices of one series that differ in direction, echo, time,
inversion, diffusion weighting or kind of image (magnitude, phase) belong to different stacks.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from medfuncta_jax.datasets.dataset import DataError

# Hounsfield units. No tissue, and hardly any noise, is below the second value; scanners mark pixels outside their round
# field with lower values (-3024, -2000). These pixels become air before interpolation, which would spread them.
AIR, _PADDING_BELOW = -1000.0, -1500.0

# Version of the conversion to Hounsfield units; a higher number makes converted files anew.
READING = 2

# Limits of plausible numbers in a header: rows or columns, millimetres from the origin, and rescaling.
_LARGEST_SIDE, _FARTHEST, _LARGEST_RESCALE = 1 << 13, 1e5, 1e5

# Smallest plausible size of a pixel, millimetres.
_SMALLEST_SPACING = 1e-4

# Smallest cosine between the normal of an axial slice and the body axis: a gantry tilts by 30 degrees at most.
_AXIAL = 0.8


@dataclass(frozen=True)
class Kind:
    """The kind of slices to look for.

    Attributes:
      name, modality, image: the common name, the name in DICOM, and the class of its images.
      axial: whether slices must lie across the body.
    """

    name: str
    modality: str
    image: str
    axial: bool


CT = Kind("CT", "CT", "1.2.840.10008.5.1.4.1.1.2", True)
MR = Kind("MR", "MR", "1.2.840.10008.5.1.4.1.1.4", False)
KINDS = {"ct": CT, "mr": MR}

# Fields that divide the slices of an MR series into stacks, beside their direction.
_OF_A_STACK = ("EchoTime", "InversionTime", "TemporalPositionIdentifier", "DiffusionBValue")

# Hounsfield units, or not specified; other types are doses, densities or virtual energies.
_RESCALE_TYPES = ("", "HU", "US")

_TAGS = [
    "SOPClassUID", "Modality", "ImageType", "SeriesInstanceUID", "PatientID", "ImagePositionPatient", "NumberOfFrames",
    "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "RescaleSlope", "RescaleIntercept", "RescaleType",
    "PhotometricInterpretation", "ModalityLUTSequence", "PixelAspectRatio", "SeriesDescription", *_OF_A_STACK,
]  # fmt: skip

# First bytes of a data set, in both byte orders: the group of its first element.
_GROUPS = (b"\x02\0", b"\x08\0", b"\0\x08")

# Images of these families end with this marker, which their data never hold; some writers add a few bytes.
_END_OF_IMAGE, _BYTES_AFTER, _JPEG_FAMILY = b"\xff\xd9", 64, ("JPEG", "HTJ2K")

EXTRA = "pip install 'medfuncta_jax[dicom]'"


@dataclass(frozen=True)
class Slice:
    """A header: the position of a slice (millimetres, LPS as in DICOM) and the meaning of its stored values.

    Attributes:
      path, series, patient: the file, its series' UID and its patient.
      position: [3], the centre of the first pixel.
      orientation: [6], unit vectors along a row and along a column.
      spacing: [2], from row to row and from column to column.
      shape: rows, columns.
      rescale: slope, intercept.
      ignored: fields that are set but ignored.
      kind: the kind of the slice.
      description: the series' description, for people.
      stack: key that separates slices of one series that form no common volume; "" for CT.
    """

    path: Path
    series: str
    patient: str
    position: np.ndarray
    orientation: np.ndarray
    spacing: np.ndarray
    shape: tuple[int, int]
    rescale: tuple[float, float]
    ignored: tuple[str, ...] = ()
    kind: Kind = CT
    description: str = ""
    stack: str = ""

    @property
    def normal(self) -> np.ndarray:
        """[3], the direction from slice to slice."""
        return np.cross(self.orientation[:3], self.orientation[3:])

    @property
    def axial(self) -> bool:
        """Whether the normal runs along the body."""
        return bool(abs(self.normal[2]) > _AXIAL)

    @property
    def usable(self) -> bool:
        """Whether slices of its kind are taken from this direction."""
        return self.axial or not self.kind.axial


@dataclass(frozen=True)
class LeftOut:
    """A file that is no slice, and why; `slice_of` is the beginning of its series' UID if it may be a damaged one."""

    path: Path
    reason: str
    slice_of: str | None = None


class _FaultError(Exception):
    """A fault in the pixels of a slice, in this package's words."""


def pydicom_module() -> ModuleType:
    """pydicom, imported on first use.

    Raises:
      DataError: it is not installed.
    """
    try:
        import pydicom
        import pydicom.errors
        import pydicom.pixels
    except ImportError as error:
        raise DataError(f"reading DICOM needs pydicom, which is not installed: {EXTRA}") from error
    return pydicom


def read_header(path: Path, wanted: Kind = CT) -> Slice | LeftOut:
    """The header of a file if it is a slice of the wanted kind; raises nothing for any file content."""
    pydicom = pydicom_module()
    try:
        with warnings.catch_warnings(action="ignore"):  # about malformed values of irrelevant elements
            header = _data_set(path, pydicom, stop_before_pixels=True, specific_tags=_TAGS)
            kind = pydicom.uid.UID(str(header.get("SOPClassUID") or _meta_class(header)))
            # pydicom accepts a value that is cut short by the end of the file.
            cut_short = kind != wanted.image and wanted.image.startswith(kind)
            if cut_short or (kind == wanted.image and header.get("Modality") != wanted.modality):
                return LeftOut(path, "unreadable DICOM (its class or modality is cut short or wrong)", "")
            if kind != wanted.image:
                return LeftOut(path, f"no {wanted.name} image but {kind.name}")
            if "MOSAIC" in str(header.get("ImageType", "")).upper():
                return LeftOut(path, "a mosaic of slices, which is not read")
            if any(word in str(header.get("ImageType", "")).upper() for word in ("LOCALIZER", "SCOUT")):
                return LeftOut(path, "localiser")
            if int(header.get("NumberOfFrames") or 1) > 1:
                return LeftOut(path, "several frames in one file, which are not read")
            found = _slice(path, header, wanted)
            return LeftOut(path, found, str(header.get("SeriesInstanceUID", ""))) if isinstance(found, str) else found
    except pydicom.errors.InvalidDicomError:
        return LeftOut(path, "no DICOM file", "" if path.suffix.lower() == ".dcm" else None)
    except PermissionError:
        return LeftOut(path, "cannot be read, for lack of the right to", "")
    except Exception:  # pydicom parses any content and may raise anything
        other = path.name.upper().startswith("DICOMDIR") or _is_of_another_class(path, pydicom, wanted)
        return LeftOut(path, "unreadable DICOM (its header is damaged)", None if other else "")


def _data_set(path: Path, pydicom: ModuleType, **options: Any) -> Any:
    """The data set that pydicom reads; the preamble may be missing if the bytes look like a data set."""
    try:
        return pydicom.dcmread(path, **options)
    except pydicom.errors.InvalidDicomError:
        with open(path, "rb") as file:
            if not file.read(2).startswith(_GROUPS):
                raise
        header = pydicom.dcmread(path, force=True, **options)
        if not (header.get("SOPClassUID") or _meta_class(header)):
            raise
        return header


def _meta_class(header: Any) -> str:
    return str(getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID", ""))


def _is_of_another_class(path: Path, pydicom: ModuleType, wanted: Kind) -> bool:
    """Whether the meta group, at the file's start, shows that a damaged file is no image of the wanted kind."""
    with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
        kind = str(pydicom.filereader.read_file_meta_info(path).get("MediaStorageSOPClassUID", ""))
        return not wanted.image.startswith(kind)
    return False


def _slice(path: Path, header: Any, kind: Kind) -> Slice | str:
    """A slice, or the fault in it."""
    if not (header.get("Rows") and header.get("Columns")):
        return "no image in it"
    if max(int(header.Rows), int(header.Columns)) > _LARGEST_SIDE:
        return f"it claims {header.Rows} x {header.Columns} pixels"
    wanted = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    numbers = {}
    for name, count in wanted.items():
        value = header.get(name)
        numbers[name] = np.array([] if value is None else value, np.float64).reshape(-1)
        if numbers[name].shape != (count,) or not (np.abs(numbers[name]) <= _FARTHEST).all():  # NaN is not either
            return f"its {name} is missing or wrong"
    orientation, spacing = numbers["ImageOrientationPatient"], numbers["PixelSpacing"]
    axes = orientation.reshape(2, 3)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=0.01):
        return "its ImageOrientationPatient is no pair of perpendicular directions"
    if spacing.min() < _SMALLEST_SPACING:
        return "its PixelSpacing is not above 0"
    absent = (1, 0) if kind is MR else (None, None)  # the values of an MR have no unit
    rescale = (header.get("RescaleSlope", absent[0]), header.get("RescaleIntercept", absent[1]))
    if None in rescale:
        return "no RescaleSlope or RescaleIntercept, so its values are no Hounsfield units"
    if not (np.abs(np.array(rescale, np.float64)) <= _LARGEST_RESCALE).all() or float(rescale[0]) == 0:
        return "its RescaleSlope or RescaleIntercept is wrong"
    if kind is CT and str(header.get("RescaleType") or "").strip().upper() not in _RESCALE_TYPES:
        return f"its RescaleType is {header.RescaleType}, so its values are no Hounsfield units"
    return Slice(
        path=path,
        series=str(header.get("SeriesInstanceUID", "")),
        patient=str(header.get("PatientID", "")),
        position=numbers["ImagePositionPatient"],
        orientation=orientation,
        spacing=spacing,
        shape=(int(header.Rows), int(header.Columns)),
        rescale=(float(rescale[0]), float(rescale[1])),
        ignored=tuple(_ignored(header)),
        kind=kind,
        description=" ".join(str(header.get("SeriesDescription") or "").split()),
        stack=_stack(header, orientation) if kind is MR else "",
    )


def _stack(header: Any, orientation: np.ndarray) -> str:
    values = [f"{name} {header.get(name)}" for name in _OF_A_STACK if header.get(name) not in (None, "")]
    form = "/".join(map(str, list(header.get("ImageType") or [])[2:]))
    return f"direction {np.round(orientation, 2) + 0.0}, image {form}, {', '.join(values)}"


def _ignored(header: Any) -> list[str]:
    ratio = header.get("PixelAspectRatio")
    found = {
        "PhotometricInterpretation MONOCHROME1": header.get("PhotometricInterpretation") == "MONOCHROME1",
        "ModalityLUTSequence": bool(header.get("ModalityLUTSequence")),
        f"PixelAspectRatio {ratio}": bool(ratio) and len(set(map(str, ratio))) > 1,
    }
    return [name for name, there in found.items() if there]


def hounsfield(one: Slice) -> np.ndarray:
    """`pixel_values` of a CT, in Hounsfield units; padding outside the scanner's field is air."""
    values, padded = _scaled(one)
    values[padded | (values < _PADDING_BELOW)] = AIR
    return values


def pixel_values(one: Slice) -> np.ndarray:
    """float32 [rows, columns] with the slice's own slope and intercept; padding is air in a CT, else 0.

    Raises:
      DataError: no pixels, truncated or damaged ones, or no decoder for them.
    """
    if one.kind is CT:
        return hounsfield(one)
    values, padded = _scaled(one)
    values[padded] = 0
    return values


def _scaled(one: Slice) -> tuple[np.ndarray, np.ndarray]:
    """Values and a mask of padding."""
    pydicom = pydicom_module()
    try:
        with warnings.catch_warnings(action="ignore"):
            file = _data_set(one.path, pydicom)
            if "PixelData" not in file:
                raise _FaultError("no pixel data in it")
            _complete_syntax(file, pydicom)
            _require_decoder(file, pydicom)
            _require_whole_image(file, pydicom)
            # Raw words: pydicom would clear unused bits, in some files only, and these bits may mark padding.
            words = pydicom.pixels.pixel_array(file, raw=True, correct_unused_bits=False)
        if words.shape != one.shape:
            raise _FaultError(f"pixels {words.shape}, its header says {one.shape}")
        stored, padded = _stored_values(file, words)
    except DataError as error:
        raise DataError(f"{one.path}: {error}") from error
    except _FaultError as fault:
        raise DataError(f"{one.path}: unreadable slice ({fault}); copy the file anew") from fault
    except MemoryError as error:
        raise DataError(f"{one.path}: its pixels do not fit into memory; try fewer at a time") from error
    except OSError as error:
        raise DataError(f"{one.path}: cannot be read ({error.strerror or 'truncated'}); copy the file anew") from error
    except Exception as error:  # as in `read_header`; decoders may raise anything
        reason = "its pixels are damaged, cut short or of a kind that no decoder here reads"
        raise DataError(f"{one.path}: unreadable slice ({reason}); copy the file anew") from error
    slope, intercept = one.rescale
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept), padded


def _stored_values(file: Any, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values in the stored bits of decoded words, int64, and which of them are padding.

    Args:
      file: the data set.
      words: [rows, columns], with any bits above the high bit.
    """
    bits = words.dtype.itemsize * 8
    stored, high, signed = int(file.BitsStored), int(file.HighBit), int(file.PixelRepresentation) == 1
    raw = words.astype(words.dtype.newbyteorder("=")).view(f"u{words.dtype.itemsize}").astype(np.int64)
    syntax = file.file_meta.TransferSyntaxUID
    # A code stream holds only the values, so the position of the high bit does not apply to decoded words.
    shift = high + 1 - stored if not syntax.name.startswith(_JPEG_FAMILY) else 0
    if not 0 <= shift <= bits - 1 or not 1 <= stored <= int(file.BitsAllocated):
        raise _FaultError(f"{stored} bits stored below high bit {high} of {file.BitsAllocated}")
    kept = min(stored, bits)
    values = raw >> shift & ((1 << kept) - 1)
    if signed:
        values -= (values >> (kept - 1)) << kept
    limits = [file.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    limits = [None if limit == "" else limit for limit in limits]
    if limits[0] is None:
        return values, np.zeros(values.shape, bool)
    if not all(isinstance(limit, (int, type(None))) for limit in limits):
        raise _FaultError("its PixelPaddingValue or PixelPaddingRangeLimit is no whole number")
    first, last = (_as_stored(limits[0] if limit is None else limit, bits, kept, signed) for limit in limits)
    if first is None or last is None:  # marked by unused bits
        return values, raw == limits[0] % (1 << bits)
    return values, (values >= min(first, last)) & (values <= max(first, last))


def _as_stored(number: int, bits: int, stored: int, signed: bool) -> int | None:
    """A padding value, written with any sign and size, as a stored value; None if no stored value equals it."""
    low, high = (-(1 << stored - 1), 1 << stored - 1) if signed else (0, 1 << stored)
    ways = (number, number - (1 << bits), number - (1 << stored)) if signed else (number, number + (1 << bits))
    return next((way for way in ways if low <= way < high), None)


def _complete_syntax(file: Any, pydicom: ModuleType) -> None:
    """Set the transfer syntax of a file without a meta group to the encoding of its elements."""
    if not hasattr(file, "file_meta"):
        file.file_meta = pydicom.dataset.FileMetaDataset()
    if "TransferSyntaxUID" not in file.file_meta:
        implicit, little = file.original_encoding
        kinds = pydicom.uid
        explicit = kinds.ExplicitVRLittleEndian if little else kinds.ExplicitVRBigEndian
        file.file_meta.TransferSyntaxUID = kinds.ImplicitVRLittleEndian if implicit else explicit


def _require_decoder(file: Any, pydicom: ModuleType) -> None:
    syntax = file.file_meta.TransferSyntaxUID
    if syntax.is_compressed and syntax.is_encapsulated and not pydicom.pixels.get_decoder(syntax).is_available:
        raise DataError(f"compressed as {syntax.name}, for which no decoder is installed: {EXTRA}")


def _require_whole_image(file: Any, pydicom: ModuleType) -> None:
    """Refuse a code stream that is cut short; some decoders fill it up silently."""
    syntax = file.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax.name.startswith(_JPEG_FAMILY):
        frame = pydicom.encaps.get_frame(file.PixelData, 0, number_of_frames=1)
        if _END_OF_IMAGE not in frame[-_BYTES_AFTER:]:
            raise _FaultError("its compressed image ends too early")
