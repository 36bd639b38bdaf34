"""panguq's own kernels in Triton, in the subset that triton-ascend 3.2.0 takes.

Nothing here is imported before a kernel is launched; only then must triton be there.
"""

if __name__ != "panguq.kernels.ascend.own.triton":
    raise ImportError(
        "this folder is the package panguq.kernels.ascend.own.triton;"
        " install panguq (pip install -e .) and import that"
    )
