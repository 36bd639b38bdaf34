"""torch_npu's ops: contract, CPU body, fake."""
