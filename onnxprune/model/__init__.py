"""Model files: reading, graph view, shapes and known values, hoisting, writing. The only package that imports onnx."""
