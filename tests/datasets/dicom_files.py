"""Small CT series in DICOM, written from scratch; every hint at the order of slices but positions is wrong."""

import numpy as np
import pydicom
import pydicom.uid
import pytest

IMPLICIT = pydicom.uid.ImplicitVRLittleEndian
SIZE = 16


def phantom(count, seed=0):
    """int16 [count, SIZE, SIZE] (slices upwards, rows backwards, columns to the left): a warm body in a round field."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    inside = (rows - 7.5) ** 2 + (columns - 7.5) ** 2 < 56
    body = (rows - 9) ** 2 + (columns - 6) ** 2 < 20
    slices = [np.where(body, rng.integers(0, 1000, body.shape), -1000) for _ in range(count)]
    return np.where(inside, slices, -3024).astype(np.int16)


def write_series(
    folder,
    *,
    count=6,
    step=2.5,
    series="1.2.3",
    patient="P1",
    syntax=IMPLICIT,
    seed=0,
    change=None,
    name="slice {}.dcm",
):
    """One file a slice of 16 x 16 pixels of 2 x 1.5 mm (columns x rows); returns paths from the lowest slice upwards.

    `change(dataset, k)` may alter slice k, counted upwards, before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, pixels in enumerate(phantom(count, seed)):
        dataset = pydicom.Dataset()
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        dataset.SOPInstanceUID = f"{series}.{k + 1}"
        dataset.SeriesInstanceUID = series
        dataset.Modality, dataset.PatientID = "CT", patient
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.InstanceNumber = count - k
        dataset.SliceThickness = "1.25"
        dataset.ImagePositionPatient = [-20.0, -30.0, 100.0 + step * k]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing = [1.5, 2.0]
        dataset.Rows = dataset.Columns = SIZE
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
        dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"
        little = syntax != pydicom.uid.ExplicitVRBigEndian
        dataset.PixelData = (pixels + 1024).astype("<i2" if little else ">i2").tobytes()
        dataset["PixelData"].VR = "OW"
        if change is not None:
            change(dataset, k)
        paths.append(folder / name.format((count - k + 2) % count))
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def rewrite(path, change):
    """Alter one file in place."""
    dataset = pydicom.dcmread(path)
    change(dataset)
    dataset.save_as(path)


def recode(path, syntax):
    """Compress a file by GDCM."""
    gdcm = pytest.importorskip("gdcm")
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
