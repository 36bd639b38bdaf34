"""Matmuls on an Ascend NPU: CANN's ops as torch_npu names them, and panguq's own kernels."""

if __name__ != "panguq.kernels.ascend":
    raise ImportError(
        "this folder is the package panguq.kernels.ascend;"
        " install panguq (pip install -e .) and import that"
    )
