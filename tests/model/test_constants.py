"""One way to write a constant: before IR 4 as a node that holds all of its values, else as an initializer."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxprune
from onnxprune.io.constants import add_constant
from onnxprune.io.weights import Weight
from onnxprune.io.write import assemble


@pytest.mark.parametrize("ir", [3, 8])
@pytest.mark.parametrize("size", [4, 4000])
def test_all_values_are_there(ir: int, size: int) -> None:
    text = f'<ir_version: {ir}, opset_import: ["": 9]> net (float[N] x) => (float[N] y) {{ y = Relu (x) }}'
    model = onnx.parser.parse_model(text)
    weights: dict[str, Weight] = {}
    values = np.arange(size, dtype=np.float32)
    add_constant(model, weights, "c", values)
    add_constant(model, weights, "d", values, behind=True)
    whole = assemble(model, weights)
    held = [*whole.graph.initializer, *(n.attribute[0].t for n in whole.graph.node if n.op_type == "Constant")]
    assert len(held) == 2
    assert all(np.array_equal(onnx.numpy_helper.to_array(tensor), values) for tensor in held)
    assert len(whole.graph.initializer) == (2 if ir >= 4 else 0)
    onnx.checker.check_model(whole)


def test_nobody_else_asks_for_the_version() -> None:
    asking = {
        path.name
        for path in Path(onnxprune.__file__).parent.rglob("*.py")
        if re.search(r"ir_version *(<|>=) *4", path.read_text(encoding="utf-8"))
    }
    assert asking == {"constants.py"}
