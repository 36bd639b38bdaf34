"""ONNX files to look at."""
