"""The command line: ``onnxprune MODEL.onnx`` prunes, ``onnxprune inspect MODEL.onnx`` lists its layers."""

from onnxprune.cli.main import main

__all__ = ["main"]
