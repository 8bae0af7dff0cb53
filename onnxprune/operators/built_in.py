"""The rules of this package: importing it registers them, family by family."""

from onnxprune.operators import (
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

BUILT_IN = (
    *(attention, blocked, bodies, classical, contraction, convolution, decoding, elementwise, experts, grouped),
    *(contrib, images),
    *(indexing, microsoft, movement, normalization, packed, packed_codes, quantization, quantized, ranges),
    *(recurrent, scatter, sequences, spatial),
)
