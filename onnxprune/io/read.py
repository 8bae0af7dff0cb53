"""Read a model without its bulk data, and check that its names are consistent.

Some tools write nodes out of order (onnxruntime's converter to half precision appends its casts, for one); onnxruntime
sorts them, and so does :func:`sort_nodes`.
"""

from __future__ import annotations

import hashlib
import heapq
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from onnxprune.errors import ModelError, OnnxpruneError, UsageError, nearest
from onnxprune.io.external import attribute_tensors, bring_inline, external_weight, is_external
from onnxprune.io.formats import guess_by_name, guess_folder, guess_format
from onnxprune.io.functions import inline_functions
from onnxprune.io.interchange import ModelSource, to_onnx
from onnxprune.io.skeleton import without_data, without_graph, without_initializers
from onnxprune.io.subgraphs import inline_bodies, outline_bodies
from onnxprune.io.weights import ArrayWeight, BufferWeight, FileWeight, SparseWeight, TensorWeight, Weight, to_proto
from onnxprune.io.wire import TENSOR_DOUBLE_DATA, TENSOR_FLOAT_DATA, TENSOR_RAW_DATA, Buffer, Span, strip

_Scope = tuple[set[str], ...]
Names = list[tuple[list[str], list[str]]]
"""The inputs and outputs of every node of a graph, in order: protobuf takes its time to hand them out."""


class Unsorted(ModelError):
    """A node reads a tensor that a later node computes."""


def same_nodes(first: ModelProto, second: ModelProto) -> bool:
    """Return whether two models have the same nodes (bodies included, in any order) and the same inputs and outputs.

    Initializers are compared by name, type and size in the main graph, by value as well in bodies.
    """
    return _face(first.graph) == _face(second.graph) and _nodes(first.graph) == _nodes(second.graph)


def _face(graph: GraphProto) -> tuple[list[str], list[str], list[tuple[str, int, tuple[int, ...]]]]:
    tensors = sorted((t.name, t.data_type, tuple(t.dims)) for t in graph.initializer)
    return [i.name for i in graph.input], [o.name for o in graph.output], tensors


def _nodes(graph: GraphProto) -> list[bytes]:
    """Yield every node as bytes that do not depend on the order of nodes or on how tensors are stored."""
    return sorted(_plain(node) for node in graph.node)


def _plain(node: NodeProto) -> bytes:
    if not any(a.HasField("t") or _bodies_of(a) for a in node.attribute):
        return bytes(node.SerializeToString(deterministic=True))
    bare = NodeProto()
    bare.CopyFrom(node)
    parts: list[object] = []
    for attribute in bare.attribute:
        if attribute.HasField("t"):
            parts.append(_tensor(attribute.t))
        parts += [(_face(g), _nodes(g), [_tensor(t) for t in g.initializer]) for g in _bodies_of(attribute)]
        for field in ("t", "g", "graphs"):
            attribute.ClearField(field)
    return bytes(bare.SerializeToString(deterministic=True)) + repr(parts).encode()


def _tensor(tensor: TensorProto) -> tuple[int, tuple[int, ...], object]:
    if tensor.data_type == TensorProto.STRING:
        return tensor.data_type, tuple(tensor.dims), list(tensor.string_data)
    return tensor.data_type, tuple(tensor.dims), bytes(TensorWeight(tensor).stored())


def _bodies_of(attribute: AttributeProto) -> Iterable[GraphProto]:
    return [attribute.g] if attribute.HasField("g") else attribute.graphs


def check_or_sort(proto: ModelProto) -> Names:
    """Check names as :func:`check_structure` does; where nodes are out of order, sort them in place first."""
    try:
        return check_structure(proto)
    except Unsorted:
        sort_nodes(proto)
        return check_structure(proto)


def sort_nodes(proto: ModelProto) -> None:
    """Sort the nodes of every graph, body and function in place: producers first, else in their old order.

    Nodes on a cycle keep their places, so that :func:`check_structure` refuses them.
    """
    _sort(proto.graph)
    for function in proto.functions:
        _sort(function)


