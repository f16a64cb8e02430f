"""Static int8 of an ONNX network that keeps its features."""
