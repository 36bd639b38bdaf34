"""Checks of panguq's own Triton kernels without an NPU.

In Triton's interpreter, by the vendor's compiler, and as native code of this machine. Run by
`python -m conformance.triton`.
"""
