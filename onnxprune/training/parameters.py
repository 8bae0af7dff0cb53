"""Weights to train, tensors to fit, and features to compare on the way: read off a static graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx

from onnxprune.gradients.static import StaticGraph
from onnxprune.gradients.tape import Tape
from onnxprune.graph.evaluate import evaluate
from onnxprune.graph.view import Node
from onnxprune.operators.registry import Move, gradient_of, rule_of
from onnxprune.runtime.sessions import Array

# -- weights -----------------------------------------------------------------------------------------------------------

_TRAINED = {"w", "b", "c", "scale", "bias", "slope", "gamma", "beta"}
"""Names that onnx's schemas give to parameters which models learn; other constants (bounds, statistics) are fixed."""


def trainable(graph: StaticGraph) -> tuple[list[str], dict[str, str]]:
    """Return the weights to train, and the reason for every other variable.

    A weight is trained where an operator contracts with it, or names it as its scale or bias, or where it is a vector
    that is added to or multiplied with what a layer made: one value per channel of that layer, or any vector in front
    of another layer. So constants of preprocessing, tables of positions (rotary ones too), masks, and anchors and
    strides behind the last layer keep their values.
    """
    weight_tensors = _of_weights_alone(graph)
    layers = [
        n for n in graph.nodes if any(k < len(n.inputs) and n.inputs[k] in weight_tensors for k in rule_of(n).weights)
    ]
    behind, before = _downstream(graph, layers), _upstream(graph, layers)
    names, reasons = [], dict[str, str]()
    for name in graph.variables:
        if graph.kinds[name] != np.float32:
            reasons[name] = f"holds {graph.kinds[name]}, and float32 alone is trained"
        elif any(
            _learns(graph, node, i, weight_tensors, behind, before)
            for node, i in _readers(graph, name, weight_tensors)
            if not rule_of(node).pointwise or _is_vector(graph.shapes[name])
        ):
            names.append(name)
        else:
            reasons[name] = "is a constant, not a parameter"
    return names, reasons


def _of_weights_alone(graph: StaticGraph) -> set[str]:
    """Return the tensors that depend on no input: weights, and tensors computed from them alone."""
    weight_tensors = set(graph.constants) | set(graph.variables)
    for node in graph.nodes:
        if all(not i or i in weight_tensors for i in node.inputs):
            weight_tensors.update(o for o in node.outputs if o)
    return weight_tensors


def _readers(graph: StaticGraph, name: str, weight_tensors: set[str]) -> Iterable[tuple[Node, int]]:
    """Yield the nodes that read a weight together with data, through any that compute from weights alone."""
    queue, visited = [name], {name}
    while queue:
        for node, i in graph.readers.get(queue.pop(), ()):
            if any(o in weight_tensors for o in node.outputs):
                new = [o for o in node.outputs if o and o not in visited]
                queue += new
                visited.update(new)
            else:
                yield node, i


def _learns(
    graph: StaticGraph, node: Node, i: int, weight_tensors: set[str], behind: set[str], before: set[str]
) -> bool:
    """Return whether a model learns what a node reads at input ``i``."""
    rule = rule_of(node)
    if not rule.pointwise:
        if i in rule.weights and not any(n in behind for n in node.inputs):
            return not _is_outer_product(graph, node, i)
        return i in rule.weights or schema_name(node, i) in _TRAINED
    if not any(n in behind for n in node.inputs) or not _is_vector(graph.shapes[node.inputs[i]]):
        return False
    return any(o in before for o in node.outputs) or _is_per_channel(graph, node, i, weight_tensors)


def _is_vector(shape: Sequence[int]) -> bool:
    return sum(size > 1 for size in shape) == 1


def _is_outer_product(graph: StaticGraph, node: Node, i: int) -> bool:
    """Return whether a product sums over nothing: frequencies times positions are a table, and no layer."""
    data = next((k for k, name in enumerate(node.inputs) if name and k != i), None)
    shapes: list[tuple[int | None, ...] | None] = [graph.shapes.get(n) for n in node.inputs]
    form = None if data is None else rule_of(node).form(node, shapes, data)
    if data is None or form is None or form.taps > 1:
        return False
    size = graph.shapes[node.inputs[data]]
    return all(size[a] == 1 for a in form.axes) and _is_vector(graph.shapes[node.inputs[i]])


