"""Convert models of other packages: onnx_graphsurgeon.Graph and onnx_ir.Model.

Either package is imported only when a model of it is given or requested.

A graph of onnx-graphsurgeon has no place for a part of an ONNX model (metadata, domain, version, quantisation
annotations, doc strings). :func:`to_graphsurgeon` attaches that part to the graph, and :func:`to_onnx` writes it back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import onnx

from onnxprune.errors import ModelError, UsageError

ModelSource = str | Path | bytes | onnx.ModelProto | Any
"""A model as an argument. ``Any`` stands for objects of onnx-graphsurgeon and onnx-ir, which have no types here."""

ACCEPTED = "a path, bytes, an onnx.ModelProto, an onnx_graphsurgeon.Graph or an onnx_ir.Model"
"""Types of models that every call accepts, in words."""

_ATTACHED = "_onnxprune_unrepresented"
_Proto = TypeVar("_Proto", onnx.NodeProto, onnx.ValueInfoProto, onnx.TensorProto)


@dataclass(frozen=True, slots=True)
class Unrepresented:
    """Parts of a model that a graph of onnx-graphsurgeon cannot hold, without nodes and weights.

    Attributes:
        model: producer, IR version, domain, version, doc string, metadata and training information.
        graph: quantisation annotations and metadata.
        nodes: doc string, metadata and overload by the node's first output.
        values: doc string and metadata of inputs, outputs and inner tensors by name.
        weights: the same of initializers.
    """

    model: onnx.ModelProto
    graph: onnx.GraphProto
    nodes: dict[str, onnx.NodeProto]
    values: dict[str, onnx.ValueInfoProto]
    weights: dict[str, onnx.TensorProto]


def to_onnx(model: Any) -> onnx.ModelProto:
    """Convert a model of another package to ONNX's own form.

    Args:
        model: an onnx_graphsurgeon.Graph, an onnx_ir.Model or an onnx.ModelProto (returned as it is).

    Returns:
        the model; weights in memory.

    Raises:
        UsageError: an object of another kind.
        ModelError: the package that the object belongs to cannot write it.

    Example:
        >>> import onnx_graphsurgeon as gs
        >>> proto = to_onnx(gs.import_onnx(onnx.load("models/residual.onnx")))
    """
    if isinstance(model, onnx.ModelProto):
        return model
    if _is_graphsurgeon(model):
        return _from_graphsurgeon(model)
    if _is_onnx_ir(model):
        return _from_onnx_ir(model)
    raise UsageError(f"a model is {ACCEPTED}, not {type(model).__name__}")


def to_graphsurgeon(proto: onnx.ModelProto) -> Any:
    """Convert a model to an onnx_graphsurgeon.Graph that keeps the parts it has no place for.

    Args:
        proto: the model; it is not changed.

    Returns:
        the graph. ``onnx_graphsurgeon.export_onnx`` leaves out the part that it has no place for; :func:`to_onnx` and
        every call of this package put that part back.

    Raises:
        UsageError: onnx-graphsurgeon is not installed.
    """
    surgeon = _package("onnx_graphsurgeon", "pip install onnx-graphsurgeon")
    graph = surgeon.import_onnx(proto)
    setattr(graph, _ATTACHED, _unrepresented(proto))
    return graph


def to_onnx_ir(proto: onnx.ModelProto) -> Any:
    """Convert a model to an onnx_ir.Model, which holds everything that an ONNX model does.

    Raises:
        UsageError: onnx-ir is not installed.
    """
    return _package("onnx_ir", "pip install 'onnxprune[onnx-ir]'").from_proto(proto)


def _is_graphsurgeon(model: object) -> bool:
    return any(
        base.__name__ == "Graph" and base.__module__.split(".")[0] == "onnx_graphsurgeon"
        for base in type(model).__mro__
    )


def _is_onnx_ir(model: object) -> bool:
    return _is_a(model, "onnx_ir", "Model")


def _is_a(model: object, package: str, name: str) -> bool:
    """Return whether an object is of a class, without importing the package."""
    return any(base.__name__ == name and base.__module__.split(".")[0] == package for base in type(model).__mro__)


def _package(name: str, install: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(f"this needs the package {name}: {error}", hint=f"Install it: {install}") from error


def _from_graphsurgeon(graph: Any) -> onnx.ModelProto:
    surgeon = _package("onnx_graphsurgeon", "pip install onnx-graphsurgeon")
    try:
        proto: onnx.ModelProto = surgeon.export_onnx(graph)
    except Exception as error:  # its exceptions have no common base
        raise ModelError(
            f"onnx-graphsurgeon cannot export the graph {graph.name!r}: {error}",
            hint="Inputs and outputs need a dtype, and every node's inputs a producer: try graph.cleanup().toposort().",
        ) from error
    unrepresented = getattr(graph, _ATTACHED, None)
    if isinstance(unrepresented, Unrepresented):
        # Graphs have a producer and an IR version of their own from 0.6 on, which the user may have changed.
        if not hasattr(graph, "ir_version"):
            proto.ir_version = unrepresented.model.ir_version
            proto.producer_name, proto.producer_version = (
                unrepresented.model.producer_name,
                unrepresented.model.producer_version,
            )
        _put_back(proto, unrepresented)
    return proto


def _from_onnx_ir(model: Any) -> onnx.ModelProto:
    try:
        proto = _package("onnx_ir", "pip install 'onnxprune[onnx-ir]'").to_proto(model)
    except UsageError:
        raise
    except Exception as error:  # its exceptions have no common base
        raise ModelError(f"onnx-ir cannot serialise the model: {error}", hint="Check it with onnx_ir first.") from error
    assert isinstance(proto, onnx.ModelProto)
    return proto


def _unrepresented(proto: onnx.ModelProto) -> Unrepresented:
    model, graph = onnx.ModelProto(), onnx.GraphProto()
    model.domain, model.model_version, model.doc_string = proto.domain, proto.model_version, proto.doc_string
    model.ir_version = proto.ir_version
    model.producer_name, model.producer_version = proto.producer_name, proto.producer_version
    model.metadata_props.extend(proto.metadata_props)
    model.training_info.extend(proto.training_info)
    graph.quantization_annotation.extend(proto.graph.quantization_annotation)
    _extend(graph, proto.graph.metadata_props)
    nodes = {node.output[0]: _described(onnx.NodeProto(), node) for node in proto.graph.node if node.output}
    infos = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    values = {info.name: _described(onnx.ValueInfoProto(), info) for info in infos}
    weights = {tensor.name: _described(onnx.TensorProto(), tensor) for tensor in proto.graph.initializer}
    return Unrepresented(model, graph, nodes, values, weights)


def _put_back(proto: onnx.ModelProto, unrepresented: Unrepresented) -> None:
    """Write back the parts that a graph has no place for, for tensors that still exist."""
    proto.domain, proto.model_version = unrepresented.model.domain, unrepresented.model.model_version
    proto.doc_string = unrepresented.model.doc_string
    proto.metadata_props.extend(unrepresented.model.metadata_props)
    proto.training_info.extend(unrepresented.model.training_info)
    _extend(proto.graph, unrepresented.graph.metadata_props)
    infos = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    names = {*(i.name for i in infos), *(t.name for t in proto.graph.initializer)}
    names.update(output for node in proto.graph.node for output in node.output)
    for annotation in unrepresented.graph.quantization_annotation:
        parameters = {entry.value for entry in annotation.quant_parameter_tensor_names}
        if annotation.tensor_name in names and parameters <= names:
            proto.graph.quantization_annotation.append(annotation)
    for node in proto.graph.node:
        if node.output and node.output[0] in unrepresented.nodes:
            _described(node, unrepresented.nodes[node.output[0]])
    for info in infos:
        if info.name in unrepresented.values:
            _described(info, unrepresented.values[info.name])
    for tensor in proto.graph.initializer:
        if tensor.name in unrepresented.weights and not tensor.doc_string:
            _described(tensor, unrepresented.weights[tensor.name])


def _described(target: _Proto, source: Any) -> _Proto:
    """Copy doc string, metadata and, of a node, the overload."""
    target.doc_string = source.doc_string
    # Fields that onnx gained with IR version 10.
    if getattr(source, "overload", ""):
        target.overload = source.overload
    if not getattr(target, "metadata_props", ()):
        _extend(target, getattr(source, "metadata_props", ()))
    return target


def _extend(target: Any, entries: Iterable[Any]) -> None:
    entries = list(entries)
    if entries:
        target.metadata_props.extend(entries)
