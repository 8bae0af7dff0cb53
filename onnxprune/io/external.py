"""External data of a model: permitted locations, and their description in tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from onnxprune.errors import ModelError
from onnxprune.io.weights import FileWeight


def is_external(tensor: TensorProto) -> bool:
    """Return whether a tensor's data lie in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def external_weight(tensor: TensorProto, folder: Path | None) -> FileWeight:
    """Return the weight of a tensor whose data lie in another file.

    Args:
        tensor: tensor with ``external_data`` as onnx's ExternalData.md describes it.
        folder: the model's folder; None when the model came without one.

    Raises:
        ModelError: no folder, a location outside the folder, a missing or short file, or a length that does not fit.
    """
    keys = {entry.key: entry.value for entry in tensor.external_data}
    location = keys.get("location", "")
    if folder is None:
        raise ModelError(
            f"the data of tensor {tensor.name!r} lie in the file {location!r}, and a model given without its path "
            "does not say where that is",
            hint="Pass the model's path instead, or load it with its data: onnx.load(path).",
        )
    path = _inside(location, folder, tensor.name)
    offset, length = _number(keys, "offset", tensor.name) or 0, _number(keys, "length", tensor.name)
    return FileWeight(tensor.name, tensor.data_type, tensor.dims, path, offset, length)


def _inside(location: str, folder: Path, tensor: str) -> Path:
    home = folder.resolve()
    try:
        path = (home / location).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name with a null byte
        raise ModelError(f"tensor {tensor!r} names the impossible data file {location!r}: {error}") from error
    if not location or Path(location).is_absolute() or path == home or not path.is_relative_to(home):
        raise ModelError(
            f"tensor {tensor!r} names the data file {location!r}, which is not inside the model's folder {str(home)!r}",
            hint="Copy the data file itself (not a link to it) into the model's folder.",
        )
    return path


def _number(keys: dict[str, str], key: str, tensor: str) -> int | None:
    text = keys.get(key, "")
    if not text:
        return None
    if not text.isdecimal() or len(text) > 18:
        raise ModelError(f"tensor {tensor!r} has the {key} {text!r} in its external data, a number of bytes is needed")
    return int(text)


def attribute_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield tensors outside the main graph's initializers: in attributes, bodies, functions, sparse initializers."""
    yield from _sparse(model.graph)
    yield from _node_tensors(model.graph.node)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _sparse(graph: GraphProto) -> Iterator[TensorProto]:
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                if attribute.HasField("t"):  # a function's attribute may refer to an attribute of the call
                    yield attribute.t
            elif attribute.type == AttributeProto.TENSORS:
                yield from attribute.tensors
            elif attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                for body in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                    yield from body.initializer
                    yield from _sparse(body)
                    yield from _node_tensors(body.node)


def bring_inline(tensor: TensorProto, folder: Path | None) -> Path:
    """Read an external tensor's data into the tensor; return their file. Raises as :func:`external_weight` does."""
    weight = external_weight(tensor, folder)
    tensor.raw_data = bytes(weight.stored())
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    return weight.path
