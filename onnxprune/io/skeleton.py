"""Copy parts of a model without the bulk data; the originals are never changed."""

from __future__ import annotations

from typing import Any

from onnx import GraphProto, ModelProto, TensorProto

from onnxprune.io.wire import prefix

_DESCRIPTION = frozenset({"name", "data_type", "dims", "doc_string", "metadata_props"})


def without_graph(model: ModelProto) -> ModelProto:
    """Copy everything around the graph: versions, metadata, functions."""
    copy = ModelProto()
    _copy_fields(model, copy, "graph")
    return copy


def without_initializers(graph: GraphProto) -> GraphProto:
    """Copy a graph's nodes, values and texts."""
    copy = GraphProto()
    _copy_fields(graph, copy, "initializer")
    return copy


def outline(graph: GraphProto) -> GraphProto:
    """Copy a graph's declared values and texts, without its nodes and initializers."""
    copy = GraphProto()
    _copy_fields(graph, copy, "initializer", "node")
    return copy


def without_nodes(graph: GraphProto) -> GraphProto:
    """Copy everything of a graph except its nodes."""
    copy = GraphProto()
    _copy_fields(graph, copy, "node")
    return copy


def without_data(tensor: TensorProto) -> TensorProto:
    """Copy a tensor's name, type, dims and documentation."""
    copy = TensorProto()
    for field, value in tensor.ListFields():
        if field.name in _DESCRIPTION:
            _copy_field(copy, field, value)
    return copy


def _copy_fields(source: ModelProto | GraphProto, target: ModelProto | GraphProto, *left_out: str) -> None:
    for field, value in source.ListFields():
        if field.name not in left_out:
            _copy_field(target, field, value)


def _copy_field(target: ModelProto | GraphProto | TensorProto, field: Any, value: Any) -> None:
    entries = getattr(target, field.name)
    if hasattr(entries, "MergeFrom"):
        entries.MergeFrom(value)
    elif isinstance(value, bytes):
        # Text that is not UTF-8, as some tools write into doc_string: protobuf reads it but cannot assign it.
        target.MergeFromString(prefix(field.number, len(value)) + value)
    else:
        setattr(target, field.name, value)
