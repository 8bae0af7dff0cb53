"""Rewrite a model for a removal: gather weights, adapt nodes, keep every value that must not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.channels.survivors import Mask, Ragged, Survivors
from onnxprune.graph.facts import Values, is_small
from onnxprune.graph.resized import Stage, record
from onnxprune.graph.view import Graph, Node
from onnxprune.io import markers
from onnxprune.io.constants import add_constant, set_constant
from onnxprune.io.weights import ArrayWeight, DerivedWeight, GatheredWeight, Weight
from onnxprune.operators.context import Cut, Step, Table
from onnxprune.operators.registry import Scaling, lookup, rule_of

# Largest constant that takes up a factor, in bytes.
_SCALED_BYTES = 1 << 20


@dataclass(slots=True)
class Edits:
    """Attributes by (node, name), operands by (node, input), and nodes to insert in front of others and behind them.

    ``replaced``: the operator that takes the place of a node, and how many of its inputs it reads.
    ``renamed``: new names of tensors that hold other values than before.
    """

    attributes: dict[int, dict[str, Any]] = field(default_factory=dict)
    operands: dict[int, dict[int, str]] = field(default_factory=dict)
    before: dict[int, list[onnx.NodeProto]] = field(default_factory=dict)
    behind: dict[int, list[onnx.NodeProto]] = field(default_factory=dict)
    replaced: dict[int, tuple[str, int]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    sizes: dict[str, dict[int, int]] = field(default_factory=dict)
    resized: dict[str, Stage] = field(default_factory=dict)
    _count: int = 0
    _names: set[str] = field(default_factory=set)

    def constant(self, stem: str, value: NDArray[Any], used_names: Mapping[str, Any]) -> str:
        """Add a constant whose name shows its origin, and return the name."""
        while True:
            name = f"{stem}_cut" if self._count == 0 else f"{stem}_cut{self._count}"
            if name not in used_names and name not in self.constants:
                break
            self._count += 1
        self.constants[name] = np.asarray(value, order="C")  # keep rank 0 as well
        return name

    def name(self, stem: str, used_names: Mapping[str, Any]) -> str:
        """Return a name for a new tensor, made of ``stem``."""
        names = (stem if k == 0 else f"{stem}{k}" for k in count())
        name = next(n for n in names if n not in used_names and n not in self.constants and n not in self._names)
        self._names.add(name)
        return name

    def put_before(self, node: Node, proto: onnx.NodeProto) -> None:
        """Insert a node right in front of another."""
        self.before.setdefault(node.index, []).append(proto)

    def set_operand(self, node: Node, i: int, name: str) -> None:
        """Make input ``i`` of a node read another tensor."""
        self.operands.setdefault(node.index, {})[i] = name

    def operand(self, node: Node, i: int) -> str | None:
        """Return the new tensor of input ``i``, None where the input is unchanged."""
        return self.operands.get(node.index, {}).get(i)


def write(graph: Graph, edits: Edits) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    """Return a new skeleton and its weights. Everything that no edit names is copied unchanged."""
    source = graph.proto
    model = onnx.ModelProto()
    model.CopyFrom(source)
    del model.graph.node[:]
    initializers = {t.name for t in source.graph.initializer}
    constants: dict[str, Weight] = {}
    for name, value in edits.constants.items():
        add_constant(model, constants, name, value, behind=True)
    uses, unread = _uses(graph, edits)
    nodes: list[onnx.NodeProto] = []
    for node in graph.nodes:
        if node.index in edits.before:
            nodes.extend(edits.before[node.index])
        if node.index not in unread:
            nodes.append(_edited(node, edits))
            nodes.extend(edits.behind.get(node.index, ()))
    model.graph.node.extend(nodes)
    _drop_renamed(model, edits)
    weights = {name: w for name, w in graph.weights.items() if name in initializers}
    weights.update({name: w for name, w in edits.weights.items() if name in initializers})
    weights.update(constants)
    _resize(model, edits, weights)
    record(model, edits.resized)
    _drop_dead(model, graph, weights, uses)
    return model, weights


def _edited(node: Node, edits: Edits) -> onnx.NodeProto:
    """Return the node with its edits; the node itself where there are none."""
    constant = node.op == "Constant" and node.outputs[0] in edits.weights
    replaced = edits.replaced.get(node.index)
    is_edited = node.index in edits.operands or node.index in edits.attributes
    is_edited = is_edited or not edits.renamed.keys().isdisjoint(node.outputs)
    if not is_edited and replaced is None and not constant:
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
    for o, name in enumerate(target.output):
        target.output[o] = edits.renamed.get(name, name)
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


def _drop_renamed(model: onnx.ModelProto, edits: Edits) -> None:
    """Remove the declared types of tensors that no longer exist under their names."""
    restored = {o for nodes in edits.behind.values() for n in nodes for o in n.output}
    lost = edits.renamed.keys() - restored
    for k in reversed(range(len(model.graph.value_info) if lost else 0)):
        if model.graph.value_info[k].name in lost:
            del model.graph.value_info[k]


def _resize(model: onnx.ModelProto, edits: Edits, weights: Mapping[str, Weight]) -> None:
    """Adapt declared shapes: placeholders of initializers, value_info, and inputs that stand for initializers."""
    for tensor in model.graph.initializer:
        weight = weights.get(tensor.name)
        if tensor.name in edits.weights and weight is not None:
            tensor.ClearField("raw_data")
            for typed in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(typed)
            del tensor.dims[:]
            tensor.dims.extend(weight.shape)
    for info in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        sizes = edits.sizes.get(info.name)
        if not sizes:
            continue
        dims = info.type.tensor_type.shape.dim
        for axis, size in sizes.items():
            if axis < len(dims) and dims[axis].HasField("dim_value"):
                dims[axis].dim_value = size


def _uses(graph: Graph, edits: Edits) -> tuple[Counter[str], set[int]]:
    """Count the readers of every tensor; return the counts and the nodes that lost their last reader.

    Such nodes are shape arithmetic that a constant replaced.
    """
    uses = Counter(graph.captured)
    uses.update(graph.outputs)
    for added in (*edits.before.values(), *edits.behind.values()):
        for proto in added:
            uses.update(proto.input)
    reads = []
    for node in graph.nodes:
        operands = edits.operands.get(node.index)
        names = node.inputs
        if operands is not None:
            width = max(len(names), *(i + 1 for i in operands))
            names = [operands.get(i, names[i] if i < len(names) else "") for i in range(width)]
        if node.index in edits.replaced:
            names = names[: edits.replaced[node.index][1]]
        reads.append(names)
    uses.update(chain.from_iterable(reads))
    unread = set[int]()
    # Backwards: the nodes that a dead node read may be dead too, and come before it.
    for node, names in zip(reversed(graph.nodes), reversed(reads), strict=True):
        outputs = [edits.renamed.get(o, o) for o in node.outputs if o]
        if node.domain == markers.DOMAIN:
            continue  # a body keeps its inputs and outputs, whoever reads them
        if outputs and not any(uses[o] for o in outputs) and all(o in graph.consumers for o in node.outputs if o):
            unread.add(node.index)
            uses.subtract(names)
    return uses, unread


def _drop_dead(model: onnx.ModelProto, graph: Graph, weights: dict[str, Weight], uses: Counter[str]) -> None:
    """Remove initializers that lost their last reader."""
    unread: set[str] = set()
    for i in reversed(range(len(model.graph.initializer))):
        name = model.graph.initializer[i].name
        if not uses[name] and name in graph.consumers:
            del model.graph.initializer[i]
            weights.pop(name, None)
            unread.add(name)
    for i in reversed(range(len(model.graph.input))):
        if model.graph.input[i].name in unread:  # before IR 4 every initializer is an input too
            del model.graph.input[i]


class CannotRewrite(Exception):
    """A node has no form with the new sizes: carries the node and the reason, so that the caller freezes its atoms."""

    def __init__(self, node: Node, detail: str) -> None:
        super().__init__(f"{node.op} {node.label}: {detail}")
        self.node, self.detail = node, detail


def cut(table: Table, removed: Mask) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    """Return the pruned model as a skeleton with its weights; bulk data are read only when the weights are.

    Args:
        table: the labels.
        removed: bool mask over atoms, True where removed.

    Raises:
        CannotRewrite: a node has no form with the new sizes.
    """
    state = _State(table, Survivors(table, removed))
    for node in table.graph.steps:
        state.visit(node)
    state.check_outputs()
    return write(table.graph, state.edits)


class _State:
    """The walk over the graph: edits so far, and the values of small tensors in the pruned model."""

    def __init__(self, table: Table, after: Survivors) -> None:
        self.table, self.after, self.edits = table, after, Edits()
        self.graph: Graph = table.graph
        self.factors: dict[str, float] = {}
        self.values = [Values(self.graph, probe.values) for probe in table.facts.probes]
        self._shapes = [_Shapes(table, after, k) for k in range(len(self.values))]
        for name in table.items():
            if after.touched(name):
                self._resize(name)
        self._data = _data(table)

    def _resize(self, name: str) -> None:
        try:
            self.edits.sizes[name] = self.after.sizes(name)
        except Ragged:
            node = self.graph.producer.get(name) or self.graph.consumers[name][0][0]
            raise CannotRewrite(node, f"{name!r} would no longer be rectangular") from None
        weight = self.graph.weights.get(name)
        if name in self.table.resizable:
            shape = self.table.facts.shape(name) or ()
            sizes = {axis: int(shape[axis]) for axis in self.edits.sizes[name]}
            self.edits.resized[name] = Stage(sizes, self.after.steps(name))
        if weight is not None:
            weight_after = GatheredWeight(weight, self.after.steps(name))
            self.edits.weights[name] = weight_after
            if is_small(weight.shape, weight.dtype):  # known before, so the same now at every probe
                for values in self.values:
                    values.change(name, weight_after)

    def visit(self, node: Node) -> None:
        """Rewrite one node, then compute the known values of its outputs."""
        if self.factors and not self.factors.keys().isdisjoint(node.inputs):
            self._pass_factors(node)
        is_touched = not (self._untouched(node.inputs) and self._untouched(node.outputs))
        if not is_touched and not any(values.differs(*node.inputs) for values in self.values):
            return  # neither sizes nor values around it differ from the original's
        rule = lookup(node.domain, node.op, node.version)
        if is_touched or self._operands_changed(node):
            rule.rewrite(Cut(node, Step(node, self.table), self))
            self._pin(node, rule.operands)
        inputs, other = self.edits.operands.get(node.index), self.edits.replaced.get(node.index)
        if inputs:
            node = replace(node, inputs=[inputs.get(i, n) for i, n in enumerate(node.inputs)])
        if other:
            attributes = self.edits.attributes.get(node.index, {})
            node = replace(node, op=other[0], inputs=node.inputs[: other[1]], _attrs=attributes)
        for values, shapes in zip(self.values, self._shapes, strict=True):
            values.step(node, shapes)

    def _untouched(self, names: Sequence[str]) -> bool:
        return self.edits.sizes.keys().isdisjoint(names)

    def check_outputs(self) -> None:
        """Pin the sizes that leave the graph, as outputs or into bodies, to their original values."""
        for name in (*self.graph.outputs, *sorted(self.graph.captured)):
            if name in self.graph.producer and self._changed(name):
                raise CannotRewrite(self.graph.producer[name], f"the size {name!r} leaves the graph")

    def _changed(self, name: str) -> bool:
        """Return whether a value computed from sizes alone differs from the original's."""
        if name in self.edits.sizes or name in self._data or name not in self.table.facts.probes[0].sizes:
            return False
        return any(values.differs(name) for values in self.values)

    def _operands_changed(self, node: Node) -> bool:
        return any(name and name not in self.graph.weights and self._changed(name) for name in node.inputs)

    def _pin(self, node: Node, operands: tuple[int, ...]) -> None:
        """Pin a size that flows into data (an attention scale, a position) to its original value."""
        resized_inputs = [(i, n) for i, n in enumerate(node.inputs) if n not in self.graph.weights and self._changed(n)]
        if not resized_inputs:
            return
        known = all(self.table.facts.value(o) is not None for o in node.outputs if o)
        if known and not any(self.table.get(n) for n in node.inputs if n):
            return
        for i, name in resized_inputs:
            if i not in operands and self.edits.operand(node, i) is None:
                old = self.table.facts.static_value(name)
                if old is None:
                    raise CannotRewrite(node, f"the size {name!r} is used as data and depends on the batch")
                self.set_input(node, i, old)

    # -- edits that a rule asks for through Cut ---------------------------------------------------------------------

    def shape(self, name: str) -> Any:
        return self.after.shape(name)

    def touched(self, name: str) -> bool:
        return name in self.edits.sizes

    def keep(self, name: str, axis: int) -> Mask | None:
        return self.after.keep(name, axis)

    def survivors(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        return GatheredWeight(ArrayWeight(name, array), self.after.steps(name)).read()

    def kept_between(self, name: str, axis: int, start: int, stop: int) -> int:
        return self.after.kept_between(name, axis, start, stop)

    def value(self, name: str) -> NDArray[Any] | None:
        return self.values[0].get(name)

    def set_attr(self, node: Node, name: str, value: Any) -> None:
        self.edits.attributes.setdefault(node.index, {})[name] = value

    def set_input(self, node: Node, i: int, value: NDArray[Any]) -> None:
        stem = node.inputs[i] if i < len(node.inputs) and node.inputs[i] else f"{node.outputs[0]}_operand{i}"
        name = self.edits.constant(stem, value, self.table.facts.probes[0].shapes)
        for values in self.values:
            values.set(name, value)
        self.edits.set_operand(node, i, name)

    def pick(self, node: Node, i: int, axis: int, positions: NDArray[np.int64]) -> None:
        self._put_in_front(node, i, "Gather", positions, lambda now: now.take(positions, axis=axis), axis=axis)

    def add(self, node: Node, i: int, value: NDArray[Any]) -> None:
        self._put_in_front(node, i, "Add", value, lambda now: now + value)

    def _put_in_front(
        self, node: Node, i: int, op: str, constant: NDArray[Any], function: Callable[[Any], Any], **attributes: Any
    ) -> None:
        """Pass operand ``i`` through an operator with a constant."""
        stem, used_names = self.edits.operand(node, i) or node.inputs[i], self.table.facts.probes[0].shapes
        operand = self.edits.constant(f"{stem}_{op.lower()}", constant, used_names)
        result = self.edits.name(f"{stem}_{op.lower()}_{node.index}", used_names)
        self.edits.put_before(node, onnx.helper.make_node(op, [stem, operand], [result], name=result, **attributes))
        self.edits.set_operand(node, i, result)
        for values in self.values:
            current = values.get(stem)
            values.set(result, None if current is None else function(current))

    def scale_input(self, node: Node, i: int, factor: float) -> None:
        if not self._scale_constant(node, i, lambda value: value * factor):
            dtype = self._dtype(node.inputs[i])
            self._put_in_front(node, i, "Mul", np.asarray(factor, dtype), lambda now: now * factor)

    def scale_output(self, node: Node, o: int, factor: float) -> None:
        name = node.outputs[o]
        if self.graph.opsets.get("", 1) < 7:
            raise CannotRewrite(node, "its result has to be multiplied by a number, for which this opset has no Mul")
        self._rename(name, "unscaled")
        readers = list(self.graph.consumers.get(name, ()))
        alone = len(readers) == 1 and name not in self.graph.outputs and name not in self.graph.captured
        if alone and self._scaling(readers[0][0], readers[0][1], factor) is not None:
            self.factors[name] = factor
        else:
            self._put_behind(node, name, "Mul", np.asarray(factor, self._dtype(name)))

    def pad_input(self, node: Node, i: int, axis: int, size: int) -> None:
        rank, axis_size = len(self.shape(node.inputs[i])), self.shape(node.inputs[i])[axis]
        pads = np.zeros(2 * rank, np.int64)
        pads[rank + axis] = size - axis_size
        self._put_in_front(node, i, "Pad", pads, lambda now: None)

    def crop_output(self, node: Node, o: int, sizes: Mapping[int, int]) -> None:
        name = node.outputs[o]
        self._rename(name, "padded")
        bounds = ([0] * len(sizes), list(sizes.values()), list(sizes))
        self._put_behind(node, name, "Slice", *(np.asarray(n, np.int64) for n in bounds))

    def _rename(self, name: str, suffix: str) -> None:
        """Give the result of a node another name: it no longer is the tensor of that name in the original."""
        self.edits.renamed[name] = self.edits.name(f"{name}_{suffix}", self.table.facts.probes[0].shapes)

    def _put_behind(self, node: Node, name: str, op: str, *constants: NDArray[Any]) -> None:
        """Compute a tensor from the renamed result of its node by an operator with constants."""
        known_names, behind = self.table.facts.probes[0].shapes, self.edits.behind.setdefault(node.index, [])
        operands = [self.edits.constant(f"{name}_{op.lower()}", value, known_names) for value in constants]
        behind.append(
            onnx.helper.make_node(op, [self.edits.renamed[name], *operands], [name], name=f"{name}_{op.lower()}")
        )

    def _scaling(self, node: Node, i: int, factor: float) -> Scaling | None:
        """Return the effect of a factor on one input; None where the node cannot pass it on."""
        if node.domain == markers.DOMAIN:
            return None
        return lookup(node.domain, node.op, node.version).scaling(node, i, factor, lambda j: self._constant(node, j))

    def _pass_factors(self, node: Node) -> None:
        """Let the constants of a node, or its result, take up the factors of its inputs."""
        through = 1.0
        for i, name in enumerate(node.inputs):
            factor = self.factors.pop(name, None)
            if factor is None:
                continue
            scaling = self._scaling(node, i, factor)
            if scaling is None:  # it could when the factor was left to it
                raise CannotRewrite(node, f"the operator cannot pass on a factor of input {i}")
            self.edits.set_operand(node, i, self.edits.renamed[name])
            for j, function in scaling.constants.items():
                self._scale_constant(node, j, function)
            through *= scaling.factor
        if through != 1.0:
            self.scale_output(node, 0, through)

    def _constant(self, node: Node, i: int) -> NDArray[Any] | None:
        """Return the value of input ``i`` where it is a small weight of floats, in the pruned model."""
        name = node.inputs[i] if i < len(node.inputs) else ""
        weight = self.edits.weights.get(name, self.graph.weights.get(name))
        if weight is None or self.edits.operand(node, i) is not None:
            return None
        return weight.read() if weight.nbytes <= _SCALED_BYTES and weight.dtype.kind in "fV" else None

    def _scale_constant(self, node: Node, i: int, function: Callable[[NDArray[Any]], NDArray[Any]]) -> bool:
        """Replace a small constant by a function of it; returns whether input ``i`` is one."""
        value = self._constant(node, i)
        if value is None:
            return False
        name, scaled = node.inputs[i], np.asarray(function(value.astype(np.float64))).astype(value.dtype)
        if len(self.graph.consumers.get(name, ())) > 1 or name in self.graph.captured or name in self.graph.outputs:
            self.set_input(node, i, scaled)
            return True
        self.edits.weights[name] = weight = ArrayWeight(name, scaled)
        for values in self.values:
            values.change(name, weight)
        return True

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind = self.table.facts.probes[0].dtypes.get(name) or onnx.TensorProto.FLOAT
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))

    def replace(self, node: Node, op: str, inputs: int, attributes: dict[str, Any]) -> None:
        self.edits.replaced[node.index] = (op, inputs)
        self.edits.attributes[node.index] = attributes

    def derive(
        self, node: Node, i: int, shape: tuple[int, ...], function: Callable[[NDArray[Any]], NDArray[Any]]
    ) -> None:
        name = node.inputs[i]
        weight = DerivedWeight(self.graph.weights[name], shape, function)
        self.edits.weights[name] = weight
        self.edits.sizes[name] = dict(enumerate(shape))
        if is_small(weight.shape, weight.dtype):
            for values in self.values:
                values.change(name, weight)

    def fail(self, node: Node, detail: str) -> None:
        raise CannotRewrite(node, detail)

    def set_target(self, node: Node, i: int, target: tuple[int, ...]) -> None:
        name = node.inputs[i] if i < len(node.inputs) else ""
        if not name:
            self.set_input(node, i, np.asarray(target, dtype=np.int64))
            return
        old = [probe.values.get(name) for probe in self.table.facts.probes]
        current = self.values[0].get(name)
        first = old[0]
        kind = np.int64 if first is None else first.dtype
        same = first is not None and all(v is not None and np.array_equal(v, first) for v in old)
        if first is not None and same and first.shape == (len(target),):
            entries = rule_of(node).target_entries(node, first.tolist(), target, self.shape(node.inputs[0]))
            self.set_input(node, i, np.asarray(entries, dtype=kind))
        elif rule_of(node).infers_size:
            self._mixed_target(node, i, target, old, current)
        else:
            self._blend(node, i, target, old, current)

    def _dynamic(self, old: list[Any], target: tuple[int, ...]) -> NDArray[np.bool_] | None:
        """Return a mask over entries of a computed operand that differ between probes; None where none are known."""
        if any(v is None or v.shape != (len(target),) for v in old):
            return None
        return np.asarray(old[0] != old[-1])

    def _mixed_target(self, node: Node, i: int, target: tuple[int, ...], old: list[Any], current: Any) -> None:
        """Rewrite a Reshape target with dynamic entries: at most one of them changes, and becomes -1."""
        axes = np.array([self.table.facts.varies(node.outputs[0], a) for a in range(len(target))])
        same = (
            np.zeros(len(target), bool)
            if current is None or current.shape != axes.shape
            else np.asarray(current) == np.asarray(target)
        )
        change = axes & ~same
        if current is None and axes.sum() <= 1:
            self.set_input(node, i, np.where(axes, -1, target).astype(np.int64))
        elif change.sum() <= 1 and current is not None:
            self._where(node, i, np.where(change, -1, target), axes & same)
        else:
            raise CannotRewrite(node, "the target of this reshape is computed from more than one dynamic size")

    def _blend(self, node: Node, i: int, target: tuple[int, ...], old: list[Any], current: Any) -> None:
        """Rewrite a computed operand: new constants for static entries, the computed entries for dynamic ones."""
        is_dynamic = self._dynamic(old, target)
        if (
            is_dynamic is None
            or current is None
            or current.shape != is_dynamic.shape
            or (np.asarray(current) != np.asarray(target))[is_dynamic].any()
        ):
            raise CannotRewrite(node, f"operand {i} is computed in a way that cannot follow the new sizes")
        self._where(node, i, np.asarray(target), is_dynamic)

    def _where(self, node: Node, i: int, constants: NDArray[Any], is_dynamic: NDArray[np.bool_]) -> None:
        if not is_dynamic.any():
            self.set_input(node, i, constants.astype(np.int64))
            return
        if self.graph.opsets.get("", 1) < 9:
            raise CannotRewrite(node, "a computed operand needs Where, which this opset lacks")
        used_names = self.table.facts.probes[0].shapes
        stem = node.inputs[i]
        mask = self.edits.constant(f"{stem}_dynamic", is_dynamic, used_names)
        fixed = self.edits.constant(f"{stem}_sizes", constants.astype(np.int64), used_names)
        result = self.edits.name(f"{stem}_for_{node.index}", used_names)
        where = onnx.helper.make_node("Where", [mask, stem, fixed], [result], name=f"{node.label}_target")
        self.edits.put_before(node, where)
        self.edits.set_operand(node, i, result)
        for values in self.values:
            current = values.get(stem)
            values.set(result, None if current is None else np.where(is_dynamic, current, constants))


def _data(table: Table) -> set[str]:
    """Return tensors computed from labelled ones: sizes may have been used on the way, but they are no sizes."""
    known, names = table.items(), set[str]()
    for node in table.graph.steps:
        sized = rule_of(node).reads_sizes
        if not sized and (not names.isdisjoint(node.inputs) or any(known.get(name) for name in node.inputs)):
            names.update(node.outputs)
    return names


class _Shapes:
    """Shapes of the pruned model at one probe, computed on demand."""

    def __init__(self, table: Table, after: Survivors, probe: int) -> None:
        self._shapes, self._after = table.facts.probes[probe].shapes, after
        self._first = table.facts.probes[0].shapes

    def get(self, name: str, default: Any = None) -> Any:
        shape = self._shapes.get(name, default)
        if shape is None:
            return None
        sizes = self._after.sizes(name)
        if not sizes:
            return shape
        # Heads merged with a dynamic batch shrink by the same share at every batch size.
        first = self._first[name]
        return tuple(sizes[a] * n // first[a] if a in sizes else n for a, n in enumerate(shape))
