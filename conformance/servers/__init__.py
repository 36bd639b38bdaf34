"""What panguq writes, in the loaders and layers of real servers, on CPU tensors.

python -m conformance.servers [--only vllm-ascend vllm] [--rows NAME ...] [--update]
"""
