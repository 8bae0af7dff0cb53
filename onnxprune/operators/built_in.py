"""The rules of this package: importing this module registers them, family by family."""

from __future__ import annotations

from onnxprune.operators import (
    attention,
    classical,
    contraction,
    control,
    convolution,
    elementwise,
    experts,
    indexing,
    microsoft,
    movement,
    normalization,
    quantization,
    recurrent,
    sequences,
    spatial,
)

BUILT_IN = (
    attention,
    classical,
    contraction,
    control,
    convolution,
    elementwise,
    experts,
    indexing,
    microsoft,
    movement,
    normalization,
    quantization,
    recurrent,
    sequences,
    spatial,
)
