"""The comparison itself: a wrong result must not pass."""

import pytest
import torch


@pytest.mark.parametrize(
    "wrong",
    [lambda y: 2 * y, lambda y: -y, lambda y: y.flip(0), lambda y: y[:1], lambda y: y.double()],
)
def test_a_wrong_result_fails(assert_close, wrong):
    expected = torch.randn(4, 8)
    with pytest.raises(AssertionError):
        assert_close(expected, wrong(expected), 3)


def test_an_equal_result_passes_at_any_bound(assert_close):
    assert_close(torch.zeros(4), torch.zeros(4), 300)