def _sort(graph: Any) -> None:
    """Sort the nodes of a GraphProto or FunctionProto, those of bodies first."""
    for node in graph.node:
        for body in _bodies(node):
            _sort(body)
    nodes = list(graph.node)
    maker = {name: k for k, node in enumerate(nodes) for name in node.output if name}
    missing_inputs = [{maker[name] for name in _reads(node) if name in maker} for node in nodes]
    if all(max(before, default=-1) < k for k, before in enumerate(missing_inputs)):
        return
    readers: dict[int, list[int]] = {}
    for k, before in enumerate(missing_inputs):
        for b in before:
            readers.setdefault(b, []).append(k)
    ready_nodes = [k for k, before in enumerate(missing_inputs) if not before]  # rising, and so a heap
    order = []
    while ready_nodes:
        current = heapq.heappop(ready_nodes)
        order.append(current)
        for k in readers.get(current, ()):
            missing_inputs[k].discard(current)
            if not missing_inputs[k]:
                heapq.heappush(ready_nodes, k)
    if len(order) == len(nodes):
        copies = [NodeProto() for _ in nodes]
        for copy, k in zip(copies, order, strict=True):
            copy.CopyFrom(nodes[k])
        del graph.node[:]
        graph.node.extend(copies)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def _reads(node: NodeProto) -> Iterator[str]:
    """Yield names that a node reads, and those of its bodies; names that a body defines do not occur around it."""
    yield from node.input
    for body in _bodies(node):
        for inner in body.node:
            yield from _reads(inner)
        yield from (output.name for output in body.output)


def check_structure(proto: ModelProto) -> Names:
    """Check names and order of a model's graphs; needs no weights, takes time linear in the nodes.

    Returns:
        the names that the nodes of the main graph read and make.

    Raises:
        ModelError: a name is not text, or a tensor is defined twice, read before its definition, or never defined.
    """
    return _check_graph(proto.graph, ())


def _check_graph(graph: GraphProto, outer: _Scope) -> Names:
    inputs = [value.name for value in graph.input]
    initializers = [tensor.name for tensor in graph.initializer]
    initializers += [sparse.values.name for sparse in graph.sparse_initializer]
    _check_text("the graph", [*inputs, *initializers, *(value.name for value in graph.value_info)])
    _check_once("graph input", inputs)
    _check_once("initializer", initializers)
    # An initializer may bear an input's name: it is that input's default value.
    known = {*inputs, *initializers}
    scope = (*outer, known)
    names: Names = []
    for node in graph.node:
        inputs, outputs = list(node.input), list(node.output)
        names.append((inputs, outputs))
        _check_node(node, inputs, outputs, graph, scope)
        for output in outputs:
            if output and output in known:
                raise _duplicate_error(f"{_label(node)} gives", output)
            known.add(output)
    outputs = [value.name for value in graph.output]
    _check_text("the graph", outputs)
    for output in outputs:
        if not _defined(output, scope):
            raise ModelError(
                f"the graph output {output!r} is made by no node of graph {graph.name!r}",
                hint="Export the model again.",
            )
    return names


def _check_node(node: NodeProto, inputs: list[str], outputs: list[str], graph: GraphProto, scope: _Scope) -> None:
    kind = node.op_type
    try:
        "".join([node.name, kind, node.domain, *inputs, *outputs])  # all of it text, at the speed of C
    except TypeError:
        _check_text(_label(node), [node.name, kind, node.domain, *inputs, *outputs])
    if not kind:
        raise ModelError(f"{_label(node)} has no operator type", hint="The file is damaged, or was written by hand.")
    known = scope[-1]
    for name in inputs:
        if name and name not in known and not _defined(name, scope):
            raise _undefined_error(node, name, graph)
    for attribute in node.attribute:
        if not isinstance(attribute.name, str):
            raise _text_error(_label(node), attribute.name)
    for body in _bodies(node):
        _check_graph(body, scope)


def _defined(name: str, scope: _Scope) -> bool:
    return any(name in names for names in scope)


def _check_once(kind: str, names: list[str]) -> None:
    if len(set(names)) == len(names):
        return
    known_names: set[str] = set()
    for name in names:
        if name in known_names:
            raise _duplicate_error(f"an {kind}" if kind[0] == "i" else f"a {kind}", name)
        known_names.add(name)


def _check_text(where: str, names: Iterable[object]) -> None:
    # protobuf returns bytes for a name that is not UTF-8, whatever its type declares.
    for name in names:
        if not isinstance(name, str):
            raise _text_error(where, name)


def _text_error(where: str, name: object) -> ModelError:
    return ModelError(f"{where} has a name that is not UTF-8 text: {name!r}", hint="The file is damaged.")


def _duplicate_error(what: str, name: str) -> ModelError:
    return ModelError(
        f"{what} {name!r}, a name that is in use already; every tensor of a graph needs one definition",
        hint="Rename one of the two, or export the model again.",
    )


