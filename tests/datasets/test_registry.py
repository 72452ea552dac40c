"""`open_dataset`: its registry, and the cost of importing it."""

import subprocess
import sys

import pytest

from medfuncta_jax.datasets import SOURCES, DataError, open_dataset
from medfuncta_jax.settings import DataSettings, SettingsError


def test_unknown_source_names_the_known_ones():
    with pytest.raises(SettingsError, match=r"unknown data\.source 'mnist'; known: .*medmnist, nibabel_slices"):
        open_dataset(DataSettings("mnist"), data_dir=None)


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_unknown_option_is_refused_by_its_dotted_name(source, tmp_path):
    settings = DataSettings(source, str(tmp_path), (("sise", 28),))
    with pytest.raises(SettingsError, match=r"unknown setting data\.sise"):
        open_dataset(settings, data_dir=None)


def test_option_of_wrong_type_or_range_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"data\.size must be a whole number, got 'big'"):
        open_dataset(DataSettings("nibabel_slices", str(tmp_path), (("size", "big"),)), data_dir=None)
    with pytest.raises(SettingsError, match=r"data\.size must be 8 to 256, got 4"):
        open_dataset(DataSettings("nibabel_slices", str(tmp_path), (("size", 4),)), data_dir=None)


@pytest.mark.parametrize("source", ["nifti_folder", "medmnist"])
def test_missing_data_directory_is_one_line(source, tmp_path):
    options = (("flag", "pneumoniamnist"),) if source == "medmnist" else ()
    with pytest.raises(DataError, match=r"absent: no such folder; data_dir must name") as caught:
        open_dataset(DataSettings(source, str(tmp_path), options), data_dir=str(tmp_path / "absent"))
    assert "\n" not in str(caught.value)


def test_importing_datasets_is_light():
    code = (
        "import sys, medfuncta_jax.datasets; "
        "heavy = {'tensorflow_datasets', 'grain', 'nibabel', 'tensorflow'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
