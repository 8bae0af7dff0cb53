"""The command line: ``onnxprune MODEL.onnx`` prunes, ``onnxprune inspect MODEL.onnx`` shows what could be cut."""

from onnxprune.cli.main import main

__all__ = ["main"]
