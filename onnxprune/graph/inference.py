"""Infer shapes: by onnx, then node by node where computed operands or branches require it.

A property of a state on entry need not hold in the second iteration: a state keeps those sizes that the body returns
unchanged, which then hold in every iteration; its other sizes are unknown.

For a second binding of the dynamic sizes, nodes are visited again only where sizes or values differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import onnx

from onnxprune.graph.shapes import output_shapes
from onnxprune.graph.values import Probe, Values, has_long_vectors, propagates
from onnxprune.graph.view import CONTROL, Graph, Node
from onnxprune.io import markers
from onnxprune.operators.registry import Elements, Move, rule_of

Walk = Callable[[Sequence[Node]], None]
"""Infers shapes and values of nodes in order."""


def infer_marker(graph: Graph, node: Node, probe: Probe, walk: Walk) -> None:
    """Infer shapes and types of a marker's outputs."""
    op = node.op
    if op == markers.OPEN:
        kinds = (onnx.TensorProto.BOOL, onnx.TensorProto.INT64, onnx.TensorProto.BOOL)
        for name, kind in zip(node.outputs, kinds, strict=False):
            probe.shapes[name], probe.dtypes[name] = (), kind
    if op in (markers.OPEN, markers.ELSE) and node.kind == "If":
        _mark_idle(graph, node, probe)
    elif op == markers.END and node.kind != "If":
        _settle(graph, node, probe, walk)
    elif op in (markers.CARRY, markers.SLICE, *markers.RESULTS):
        name, source = node.outputs[0], node.inputs[0]
        probe.shapes[name] = _result(graph, node, probe)
        known = probe.dtypes.get(source) or _weight_type(graph, source)
        if known:
            probe.dtypes[name] = known


def _weight_type(graph: Graph, name: str) -> int:
    weight = graph.weights.get(name)
    return 0 if weight is None else weight.onnx_type


def _result(graph: Graph, node: Node, probe: Probe) -> Any:
    shape = probe.shapes.get(node.inputs[0])
    if node.op == markers.TIE:
        return _common(shape, probe.shapes.get(node.inputs[1]))
    if node.op == markers.JOIN:
        condition = probe.values.get(node.inputs[2])
        other = probe.shapes.get(node.inputs[1])
        return _common(shape, other) if condition is None else shape if condition.ravel()[0] else other
    if shape is None or node.op == markers.CARRY:
        return shape
    axis = int(node.attrs["axis"])
    if node.op == markers.SLICE:
        axis %= len(shape)
        return (*shape[:axis], *shape[axis + 1 :])
    axis %= len(shape) + 1
    return (*shape[:axis], _stacked(graph, node, probe), *shape[axis:])


def _common(a: Any, b: Any) -> Any:
    """Return the common shape of two: None for a size that differs, None for the whole where the rank does."""
    if a is None or b is None or len(a) != len(b):
        return None
    return tuple(n if n == m else None for n, m in zip(a, b, strict=True))


def _mark_idle(graph: Graph, node: Node, probe: Probe) -> None:
    """Record the nodes of a branch that does not run."""
    condition = probe.values.get(node.inputs[0])
    if condition is not None and bool(condition.ravel()[0]) != (node.op == markers.OPEN):
        depth = len(graph.around[node.index])
        for inner in graph.nodes[node.index + 1 :]:
            if len(graph.around[inner.index]) <= depth:
                return
            probe.idle.add(inner.index)


def _settle(graph: Graph, end: Node, probe: Probe, walk: Walk) -> None:
    """Forget sizes of states that the body changes, and all facts derived from them, until nothing changes any more."""
    ties = []
    for node in graph.nodes[end.index + 1 :]:
        if node.op == markers.CLOSE:
            break
        if node.op == markers.TIE:
            ties.append(node)
    body = [n for n in _body(graph, end) if n.op != "Constant"]
    while True:
        changed = False
        for tie in ties:
            state, following = tie.inputs
            before = probe.shapes.get(state)
            after = _common(before, probe.shapes.get(following))
            if before is not None and after != before:
                probe.shapes[state], changed = after, True
        if not changed:
            return
        for node in body:
            for name in node.outputs:
                probe.shapes.pop(name, None)
                probe.values.set(name, None)
                probe.sizes.discard(name)
        walk(body)


def _body(graph: Graph, end: Node) -> list[Node]:
    """Return the nodes of the body that ends here, without the markers through which values enter it."""
    bodies, entries = graph.around[end.index], (markers.CARRY, markers.SLICE)
    nodes = graph.nodes[bodies[-1].start + 1 : end.index]
    return [n for n in nodes if n.marker not in entries or graph.around[n.index] != bodies]


