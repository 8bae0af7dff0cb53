"""Facts that a rule states of its operator: every stage asks the rule, so that an operator of a vendor has them too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxprune as op
from onnxprune.graph.facts import integer_bounds
from onnxprune.graph.precision import draws, jumps
from onnxprune.operators.factoring import Product
from onnxprune.operators.registry import lookup, with_facts
from onnxprune.rules import Elementwise, Pairwise, Rule, rule_of

ACME = "com.acme"


class Linear(Rule):
    """x [N, inputs] times w [inputs, outputs]."""

    weights = (1,)
    factoring = Product()

    def form(self, node: Any, shapes: list[Any], data: int) -> Pairwise | None:
        return Pairwise(("nk", "km", "nm"), shapes[1]) if shapes[1] else None

    def infer(self, node: Any, shapes: list[Any], values: Any) -> list[Any]:
        return [(shapes[0][0], shapes[1][1])]


class SizeOf(Rule):
    """Sizes of a tensor, like Shape."""

    reads_sizes = True

    def propagate(self, step: Any) -> None:
        step.labels(0)

    def infer(self, node: Any, shapes: list[Any], values: Any) -> list[Any]:
        return [(len(shapes[0]),)]

    def size_values(self, node: Any, shape: Sequence[int | None]) -> Any:
        return None if None in shape else np.asarray(shape, np.int64)


class Lookup(Rule):
    """Rows of a table, input 1, by indices, input 0."""

    def index_limit(self, node: Any, i: int, shapes: Sequence[Any], read: Any) -> int | None:
        return None if i else int(shapes[1][0])

    def infer(self, node: Any, shapes: list[Any], values: Any) -> list[Any]:
        return [(*shapes[0], shapes[1][1])]


RULES: Mapping[str, Rule] = {
    "Linear": Linear(),
    "SizeOf": SizeOf(),
    "Lookup": Lookup(),
    "Pick": with_facts(Elementwise([0]), jumps=True),
    "Noise": with_facts(Elementwise([0]), random=True),
    "Drop": with_facts(Elementwise([0]), training=1),
}


def model_of(
    nodes: Sequence[onnx.NodeProto], x: tuple[int, ...], y: tuple[int, ...], weights: Mapping[str, Any], kind: int
) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes),
        "net",
        [info("x", kind, x)],
        [info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(ACME, 1)])


@pytest.fixture(autouse=True)
def rules() -> Iterator[None]:
    for name, rule in RULES.items():
        op.rules.register(ACME, name, rule=rule)
    yield
    for name in RULES:
        op.rules.unregister(ACME, name)


def test_a_vendors_product_is_factorized() -> None:
    draw = np.random.default_rng(0)
    low = (draw.normal(size=(12, 2)) @ draw.normal(size=(2, 16))).astype(np.float32)
    node = helper.make_node("Linear", ["x", "w"], ["y"], domain=ACME)
    model = model_of([node], (4, 12), (4, 16), {"w": low}, TensorProto.FLOAT)
    result = op.Pipeline([op.passes.Factorize("svd", rank=2, check=False)]).run(model).model
    assert [(n.domain, n.op_type) for n in result.graph.node] == [(ACME, "Linear")] * 2
    first, second = (numpy_helper.to_array(t) for t in result.graph.initializer)
    np.testing.assert_allclose(first @ second, low, atol=1e-5)


def test_sizes_that_a_vendors_operator_reads_are_known() -> None:
    nodes = [
        helper.make_node("SizeOf", ["x"], ["sizes"], domain=ACME),
        helper.make_node("Reshape", ["x", "sizes"], ["y"]),
    ]
    analysis = op.analyze(model_of(nodes, (2, 6), (2, 6), {}, TensorProto.FLOAT))
    assert analysis.facts.probes[0].values.get("sizes").tolist() == [2, 6]


def test_indices_of_a_vendors_table_stay_inside() -> None:
    node = helper.make_node("Lookup", ["x", "table"], ["y"], domain=ACME)
    analysis = op.analyze(model_of([node], (3,), (3, 4), {"table": np.zeros((7, 4), np.float32)}, TensorProto.INT64))
    assert integer_bounds(analysis.graph, analysis.facts)["x"] == (0, 6)


def test_a_vendors_operator_jumps_or_draws() -> None:
    floats = {TensorProto.FLOAT}
    assert jumps(lookup(ACME, "Pick"), floats, floats) and not jumps(lookup("", "Relu"), floats, floats)
    assert draws(helper.make_node("Noise", ["x"], ["y"], domain=ACME))
    drop = helper.make_node("Drop", ["x", "training"], ["y"], domain=ACME)
    assert draws(drop) and not draws(drop, {"training": np.array(False)})


def test_facts_are_those_that_rules_have() -> None:
    with pytest.raises(AttributeError, match="jump"):
        with_facts(Elementwise(), jump=True)


def nodes_of(text: str) -> Sequence[Any]:
    """Nodes of a graph in onnx's text format."""
    opsets = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
    return op.analyze(onnx.parser.parse_model(f"{opsets} net {text}")).graph.nodes


def test_defaults_of_attributes_are_those_of_the_operators() -> None:
    (flatten,) = nodes_of("(float[2,3,4] x) => (float[2,12] y) { y = Flatten(x) }")
    assert rule_of(flatten).infer(flatten, [(2, 3, 4)], [None]) == [(2, 12)]
    (product,) = nodes_of("(float[2,3] x, float[3,4] w) => (float[2,4] y) { y = com.microsoft.FusedMatMul(x, w) }")
    assert rule_of(product).infer(product, [(2, 3), (3, 4)], [None, None]) == [(2, 4)]
    assert list(rule_of(product).agreements(product, [(2, 3), (3, 4)], lambda i: None)) == [(3, 3)]


def test_parts_of_a_split_add_up_to_its_axis() -> None:
    (split,) = nodes_of(
        "(float[6,2] x, int64[2] s) => (float[2,2] y, float[4,2] z) { y, z = Split <axis: int = 0> (x, s) }"
    )
    sizes = {1: np.array([2, 5])}
    assert list(rule_of(split).agreements(split, [(6, 2), (2,)], sizes.get)) == [(6, 7)]


def test_a_loop_may_run_never() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> net (float[2] x) => (float[2] y, float[n,2] z)
        <int64 trips = {0}, bool go = {1}> {
        y, z = Loop(trips, go, x) <body = body (int64 i, bool c, float[2] a) => (bool d, float[2] b, float[2] e) {
            d = Identity(c) b = Add(a, a) e = Identity(a) }> }"""
    )
    assert op.analyze(model).facts.shape("z") == (0, 2)
