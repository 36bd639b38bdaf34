"""Run by the Python of `.venv-vllm-ascend`: vllm-ascend's own code on CPU tensors."""
