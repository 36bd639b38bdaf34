"""panguq's compressed-tensors checkpoints in the releases of the real loaders that pip can install.

python -m conformance.compressed_tensors [--environment DIR] [--model tiny|smollm2|all]
"""
