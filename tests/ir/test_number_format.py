"""Every number format: its codes are of the nearest values of its grid, and survive storage."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from panguq.ir.number_format import FLOAT8_E4M3, FORMATS, INT8, NumberFormat


def grid(number_format: NumberFormat) -> Tensor:
    """All values of a format, rising, found by rounding a fine comb over its whole range."""
    comb = torch.linspace(number_format.smallest, number_format.largest, 1 << 16)
    end = max(-number_format.smallest, number_format.largest)
    fine = comb.sign() * comb.abs().pow(4) / end**3  # dense around zero
    return number_format.decode(number_format.encode(torch.cat([comb, fine]))).unique()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_found_by_its_name_and_ends_where_it_says(name):
    known = FORMATS[name]
    values = grid(known)
    assert known.name == str(known) == name
    assert (float(values[0]), float(values[-1])) == (known.smallest, known.largest)
    assert len(values) <= 2**known.bits
    codes = known.encode(values)
    assert codes.dtype == known.storage
    assert torch.equal(known.decode(codes), values)


GRIDS = {name: grid(known) for name, known in FORMATS.items()}


@given(
    name=st.sampled_from(sorted(FORMATS)),
    values=st.lists(st.floats(-600, 600, width=32), min_size=1, max_size=50),
)
def test_codes_are_those_of_the_nearest_values(name, values):
    x, known = torch.tensor(values), FORMATS[name]
    found = known.decode(known.encode(x))
    distances = (GRIDS[name][:, None].double() - x.double()).abs()
    assert torch.equal((found.double() - x.double()).abs(), distances.amin(0))


@pytest.mark.parametrize("name", FORMATS)
def test_infinities_get_the_ends(name):
    known = FORMATS[name]
    ends = known.decode(known.encode(torch.tensor([-torch.inf, torch.inf])))
    assert ends.tolist() == [known.smallest, known.largest]


def test_integers_round_halves_to_even():
    assert INT8.encode(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])).tolist() == [0, 2, 2, 0, -2]


# --- FP8 E4M3 -----------------------------------------------------------------------------------


def reference(byte: int) -> float:
    """The value of a byte, from its sign, exponent and mantissa (OCP FP8, table 1)."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


BYTES = torch.arange(256, dtype=torch.uint8)


def test_every_byte_has_its_value_and_every_value_its_byte():
    codes = BYTES.view(torch.float8_e4m3fn)
    values = FLOAT8_E4M3.decode(codes)
    expected = torch.tensor([reference(byte) for byte in range(256)])
    assert torch.equal(values.nan_to_num(999), expected.nan_to_num(999))
    assert (values.signbit() == expected.signbit())[~expected.isnan()].all()  # -0 is one
    assert torch.equal(FLOAT8_E4M3.encode(values).view(torch.uint8), BYTES)


def test_halfway_between_two_values_the_even_byte_wins():
    positive = FLOAT8_E4M3.decode(BYTES[:127].view(torch.float8_e4m3fn))
    halfway = (positive[1:] + positive[:-1]) / 2  # subnormals, normals and across binades
    even = torch.arange(126).add(1).div(2, rounding_mode="floor").mul(2).to(torch.uint8)
    assert torch.equal(FLOAT8_E4M3.encode(halfway).view(torch.uint8), even)
    above = torch.nextafter(halfway, torch.tensor(1e9))
    assert torch.equal(FLOAT8_E4M3.encode(above).view(torch.uint8), BYTES[1:127])


@given(st.floats(width=32, allow_nan=False))
def test_no_number_becomes_a_nan(value):
    found = float(FLOAT8_E4M3.decode(FLOAT8_E4M3.encode(torch.tensor(value))))
    assert math.isfinite(found) and (abs(value) < 448 or abs(found) == 448)


def test_a_nan_stays_one():
    assert FLOAT8_E4M3.decode(FLOAT8_E4M3.encode(torch.tensor(math.nan))).isnan()
