"""Everything that runs a model: sessions, inputs, comparison, latency. The only package that imports onnxruntime."""
