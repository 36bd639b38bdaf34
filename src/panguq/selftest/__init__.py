"""What `panguq selftest` does on a machine with an NPU: numbers and times of all that panguq calls.

`npu_calls` and `moe_calls` hold legal calls of every op of torch_npu that a lowered graph may
contain.
"""
