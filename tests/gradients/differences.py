"""Gradients held to central differences in float64, by onnx's reference evaluator, and to onnxruntime in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from onnxprune.gradients.backward import TrainingGraph, training_graph
from onnxprune.gradients.static import StaticGraph, static_graph
from onnxprune.gradients.tape import Tape
from onnxprune.graph.view import Node
from onnxprune.io.read import load

STEP, TOLERANCE = 1e-5, 1e-5


class Erf(OpRun):
    """In the precision of its input: the evaluator's own computes in float32."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (np.vectorize(math.erf, otypes=[x.dtype])(x),)


class Gelu(OpRun):
    op_domain = ""

    def _run(self, x: np.ndarray, approximate: str = "none") -> tuple[np.ndarray]:
        if approximate == "tanh":
            return (0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),)
        return (0.5 * x * (1 + np.vectorize(math.erf, otypes=[x.dtype])(x * math.sqrt(0.5))),)


class LRN(OpRun):
    op_domain = ""

    def _run(self, x: np.ndarray, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int = 1) -> Any:
        squares = np.stack(
            [(x[:, max(0, c - size // 2) : c + size // 2 + 1] ** 2).sum(1) for c in range(x.shape[1])], 1
        )
        return (x / (bias + alpha / size * squares) ** beta,)


def static(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> StaticGraph:
    loaded = load(model)
    return static_graph(loaded.proto, loaded.weights, feed)


def doubled(graph: StaticGraph) -> StaticGraph:
    """The same graph in float64."""
    kinds = {n: np.dtype(np.float64) if k == np.float32 else k for n, k in graph.kinds.items()}
    constants = {n: v.astype(np.float64) if v.dtype == np.float32 else v for n, v in graph.constants.items()}
    return replace(graph, nodes=[_doubled(n) for n in graph.nodes], kinds=kinds, constants=constants)


def _doubled(node: Node) -> Node:
    """Casts to float become casts to double."""
    if node.op != "Cast" or node.attrs["to"] != onnx.TensorProto.FLOAT:
        return node
    proto = onnx.helper.make_node("Cast", node.inputs, node.outputs, to=onnx.TensorProto.DOUBLE)
    return Node(node.index, node.op, node.domain, node.version, node.name, node.inputs, node.outputs, proto)


def weighted(graph: StaticGraph) -> Any:
    """A loss that weights every element of every float output differently."""

    def loss(tape: Tape) -> str:
        total = ""
        for name in graph.outputs:
            if graph.is_float(name):
                shape = tape.shape(name)
                seed = 0.5 + np.random.default_rng(len(shape)).random(shape)
                part = tape.total(tape.mul(name, tape.constant(seed.astype(tape.kinds[name]))))
                total = tape.add(total, part) if total else part
        return total

    return loss


def gradients(model: onnx.ModelProto, feed: dict[str, np.ndarray], names: Sequence[str], *, seeded: bool = True) -> Any:
    """Gradients in float32 by onnxruntime; ``seeded=False``: of the plain sum of all outputs."""
    graph = static(model, feed)

    def plain(tape: Tape) -> str:
        return tape.total(graph.outputs[0])

    training = training_graph(graph, weighted(graph) if seeded else plain, names)
    assert not training.frozen
    return run_float(training, graph, feed)


def run_float(training: TrainingGraph, graph: StaticGraph, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    got = evaluator(training, "runtime")({**feed, **{n: graph.constants[n] for n in training.gradients}})
    return {n: got[g] for n, g in training.gradients.items()}


def evaluator(training: TrainingGraph, engine: str) -> Any:
    """The function from all inputs to all outputs by name."""
    names = [o.name for o in training.model.graph.output]
    given = {i.name for i in training.model.graph.input}
    if engine == "reference":
        run = ReferenceEvaluator(training.model, new_ops=[Erf, Gelu, LRN]).run
    else:
        run = ort.InferenceSession(training.model.SerializeToString(), providers=["CPUExecutionProvider"]).run
    return lambda fed: dict(zip(names, run(None, {k: v for k, v in fed.items() if k in given}), strict=True))


def check(
    model: onnx.ModelProto,
    feed: dict[str, np.ndarray],
    wrt: Sequence[str] | None = None,
    *,
    engine: str = "reference",
) -> TrainingGraph:
    """Hold the gradients of weights along random directions to central differences.

    Inputs of interest are given as initializers: ``wrt`` names them, None all variables. ``engine`` computes the
    differences: onnx's evaluator ("reference"), or where that is wrong onnxruntime in float64 ("double"), or in float32
    ("linear": of operators that are linear in every operand, a step of 1/2 is as good as a small one).
    """
    graph = static(model, feed)
    wide = graph if engine == "linear" else doubled(graph)
    step = 0.5 if engine == "linear" else STEP
    names = list(wrt or graph.variables)
    training = training_graph(wide, weighted(wide), names)
    assert not training.frozen, training.frozen
    weights = {n: wide.constants[n] for n in names}
    if engine != "linear":
        feed = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in feed.items()}
    evaluate = evaluator(training, engine)

    def values(weights: dict[str, np.ndarray]) -> dict[str, Any]:
        return evaluate({**feed, **weights})

    at = values(weights)
    rng = np.random.default_rng(1)
    for name in names:
        gradient = at[training.gradients[name]]
        for _ in range(2):
            direction = rng.standard_normal(weights[name].shape).astype(weights[name].dtype)
            moved = ({**weights, name: weights[name] + side * step * direction} for side in (1, -1))
            above, below = (float(values(w)[training.loss]) for w in moved)
            numeric, analytic = (above - below) / (2 * step), float((gradient * direction).sum())
            scale = max(float(np.abs(gradient * direction).sum()), 1e-3)
            assert abs(numeric - analytic) <= TOLERANCE * scale, (name, numeric, analytic)
    if engine != "linear":
        feed = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in feed.items()}
        narrow = training_graph(graph, weighted(graph), names)
        got = run_float(narrow, graph, feed)
        for name in names:
            want = at[training.gradients[name]]
            size = np.abs(want).max() + 1e-6
            np.testing.assert_allclose(got[name] / size, want / size, atol=2e-5, err_msg=name)
    return training
