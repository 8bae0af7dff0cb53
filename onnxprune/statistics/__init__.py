"""Statistics of feature maps, accumulated batch by batch in float64. Arrays only, no onnx here."""

from onnxprune.statistics.maps import Maps

__all__ = ["Maps"]
