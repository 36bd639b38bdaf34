"""Groups of different widths: what is packed comes back, in exactly as many bytes as said."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from panguq.ir.ops.mixed_packing import pack_mixed_codes, unpack_mixed_codes
from panguq.ir.ops.packing import pack_codes


def random_codes(n: int, bits: list[int], group_size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)

    def group(width: int) -> torch.Tensor:
        size = (n, group_size)
        if width == 1:
            return torch.randint(0, 2, size, generator=generator) * 2 - 1
        return torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), size, generator=generator)

    return torch.cat([group(width) for width in bits], 1).to(torch.int8)


@given(
    bits=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    n=st.integers(1, 4),
    group_size=st.sampled_from([4, 8, 20, 32]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_every_code_survives_the_round_trip(bits, n, group_size, seed):
    codes = random_codes(n, bits, group_size, seed)
    widths = torch.tensor(bits, dtype=torch.uint8)
    packed = pack_mixed_codes(codes, widths, group_size)
    expected = sum(group_size if b == 8 else -(-group_size // 8) * b for b in bits)
    assert packed.shape == (n, expected) and packed.dtype == torch.uint8
    assert torch.equal(unpack_mixed_codes(packed, widths, group_size), codes)


def test_groups_follow_each_other_as_pack_codes_packs_them():
    codes = random_codes(3, [2, 3], 32)
    packed = pack_mixed_codes(codes, torch.tensor([2, 3], dtype=torch.uint8), 32)
    parts = [pack_codes(codes[:, :32], 2), pack_codes(codes[:, 32:], 3)]
    assert torch.equal(packed, torch.cat(parts, 1))


def test_one_bit_stands_for_minus_one_and_one():
    codes = torch.tensor([[1, -1, 1, 1, -1, 1, 1, 1]], dtype=torch.int8)
    bits = torch.tensor([1], dtype=torch.uint8)
    assert pack_mixed_codes(codes, bits, 8).tolist() == [[0b00010010]]


def test_the_fake_agrees_with_the_body():
    bits = torch.tensor([1, 4, 8], dtype=torch.uint8)
    packed = pack_mixed_codes(random_codes(3, [1, 4, 8], 16), bits, 16)
    opcheck(unpack_mixed_codes, (packed, bits, 16))
