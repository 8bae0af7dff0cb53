"""Training of ONNX graphs by onnxruntime alone: what is trained, losses, steps, the optimiser and the loop."""