def _stacked(graph: Graph, node: Node, probe: Probe) -> int | None:
    """Return the number of values in a scan output; None where it is not known."""
    if node.kind == "Scan":
        scan_shape = probe.shapes.get(node.inputs[1])
        return None if scan_shape is None else scan_shape[int(node.attrs["along"])]
    end = next(n for n in reversed(graph.nodes[: node.index]) if n.op == markers.END and n.name == node.name)
    return _trips(graph, end, node.inputs[1], node.inputs[2], probe)


def _trips(graph: Graph, end: Node, count: str, condition: str, probe: Probe) -> int | None:
    """Return the number of runs of a Loop, where its condition is known to stay true."""
    max_trips = probe.values.get(count) if count else None
    if max_trips is None or not _stays_true(graph, end, condition, probe):
        return None
    return max(int(max_trips.ravel()[0]), 0)


def _stays_true(graph: Graph, end: Node, condition: str, probe: Probe) -> bool:
    """Return whether the body passes its condition on, or returns a constant that is true."""
    name = end.inputs[0]
    while not _is_true(name, probe):
        producer = graph.producer.get(name)
        if producer is None:
            return False
        if producer.op == markers.OPEN and producer.name == end.name:
            return not condition or _is_true(condition, probe)
        if rule_of(producer).moves not in (Move.SAME, Move.CAST):
            return False
        name = producer.inputs[0]
    return not condition or _is_true(condition, probe)


def _is_true(name: str, probe: Probe) -> bool:
    value = probe.values.get(name)
    return value is not None and bool(value.ravel()[0])


def count_repeats(graph: Graph, probe: Probe) -> None:
    """Count the runs of every node: those of the Loops and Scans around it, where sizes determine them."""
    times, counts = dict[int, int](), dict[int, int]()
    for node in graph.nodes:
        around = graph.around[node.index]
        if around:
            counts[node.index] = times[around[-1].start]
        if node.marker == markers.OPEN:
            times[node.index] = counts.get(node.index, 1) * (_runs(graph, node, probe) or 1)
    graph.record_repeats(counts)


def _runs(graph: Graph, node: Node, probe: Probe) -> int | None:
    """Return the number of runs of the body that begins here."""
    for other in graph.nodes[node.index + 1 :]:
        if other.name != node.name or other.domain != markers.DOMAIN:
            continue
        if other.op == markers.SLICE:
            scan_shape = probe.shapes.get(other.inputs[0])
            return None if scan_shape is None else scan_shape[int(other.attrs["axis"])]
        if other.op == markers.END:
            return _trips(graph, other, node.inputs[0], node.inputs[1], probe) if node.kind == "Loop" else None
    return None


FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
_CODES = tuple(onnx.TensorProto.DataType.Value(name) for name in ("UINT8", "INT8", "UINT16", "INT16"))
_DeclaredType = tuple["int | None", "tuple[int | None, ...] | None"]
Infer = Callable[[Node, list[Any], list[Any]], "list[Any] | None"]
"""(node, shapes and values of its inputs) -> shapes of its outputs: for operators that onnx does not know."""


def probe_at(
    graph: Graph, inputs: dict[str, tuple[int, ...]], infer: Infer | None, first: Probe | None = None
) -> Probe:
    """Infer shapes and values at one binding of the inputs; ``infer`` handles operators without an onnx schema.

    ``first`` is another binding's probe, whose values are reused wherever they are the same.
    """
    if first is not None:
        probe = _follow(graph, inputs, infer, first)
        if probe is not None:
            return probe
    probe = Probe(inputs=inputs, values=Values(graph, None if first is None else first.values))
    if first is not None:
        probe.sizes = first.sizes
    _fill(graph, probe, infer, propagate=propagates(graph.proto))
    if graph.has_bodies and first is None:
        count_repeats(graph, probe)
    return probe


def _fill(graph: Graph, probe: Probe, infer: Infer | None, *, propagate: bool) -> None:
    """Fill shapes and values of a probe. ``propagate`` False: check first whether onnx can propagate values."""
    if not propagate:
        first = Probe(inputs=probe.inputs, values=Values(graph))
        _fill_once(graph, first, infer, propagate=False)
        propagate = not has_long_vectors(first)
    _fill_once(graph, probe, infer, propagate=propagate)


def _fill_once(graph: Graph, probe: Probe, infer: Infer | None, *, propagate: bool) -> None:
    probe.shapes.update({name: weight.shape for name, weight in graph.weights.items()})
    _infer_whole(graph, probe, propagate)
    probe.shapes.update(_ranked(graph, probe.inputs))
    _walk(graph, graph.steps, probe, infer)


