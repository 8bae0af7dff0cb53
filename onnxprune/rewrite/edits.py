"""Changes to nodes that a cut asks for, collected first and written into a new proto afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.graph.view import Graph, Node
from onnxprune.model import markers
from onnxprune.model.constants import add_constant, set_constant
from onnxprune.model.weights import Weight


@dataclass(slots=True)
class Edits:
    """Attributes by (node, name), operands by (node, input), and nodes to put in front of others.

    ``replaced``: the operator that takes the place of a node, and how many of its inputs it reads.
    """

    attributes: dict[int, dict[str, Any]] = field(default_factory=dict)
    operands: dict[int, dict[int, str]] = field(default_factory=dict)
    before: dict[int, list[onnx.NodeProto]] = field(default_factory=dict)
    replaced: dict[int, tuple[str, int]] = field(default_factory=dict)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    sizes: dict[str, dict[int, int]] = field(default_factory=dict)
    _count: int = 0

    def constant(self, stem: str, value: NDArray[Any], taken: Mapping[str, Any]) -> str:
        """A new constant with a name that tells where it came from."""
        while True:
            name = f"{stem}_cut" if self._count == 0 else f"{stem}_cut{self._count}"
            if name not in taken and name not in self.constants:
                break
            self._count += 1
        self.constants[name] = np.asarray(value, order="C")  # of its own rank, where that is 0 too
        return name

    def name(self, stem: str, taken: Mapping[str, Any]) -> str:
        """A name for a new tensor, made of ``stem``."""
        used = {*self.constants, *(o for nodes in self.before.values() for n in nodes for o in n.output)}
        names = (stem if k == 0 else f"{stem}{k}" for k in count())
        return next(name for name in names if name not in taken and name not in used)

    def put_before(self, node: Node, proto: onnx.NodeProto) -> None:
        """Put a node right in front of another."""
        self.before.setdefault(node.index, []).append(proto)

    def set_operand(self, node: Node, i: int, name: str) -> None:
        """Point input ``i`` of a node at another tensor."""
        self.operands.setdefault(node.index, {})[i] = name

    def operand(self, node: Node, i: int) -> str | None:
        """What input ``i`` was pointed at, if it was."""
        return self.operands.get(node.index, {}).get(i)


def write(graph: Graph, edits: Edits) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    """A new skeleton and its weights. Everything that no edit names is copied as it is."""
    source = graph.proto
    model = onnx.ModelProto()
    model.CopyFrom(source)
    del model.graph.node[:]
    initializers = {t.name for t in source.graph.initializer}
    constants: dict[str, Weight] = {}
    for name, value in edits.constants.items():
        add_constant(model, constants, name, value, behind=True)
    uses, dead = _uses(graph, edits)
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if node.index in edits.before:
            nodes.extend(edits.before[node.index])
        if node.index not in dead:
            nodes.append(_edited(node, edits))
    model.graph.node.extend(nodes)
    weights = {name: w for name, w in graph.weights.items() if name in initializers}
    weights.update({name: w for name, w in edits.weights.items() if name in initializers})
    weights.update(constants)
    _resize(model, edits, weights)
    _drop_dead(model, graph, weights, uses)
    return model, weights


def _edited(node: Node, edits: Edits) -> onnx.NodeProto:
    """The node as it is to be written: itself where nothing changes."""
    constant = node.op == "Constant" and node.outputs[0] in edits.weights
    replaced = edits.replaced.get(node.index)
    edited = node.index in edits.operands or node.index in edits.attributes
    if not edited and replaced is None and not constant:
        return node.proto
    target = onnx.NodeProto()
    target.CopyFrom(node.proto)
    if replaced is not None:
        target.op_type = replaced[0]
        del target.input[replaced[1] :], target.attribute[:]
    for i, name in edits.operands.get(node.index, {}).items():
        while len(target.input) <= i:
            target.input.append("")
        target.input[i] = name
    for name, value in edits.attributes.get(node.index, {}).items():
        for k, attribute in enumerate(target.attribute):
            if attribute.name == name:
                del target.attribute[k]
                break
        if value is not None:
            target.attribute.append(onnx.helper.make_attribute(name, value))
    if constant:
        set_constant(target, edits.weights[node.outputs[0]])
    return target


def _resize(model: onnx.ModelProto, edits: Edits, weights: Mapping[str, Weight]) -> None:
    """Declared shapes follow: placeholders of initializers, value_info, and inputs that stand for initializers."""
    for tensor in model.graph.initializer:
        weight = weights.get(tensor.name)
        if tensor.name in edits.weights and weight is not None:
            tensor.ClearField("raw_data")
            for typed in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(typed)
            del tensor.dims[:]
            tensor.dims.extend(weight.shape)
    for info in [*model.graph.value_info, *model.graph.input]:
        sizes = edits.sizes.get(info.name)
        if not sizes:
            continue
        dims = info.type.tensor_type.shape.dim
        for axis, size in sizes.items():
            if axis < len(dims) and dims[axis].HasField("dim_value"):
                dims[axis].dim_value = size


def _uses(graph: Graph, edits: Edits) -> tuple[Counter[str], set[int]]:
    """How often every tensor is read, and the nodes that were needed and no longer are.

    That is shape arithmetic that a constant replaced.
    """
    uses = Counter(graph.captured)
    uses.update(graph.outputs)
    for added in edits.before.values():
        for proto in added:
            uses.update(proto.input)
    reads = []
    for node in graph.nodes:
        given = edits.operands.get(node.index)
        names = node.inputs
        if given is not None:
            width = max(len(names), *(i + 1 for i in given))
            names = [given.get(i, names[i] if i < len(names) else "") for i in range(width)]
        if node.index in edits.replaced:
            names = names[: edits.replaced[node.index][1]]
        reads.append(names)
    uses.update(chain.from_iterable(reads))
    dead = set[int]()
    # Backwards: what a dead node read may be dead too, and comes before it.
    for node, names in zip(reversed(graph.nodes), reversed(reads), strict=True):
        made = [o for o in node.outputs if o]
        if node.domain == markers.DOMAIN:
            continue  # a body keeps its inputs and outputs, whoever reads them
        if made and not any(uses[o] for o in made) and all(o in graph.consumers for o in made):
            dead.add(node.index)
            uses.subtract(names)
    return uses, dead


def _drop_dead(model: onnx.ModelProto, graph: Graph, weights: dict[str, Weight], uses: Counter[str]) -> None:
    """Remove initializers that were used and no longer are."""
    dropped: set[str] = set()
    for i in reversed(range(len(model.graph.initializer))):
        name = model.graph.initializer[i].name
        if not uses[name] and name in graph.consumers:
            del model.graph.initializer[i]
            weights.pop(name, None)
            dropped.add(name)
    for i in reversed(range(len(model.graph.input))):
        if model.graph.input[i].name in dropped:  # before IR 4 every initializer is an input too
            del model.graph.input[i]
