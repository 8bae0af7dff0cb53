"""Weights that are codes: numbers in their place while layers are factorized, and factors in the same code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx

from onnxprune.factorization.layers import NUMBERS
from onnxprune.graph.canonical import keeps_values, weight_of
from onnxprune.graph.cost import constant_source, is_layer
from onnxprune.graph.view import Graph, Node, body_reads, connect, numbered_name
from onnxprune.io.constants import placeholder
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.operators.codes import numbers as dequantise
from onnxprune.operators.codes import pack, requantise
from onnxprune.operators.factoring import Description, Factoring
from onnxprune.operators.kernels import Array, Factor, Real
from onnxprune.operators.registry import Code, rule_of

# -- numbers in the place of codes -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DecodedWeights:
    """A model whose layers read numbers where they read codes.

    Attributes:
        proto: the model.
        weights: its constants by name.
        codes: {constant of numbers: the code of its weight}.
    """

    proto: onnx.ModelProto
    weights: dict[str, Weight]
    codes: Mapping[str, Code]
    _tensors: Mapping[str, str]
    _packed: Mapping[str, Node]
    _values: Mapping[str, Weight]

    @classmethod
    def of(cls, graph: Graph) -> DecodedWeights | None:
        """Write numbers in the place of the codes of layers, outside of bodies; None where there are none."""
        result = cls(onnx.ModelProto(), dict(graph.weights), {}, {}, {}, {})
        result.proto.CopyFrom(graph.proto)
        writer = _Decoder(graph, result.weights)
        nodes: list[onnx.NodeProto] = []
        for node, proto in zip(graph.nodes, result.proto.graph.node, strict=True):
            nodes.extend(writer.node(node, proto))
        if not writer.values:
            return None
        del result.proto.graph.node[:]
        result.proto.graph.node.extend(nodes)
        result.proto.graph.initializer.extend(placeholder(w) for w in writer.values.values())
        return cls(result.proto, result.weights, writer.codes, writer.tensors, writer.packed, writer.values)

    def restored(
        self, proto: onnx.ModelProto, weights: Mapping[str, Weight], coded: Mapping[str, Coded]
    ) -> tuple[onnx.ModelProto, dict[str, Weight]]:
        """Return a later state of the model: codes again where numbers are as they were, and factors as codes.

        Args:
            proto: the model.
            weights: its constants by name.
            coded: {constant: its codes} of constants to store as codes.
        """
        result, known = onnx.ModelProto(), dict(weights)
        result.CopyFrom(proto)
        same = {name for name, value in self._values.items() if known.get(name) is value}
        nodes: list[onnx.NodeProto] = []
        products: set[str] = set()
        for node in proto.graph.node:
            packed = next((self._packed[n] for n in node.input if n in self._packed and n in same), None)
            if packed is not None:
                nodes.append(packed.proto)
                products.update(o for o in node.output if o not in packed.outputs)
            elif not products & set(node.input):
                copy = onnx.NodeProto()
                copy.CopyFrom(node)
                for i, name in enumerate(node.input):
                    if name in self._tensors and name in same:
                        connect(copy, i, self._tensors[name])
                nodes.extend(_with_codes(copy, coded, known))
        live_nodes, freed = _live(nodes, {o.name for o in proto.graph.output}, set(self._tensors.values()))
        del result.graph.node[:]
        result.graph.node.extend(live_nodes)
        result.graph.initializer.extend(placeholder(known[name]) for name in known if name not in weights)
        unread = {*freed, *self._values, *coded, *(n for node in self._packed.values() for n in node.inputs)}
        return _without_unread(result, known, unread)


class _Decoder:
    """Numbers for the codes that layers read."""

    def __init__(self, graph: Graph, weights: dict[str, Weight]) -> None:
        self._graph, self._weights = graph, weights
        self._names = {*weights, *graph.producer, *graph.inputs}
        self.codes: dict[str, Code] = {}
        self.tensors: dict[str, str] = {}
        self.packed: dict[str, Node] = {}
        self.values: dict[str, Weight] = {}
        self._by_tensor: dict[str, str] = {}

    def node(self, node: Node, proto: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return the nodes in the place of one."""
        graph = self._graph
        if not node.inputs or (node.outputs and node.outputs[0] in graph.inner):
            return [proto]
        code = rule_of(node).code(node, self._reader(node))
        if code is not None and code.numeric:
            return self._opened(node, proto, code)
        factoring = rule_of(node).factoring
        if factoring is None or not (is_layer(node, graph) or factoring.looks_up):
            return [proto]
        for position in rule_of(node).weights[:2] or (0,):
            name = node.inputs[position] if position < len(node.inputs) else ""
            constant = self._decoded(name) if name and name not in graph.weights else ""
            if constant:
                connect(proto, position, constant)
        return [proto]

    def _reader(self, node: Node) -> Callable[[int], Array | None]:
        def read(i: int) -> Array | None:
            name = node.inputs[i] if i < len(node.inputs) else ""
            return self._graph.weights[name].read() if name in self._graph.weights else None

        return read

    def _decoded(self, name: str) -> str:
        """Return the constant of the numbers of a weight that was decoded or moved; empty for other tensors."""
        if name in self._by_tensor:
            return self._by_tensor[name]
        self._by_tensor[name] = ""
        source, graph = name, self._graph
        while source in graph.producer and keeps_values(graph.producer[source]) and source not in graph.weights:
            source = graph.producer[source].inputs[0]
        if name in graph.outputs or name in graph.captured:
            return ""
        producer = graph.producer.get(source)
        code = None
        if source not in graph.weights:
            code = None if producer is None else rule_of(producer).code(producer, self._reader(producer))
        elif graph.weights[source].dtype.kind != "f":
            return ""
        value = weight_of(graph, name) if code is not None or source in graph.weights else None
        if value is None:
            return ""
        stored = constant_source(graph, name) or name
        constant = self._constant(f"{stored}{NUMBERS}", value, code)
        self.tensors[constant] = name
        self._by_tensor[name] = constant
        return constant

    def _constant(self, stem: str, value: Array, code: Code | None) -> str:
        name = numbered_name(stem, self._names)
        self.values[name] = self._weights[name] = ArrayWeight(name, value)
        if code is not None:
            self.codes[name] = code
        return name

    def _opened(self, node: Node, proto: onnx.NodeProto, code: Code) -> list[onnx.NodeProto]:
        """Return an operator on packed codes as one on numbers, with its bias behind it."""
        read = self._reader(node)
        codes = read(code.codes)
        value = None if codes is None else rule_of(node).numbers(node, code.codes, codes, read)
        bias = "" if code.bias is None else node.inputs[code.bias]
        if value is None or (bias and bias not in self._graph.weights):
            return [proto]
        value = value.reshape(len(value), -1).astype(code.scale)
        output, stem = node.outputs[0], f"{node.inputs[code.codes]}{NUMBERS}"
        if not code.looks_up:
            value = np.ascontiguousarray(value[:, : int(node.attrs["K"])].T)
        constant = self._constant(stem, value, code)
        self.packed[constant] = node
        if code.looks_up:
            return [onnx.helper.make_node(code.numeric, [constant, node.inputs[1]], [output], node.label, axis=0)]
        product = numbered_name(f"{output}__product", self._names) if bias else output
        nodes = [onnx.helper.make_node(code.numeric, [node.inputs[0], constant], [product], node.label)]
        if bias:
            nodes.append(onnx.helper.make_node("Add", [product, bias], [output], f"{node.label}__sum"))
        return nodes


