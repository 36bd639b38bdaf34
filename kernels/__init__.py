"""Quantized matmuls: for each op one contract, one reference body, one fake."""

if __name__ != "panguq.kernels":
    # From the project's root this folder shadows the package `kernels` of PyPI, which transformers
    # probes for by importing it: offer nothing under that name, and look like no installed package.
    __path__.clear()
    del __file__
