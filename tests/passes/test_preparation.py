"""Every step between the file and the prepared graph broken on purpose: no run may go through, at ratio 0 either."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from onnx import numpy_helper, parser

import onnxprune as op
from onnxprune.errors import ValidationError
from onnxprune.graph import canonical, restore
from onnxprune.graph.canonical import Fold, Pick, Selections
from onnxprune.io import functions, read, subgraphs
from onnxprune.io.weights import BufferWeight, Weight
from onnxprune.passes import prepared
from onnxprune.pruning.subnormals import FlushedWeight

Patch = pytest.MonkeyPatch
Model = onnx.ModelProto


def filled(text: str, **shapes: Any) -> Model:
    """The model of a text with drawn initializers."""
    model: Model = parser.parse_model(text)
    draw = np.random.default_rng(5)
    for name, shape in shapes.items():
        array = (draw.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        if name == "tiny":
            array[0] = 1e-40
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def plain() -> Model:
    head = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 3] y) '
    body = "{ a = MatMul (x, tiny)  b = Relu (a)  y = MatMul (b, w2) }"
    return filled(head + body, tiny=(4, 8), w2=(8, 3))


def calling() -> Model:
    return filled(
        '<ir_version: 8, opset_import: ["": 17, "own": 1]> g (float[N, 4] x) => (float[N, 3] y) '
        "{ a = MatMul (x, w1)  b = own.f (a)  y = MatMul (b, w2) }"
        '<domain: "own", opset_import: ["": 17]> f <alpha: float = -0.5> (a) => (b) '
        "{ b = LeakyRelu <alpha: float = @alpha> (a) }",
        w1=(4, 8),
        w2=(8, 3),
    )


def branching() -> Model:
    """The inputs that are drawn never take the second branch."""
    return filled(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 3] y) '
        "{ a = MatMul (x, w1)  square = Mul (x, x)  least = ReduceMin <keepdims = 0> (square) "
        "none = Constant <value_float = 0.0> ()  c = GreaterOrEqual (least, none) "
        "b = If (c) <then_branch = yes () => (float[N, 8] t) { t = Relu (a) }, "
        "else_branch = no () => (float[N, 8] e) { e = LeakyRelu <alpha = 0.7> (a) }>  y = MatMul (b, w2) }",
        w1=(4, 8),
        w2=(8, 3),
    )


def folding() -> Model:
    """The first weight is computed, and folded in a branch as well."""
    net = Net(17)
    x = net.input("x", ["N", 4])
    x = net.op("Relu", net.op("MatMul", x, net.op("Mul", net.weight(4, 8), net.op("Abs", net.weight(1, 8)))))
    return net.model(net.linear(x, 8, 3))


def hoisting() -> Model:
    """One projection for Q, K and V of two heads of size 4."""
    net = Net(17)
    y = net.reshape(net.linear(net.input("x", ["N", 5, 6]), 6, 24), 0, -1, 3, 2, 4)
    y = net.transpose(y, 2, 0, 3, 1, 4)
    q, k, v = (net.gather(y, i, 0) for i in range(3))
    scores = net.op("Softmax", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), axis=-1)
    z = net.transpose(net.op("MatMul", scores, v), 0, 2, 1, 3)
    return net.model(net.linear(net.reshape(z, 0, -1, 8), 8, 3))


def sharing() -> Model:
    net = Net(17)
    x, shared = net.input("x", ["N", 8]), net.const(np.full(8, 0.7), name="shared")
    for _ in range(3):
        x = net.op("Relu", net.op("Mul", net.op("MatMul", x, net.weight(8, 8)), shared))
    return net.model(net.linear(x, 8, 3))


# -- mutants -----------------------------------------------------------------------------------------------------------


class Wrong(Weight):
    """Another weight whose values are a little larger."""

    __slots__ = ("base",)

    def __init__(self, base: Weight) -> None:
        super().__init__(base.name, base.onnx_type, base.shape)
        self.base = base

    def read(self) -> Any:
        return self.base.read() * np.asarray(1.01, self.dtype)


def forget_defaults(patch: Patch) -> None:
    """What onnx's inliner does on its own."""
    patch.setattr(functions, "inline_functions", onnx.inliner.inline_local_functions)
    patch.setattr(read, "inline_functions", onnx.inliner.inline_local_functions)


def forget_an_attribute_in_a_body(patch: Patch) -> None:
    right = subgraphs._Inliner._add

    def wrong(self: Any, node: Any, scope: Any, path: str) -> None:
        right(self, node, scope, path)
        if path and self.model.graph.node[-1].op_type == "LeakyRelu":
            del self.model.graph.node[-1].attribute[:]

    patch.setattr(subgraphs._Inliner, "_add", wrong)


def read_wrong_bytes(patch: Patch) -> None:
    class Shifted(BufferWeight):
        def stored(self) -> Any:
            data = bytes(super().stored())
            return data[4:] + data[:4] if len(self.shape) == 2 else data

        def read(self) -> Any:
            return np.frombuffer(self.stored(), self.dtype).reshape(self.shape)

    patch.setattr(read, "BufferWeight", Shifted)


