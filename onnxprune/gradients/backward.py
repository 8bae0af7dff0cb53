"""Reverse mode: emit the gradients of a scalar with respect to weights, and build the graph that computes both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

from onnxprune.gradients.lowering import lowered
from onnxprune.gradients.static import StaticGraph, named_tensor
from onnxprune.gradients.tape import Array, NoGradient, Reverse, Tape
from onnxprune.graph.resized import KEY
from onnxprune.graph.view import Node
from onnxprune.operators.registry import gradient_of

Loss = Callable[[Tape], str]
"""Emits a scalar from tensors of the forward pass, with the operators of any model, and returns its name."""


@dataclass(frozen=True, slots=True)
class TrainingGraph:
    """Forward and backward pass as one model.

    Attributes:
        model: inputs of the model, additional inputs and weights -> the loss, gradients, and further outputs.
        loss: the output with the loss, a scalar.
        gradients: weight -> output with its gradient.
        frozen: weight -> reason why it has no gradient.
        further: further outputs.
        squares: tensor of the forward pass -> output with the squares of its gradient, summed over channels.
    """

    model: onnx.ModelProto
    loss: str
    gradients: Mapping[str, str]
    frozen: Mapping[str, str]
    further: Sequence[str] = ()
    squares: Mapping[str, str] = field(default_factory=dict)


def training_graph(
    graph: StaticGraph,
    loss: Loss,
    weights: Collection[str],
    *,
    inputs: Mapping[str, tuple[Sequence[int], Any]] | None = None,
    further: Sequence[str] = (),
    squares: Mapping[str, int] | None = None,
) -> TrainingGraph:
    """Build the graph that computes a loss and its gradients.

    Args:
        graph: the forward pass.
        loss: emits the loss.
        weights: variables of ``graph`` whose gradients are wanted.
        inputs: additional inputs that the loss reads: shape and type by name.
        further: tensors of the forward pass to give as well.
        squares: tensors of the forward pass whose squared gradients are wanted, and the axis to sum them over.

    Returns:
        the training graph; a weight whose way to the loss leads through an operator without a gradient is frozen.
    """
    blocked: dict[int, str] = {}
    graph = lowered(graph)
    while True:
        tape = Tape(graph.shapes, graph.kinds)
        for name, (shape, kind) in (inputs or {}).items():
            tape.declare(name, shape, kind)
        value = loss(tape)
        nodes = [*graph.nodes, *_as_nodes(tape, graph)]
        constants = {**graph.constants, **tape.constants}
        try:
            walk = _Backward(tape, nodes, constants, graph, blocked, squares or {})
            sent, frozen = walk.run(value, weights)
        except _Blocked as found:
            blocked[found.index] = found.reason
            continue
        model = _model(graph, tape, [value, *sent.values(), *walk.squared.values(), *further], inputs or (), sent)
        return TrainingGraph(model, value, sent, frozen, list(further), walk.squared)


def _as_nodes(tape: Tape, graph: StaticGraph) -> list[Node]:
    """Return the nodes of the loss as nodes of the forward pass."""
    start = 1 + max((node.index for node in graph.nodes), default=-1)
    return [
        Node(start + k, p.op_type, p.domain, graph.opsets.get(p.domain, 1), p.name, list(p.input), list(p.output), p)
        for k, p in enumerate(tape.nodes)
    ]


class _Blocked(Exception):
    """A node turned out to have no gradient while one was emitted."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index, self.reason = index, reason


