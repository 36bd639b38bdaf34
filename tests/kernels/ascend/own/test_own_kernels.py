"""panguq's own kernels without Triton and without a device."""

import subprocess
import sys

import pytest
import torch

from panguq.errors import LoweringError
from panguq.kernels.ascend.own import dynamic_quant as own_dynamic_quant
from panguq.kernels.ascend.own import w4a16, w8a8
from panguq.kernels.ascend.own.triton import launch

OPS = (
    w4a16.w4a16,
    w8a8.w8a8,
    own_dynamic_quant.dynamic_quant,
)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_op_has_a_way_to_a_device(op):
    name = op.name()
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "PrivateUse1")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd")


def test_triton_is_not_needed_before_a_launch():
    code = (
        "import sys, torch\n"
        "sys.modules['triton'] = None\n"
        "from panguq.kernels.ascend.own import dynamic_quant, w4a16, w8a8\n"
        "codes, scale = dynamic_quant.dynamic_quant(torch.ones(2, 8))\n"
        "print(int(codes.sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(127 * 16)


def test_a_launch_without_triton_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(
        sys.modules, "panguq.kernels.ascend.own.triton.dynamic_quant", raising=False
    )
    with pytest.raises(LoweringError, match="triton-ascend, which is not installed"):
        launch.launch_dynamic_quant(torch.ones(2, 8))


def test_the_grid_covers_every_output_and_split():
    assert launch.grid_of(33, 300, [16, 128, 64], 4) == (3, 3, 4)


@pytest.mark.parametrize(
    ("m", "n", "splits", "message"),
    [(4096, 153376, 4, "programs, more than 65535"), (65536, 65536, 1, "places in 32 bits")],
)
def test_what_a_launch_cannot_count_is_refused(m, n, splits, message):
    tile = [16, 128, 64] if splits > 1 else [4096, 4096, 64]
    with pytest.raises(LoweringError, match=message):
        launch.grid_of(m, n, tile, splits)