def fold_something_else(patch: Patch) -> None:
    right = canonical._fold

    def wrong(*args: Any) -> Fold | None:
        found = right(*args)
        return found and replace(found, folded={n: Wrong(w) for n, w in found.folded.items()})

    patch.setattr(canonical, "_fold", wrong)


def exchange_what_is_hoisted(patch: Patch) -> None:
    right = canonical.selections

    def wrong(graph: Any, facts: Any) -> Iterator[Selections]:
        for found in right(graph, facts):
            places = [(p.start, p.stop) for p in found.picks]
            picks = [Pick(p.node, p.output, *s, p.scalar) for p, s in zip(found.picks, reversed(places), strict=True)]
            yield replace(found, picks=picks)

    patch.setattr(canonical, "selections", wrong)


def copy_something_else(patch: Patch) -> None:
    right = canonical.add_constant

    def wrong(proto: Any, weights: Any, name: str, value: Any) -> None:
        right(proto, weights, name, value * np.asarray(1.01, value.dtype))

    patch.setattr(canonical, "add_constant", wrong)


def restore_something_else(patch: Patch) -> None:
    right = restore._unfold

    def wrong(model: Any, item: Fold) -> None:
        right(model, item)
        for name in item.sources:
            if name in model.weights:
                model.weights[name] = Wrong(model.weights[name])

    patch.setattr(restore, "_unfold", wrong)


def rejoin_anything(patch: Patch) -> None:
    """The second reader of the shared vector reads a weight of the same size from then on."""
    right = prepared.join_copies

    def wrong(proto: Any, weights: Any, copies: Any) -> None:
        right(proto, weights, copies)
        node = next(n for n in proto.graph.node if n.op_type == "Mul")
        node.input[1] = next(n for n, w in weights.items() if w.shape == weights[node.input[1]].shape[::-1] * 2)

    patch.setattr(prepared, "join_copies", wrong)


def flush_more(patch: Patch) -> None:
    patch.setattr(FlushedWeight, "read", lambda self: np.where(np.abs(b := self.base.read()) < 0.3, np.float32(0), b))


MUTANTS: dict[Callable[[Patch], None], Callable[[], Model]] = {
    forget_defaults: calling,
    forget_an_attribute_in_a_body: branching,
    read_wrong_bytes: plain,
    fold_something_else: folding,
    exchange_what_is_hoisted: hoisting,
    copy_something_else: sharing,
    restore_something_else: folding,
    rejoin_anything: sharing,
    flush_more: plain,
}


@pytest.mark.parametrize("build", set(MUTANTS.values()), ids=lambda f: f.__name__)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_the_steps_themselves_pass(build: Callable[[], Model], ratio: float) -> None:
    assert op.prune(build(), ratio=ratio, latency=False).report.exactness.passed


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_broken_steps_are_noticed(
    mutant: Callable[[Patch], None], ratio: float, monkeypatch: Patch, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(MUTANTS[mutant]().SerializeToString())
    mutant(monkeypatch)
    if ratio and mutant is restore_something_else:
        pytest.skip("what was cut is not restored")
    with pytest.raises(ValidationError) as caught:
        op.prune(path, ratio=ratio, latency=False)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("mutant", [forget_defaults, read_wrong_bytes, fold_something_else, flush_more])
def test_broken_steps_are_noticed_when_factorizing(mutant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    model = MUTANTS[mutant]()
    assert op.factorize(model, method="svd", rank=1, latency=False).report.product.passed
    mutant(monkeypatch)
    with pytest.raises(ValidationError, match="Preparing the graph changed output"):
        op.factorize(model.SerializeToString(), method="svd", rank=1, latency=False)


@pytest.mark.parametrize("mutant", [forget_defaults, read_wrong_bytes, flush_more])
def test_a_pair_is_what_its_files_are(mutant: Callable[[Patch], None], monkeypatch: Patch, tmp_path: Path) -> None:
    model = MUTANTS[mutant]()
    first = op.prune(model, ratio=0.5, latency=False)
    # The cut file has its activation in a function again, as somebody who trains it may have.
    cut = first.model
    if mutant is forget_defaults:
        (node,) = (n for n in cut.graph.node if n.op_type == "LeakyRelu")
        node.op_type, node.domain = "f", "own"
        del node.attribute[:]
        cut.functions.extend(model.functions)
    if mutant is flush_more:
        (tensor,) = (t for t in cut.graph.initializer if t.name == "tiny")
        array = numpy_helper.to_array(tensor).copy()
        array[0] = 1e-40
        tensor.CopyFrom(numpy_helper.from_array(array, "tiny"))
    path = tmp_path / "cut.onnx"
    path.write_bytes(cut.SerializeToString())
    x = np.random.default_rng(0).standard_normal((32, 4)).astype(np.float32)
    assert op.recover(model, path, plan=first.plan, data=x)
    mutant(monkeypatch)
    first.plan.model_sha256 = ""  # bytes that are read wrongly have another digest
    with pytest.raises(ValidationError, match="Preparing the graph changed output"):
        op.recover(model, path, plan=first.plan, data=x)
