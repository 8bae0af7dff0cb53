"""One rule per operator: how labels pass through it and how its node is rewritten.

Importing this package registers the built-in rules. Add your own with :func:`register`, see CONTRIBUTING.
"""

from onnxprune.labels.label import Label, along
from onnxprune.rules import (
    attention,
    blocked,
    bodies,
    classical,
    contraction,
    contrib,
    convolution,
    decoding,
    elementwise,
    experts,
    grouped,
    images,
    indexing,
    microsoft,
    movement,
    normalization,
    packed,
    packed_codes,
    quantization,
    quantized,
    ranges,
    recurrent,
    scatter,
    sequences,
    spatial,
)
from onnxprune.rules.context import Cut, Step
from onnxprune.rules.elementwise import Elementwise
from onnxprune.rules.registry import Rule, known, lookup, register, unregister

BUILT_IN = (
    *(attention, blocked, bodies, classical, contraction, convolution, decoding, elementwise, experts, grouped),
    *(contrib, images),
    *(indexing, microsoft, movement, normalization, packed, packed_codes, quantization, quantized, ranges),
    *(recurrent, scatter, sequences, spatial),
)

__all__ = [
    "BUILT_IN",
    "Cut",
    "Elementwise",
    "Label",
    "Rule",
    "Step",
    "along",
    "known",
    "lookup",
    "register",
    "unregister",
]