def _is_per_channel(graph: StaticGraph, node: Node, i: int, outputs: set[str]) -> bool:
    """Return whether a vector has one value for each channel of the layer in front, through pointwise operators."""
    out = graph.shapes[node.outputs[0]]
    shape = graph.shapes[node.inputs[i]]
    axis = len(out) - len(shape) + next(k for k, size in enumerate(shape) if size > 1)
    current: Node | None = node
    while current is not None and rule_of(current).pointwise:
        producers = [graph.producer.get(n) for n in current.inputs]
        current = next((p for p in producers if p is not None and graph.shapes.get(p.outputs[0]) == out), None)
    if current is None or not rule_of(current).weights:
        return False
    rule = rule_of(current)
    shapes = [graph.shapes.get(n) for n in current.inputs]
    weights = [w for w in rule.weights if w < len(shapes) and current.inputs[w] in outputs]
    return any(rule.output_axis(current, shapes, len(out), w) == axis for w in weights)


def schema_name(node: Node, i: int) -> str:
    """Return the name of an input in the operator's schema, in lower case; empty where there is none."""
    if not onnx.defs.has(node.op, node.version, node.domain):
        return ""
    inputs = onnx.defs.get_schema(node.op, node.version, node.domain).inputs
    return inputs[i].name.lower() if i < len(inputs) else ""


def _downstream(graph: StaticGraph, nodes: Sequence[Node]) -> set[str]:
    reached = {o for node in nodes for o in node.outputs if o}
    for node in graph.nodes:
        if any(i in reached for i in node.inputs):
            reached.update(o for o in node.outputs if o)
    return reached


def _upstream(graph: StaticGraph, nodes: Sequence[Node]) -> set[str]:
    reached = {i for node in nodes for i in node.inputs if i}
    for node in reversed(graph.nodes):
        if any(o in reached for o in node.outputs):
            reached.update(i for i in node.inputs if i)
    return reached


