"""Units: values in [0, 1] and what they were, exactly and through text."""

import numpy as np
import pytest

from medfuncta_jax.units import Units, units_between


def test_values_come_back():
    values = np.random.default_rng(0).normal(size=(50, 3)) * [1, 10, 100]
    units = units_between(values.min(0), values.max(0), values=values)
    signal = (values - values.min(0)) / (values.max(0) - values.min(0))
    np.testing.assert_allclose(units.values(signal), values, rtol=1e-12, atol=1e-12)
    assert units.clipped == 0
    assert units.notes == ""


def test_samples_are_those_of_the_file():
    units = Units((-1000.0,), (3000.0,), unit="HU", dtype="int16", slope=2.0, intercept=-1024.0)
    stored = units.stored(np.array([[0.0], [0.5], [1.0]]))
    assert stored.dtype == np.int16
    np.testing.assert_array_equal(stored[:, 0], [12, 762, 1512])
    low = Units((-10.0,), (300.0,), dtype="uint8")
    np.testing.assert_array_equal(low.stored(np.array([[0.0], [1.0]]))[:, 0], [0, 255])  # cut, not wrapped


def test_what_is_clipped_or_shared_is_said():
    units = units_between(0.0, 1.0, values=np.array([[-1.0], [0.5], [1.0], [2.0]]), shared="signals")
    assert units.clipped == 0.5
    assert units.notes == "one scale for all signals; 50 % of the values were clipped"


def test_channels_that_were_not_recorded_have_no_values():
    units = Units(
        (0.0,), (2.0,), "mV", shared="channels", time=(0.0, 0.01), columns=("s", "I", "II", "V1"), missing=(1,)
    )
    values = units.values(np.ones((4, 3)))
    np.testing.assert_array_equal(values, [[2, np.nan, 2]] * 4)
    assert units.notes == "one scale for all channels; not recorded: II"
    assert Units(missing=(0, 2)).notes.endswith("not recorded: channel 0, channel 2")


@pytest.mark.parametrize(
    "units",
    [
        Units(),
        Units((1.0, -2.5), (1e-9, 4.0), "mV", "", time=(0.25, 0.004), columns=("t", "I", "Ü"), shared="channels"),
        Units(missing=(0, 3)),
    ],
)
def test_through_text(units):
    assert Units.from_json(units.to_json()) == units
    assert "\n" not in units.to_json()


def test_entries_of_a_later_version_are_left_out():
    assert Units.from_json('{"later": 1, "unit": "HU"}') == Units(unit="HU")
