"""Training of ONNX graphs by onnxruntime alone: parameters, losses, steps, the optimiser and the loop."""
