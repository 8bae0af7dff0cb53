"""Gradients of ONNX graphs as more ONNX nodes, so that any runtime of ONNX can train."""
