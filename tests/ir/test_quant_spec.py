"""Schemes by name, with options."""

from __future__ import annotations

import pytest

from panguq.errors import RecipeError
from panguq.ir.quant_spec import SCHEMES, parse_scheme


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_found_by_its_name(name) -> None:
    assert parse_scheme(name) is SCHEMES[name]
    assert parse_scheme(name.lower()) is SCHEMES[name]


@pytest.mark.parametrize(
    ("text", "name", "bits", "group_size", "symmetric"),
    [
        ("w4a16-g64", "W4A16-g64", 4, 64, True),
        ("W4A16-asym", "W4A16_ASYM", 4, 128, False),
        ("W4A16_ASYM-sym-g32", "W4A16-g32", 4, 32, True),
        ("W4A8-per_channel", "W4A8-per_channel", 4, None, True),
        ("W3A16", "W3A16", 3, 128, False),
        ("W3A16-g64-SYM", "W3A16-sym-g64", 3, 64, True),
        ("W2A16-PER_channel", "W2A16-per_channel", 2, None, False),
        ("W6A16-asym", "W6A16-asym", 6, 128, False),
    ],
)
def test_options(text, name, bits, group_size, symmetric) -> None:
    scheme = parse_scheme(text)
    weight = scheme.weight
    assert (scheme.name, weight.bits, weight.group_size) == (name, bits, group_size)
    assert weight.symmetric == symmetric
    assert parse_scheme(name) == scheme


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("W4A17", "unknown scheme 'W4A17'", "did you mean W4A1"),
        ("mxfp8", "'mxfp8': panguq has no kernel of MXFP8", "choose W8A8_DYNAMIC"),
        ("MXFP4", "'MXFP4': panguq has no kernel of MXFP4", "choose W4A8"),
        ("W4A8_MXFP4", "panguq has no kernel of MXFP4", "choose W4A8"),
        ("MXFP5", "unknown scheme 'MXFP5'", "The schemes are"),
        ("W4A16-g48", "unknown option 'G48'", "write -g32"),
        ("W8A8-g64", "has no groups", "write W8A8"),
        ("FLOAT-g64", "has no groups", "write FLOAT"),
        ("W8A8-asym", "only weight-only schemes below 8 bits", "write W8A8"),
        ("W4A8-asym", "only weight-only schemes below 8 bits", "write W4A8"),
        ("FLOAT-sym", "only weight-only schemes below 8 bits", "write FLOAT"),
        ("W1A16-sym", "one bit around zero has one level", "write W1A16"),
        ("W4A16-per_channel-g64", "has no groups", "write W4A16"),
    ],
)
def test_what_is_no_scheme_is_refused(text, message, hint) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_scheme(text)
    assert caught.value.hint.startswith(hint)


def test_codes_and_groups() -> None:
    two = SCHEMES["W2A16"].weight
    assert (two.quant_min, two.quant_max) == (-2, 1)
    assert two.group_size_for(576) == 64
    assert SCHEMES["W6A6"].activation.quant_min == -31