def _live(
    nodes: Sequence[onnx.NodeProto], outputs: Collection[str], chains: set[str]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """Return the nodes without those that compute nothing but unread tensors of chains, and what these read."""
    uses = Counter(name for node in nodes for name in node.input)
    suspects, live_nodes = set(chains), []
    freed: set[str] = set()
    for node in reversed(nodes):
        tensors = {o for o in node.output if o}
        if tensors and tensors <= suspects and not any(uses[o] or o in outputs for o in tensors):
            uses.subtract(node.input)
            suspects.update(node.input)
            freed.update(node.input)
        else:
            live_nodes.append(node)
    return live_nodes[::-1], freed


def _without_unread(
    proto: onnx.ModelProto, weights: dict[str, Weight], names: Collection[str]
) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    """Remove those of the constants that nothing reads, or that nodes compute now."""
    read = {n for node in proto.graph.node for n in reads(node)} | {o.name for o in proto.graph.output}
    read -= {o for node in proto.graph.node if node.op_type != "Constant" for o in node.output}
    unread = {n for n in names if n in weights and n not in read}
    for values in (proto.graph.initializer, proto.graph.input):
        for i in reversed(range(len(values))):
            if values[i].name in unread:
                del values[i]
    for i in reversed(range(len(proto.graph.node))):
        if proto.graph.node[i].op_type == "Constant" and proto.graph.node[i].output[0] in unread:
            del proto.graph.node[i]
    return proto, {n: w for n, w in weights.items() if n not in unread}


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that a node reads, its bodies' included."""
    yield from node.input
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.type == attribute.GRAPH else attribute.graphs:
            yield from body_reads(body)


# -- factors as codes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Coded:
    """A constant as codes.

    Attributes:
        code: the code.
        constants: codes, scales and zero points, by role; zero points only where the code has some.
        axis: axis of the constant along which scales vary; None where there is one for all.
        numbers: the numbers that codes stand for, in the layout of the constant.
    """

    code: Code
    constants: Mapping[str, Array]
    axis: int | None
    numbers: Array

    @property
    def num_bytes(self) -> int:
        """Return the bytes of codes, scales and zero points in a file."""
        narrow = self.code.bits if self.code.kind.name not in ("int8", "uint8") else 8
        return sum(-(-v.size * (narrow if r != "scale" else 8 * v.itemsize) // 8) for r, v in self.constants.items())


def code_factors(
    code: Code, factoring: Factoring, described: Description, factors: Sequence[Factor], like: Sequence[int]
) -> tuple[list[Factor], list[Coded | None]] | None:
    """Store factors as codes: the factors that codes stand for, and the codes; None for factors that stay numbers.

    Args:
        code: the code of the weight.
        factoring: factoring of the layer.
        described: description of the layer.
        factors: the factors.
        like: shape of the weight.

    Returns:
        None where no factor has a form in this code.
    """
    constants = factoring.constants(factors, described, like)
    places = factoring.constants([Factor(f.stage, _places(f.array.shape)) for f in factors], described, like)
    outputs = factoring.constants([Factor(f.stage, _outputs(f)) for f in factors], described, like)
    new, codes = [], list[Coded | None]()
    for number, (factor, value, place, output) in enumerate(zip(factors, constants, places, outputs, strict=True)):
        coded = _encoded(code, value, output, number)
        index = place.ravel().astype(np.int64)
        if coded is None or not np.array_equal(np.sort(index), np.arange(index.size)):
            new.append(factor)
            codes.append(None)
            continue
        array = np.empty(index.size)
        array[index] = coded.numbers.ravel()
        new.append(Factor(factor.stage, array.reshape(factor.array.shape)))
        codes.append(coded)
    return (new, codes) if any(codes) else None


def _places(shape: Sequence[int]) -> Real:
    return np.arange(prod(shape), dtype=np.float64).reshape(shape)


def _outputs(factor: Factor) -> Real:
    """Return the number of the output that each weight of a factor adds to, as a factor's weights."""
    parts, outputs = factor.stage.parts, factor.stage.outputs
    numbers = np.arange(parts * outputs, dtype=np.float64).reshape(parts, *(1,) * (factor.array.ndim - 2), outputs)
    return np.broadcast_to(numbers, factor.array.shape).copy()


def _axis_of(outputs: Array) -> int | None:
    """Return the axis of a constant that counts its outputs."""
    varying = [a for a, n in enumerate(outputs.shape) if n > 1 and (np.diff(outputs, axis=a) != 0).any()]
    if len(varying) == 1:
        return varying[0]
    return next((a for a, n in enumerate(outputs.shape) if n == 1), None) if not varying else None


def _encoded(code: Code, value: Array, outputs: Array, number: int) -> Coded | None:
    """Return a constant as codes; None where its layout has no such form, or where it is no lookup table."""
    axis = _axis_of(outputs)
    if code.looks_up:
        per_byte = 8 // code.bits
        blocks_fit = value.ndim == 2 and value.shape[1] % per_byte == 0
        return _blocked(code, value, 1) if number == 0 and blocks_fit else None
    if code.numeric:
        return _blocked(code, value.T, 0) if value.ndim == 2 and axis == 1 else None
    if code.block:
        if value.ndim != 2 or axis is None:
            return None
        return _blocked(code, value if axis == 0 else value.T, axis)
    if code.per_channel and axis is None:
        return None
    rows = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1) if axis is not None else value.reshape(1, -1)
    if not code.per_channel:
        axis, rows = None, value.reshape(1, -1)
    codes, scale, zero = _codes(code, rows)
    shape = value.shape if axis is None else np.moveaxis(value, axis, 0).shape
    codes = codes.reshape(shape) if axis is None else np.moveaxis(codes.reshape(shape), 0, axis)
    constants = {"codes": codes, "scale": scale.reshape(() if axis is None else -1)}
    if code.zeros:
        constants["zero"] = zero.reshape(() if axis is None else -1)
    real = dequantise(codes, constants["scale"], constants.get("zero"), axis or 0)
    return Coded(code, constants, axis, real)


def _codes(code: Code, values: Array) -> tuple[Array, Array, Array]:
    """Return codes, scales [..., 1] and zero points [..., 1] of numbers [..., positions], as they are stored."""
    middle = 1 << (code.bits - 1)
    scale = np.abs(values).max(axis=-1, keepdims=True) / max(middle - 1, 1)
    scale = np.where(scale > 0, scale, 1.0).astype(code.scale).astype(np.float64)
    scale = np.where(scale > 0, scale, 1.0)
    unsigned, scale, zero = requantise(
        np.asarray(values, np.float64),
        code.bits,
        scale,
        np.full_like(scale, middle),
        moves_zero=code.moves_zero,
        kind=code.scale,
        is_integer=code.zeros != "numbers",
    )
    lowest = middle if code.kind.name.startswith("int") else 0
    kind = code.scale if code.zeros == "numbers" else code.kind
    return (
        (unsigned.astype(np.int16) - lowest).astype(code.kind),
        scale.astype(code.scale),
        (zero - lowest).astype(kind),
    )


def _blocked(code: Code, rows: Array, axis: int) -> Coded:
    """Return a matrix as codes in blocks along its rows [outputs, contracted]; ``axis``: that of the outputs."""
    outputs, size = rows.shape
    blocks = -(-size // code.block)
    padded = np.zeros((outputs, blocks * code.block))
    padded[:, :size] = rows
    codes, scale, zero = _codes(code, padded.reshape(outputs, blocks, code.block))
    real = ((codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)).reshape(outputs, -1)
    constants = {"scale": scale[:, :, 0]}
    if not code.numeric:
        constants["codes"] = codes.reshape(outputs, -1)[:, :size]
        if code.zeros:
            constants["zero"] = zero[:, :, 0]
        constants = {role: value if axis == 0 else value.T for role, value in constants.items()}
        return Coded(code, constants, 1 - axis, real[:, :size] if axis == 0 else real[:, :size].T)
    row_codes = codes if not code.looks_up else codes.reshape(outputs, -1)[:, :size]
    constants["codes"] = pack(row_codes, code.bits)
    if code.zeros:
        constants["zero"] = pack(zero[:, :, 0], code.bits) if code.zeros == "codes" else zero[:, :, 0]
    if code.flat:
        constants |= {role: value.ravel() for role, value in constants.items() if role != "codes"}
    return Coded(code, constants, 1 - axis, real[:, :size] if axis else real[:, :size].T)


def _with_codes(
    node: onnx.NodeProto, coded: Mapping[str, Coded], weights: dict[str, Weight]
) -> Iterator[onnx.NodeProto]:
    """Yield a node that reads codes where it read numbers: an operator on codes, or decoders in front of it."""
    for i, name in enumerate(node.input):
        item = coded.get(name)
        if item is None:
            continue
        op, domain, attributes = item.code.operator
        roles = ("codes", "scale", "zero")
        names = {role: f"{name}/{role}" for role in roles if role in item.constants}
        is_new = names["codes"] not in weights
        weights.update({n: ArrayWeight(n, np.ascontiguousarray(item.constants[r])) for r, n in names.items()})
        if not item.code.numeric:
            sizes: dict[str, Any] = {} if item.axis is None else {"axis": item.axis}
            sizes |= {"block_size": item.code.block} if item.code.block else {}
            if is_new:
                yield onnx.helper.make_node(op, list(names.values()), [name], name, domain=domain, **sizes)
            continue
        operands = [names["codes"], names["scale"], *([names["zero"]] if "zero" in names else [])]
        if not item.code.looks_up:
            inner = {"K": item.numbers.shape[0], "N": item.numbers.shape[1]}
            inputs = [node.input[1 - i], *operands]
        else:
            inner, inputs = {}, [operands[0], node.input[1], *operands[1:]]
        yield onnx.helper.make_node(op, inputs, list(node.output), node.name, domain=domain, **attributes, **inner)
        return
    yield node
