"""panguq: a quantizing graph compiler for large language models on Ascend NPUs and CPUs."""

from panguq.errors import PanguqError

__all__ = ["PanguqError"]