def _ranked(graph: Graph, inputs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes without those of inputs of unknown rank, which look like scalars."""
    if all(inputs.values()):
        return inputs
    scalars = {i.name for i in graph.proto.graph.input if i.type.tensor_type.HasField("shape")}
    return {name: shape for name, shape in inputs.items() if shape or name in scalars}


def probe_of(
    graph: Graph, nodes: Sequence[Node], inputs: dict[str, tuple[int, ...]], base: Probe, infer: Infer | None
) -> Probe:
    """Infer some nodes, given in order with all that they depend on, at one binding of the inputs.

    ``base`` is the probe of another binding, which provides the types.
    """
    known = {**{name: weight.shape for name, weight in graph.weights.items()}, **_ranked(graph, inputs)}
    probe = Probe(inputs, known, base.dtypes)
    probe.values = Values(graph)
    _walk(graph, nodes, probe, infer)
    return probe


def _follow(graph: Graph, inputs: dict[str, tuple[int, ...]], infer: Infer | None, first: Probe) -> Probe | None:
    """Derive a probe from the first one for other inputs; None where a node would be known less than at the first."""
    shapes, values = {**first.shapes, **_ranked(graph, inputs)}, Values(graph, first.values)
    probe = Probe(inputs, shapes, first.dtypes, values, first.sizes, dict(first.elements))
    resized = {name for name, shape in inputs.items() if shape != first.inputs[name]}
    if graph.captured or graph.has_bodies or any(node.op in CONTROL for node in graph.steps):
        return None  # tensors that bodies read are no inputs of their node, and branches or carried states may differ
    for node in graph.steps:
        if resized.isdisjoint(node.inputs):
            continue
        for name in node.outputs:
            probe.shapes.pop(name, None)
            probe.elements.pop(name, None)
        _walk(graph, [node], probe, infer)
        for name in node.outputs:
            before, after = first.shapes.get(name), probe.shapes.get(name)
            if before == after:
                if probe.values.differs(name) or probe.elements.get(name) != first.elements.get(name):
                    resized.add(name)
                continue
            if before is None or after is None or len(before) != len(after) or _open(before) != _open(after):
                return None
            resized.add(name)
    return probe


def _open(shape: tuple[int | None, ...]) -> list[int]:
    """Return the axes whose size is not known."""
    return [a for a, n in enumerate(shape) if n is None] if None in shape else []


def _walk(graph: Graph, nodes: Sequence[Node], probe: Probe, infer: Infer | None) -> None:
    """Infer values and missing shapes of nodes in order."""
    values, shapes, sizes = probe.values, probe.shapes, probe.sizes
    for node in nodes:
        values.step(node, shapes)
        if rule_of(node).reads_sizes or (not sizes.isdisjoint(node.inputs) and _from_sizes(node, sizes)):
            sizes.update([o for o in node.outputs if o and values.get(o) is not None])
        for name in node.outputs:
            if not name:
                continue
            value = values.get(name)
            if value is not None:
                shapes[name] = value.shape
            elif _unsure(shapes.get(name)):
                _infer_node(graph, node, probe, infer)
                break


def _from_sizes(node: Node, sizes: set[str]) -> bool:
    """Return whether a node reads sizes as sizes, not as the shape of its result."""
    targets = rule_of(node).targets
    return any(name in sizes and i not in targets for i, name in enumerate(node.inputs))


def _infer_whole(graph: Graph, probe: Probe, propagate: bool) -> None:
    """Run onnx's shape inference over the skeleton with the dynamic input dimensions bound."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.proto)
    ranked = _ranked(graph, probe.inputs)
    for declared in model.graph.input:
        if declared.name in ranked:
            shape = declared.type.tensor_type.shape
            del shape.dim[:]
            for size in probe.inputs[declared.name]:
                shape.dim.add().dim_value = size
    types = {i.name: i.type for i in [*model.graph.value_info, *model.graph.output]}
    del model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=propagate)
    except Exception:  # inference errors on odd graphs leave the node-by-node pass
        return
    known: dict[bytes, _DeclaredType] = {}
    for info in [*model.graph.value_info, *model.graph.output]:
        kind = info.type
        key = kind.SerializeToString()  # types repeat, and a cache lookup takes a fraction of the time of decoding one
        inferred = known.get(key)
        if inferred is None:
            known[key] = inferred = _declared_type(kind)
        _learn(info.name, inferred, probe)
    for name, kind in types.items():
        if name in graph.inner:  # the declared shape of a state may hold for its first value alone
            probe.dtypes[name] = kind.tensor_type.elem_type
        elif probe.shapes.get(name) is None:
            _record_type(name, kind, probe)


def _record_type(name: str, kind: onnx.TypeProto, probe: Probe) -> None:
    _learn(name, _declared_type(kind), probe)


