"""Graph rewrites, one file a pass, and the pipeline that runs them."""

if __name__ != "panguq.passes":
    raise ImportError(
        "this folder is the package panguq.passes;"
        " install panguq (pip install -e .) and import that"
    )
