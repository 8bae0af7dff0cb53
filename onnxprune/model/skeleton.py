"""Copies of a model's parts that leave the bulk data behind; the originals are never changed."""

from __future__ import annotations

from onnx import GraphProto, ModelProto, TensorProto


def without_graph(model: ModelProto) -> ModelProto:
    """A copy of everything around the graph: versions, metadata, functions."""
    copy = ModelProto()
    _copy_fields(model, copy, "graph")
    return copy


def without_initializers(graph: GraphProto) -> GraphProto:
    """A copy of a graph's nodes, values and texts."""
    copy = GraphProto()
    _copy_fields(graph, copy, "initializer")
    return copy


def _copy_fields(source: ModelProto | GraphProto, target: ModelProto | GraphProto, left_out: str) -> None:
    for field, value in source.ListFields():
        if field.name == left_out:
            continue
        held = getattr(target, field.name)
        if hasattr(held, "MergeFrom"):
            held.MergeFrom(value)
        else:
            setattr(target, field.name, value)


def without_data(tensor: TensorProto) -> TensorProto:
    """A copy of a tensor's name, type, dims and documentation."""
    copy = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    if tensor.doc_string:
        copy.doc_string = tensor.doc_string
    copy.metadata_props.extend(tensor.metadata_props)
    return copy