def _undefined_error(node: NodeProto, name: str, graph: GraphProto) -> ModelError:
    maker = next((other for other in graph.node if name in other.output), None)
    if maker is None:
        return ModelError(
            f"{_label(node)} reads {name!r}, which no input, initializer or node defines",
            hint="The file is damaged, or a tool that edited it left a name behind.",
        )
    return Unsorted(
        f"{_label(node)} reads {name!r} before {_label(maker)} makes it: the two wait for each other",
        hint="Nodes must read outputs of earlier nodes. The file is damaged; export the model again.",
    )


def _label(node: NodeProto) -> str:
    return f"node {node.name or next(iter(node.output), '')!r} ({node.op_type})"


INLINE_LIMIT = 1024
"""Data of at most so many bytes stay in the skeleton (shapes, axes, scalars), so that shape inference finds them."""

_WHOLE_FILE_LIMIT = 128 << 20  # smaller files are read once, of larger ones each weight by itself

# Limits on the elements of a sparse tensor: absolute, and as a multiple of the bytes of the model.
_MOST_UNFOLDED, _TIMES = 1 << 26, 64

_TYPED = {
    (TensorProto.FLOAT, TENSOR_FLOAT_DATA),
    (TensorProto.COMPLEX64, TENSOR_FLOAT_DATA),
    (TensorProto.DOUBLE, TENSOR_DOUBLE_DATA),
    (TensorProto.COMPLEX128, TENSOR_DOUBLE_DATA),
}


@dataclass(frozen=True)
class Loaded:
    """A model as it was read; only local functions and the bodies of If, Loop and Scan are inlined
    (:mod:`onnxprune.io.markers`).

    Attributes:
        proto: the skeleton: everything but the bulk data of initializers.
        weights: every initializer by name, those of inlined bodies included.
        path: the model file; None for bytes and a ModelProto.
        digest: the SHA-256 of the model file's bytes, or of a ModelProto's skeleton and weights; computed on demand.
        size: bytes of the model file and of the files with its external data.
        external: the files with its external data.
        as_read: the skeleton with local functions, and bodies in their nodes: the reference for ``proto``.
        data: the bytes that were given in place of a file.
        names: inputs and outputs of every node of the graph, where they are known already; else empty.
    """

    proto: ModelProto
    weights: dict[str, Weight]
    path: Path | None
    digest: Callable[[], str]
    size: int
    as_read: ModelProto
    external: tuple[Path, ...] = ()
    data: bytes | None = None
    names: Sequence[tuple[list[str], list[str]]] = ()

    @cached_property
    def sha256(self) -> str:
        """Return the hexadecimal digest that names the model in plans."""
        return self.digest()


def with_parts(loaded: Loaded, proto: ModelProto, weights: Mapping[str, Weight]) -> Loaded:
    """Return another graph with weights as a model of its own, which has no file yet, under the digest of the first.

    Args:
        loaded: the model that it was made of.
        proto: the skeleton, bodies inlined.
        weights: all of its initializers, by name.
    """
    size = sum(weight.nbytes for weight in weights.values()) + proto.ByteSize()
    as_read = outline_bodies(proto, weights)[0]
    parts = {"proto": proto, "weights": dict(weights), "as_read": as_read, "size": size}
    return replace(loaded, path=None, data=None, names=(), digest=lambda: loaded.sha256, **parts)