@dataclass(slots=True)
class _Backward:
    """The walk from the loss to the weights, and to tensors on the way whose gradients are wanted too."""

    tape: Tape
    nodes: Sequence[Node]
    constants: Mapping[str, Array]
    graph: StaticGraph
    blocked: Mapping[int, str]
    squares: Mapping[str, int]
    pending: dict[str, list[str]] = field(default_factory=dict)
    squared: dict[str, str] = field(default_factory=dict)

    def run(self, loss: str, weights: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Return the gradient of every weight that has one, and the reason for every other."""
        frozen = self._frozen(loss, [*weights, *self.squares])
        trained = [w for w in weights if w not in frozen]
        dependents = self._depending([*trained, *(n for n in self.squares if n not in frozen)])
        self.pending = {loss: [self.tape.scalar(1, loss)]}
        for node in reversed(self.nodes):
            if any(i in dependents for i in node.inputs):
                self._through(node, dependents)
        sent = {w: g for w in trained if (g := self._take(w)) is not None}
        for name in [n for n in self.squares if n not in frozen]:
            self._square(name, self._take(name))
        frozen |= {w: "the loss does not depend on it" for w in trained if w not in sent}
        return sent, frozen

    def _through(self, node: Node, dependents: Collection[str]) -> None:
        gradients = [self._take(o) if o else None for o in node.outputs]
        for output, gradient in zip(node.outputs, gradients, strict=True):
            self._square(output, gradient)
        emit = gradient_of(node.domain, node.op, node.version)
        if emit is None or all(g is None for g in gradients):
            return
        reverse = Reverse(self.tape, node, gradients, [i in dependents for i in node.inputs], self.constants)
        try:
            emit(reverse)
        except NoGradient as error:
            raise _Blocked(node.index, f"{node.kind} {node.label!r} {error}") from error
        for i, sent in reverse.sent.items():
            self.pending.setdefault(node.inputs[i], []).append(sent)

    def _square(self, name: str, gradient: str | None) -> None:
        """Emit the squares of a gradient, summed over channels, where they are wanted."""
        if gradient is not None and name in self.squares:
            self.squared[name] = self.tape.sum(self.tape.square(gradient), [self.squares[name]], keep=True)

    def _take(self, name: str) -> str | None:
        """Return the sum of all gradients of a tensor."""
        parts = self.pending.pop(name, [])
        if len(parts) < 2:
            return parts[0] if parts else None
        return self.tape.emit("Sum" if len(parts) > 2 else "Add", parts, self.tape.shape(parts[0]))

    def _depending(self, weights: Iterable[str]) -> set[str]:
        """Return the tensors that depend on weights and can have a gradient."""
        dependents = set(weights)
        for node in self.nodes:
            if any(i in dependents for i in node.inputs):
                codes = node.op == "QuantizeLinear"
                dependents.update(o for o in node.outputs if o and (codes or self._is_float(o)))
        return dependents

    def _is_float(self, name: str) -> bool:
        kind = self.tape.kinds.get(name)
        return kind is None or kind.kind in "fV"

    def _frozen(self, loss: str, weights: Collection[str]) -> dict[str, str]:
        """Return the weights from which a way to the loss leads through a node without a gradient, with the reason."""
        reached = self._reaching(loss)
        reason: dict[str, str] = {}
        for node in reversed(self.nodes):
            if not any(o in reached for o in node.outputs):
                continue
            why = self.blocked.get(node.index, "")
            if not why and gradient_of(node.domain, node.op, node.version) is None:
                domain = f"{node.domain}." if node.domain else ""
                why = f"{domain}{node.kind} {node.label!r} has no gradient"
            why = why or next((reason[o] for o in node.outputs if o in reason), "")
            if why:
                for name in _read(node):
                    reason.setdefault(name, why)
        return {w: reason[w] for w in weights if w in reason}

    def _reaching(self, loss: str) -> set[str]:
        """Return the tensors that the loss depends on through numbers: integers and booleans carry no gradient."""
        reached = {loss}
        for node in reversed(self.nodes):
            if any(o in reached for o in node.outputs):
                codes = gradient_of(node.domain, node.op, node.version) is not None and node.op == "DequantizeLinear"
                reached.update(n for n in _read(node) if codes or self._is_float(n))
        return reached


def _read(node: Node) -> list[str]:
    """Return the names that a node reads, those of its bodies included."""
    names = [i for i in node.inputs if i]
    for attribute in node.proto.attribute:
        for body in [attribute.g, *attribute.graphs]:
            names += [i for inner in body.node for i in inner.input if i]
    return names


def inference_graph(
    graph: StaticGraph, tape: Tape, outputs: Sequence[str], variables: Collection[str] = ()
) -> onnx.ModelProto:
    """Return the model that gives some tensors of a static graph, or of tensors computed from them on a tape.

    Args:
        graph: the graph.
        tape: nodes behind it.
        outputs: the tensors.
        variables: weights that are inputs of the model.
    """
    return _model(graph, tape, outputs, (), variables)


def _model(
    graph: StaticGraph, tape: Tape, outputs: Sequence[str], inputs: Collection[str], variables: Collection[str]
) -> onnx.ModelProto:
    """Return the model that gives tensors; nodes that none of them needs are left out.

    Args:
        graph: the forward pass.
        tape: nodes behind it.
        outputs: the tensors.
        inputs: inputs beside those of the graph.
        variables: weights that are inputs.
    """
    protos = [*(_with_outputs(node, tape) for node in graph.nodes), *tape.nodes]
    live, nodes = set(outputs), []
    for proto in reversed(protos):
        if any(o in live for o in proto.output):
            nodes.append(proto)
            live.update(proto.input)
            live.update(n for a in proto.attribute for b in [a.g, *a.graphs] for inner in b.node for n in inner.input)
    constants = {**graph.constants, **tape.constants}
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            nodes[::-1],
            "training",
            [_info(tape, name) for name in (*graph.inputs, *inputs, *variables) if name in live],
            [_info(tape, name) for name in dict.fromkeys(outputs)],
            [named_tensor(name, value) for name, value in constants.items() if name in live and name not in variables],
        ),
        opset_imports=[onnx.helper.make_opsetid(domain, version) for domain, version in graph.opsets.items()],
        ir_version=graph.ir_version,
    )
    if graph.resized:
        model.metadata_props.add(key=KEY, value=graph.resized)
    return model


def _with_outputs(node: Node, tape: Tape) -> onnx.NodeProto:
    """Return a node with the optional outputs that its gradient asked for."""
    added = tape.added_outputs.get(node.index)
    if not added:
        return node.proto
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    outputs = [*node.outputs, *[""] * (1 + max(added) - len(node.outputs))]
    for position, name in added.items():
        outputs[position] = name
    del proto.output[:]
    proto.output.extend(outputs)
    return proto


def _info(tape: Tape, name: str) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(tape.kinds[name])
    return onnx.helper.make_tensor_value_info(name, kind, tape.shape(name))
