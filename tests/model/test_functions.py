"""Model-local functions: what is inlined computes what the model with its functions does."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import onnxruntime as ort
import pytest
from onnx import ModelProto, parser

import onnxprune as op
from onnxprune.errors import ModelError
from onnxprune.io.read import load
from onnxprune.io.write import assemble

HEAD = '<ir_version: 10, opset_import: ["": 17, "own": 1]> g (float[N, 4] x) => (float[N, 4] y) '
FUNCTION = '<domain: "own", opset_import: ["": 17, "own": 1]> '
LEAKY = FUNCTION + "f <alpha: float = 0.5> (a) => (b) { b = LeakyRelu <alpha: float = @alpha> (a) }"
CHOICE = """{ s = ReduceSum <keepdims = 0> (a)  z = Constant <value_float = 0.0> ()  c = Greater (s, z)
  b = If (c) <then_branch = t () => (p) { p = LeakyRelu <alpha: float = @alpha> (a) },
              else_branch = e () => (q) { q = Elu <alpha: float = @alpha> (a) }> }"""

MODELS = {
    "default": HEAD + "{ y = own.f (x) }" + LEAKY,
    "given": HEAD + "{ y = own.f <alpha = 0.25> (x) }" + LEAKY,
    "both": HEAD + "{ a = own.f <alpha = 0.25> (x)  b = own.f (a)  c = own.f <alpha = 0.5> (b) "
    "y = Add (b, c) }" + LEAKY,
    "no value anywhere": HEAD + "{ y = own.f (x) }" + LEAKY.replace("<alpha: float = 0.5>", "<alpha>"),
    "default of the inner": HEAD
    + "{ y = own.o (x) }"
    + LEAKY
    + FUNCTION
    + "o <beta> (a) => (b) { b = own.f <alpha: float = @beta> (a) }",
    "default of the outer": HEAD
    + "{ a = own.o (x)  y = own.o <beta = 0.7> (a) }"
    + LEAKY
    + FUNCTION
    + "o <beta: float = 0.3> (a) => (b) { c = own.f <alpha: float = @beta> (a)  d = own.f (a)  b = Add (c, d) }",
    "body of a function": HEAD + "{ y = own.f (x) }" + FUNCTION + "f <alpha: float = 0.5> (a) => (b) " + CHOICE,
    "call in a body": HEAD
    + CHOICE.replace("(a)", "(x)")
    .replace("b =", "y =")
    .replace("LeakyRelu <alpha: float = @alpha>", "own.f")
    .replace("Elu <alpha: float = @alpha>", "own.f <alpha = 0.9>")
    + LEAKY,
    "overloads": HEAD
    + "{ a = own.f:one (x)  y = own.f:two (a) }"
    + LEAKY.replace('"own",', '"own", overload: "one",', 1)
    + LEAKY.replace('"own",', '"own", overload: "two",', 1).replace("0.5", "0.2").replace("LeakyRelu", "Elu"),
    "tensor": HEAD
    + "{ y = own.f (x) }"
    + FUNCTION
    + "f <w: tensor = float[1] {3.0}> (a) => (b) { c = Constant <value: tensor = @w> ()  b = Mul (a, c) }",
    "names of attributes swapped": HEAD
    + "{ y = own.f <beta = 0.3> (x) }"
    + FUNCTION
    + "f <alpha: float = 0.9, beta: float = 0.1> (a) => (b) "
    "{ b = HardSigmoid <alpha: float = @beta, beta: float = @alpha> (a) }",
}


def outputs(model: ModelProto) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    feeds = [{"x": sign * np.abs(draw.standard_normal((3, 4)).astype(np.float32)) - 0.1} for sign in (1, -1)]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [session.run(None, feed)[0] for feed in feeds]


@pytest.mark.parametrize("name", MODELS)
def test_attributes_survive_inlining(name: str) -> None:
    model = parser.parse_model(MODELS[name])
    before = model.SerializeToString()
    loaded = load(model)
    assert not loaded.proto.functions and not any(n.domain == "own" for n in loaded.proto.graph.node)
    assert model.SerializeToString() == before
    if name == "overloads" and not knows_overloads():
        pytest.skip("this onnxruntime takes the first overload for all of them")
    for want, have in zip(outputs(model), outputs(assemble(loaded.proto, loaded.weights)), strict=True):
        np.testing.assert_array_equal(want, have)


def knows_overloads() -> bool:
    one, two = (
        outputs(parser.parse_model(MODELS["overloads"].replace(" own.f:one (x)", f" own.f:{n} (x)")))
        for n in ("one", "two")
    )
    return not np.array_equal(one[0], two[0])


@pytest.mark.parametrize(("name", "alpha"), [("default", 0.5), ("given", 0.25)])
def test_defaults_by_the_reference_evaluator(name: str, alpha: float) -> None:
    loaded = load(parser.parse_model(MODELS[name]))
    evaluator = onnx.reference.ReferenceEvaluator(assemble(loaded.proto, loaded.weights))
    (y,) = evaluator.run(None, {"x": np.array([[-1, -2, 3, 4]], np.float32)})
    np.testing.assert_array_equal(y, [[-alpha, -2 * alpha, 3, 4]])


def test_an_output_that_is_an_input() -> None:
    model = parser.parse_model(
        HEAD.replace("y)", "y, float[N, 4] z)") + "{ y, z = own.f (x) }" + FUNCTION + "f (a) => (a, b) { b = Neg (a) }"
    )
    loaded = load(model)
    assert [n.op_type for n in loaded.proto.graph.node] == ["Neg", "Identity"]
    onnx.checker.check_model(assemble(loaded.proto, loaded.weights), full_check=True)


def test_operator_sets_of_functions() -> None:
    """Another version that says the same is the model's; one that does not stays a call; new domains are imported."""
    model = parser.parse_model(
        HEAD + "{ a = own.f (x)  y = own.h (a) }"
        '<domain: "own", opset_import: ["": 16, "com.microsoft": 1]> f (a) => (c) '
        "{ b = com.microsoft.QuickGelu <alpha = 1.0> (a)  c = Relu (b) }"
        '<domain: "own", opset_import: ["": 11]> h (a) => (c) { c = Softmax (a) }'
    )
    proto = load(model).proto
    assert [n.op_type for n in proto.graph.node] == ["QuickGelu", "Relu", "h"]
    assert {o.domain for o in proto.opset_import} == {"", "own", "com.microsoft"}


