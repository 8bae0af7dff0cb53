"""Probe sizes: concrete shapes for inputs with dynamic dimensions, used for analysis and validation only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from onnxprune.errors import UsageError, nearest
from onnxprune.model.graph import Graph

# Two values per kind of dimension: what differs between the probes is dynamic, and a baked-in size is caught.
BATCH, SEQUENCE, CHANNELS, PIXELS = (2, 3), (16, 24), (3, 3), (224, 256)


def probe_shapes(
    graph: Graph, overrides: Mapping[str, Sequence[int]] | None = None
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Two bindings {input: shape} of the dynamic dimensions; equal where nothing is dynamic.

    An override fixes every dimension of that input; its leading dimension still varies between the probes when the
    model declares it dynamic. The same symbol always gets the same size.

    Raises:
        UsageError: an override names no input, has the wrong rank or contradicts a static dimension.
    """
    declared = {i.name: i.type.tensor_type for i in graph.proto.graph.input if i.name in graph.inputs}
    overrides = dict(overrides or {})
    for name, shape in overrides.items():
        _check_override(name, shape, declared)
    symbols: dict[str, tuple[int, int]] = {}
    bound: tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]] = ({}, {})
    for name in sorted(declared, key=lambda n: n not in overrides):
        pairs = _bind(declared[name], overrides.get(name), symbols)
        for k in (0, 1):
            bound[k][name] = tuple(p[k] for p in pairs)
    return bound


def _bind(
    kind: onnx.TypeProto.Tensor, override: Sequence[int] | None, symbols: dict[str, tuple[int, int]]
) -> list[tuple[int, int]]:
    if override is not None and not kind.HasField("shape"):
        return [(int(size), int(size)) for size in override]
    dims = list(kind.shape.dim)
    pairs = []
    for axis, dim in enumerate(dims):
        if dim.HasField("dim_value") and dim.dim_value > 0:
            pair = (dim.dim_value, dim.dim_value)
        elif override is not None:
            size = int(override[axis])
            pair = symbols.get(dim.dim_param, (size, size + 1 if axis == 0 else size))
        else:
            pair = symbols.get(dim.dim_param) or _guess(dims, axis, dim.dim_param)
        if dim.dim_param:
            symbols.setdefault(dim.dim_param, pair)
        pairs.append(pair)
    return pairs


def _guess(dims: Sequence[onnx.TensorShapeProto.Dimension], axis: int, symbol: str) -> tuple[int, int]:
    if axis == 0 and ("seq" not in symbol.lower() or len(dims) == 1):
        return BATCH
    if len(dims) < 4:
        return SEQUENCE
    known = [d.dim_value for d in dims[1:]]
    channels_last = 0 < known[-1] <= 4
    if axis == 1 and not channels_last:
        return CHANNELS
    return PIXELS if len(dims) == 4 else SEQUENCE


def _check_override(name: str, shape: Sequence[int], declared: Mapping[str, onnx.TypeProto.Tensor]) -> None:
    if name not in declared:
        raise UsageError(f"--input-shape names no input of this model: {name!r}.", hint=nearest(name, declared))
    if any(int(size) <= 0 for size in shape):
        raise UsageError(f"--input-shape {name}={','.join(map(str, shape))}: sizes must be positive.")
    if not declared[name].HasField("shape"):
        return
    dims = declared[name].shape.dim
    said = [d.dim_value or d.dim_param or "?" for d in dims]
    if len(dims) != len(shape):
        raise UsageError(
            f"--input-shape {name}={','.join(map(str, shape))} has {len(shape)} dimensions, the input has {len(dims)}.",
            hint=f"The model declares {said}.",
        )
    for dim, size in zip(dims, shape, strict=True):
        if dim.dim_value > 0 and dim.dim_value != size:
            raise UsageError(
                f"--input-shape {name}={','.join(map(str, shape))} contradicts the model's static shape.",
                hint=f"The model declares {said}.",
            )
