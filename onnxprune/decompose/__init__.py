"""Decompositions of kernels into smaller ones, by name. Arrays only, no onnx here."""

from onnxprune.decompose.cp import Cp, Degenerate
from onnxprune.decompose.factor import Factor, Stage, compose
from onnxprune.decompose.method import Fit, Method, Mode, Ranks, Shape, shape_of
from onnxprune.decompose.metric import Metric
from onnxprune.decompose.spatial import SpatialSvd
from onnxprune.decompose.svd import Svd
from onnxprune.decompose.tucker import Tucker

METHODS: dict[str, Method] = {m.name: m for m in (Svd(), Tucker(), Cp(), SpatialSvd())}
"""Every method by its name on the command line."""

__all__ = [
    "METHODS",
    "Cp",
    "Degenerate",
    "Factor",
    "Fit",
    "Method",
    "Metric",
    "Mode",
    "Ranks",
    "Shape",
    "SpatialSvd",
    "Stage",
    "Svd",
    "Tucker",
    "compose",
    "shape_of",
]
