"""From fake-quant matmuls to a target's kernel calls."""

if __name__ != "panguq.lowering":
    raise ImportError(
        "this folder is the package panguq.lowering;"
        " install panguq (pip install -e .) and import that"
    )
