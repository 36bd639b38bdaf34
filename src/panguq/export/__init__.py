"""Ways out: ONNX to look at, and checkpoints in the formats that servers load."""
