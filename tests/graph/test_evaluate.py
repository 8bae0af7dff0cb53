"""Operators of the evaluator's own table give what onnx's reference evaluator gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from onnxprune.graph import evaluate
from onnxprune.graph.view import Node
from onnxprune.operators.registry import rule_of

DATA = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
CASES: list[tuple[str, dict[str, Any], list[np.ndarray]]] = [
    ("Pow", {}, [np.array([1.5, -2.0, 0.0], np.float32), np.array(2.0, np.float32)]),
    ("Pow", {}, [np.array([2, 3, -4]), np.array([3, 1, 2])]),
    ("Pow", {}, [np.array([2, 3]), np.array([0.5, 2.0], np.float32)]),
    ("Pow", {}, [np.array([2.0, -1.0], np.float32), np.array([[2], [3]])]),
    ("ScatterND", {}, [DATA, np.array([[1], [-1], [1]]), np.ones((3, 3, 2), np.float32) * [[[5]], [[6]], [[7]]]]),
    ("ScatterND", {}, [DATA, np.array([[[0, 2], [3, -3]]]), np.array([[[7, 8], [9, 10]]], np.float32)]),
    ("ScatterND", {}, [DATA, np.array([[0, 1, 1], [3, 0, 0]]), np.array([70, 80], np.float32)]),
    ("ScatterND", {}, [DATA, np.zeros((0, 1), np.int64), np.zeros((0, 3, 2), np.float32)]),
    ("ScatterND", {}, [np.array([4, 5, 6]), np.array([[2], [0]]), np.array([1, 2])]),
    ("ScatterND", {"reduction": "add"}, [np.array([4, 5, 6]), np.array([[2], [2]]), np.array([1, 2])]),
]


@pytest.mark.parametrize(("op", "attrs", "values"), CASES)
def test_the_table_says_what_the_reference_says(op: str, attrs: dict[str, Any], values: list[np.ndarray]) -> None:
    inputs = [f"x{i}" for i in range(len(values))]
    proto = helper.make_node(op, inputs, ["y"], **attrs)
    node = Node(0, op, "", 18, "", inputs, ["y"], proto)
    before = [v.copy() for v in values]
    with np.errstate(all="ignore"):
        expected = evaluate._reference(node, values)
    found = evaluate.evaluate(node, list(values))
    assert rule_of(node).evaluate(node, list(values)) is not None or "reduction" in attrs or not values[1].size
    assert expected is not None and found is not None
    assert found[0].dtype == expected[0].dtype
    np.testing.assert_array_equal(found[0], expected[0])
    for value, old in zip(values, before, strict=True):
        np.testing.assert_array_equal(value, old)