def _declared_type(kind: onnx.TypeProto) -> _DeclaredType:
    """Return the declared element type (None for other than tensors) and shape (None where undeclared)."""
    if not kind.HasField("tensor_type"):
        return None, None
    tensor = kind.tensor_type
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    return tensor.elem_type, tuple([d.dim_value or (0 if d.HasField("dim_value") else None) for d in tensor.shape.dim])


def _learn(name: str, inferred: _DeclaredType, probe: Probe) -> None:
    dtype, shape = inferred
    if dtype is not None:
        probe.dtypes[name] = dtype
    if shape is not None:
        probe.shapes[name] = shape


def _infer_foreign(graph: Graph, node: Node, probe: Probe, infer: Infer) -> None:
    """Infer shapes of an operator without onnx schema.

    Results have the type of its first input of floats (or codes).
    """
    shapes = [probe.elements.get(name, probe.shapes.get(name)) if name else None for name in node.inputs]
    results = infer(node, shapes, [probe.values.get(name) if name else None for name in node.inputs])
    kinds = [probe.dtypes.get(name) or _dtype_of(graph, name) for name in node.inputs if name]
    allowed_kinds = _CODES if rule_of(node).gives_codes(node) else FLOATS
    kind = next((k for k in kinds if k in allowed_kinds), kinds[0] if kinds else onnx.TensorProto.FLOAT)
    for name, shape in zip(node.outputs, results or (), strict=False):
        if name:
            probe.dtypes.setdefault(name, kind)
            if isinstance(shape, Elements):
                probe.elements[name] = shape
                continue
            # The file may leave sizes open that follow here.
            if shape is not None and (probe.shapes.get(name) is None or None not in shape):
                probe.shapes[name] = tuple(shape)


def _infer_node(graph: Graph, node: Node, probe: Probe, infer: Infer | None) -> None:
    """Infer a single node from the facts so far: computed targets of Reshape, Expand, Slice and so on."""
    if node.domain == markers.DOMAIN:
        infer_marker(graph, node, probe, lambda nodes: _walk(graph, nodes, probe, infer))
        return
    if _infer_quickly(node, probe):
        return
    with suppress(onnx.defs.SchemaError):
        _infer_known(graph, node, probe, onnx.defs.get_schema(node.op, node.version, node.domain))
    if infer is not None and any(_unsure(probe.shapes.get(o)) for o in node.outputs if o):
        _infer_foreign(graph, node, probe, infer)


def _unsure(shape: Any) -> bool:
    return shape is None or None in shape


def _infer_quickly(node: Node, probe: Probe) -> bool:
    """Return whether the types are known and the shapes follow without onnx."""
    for name in node.outputs:
        if name and name not in probe.dtypes:
            return False
    values, inputs, known_shape = probe.values, node.inputs, probe.shapes.get

    def known(i: int) -> np.ndarray | None:
        return values.get(inputs[i]) if inputs[i] else None

    shapes = output_shapes(node, [known_shape(n) if n else None for n in inputs], known)
    if shapes is None:
        return False
    for name, shape in zip(node.outputs, shapes, strict=True):
        if name:
            probe.shapes[name] = shape
    return True


def _operands(graph: Graph, node: Node, probe: Probe) -> tuple[dict[str, onnx.TypeProto], dict[str, onnx.TensorProto]]:
    """Return types and values of a node's inputs. Raises ValueError for a size of more than 64 bits."""
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for name in node.inputs:
        if not name:
            continue
        kind = onnx.TypeProto()
        kind.tensor_type.elem_type = probe.dtypes.get(name) or _dtype_of(graph, name)
        shape = probe.shapes.get(name)
        if shape is not None:
            kind.tensor_type.shape.SetInParent()
            for size in shape:
                dim = kind.tensor_type.shape.dim.add()
                if size is not None:
                    dim.dim_value = size
        types[name] = kind
        value = probe.values.get(name)
        if value is not None:
            kind.tensor_type.elem_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
            data[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
    return types, data


def _infer_known(graph: Graph, node: Node, probe: Probe, schema: onnx.defs.OpSchema) -> None:
    """Run onnx's own inference of one node."""
    try:
        types, data = _operands(graph, node, probe)
        results = onnx.shape_inference.infer_node_outputs(
            schema,
            node.proto,
            types,
            data,
            opset_imports=list(graph.proto.opset_import),
            ir_version=graph.proto.ir_version,
        )
    except Exception:  # a node that inference refuses keeps an unknown shape, and is frozen later with that reason
        return
    for name, kind in results.items():
        _record_type(name, kind, probe)


def _dtype_of(graph: Graph, name: str) -> int:
    weight = graph.weights.get(name)
    if weight is not None:
        return weight.onnx_type
    declared = next((i for i in graph.proto.graph.input if i.name == name), None)
    return declared.type.tensor_type.elem_type if declared is not None else onnx.TensorProto.FLOAT
