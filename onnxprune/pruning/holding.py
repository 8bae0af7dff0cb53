"""Hold the choices and random draws of two models equal, so that their outputs can be compared.

An operator that chooses (a largest value, overlapping boxes, a side of a threshold, a nearest integer) can turn a
difference of rounding into another result, and an operator that draws random numbers draws others where its sizes
differ. Neither difference shows a fault. Both models therefore receive the values of the reference in front of every
operator that chooses, and the numbers drawn in the reference in place of every operator that draws. The values that
each model computes itself at those points become outputs.
The proof stays complete: a difference in front of a choice shows in these outputs, and a difference in the choice or
behind it shows in the tensors that are computed from the same held values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxprune.graph.precision import draws, jumps
from onnxprune.io.subgraphs import outline_bodies
from onnxprune.io.weights import Weight
from onnxprune.operators.registry import lookup
from onnxprune.pruning.masked import Model, Steps, gather

Feed = dict[str, Any]
SurvivorSteps = Callable[[str], Steps | None]
"""Steps from a tensor of the reference to that of the other model; None where they are not known."""

HELD_SUFFIX, VALUE_SUFFIX, COMPUTED_SUFFIX = "__held", "__seen", "__made"
"""Endings of names: of inputs with held values, of outputs with the values of a model, of those computed from them."""

_SEED = 7
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


def no_steps(_: str) -> Steps:
    """Return no gather steps: nothing was removed."""
    return []


@dataclass(slots=True)
class Holding:
    """A record of the tensors that are held equal between two models.

    Args:
        reference: the model whose values are held.
        other: the model compared with it. The bodies of both are put into the nodes that hold them: such a node counts
            as one operator that chooses.
        kinds: element types by tensor name.
        survivors: maps a tensor of the reference to the part of it that the other model has.

    Attributes:
        operators: types of the operators that choose or draw, with their counts.
        unheld: names of outputs of operators that draw and cannot be held (in bodies, or of unknown size).
    """

    reference: Model
    other: Model
    kinds: Mapping[str, int]
    survivors: SurvivorSteps = no_steps
    operators: dict[str, int] = field(default_factory=dict)
    unheld: list[str] = field(default_factory=list)
    _inputs: dict[str, tuple[str, Steps]] = field(default_factory=dict)
    _choices: list[tuple[int, int, int, str]] = field(default_factory=list)
    _enclosed: list[tuple[int, int, str]] = field(default_factory=list)
    _computed: dict[str, Steps] = field(default_factory=dict)
    _drawn: dict[str, tuple[int, int, Steps, float | None]] = field(default_factory=dict)
    _differs: bool = False

    def __post_init__(self) -> None:
        self.reference, self.other = outline_bodies(*self.reference), outline_bodies(*self.other)
        index_by_output = {n.output[0]: k for k, n in enumerate(self.other[0].graph.node) if n.output}
        data, values = self._data(), _constants(self.reference[0])
        for index, node in enumerate(self.reference[0].graph.node):
            partner = index_by_output.get(node.output[0]) if node.output else None
            twin = self.other[0].graph.node[partner] if partner is not None else None
            is_same_op = twin is not None and twin.op_type == node.op_type
            if draws(node, values):
                if not (is_same_op and partner is not None and self._draw(index, node, partner, values)):
                    self.unheld += [o for o in node.output if o]
            elif twin is not None and partner is not None and _bodies(node):
                self._enclose(index, node, partner, data)
            elif twin is not None and partner is not None and self._jumps(node, data):
                self._differs |= not is_same_op
                self._choose(index, node, partner, twin, data)
        self.unheld += [o for node in _inner(self.reference[0]) if draws(node, values) for o in node.output if o]

    def __bool__(self) -> bool:
        return bool(self._inputs or self._drawn) and not self._differs

    def _data(self) -> set[str]:
        """Return the tensors that depend on the inputs."""
        proto = self.reference[0].graph
        data = {i.name for i in proto.input} - {t.name for t in proto.initializer}
        for node in proto.node:
            if _bodies(node) or draws(node) or not data.isdisjoint(node.input):
                data.update(node.output)
        return data

    def _jumps(self, node: onnx.NodeProto, data: set[str]) -> bool:
        reads = {self._kind(name) for name in node.input if name in data}
        return jumps(lookup(node.domain, node.op_type), reads, {self._kind(name) for name in node.output if name})

    def _kind(self, name: str) -> int:
        return self.kinds.get(_unmasked(name), 0)

    def _choose(self, index: int, node: onnx.NodeProto, partner: int, twin: onnx.NodeProto, data: set[str]) -> None:
        """Hold the float inputs that a node chooses by: all of them, or none."""
        operands = []
        for i, name in enumerate(node.input):
            if name not in data or not _is_float(self._kind(name)):
                continue
            steps = self.survivors(_unmasked(name))
            if steps is None or i >= len(twin.input) or twin.input[i] != _unmasked(name):
                return
            operands.append((i, name, steps))
        for i, name, steps in operands:
            self._inputs[name] = _unmasked(name), steps
            self._choices.append((index, partner, i, name))
        if operands and all(name == _unmasked(name) for _, name, _ in operands):  # its sums differ
            places = {name: self.survivors(name) for name in node.output if name}
            self._computed.update({name: steps for name, steps in places.items() if steps is not None})
        if operands:
            self.operators[node.op_type] = self.operators.get(node.op_type, 0) + 1

    def _enclose(self, index: int, node: onnx.NodeProto, partner: int, data: set[str]) -> None:
        """Hold the float tensors that bodies read from around them; nodes in a body may choose in any way."""
        names = {name for body in _bodies(node) for inner in _all(body) for name in inner.input}
        for name in sorted((names | set(node.input)) & data):
            steps = self.survivors(_unmasked(name)) if _is_float(self._kind(name)) else None
            if steps is not None and name == _unmasked(name):
                self._inputs[name] = name, steps
                self._enclosed.append((index, partner, name))
        if any(index == node_index for node_index, _, _ in self._enclosed):
            self.operators[node.op_type] = self.operators.get(node.op_type, 0) + 1

    def _draw(self, index: int, node: onnx.NodeProto, partner: int, values: Mapping[str, Any]) -> bool:
        """Hold the random numbers that a node draws; return whether that is possible."""
        steps, scale, rule = self.survivors(node.output[0]), None, lookup(node.domain, node.op_type)
        if rule.training is not None:
            ratio = node.input[rule.training - 1]
            share = float(values.get(ratio, np.nan)) if ratio else 0.5
            if not 0 <= share < 1 or any(node.output[1:]):
                return False
            scale = 1 / (1 - share)
        if steps is None or node.domain not in ("", "ai.onnx") or not self._kind(node.output[0]):
            return False
        if rule.draws_by is not None:  # by probabilities: draws are not compared
            probabilities = node.input[rule.draws_by]
            before = self.survivors(_unmasked(probabilities))
            if before is None:
                return False
            self._inputs[probabilities] = _unmasked(probabilities), before
        self._drawn[node.output[0]] = index, partner, steps, scale
        self.operators[node.op_type] = self.operators.get(node.op_type, 0) + 1
        return True

    def depend_on_unheld(self) -> set[str]:
        """Return outputs of the models that depend on random draws that are not held."""
        graph, affected = self.reference[0].graph, set(self.unheld)
        for node in graph.node:
            inner_names = [n for body in _bodies(node) for inner in _all(body) for n in (*inner.input, *inner.output)]
            if not affected.isdisjoint([*node.input, *node.output, *inner_names]):
                affected.update(node.output)
        return affected & {o.name for o in graph.output}

    # -- the models ------------------------------------------------------------------------------------------------

    def tapped(self) -> tuple[Model, Sequence[str]]:
        """Return the reference with all held tensors as additional outputs, and the names of these."""
        proto, weights = _copy(self.reference)
        names = []
        for name, (_, steps) in self._inputs.items():
            names += [f"{name}__all", f"{name}__kept"]
            proto.graph.node.append(onnx.helper.make_node("Identity", [name], [names[-2]]))
            gather(proto, weights, name, names[-1], steps)
        for name, (index, _, steps, scale) in self._drawn.items():
            source, node = name, proto.graph.node[index]
            if scale is not None:
                del node.output[1:]
                node.output.append(source := f"{name}__drops")
            names += [f"{name}__all", f"{name}__kept"]
            proto.graph.node.append(onnx.helper.make_node("Identity", [source], [names[-2]]))
            gather(proto, weights, source, names[-1], steps)
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        return (proto, weights), names

    def feeds(self, values: Feed) -> tuple[Feed, Feed]:
        """Return additional inputs of both models, made of the values of the tapped reference."""
        result: tuple[Feed, Feed] = ({}, {})
        for feed, part in zip(result, ("all", "kept"), strict=True):
            for name in self._inputs:
                feed[f"{name}{HELD_SUFFIX}"] = values[f"{name}__{part}"]
            for name, (_, _, _, scale) in self._drawn.items():
                value = values[f"{name}__{part}"]
                if scale is not None:
                    kind = onnx.helper.tensor_dtype_to_np_dtype(self._kind(name))
                    value = (value.astype(np.float32) * scale).astype(kind)
                feed[f"{name}{HELD_SUFFIX}"] = value
        return result

    def pair(self) -> tuple[Model, Model]:
        """Return both models with inputs for the held tensors, and outputs for their own values at those points."""
        models = _copy(self.reference), _copy(self.other)
        for side, (proto, weights) in enumerate(models):
            for name, (other_name, steps) in self._inputs.items():
                self._add_input(proto, name)
                output = f"{name}{VALUE_SUFFIX}"
                gather(proto, weights, other_name if side else name, output, [] if side else steps)
                proto.graph.output.append(onnx.ValueInfoProto(name=output))
            for name, steps in self._computed.items():
                gather(proto, weights, name, f"{name}{COMPUTED_SUFFIX}", [] if side else steps)
                proto.graph.output.append(onnx.ValueInfoProto(name=f"{name}{COMPUTED_SUFFIX}"))
            for index, partner, i, name in self._choices:
                proto.graph.node[partner if side else index].input[i] = f"{name}{HELD_SUFFIX}"
            for index, partner, name in self._enclosed:
                _rename(proto.graph.node[partner if side else index], name, f"{name}{HELD_SUFFIX}")
            for name, (index, partner, _, scale) in self._drawn.items():
                self._add_input(proto, name)
                self._replace(proto.graph.node[partner if side else index], f"{name}{HELD_SUFFIX}", scale)
        return models

    def _replace(self, node: onnx.NodeProto, input_name: str, scale: float | None) -> None:
        """Return nodes that take held numbers in place of a random draw."""
        output, source = node.output[0], node.input[0] if node.input else ""
        node.Clear()
        if scale is None:
            node.CopyFrom(onnx.helper.make_node("Identity", [input_name], [output]))
        else:
            node.CopyFrom(onnx.helper.make_node("Mul", [source, input_name], [output]))

    def _add_input(self, proto: onnx.ModelProto, name: str) -> None:
        info = onnx.helper.make_tensor_value_info(f"{name}{HELD_SUFFIX}", self._kind(name), None)
        proto.graph.input.append(info)


def _constants(proto: onnx.ModelProto) -> dict[str, Any]:
    """Return small constants by name, those of Constant nodes included."""
    tensors = {t.name: t for t in proto.graph.initializer}
    for node in (n for graph in (proto.graph, *proto.functions) for n in _all(graph)):
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            tensors[node.output[0]] = node.attribute[0].t
    return {
        name: onnx.numpy_helper.to_array(tensor)
        for name, tensor in tensors.items()
        if not tensor.dims and any(field.name.endswith("_data") for field, _ in tensor.ListFields())
    }


def _unmasked(name: str) -> str:
    """Return the tensor that a mask was applied to."""
    return name.split("__mask_")[0]


def _is_float(kind: int) -> bool:
    return kind in _FLOATS


def _copy(model: Model) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    proto = onnx.ModelProto()
    proto.CopyFrom(model[0])
    return proto, dict(model[1])


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [graph for a in node.attribute for graph in ([a.g] if a.HasField("g") else a.graphs)]


def _rename(node: onnx.NodeProto, old: str, new: str) -> None:
    """Make a node read another tensor, in its bodies as well."""
    node.input[:] = [new if name == old else name for name in node.input]
    for body in _bodies(node):
        for inner in body.node:
            _rename(inner, old, new)


def _inner(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Return the nodes that lie in a body."""
    for node in proto.graph.node:
        for body in _bodies(node):
            yield from _all(body)


def _all(graph: Any) -> Iterator[onnx.NodeProto]:
    """Return the nodes of a graph and of the bodies in it."""
    for node in graph.node:
        yield node
        for body in _bodies(node):
            yield from _all(body)


def random_operators(proto: onnx.ModelProto) -> list[str]:
    """Return the types of operators that draw random numbers without a seed, bodies included, one entry per node."""
    values = _constants(proto)
    nodes = [*_all(proto.graph), *(n for f in proto.functions for n in _all(f))]
    random_nodes = [n for n in nodes if draws(n, values)]
    return [n.op_type for n in random_nodes if not any(a.name == "seed" for a in n.attribute)]


def seed_random_nodes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with a seed for every unseeded random operator: two copies draw alike while sizes are equal."""
    if not random_operators(proto):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for node in [*_all(copy.graph), *(n for f in copy.functions for n in _all(f))]:
        if draws(node) and not any(a.name == "seed" for a in node.attribute):
            drops = lookup(node.domain, node.op_type).training is not None
            value: int | float = _SEED if drops else float(_SEED)
            node.attribute.append(onnx.helper.make_attribute("seed", value))
    return copy
