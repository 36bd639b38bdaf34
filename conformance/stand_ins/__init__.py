"""Stand-ins for the CANN libraries that torch_npu links: enough to run its host code."""