# -- tensors to fit ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """A tensor to fit.

    Attributes:
        tensor: its name, in both models.
        output: the model output that it decides.
        axis: axis of scores of classes that exclude each other; None where the values themselves are fitted.
        logits: tensor with the logits where every value is a probability by itself; empty where none is.
        positions: flat positions of the values among the logits; None where all are at their places.
    """

    tensor: str
    output: str
    axis: int | None = None
    logits: str = ""
    positions: Array | None = field(default=None, compare=False, repr=False)


def heads(graph: StaticGraph, weights: Iterable[str], by_parts: bool = False) -> list[Head]:
    """Return the last tensors in front of the outputs that gradients can reach, a softmax at the end left out.

    Of an output that is computed without a gradient (a class, the boxes that a suppression chose, codes), or whose size
    depends on values and changes from call to call, these are the tensors that it is computed from.

    Args:
        graph: the graph.
        weights: the weights to train.
        by_parts: whether an output that is joined from parts with scores among them, as detectors join boxes, objects
            and classes, comes back as these parts, and probabilities with their logits.
    """
    weight_tensors, reached, uneven = _of_weights_alone(graph), set(weights), _sized_by_values(graph)
    for node in graph.nodes:
        if uneven.issuperset(o for o in node.outputs if o):
            continue
        if any(i in reached for i in node.inputs) and gradient_of(node.domain, node.op, node.version) is not None:
            reached.update(o for o in node.outputs if o and (graph.is_float(o) or rule_of(node).encodes))
    result: dict[str, Head] = {}
    for output in graph.outputs:
        queue, visited = [output], {output}
        while queue:
            name = queue.pop()
            maker = graph.producer.get(name)
            if maker is None or name in weight_tensors:
                continue
            if graph.is_float(name) and name in reached:
                parts = _parts(graph, name, output, reached, by_parts)
                result.update({head.tensor: head for head in parts if head.tensor not in result})
                continue
            new = [i for i in maker.inputs if i and i not in visited]
            queue += new
            visited.update(new)
    return list(result.values())


def _sized_by_values(graph: StaticGraph) -> set[str]:
    """Return the tensors whose sizes depend on values, and everything that is computed from them."""
    result: set[str] = set()
    for node in graph.nodes:
        if rule_of(node).sized_by_values or any(i in result for i in node.inputs):
            result.update(o for o in node.outputs if o)
    return result


def _parts(graph: StaticGraph, name: str, output: str, reached: Collection[str], by_parts: bool) -> list[Head]:
    """Return what is fitted in place of a tensor: the scores, logits and values that it only moves; else itself.

    Args:
        graph: the graph.
        name: the tensor.
        output: the output that it decides.
        reached: tensors that depend on weights.
        by_parts: whether tensors that are joined or selected count as well, and logits.
    """
    result: list[Head] = []
    joined, visited = [name], {name}
    while joined:
        part = current = joined.pop()
        while current in reached and graph.is_float(current):
            node = graph.producer[current]
            rule, moves = rule_of(node), rule_of(node).moves
            axis = rule.score_axis(node, len(graph.shapes[node.inputs[0]]))
            if axis is not None and part == current:
                result.append(Head(node.inputs[0], output, axis))
                break
            if moves is Move.JOIN and by_parts:
                joined += [i for i in node.inputs if i not in visited]
                visited.update(node.inputs)
                break
            if moves is None or not (moves.keeps_all or (moves is Move.SELECT and by_parts)):
                result.append(_part(graph, part, current, output) if by_parts else Head(part, output))
                break
            # A selection stays on the way, since what it drops decides nothing.
            part = node.inputs[0] if moves.keeps_all and part == current else part
            current = node.inputs[0]
    return result if any(h.axis is not None or h.logits for h in result) else [Head(name, output)]


def _part(graph: StaticGraph, part: str, current: str, output: str) -> Head:
    """Return what is fitted of a tensor that moves the values of another one, which an operator computes."""
    node = graph.producer[current]
    if not rule_of(node).logistic:
        return Head(part, output)
    if part == current:
        return Head(part, output, logits=node.inputs[0])
    positions = _positions(graph, part, current)
    return Head(part, output) if positions is None else Head(part, output, logits=node.inputs[0], positions=positions)


def _positions(graph: StaticGraph, name: str, source: str) -> Array | None:
    """Return the flat positions in ``source`` of the values of a tensor that moves them; None where unknown."""
    nodes: list[tuple[Node, str]] = []
    while name != source:
        nodes.append((graph.producer[name], name))
        name = nodes[-1][0].inputs[0]
    shape = graph.shapes[source]
    value = np.arange(prod(shape), dtype=np.int64).reshape(shape)
    for node, output in reversed(nodes):
        operands = [value, *(graph.constants.get(i) for i in node.inputs[1:])]
        if rule_of(node).moves in (Move.SAME, Move.CAST):
            continue
        values = evaluate(node, operands)
        if values is None or values[node.outputs.index(output)].shape != graph.shapes[output]:
            return None
        value = values[node.outputs.index(output)]
    return value


def value_to_fit(tape: Tape, head: Head) -> str:
    """Emit what is fitted of a head: its tensor, or the logits of its values.

    Args:
        tape: a tape of the graph, or of one with the same tensors to fit.
        head: the head.
    """
    if head.positions is None:
        return head.logits or head.tensor
    flat = tape.reshape(head.logits, [prod(tape.shape(head.logits))])
    return tape.emit("Gather", [flat, tape.constant(head.positions)], head.positions.shape, axis=0)


def bottlenecks(graph: StaticGraph) -> list[str]:
    """Return the tensors that everything behind them depends through, in order: outputs of blocks.

    Of consecutive ones of one block, an activation behind a sum say, the last comes back, in front of the next layer.
    """
    last: dict[str, int] = {}
    for k, node in enumerate(graph.nodes):
        last.update({i: k for i in node.inputs if i})
    last.update({o: len(graph.nodes) for o in graph.outputs})
    weight_tensors, uneven = _of_weights_alone(graph), _sized_by_values(graph)
    open_tensors = {i for i in graph.inputs if i in last}
    result: list[str] = []
    for k, node in enumerate(graph.nodes):
        open_tensors.update(o for o in node.outputs if last.get(o, -1) > k and o not in weight_tensors)
        open_tensors -= {i for i in node.inputs if last.get(i) == k}
        if len(open_tensors) != 1:
            continue
        (name,) = open_tensors
        if name not in graph.producer or not graph.is_float(name) or name in uneven:
            continue
        followed = any(rule_of(n).weights and i in (rule_of(n).data,) for n, i in graph.readers.get(name, ()))
        if followed or len(graph.readers.get(name, ())) > 1:
            result.append(name)
    return result
