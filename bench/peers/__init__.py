"""panguq against other quantizers: same model, same calibration tokens, same evaluation.

Each peer runs in a virtual environment of its own and is never a dependency of panguq.
"""
