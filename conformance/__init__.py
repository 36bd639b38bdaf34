"""Checks of panguq's Ascend calls against the real torch_npu and torchair, without an NPU.

Run by `make conformance` or `python -m conformance`; README.md says what they prove.
"""
