"""The gradients of this package: importing this module registers them, family by family."""

from __future__ import annotations

from onnxprune.gradients import contraction, elementwise, movement, normalization, pooling, quantization

BUILT_IN = (contraction, elementwise, movement, normalization, pooling, quantization)
