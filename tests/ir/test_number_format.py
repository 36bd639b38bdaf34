"""Every number format: its codes are of the nearest values of its grid, and survive storage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from panguq.ir.number_format import FORMATS, INT8, NumberFormat


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
