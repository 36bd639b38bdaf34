"""The graph: tracing, canonical ops, analyses, edits, printing, checks."""

if __name__ != "panguq.ir":
    raise ImportError(
        "this folder is the package panguq.ir; install panguq (pip install -e .) and import that"
    )
