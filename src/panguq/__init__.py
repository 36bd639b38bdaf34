"""panguq: a quantizing graph compiler for large language models on Ascend NPUs and CPUs."""

from panguq.errors import PanguqError

__all__ = ["PanguqError", "compile"]


def __getattr__(name: str):
    if name == "compile":
        from panguq.compiler import compile

        return compile
    raise AttributeError(name)
