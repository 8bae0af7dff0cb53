"""Small models in onnx's text format, shared by the runtime tests."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

HEADER = '<ir_version: 10, opset_import: ["" : 21, "vendor" : 1, "ai.onnx.ml" : 3]>\n'


def model(text: str, **weights: np.ndarray) -> bytes:
    """The serialised model of a graph in text, with extra initializers."""
    parsed = onnx.parser.parse_model(HEADER + text)
    for name, array in weights.items():
        parsed.graph.initializer.append(numpy_helper.from_array(array, name))
    return bytes(parsed.SerializeToString())


def mlp(rng: np.random.Generator, hidden: int = 8, keep: list[int] | None = None, output: str = "y") -> bytes:
    """Two layers over 4 inputs; with ``keep`` the hidden units that are left."""
    w1 = rng.standard_normal((4, hidden)).astype(np.float32)
    w2 = rng.standard_normal((hidden, 3)).astype(np.float32)
    if keep is not None:
        w1, w2 = w1[:, keep], w2[keep]
    text = (
        f"agraph (float[N,4] x) => (float[N,3] {output}) {{ h = MatMul(x, w1) r = Relu(h) {output} = MatMul(r, w2) }}"
    )
    return model(text, w1=w1, w2=w2)
