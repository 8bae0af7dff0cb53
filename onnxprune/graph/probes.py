"""Probe sizes: concrete shapes for inputs with dynamic dimensions, used for analysis and validation only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx

from onnxprune.graph.binding import InputSpec, bind_shapes
from onnxprune.graph.view import Graph

Binding = dict[str, tuple[int, ...]]
# (batch, sequence) of the two probes: what differs between them is dynamic, and a baked-in size is caught.
_SIZES = ((2, 16), (3, 24))
# A batch of 1 is often baked into a graph that declares it free; audio models want longer sequences.
_FALLBACKS = (((1, 16), (1, 24)), ((2, 512), (3, 640)), ((1, 512), (1, 640)), ((1, 16000), (1, 20000)))


def input_specs(graph: Graph) -> list[InputSpec]:
    """Name, dtype (strings: object) and declared shape of every graph input that is a tensor."""
    specs = []
    for info in graph.proto.graph.input:
        if info.name not in graph.inputs or info.type.WhichOneof("value") != "tensor_type":
            continue
        tensor = info.type.tensor_type
        string = tensor.elem_type == onnx.TensorProto.STRING
        dtype = np.dtype(object) if string else np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        dims = tuple(d.dim_value if d.dim_value > 0 else (d.dim_param or None) for d in tensor.shape.dim)
        specs.append(InputSpec(info.name, dtype, dims, tensor.HasField("shape") and not dims))
    return specs


def probe_shapes(graph: Graph, overrides: Mapping[str, Sequence[int]] | None = None) -> Iterator[tuple[Binding, ...]]:
    """Bindings of the dynamic dimensions to try, likeliest first; each has one probe, or two where sizes are dynamic.

    An override fixes every dimension of its input, see :func:`bind_shapes`.

    Raises:
        UsageError: an override names no input, has the wrong rank or contradicts a static dimension.
    """
    specs = input_specs(graph)
    seen = set()
    for pair in (_SIZES, *_FALLBACKS):
        probes = [bind_shapes(specs, batch=b, sequence=s, overrides=overrides or {}) for b, s in pair]
        if probes[0] == probes[1]:
            probes.pop()
        key = repr(probes)
        if key not in seen:
            seen.add(key)
            yield tuple(probes)