def test_doubling_calls_are_bound_once() -> None:
    functions = [FUNCTION + f"f{k} (a) => (c) {{ b = own.f{k + 1} (a)  c = own.f{k + 1} (b) }}" for k in range(3)]
    model = parser.parse_model(HEAD + "{ y = own.f0 (x) }" + "".join(functions) + LEAKY.replace("f <", "f3 <"))
    nodes = load(model).proto.graph.node
    assert len(nodes) == 8 and all(n.attribute[0].f == 0.5 for n in nodes)


@pytest.mark.parametrize("text", ["f (a) => (c) { c = own.h (a) }", "f (a) => (c) { c = own.f (a) }"])
def test_functions_that_call_themselves(text: str) -> None:
    other = FUNCTION + "h (a) => (c) { c = own.f (a) }"
    with pytest.raises(ModelError, match=r"cannot be inlined: the function '\w' calls itself"):
        load(parser.parse_model(HEAD + "{ y = own.f (x) }" + FUNCTION + text + other))


def test_a_pruned_model_keeps_the_defaults_of_its_functions() -> None:
    draw = np.random.default_rng(0)
    model = parser.parse_model(
        HEAD + "{ a = MatMul (x, w1)  b = own.f (a)  y = MatMul (b, w2) }" + LEAKY.replace("0.5", "-0.5")
    )
    for name, shape in (("w1", (4, 8)), ("w2", (8, 4))):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(draw.standard_normal(shape).astype(np.float32), name)
        )
    same = op.prune(model, ratio=0.0, latency=False).model
    for want, have in zip(outputs(model), outputs(same), strict=True):
        np.testing.assert_allclose(want, have, rtol=1e-6)
    assert op.prune(model, ratio=0.5, latency=False).report.exactness.passed
