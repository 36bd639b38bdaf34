"""Integer and 4-bit matmuls on a plain CPU, made of what PyTorch ships."""

if __name__ != "panguq.kernels.cpu":
    raise ImportError(
        "this folder is the package panguq.kernels.cpu;"
        " install panguq (pip install -e .) and import that"
    )
