"""Attacks on panguq with random input, drawn by a seed: `make fuzz`, or `python -m fuzz`.

panguq is to do what it is asked, or to refuse with one PanguqError that says why. Everything else
is a fault: another exception, an error that blames panguq itself, a wrong result, a hang, a crash.
`kinds.py` lists the attacks; tests/fuzz runs a few cases of each.
"""