def load(source: ModelSource) -> Loaded:
    """Read a model from a path, from the bytes of a file, or from a ModelProto (which is not changed).

    Raises:
        UsageError: no such file, or a folder.
        ModelError: not ONNX, damaged, newer than the installed onnx, or with data missing.
    """
    label = repr(str(source)) if isinstance(source, (str, Path)) else "the model"
    try:
        return _load(source)
    except OnnxpruneError as error:
        if isinstance(error, UsageError) or label in error.message:
            raise
        raise type(error)(f"{label}: {error.message.marked}", hint=error.hint) from error
    except (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{label} cannot be read: {error}", hint="The file is damaged; export it again.") from error


def _load(source: ModelSource) -> Loaded:
    if isinstance(source, ModelProto):
        return _from_proto(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(bytes(source), None)
    if not isinstance(source, (str, Path)):
        return _from_proto(to_onnx(source))
    path = _existing(Path(source))
    if path.stat().st_size <= _WHOLE_FILE_LIMIT:
        return _from_bytes(path.read_bytes(), path)
    return _from_large_file(path)


def _existing(path: Path) -> Path:
    try:
        if path.is_file():
            return path
        folder, exists = path.is_dir(), path.exists()
        parent = path if folder else path.parent
        names = [other.name for other in parent.glob("*.onnx")] if parent.is_dir() else []
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} is not a usable path: {error}") from error
    if folder:
        hint = f"It contains {', '.join(sorted(names)[:5])}." if names else "Name the .onnx file itself."
        known = guess_folder(path)
        hint = f"It is {known.name}. {known.hint}" if known is not None and not names else hint
        raise UsageError(f"{str(path)!r} is a folder, a model file is needed", hint=hint)
    if exists:
        raise UsageError(f"{str(path)!r} is no ordinary file", hint="Give a file that can be read twice.")
    if not parent.is_dir():
        raise UsageError(f"no file {str(path)!r}: its folder does not exist", hint="Check the path.")
    raise UsageError(f"no file {str(path)!r}", hint=nearest(path.name, names) or "Its folder has no .onnx file.")


def _from_bytes(data: bytes, path: Path | None) -> Loaded:
    proto, spans = _skeleton(data, path)
    view = memoryview(data)
    weights: dict[int, Weight] = {}
    for index, span in spans.items():
        tensor = _stub(proto.graph, index, span)
        weights[index] = BufferWeight(tensor.name, tensor.data_type, tensor.dims, view[span.start : span.end])
    loaded = _finish(proto, weights, path, lambda: hashlib.sha256(data).hexdigest(), len(data))
    return replace(loaded, data=data) if path is None else loaded


def _from_large_file(path: Path) -> Loaded:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        proto, spans = _skeleton(data, path)
        size = len(data)
    weights: dict[int, Weight] = {}
    for index, span in spans.items():
        tensor = _stub(proto.graph, index, span)
        length = span.end - span.start
        weights[index] = FileWeight(tensor.name, tensor.data_type, tensor.dims, path, span.start, length)
    return _finish(proto, weights, path, lambda: _digest_of(path), size)


def _skeleton(data: Buffer, path: Path | None) -> tuple[ModelProto, dict[int, Span]]:
    if len(data) == 0:
        raise ModelError("the file is empty", hint="Export or download the model again.")
    known = guess_format(data)
    try:
        if known is None:
            return _parsed(data)
    except ModelError:
        known = guess_by_name(path)
        if known is None:
            raise
    raise ModelError(f"not an ONNX model: it looks like {known.name}", hint=known.hint)


def _parsed(data: Buffer) -> tuple[ModelProto, dict[int, Span]]:
    stripped, spans = strip(data, INLINE_LIMIT)
    proto = ModelProto()
    try:
        proto.ParseFromString(stripped)
    except Exception as error:  # protobuf's DecodeError shares no base class with other errors
        raise ModelError(f"not an ONNX model: {error}", hint="The file is truncated or of another format.") from error
    _check_kind(proto)
    return proto, spans


def _stub(graph: GraphProto, index: int, span: Span) -> TensorProto:
    tensor: TensorProto = graph.initializer[index]
    if span.field != TENSOR_RAW_DATA and (tensor.data_type, span.field) not in _TYPED:
        raise ModelError(f"the data of tensor {tensor.name!r} do not belong to its type {tensor.data_type}")
    return tensor


def _from_proto(source: ModelProto) -> Loaded:
    _check_kind(source)
    proto = without_graph(source)
    proto.graph.MergeFrom(without_initializers(source.graph))
    weights: dict[int, Weight] = {}
    for index, tensor in enumerate(source.graph.initializer):
        target = proto.graph.initializer.add()
        if is_external(tensor) or tensor.data_type == TensorProto.STRING or _small(tensor):
            target.CopyFrom(tensor)
        else:
            target.CopyFrom(without_data(tensor))
            weights[index] = TensorWeight(tensor)
    size = proto.ByteSize() + sum(weight.nbytes for weight in weights.values())
    sparse = [tensor.SerializeToString(deterministic=True) for tensor in source.graph.sparse_initializer]
    return _finish(proto, weights, None, lambda: _digest_in_memory(proto, weights.values(), sparse), size)


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_in_memory(proto: ModelProto, weights: Iterable[Weight], sparse: Iterable[bytes]) -> str:
    digest = hashlib.sha256(proto.SerializeToString(deterministic=True))
    for weight in weights:
        digest.update(weight.stored())
    for data in sparse:
        digest.update(data)
    return digest.hexdigest()


def _small(tensor: TensorProto) -> bool:
    # Counted in elements first: nothing is allocated for the absurd dims of a damaged file.
    count = 1
    for size in tensor.dims:
        count *= max(size, 0)
    return count * 4 <= INLINE_LIMIT


def _check_kind(proto: ModelProto) -> None:
    if not proto.graph.output:
        what = "its graph has no outputs" if proto.HasField("graph") else "it has no graph"
        raise ModelError(f"not an ONNX model: {what}", hint="Pass the .onnx file an exporter wrote.")
    if proto.ir_version > onnx.IR_VERSION:
        raise _version_error("IR version", proto.ir_version, onnx.IR_VERSION)
    if not proto.opset_import and proto.ir_version >= 3:
        raise ModelError("the model names no operator set (opset_import is empty)", hint="Export the model again.")
    for opset in proto.opset_import:
        known = onnx.defs.onnx_opset_version()
        if opset.domain in ("", "ai.onnx") and opset.version > known:
            raise _version_error("opset", opset.version, known)


def _version_error(what: str, version: int, known: int) -> ModelError:
    return ModelError(
        f"the model needs {what} {version}, the installed onnx {onnx.__version__} knows up to {known}",
        hint="pip install -U onnx onnxruntime",
    )


def _finish(
    proto: ModelProto, weights_by_tensor: dict[int, Weight], path: Path | None, digest: Callable[[], str], size: int
) -> Loaded:
    folder = path.parent if path else None
    weights: dict[str, Weight] = {}
    files: dict[Path, None] = {}
    for index, tensor in enumerate(proto.graph.initializer):
        if is_external(tensor):
            external = external_weight(tensor, folder)
            files[external.path] = None
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            if external.nbytes <= INLINE_LIMIT:
                tensor.raw_data = bytes(external.stored())
            weights_by_tensor[index] = external
        weight = weights_by_tensor.get(index) or _take_data(tensor)
        if weight.name in weights:
            raise ModelError(f"two initializers have the name {weight.name!r}", hint="Export the model again.")
        weights[weight.name] = weight
    for tensor in attribute_tensors(proto):
        if is_external(tensor):
            files[bring_inline(tensor, folder)] = None
        TensorWeight(tensor)  # raises when the data do not fit the shape
    _unfold_sparse(proto, weights, size)
    as_read = proto
    if proto.functions:
        sort_nodes(proto)
        proto = inline_functions(proto)
    names = check_or_sort(proto)
    flat_model = inline_bodies(proto)
    for tensor in flat_model.graph.initializer[len(proto.graph.initializer) :]:
        weights[tensor.name] = _take_data(tensor)
    size += sum(file.stat().st_size for file in files)
    return Loaded(
        flat_model, weights, path, digest, size, as_read, tuple(files), names=names if flat_model is proto else ()
    )


def _unfold_sparse(proto: ModelProto, weights: dict[str, Weight], size: int) -> None:
    """Convert sparse initializers to ordinary weights; they are written in sparse form again."""
    for sparse in proto.graph.sparse_initializer:
        tensor = SparseTensorProto()
        tensor.CopyFrom(sparse)
        weight = SparseWeight(tensor, sparse.values.name, max(_MOST_UNFOLDED, _TIMES * size))
        if weight.name in weights:
            raise ModelError(f"two initializers have the name {weight.name!r}", hint="Export the model again.")
        weights[weight.name] = weight
        stub = TensorProto(name=weight.name, data_type=weight.onnx_type, dims=weight.shape)
        proto.graph.initializer.append(to_proto(weight) if weight.nbytes <= INLINE_LIMIT else stub)
    proto.graph.ClearField("sparse_initializer")


def _take_data(tensor: TensorProto) -> Weight:
    """Return the weight of an initializer with its data; bulk data are removed from the skeleton."""
    if tensor.HasField("raw_data") and not tensor.HasField("segment"):  # most are small: no more than their bytes
        data = tensor.raw_data
        if len(data) <= INLINE_LIMIT and tensor.data_type != TensorProto.STRING:
            return BufferWeight(tensor.name, tensor.data_type, tensor.dims, data)
    if tensor.data_type != TensorProto.STRING:
        weight = TensorWeight(tensor)
        if weight.nbytes <= INLINE_LIMIT:
            return ArrayWeight(weight.name, weight.read())
    typed = TensorProto()
    typed.CopyFrom(tensor)
    if tensor.data_type != TensorProto.STRING:
        tensor.CopyFrom(without_data(typed))
    return TensorWeight(typed)
