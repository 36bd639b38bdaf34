"""panguq's GPTQ and AWQ checkpoints as GPTQModel and, through it, transformers load them.

python -m conformance.gptqmodel [--environment DIR]
"""
