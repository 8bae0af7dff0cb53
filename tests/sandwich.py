"""Laws are checked between two contractions: one that makes the channels, one that reads whatever came out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from build import Net, newest
from hypothesis import strategies as st
from oracle import assert_exact_cut

OPSETS = (7, 9, 11, 13, 17, 21, newest())


def opsets(since: int = 7, until: int = 1 << 30) -> st.SearchStrategy[int]:
    """Opset versions an operator has this form at."""
    return st.sampled_from([v for v in OPSETS if since <= v < until])


def produce(net: Net, layout: str, channels: int = 6, extent: int = 4, name: str = "x", batch: int | str = "N") -> str:
    """A tensor with ``channels`` of its own, from a graph input.

    ``layout``: "nc" [N, C], "ncl" [N, C, L], "nchw", "ncdhw" (convolutions of that rank), "nlc" and "nhwc" (a MatMul on
    the last axis); spatial axes have sizes ``extent``, ``extent + 1``, ...
    """
    spatial = [extent + i for i in range(len(layout) - 2)]
    if layout == "nc":
        return net.linear(net.input(name, [batch, 3]), 3, channels, gemm=True)
    if layout.endswith("c"):
        return net.linear(net.input(name, [batch, *spatial, 3]), 3, channels)
    return net.conv(net.input(name, [batch, 3, *spatial]), 3, channels, dims=len(spatial))


def shape_of(net: Net, name: str) -> list[int | None]:
    """The shape of a tensor, hinted or inferred, None for the batch."""
    hinted = [h for h in net.hints if h.name == name]
    info = hinted[0] if hinted else net.model(name, check=False, shapes={name: None}).graph.output[0]
    assert info.type.tensor_type.HasField("shape"), f"give a hint of the shape of {name}"
    return [d.dim_value or None for d in info.type.tensor_type.shape.dim]


def consume(net: Net, y: str, width: int = 4) -> str:
    """A Gemm over everything but the batch."""
    rest = shape_of(net, y)[1:]
    assert all(rest), f"{y} has shape {rest} behind its batch axis"
    flat = y if len(rest) == 1 else net.op("Flatten", y, axis=1)
    return net.linear(flat, int(np.prod([n or 0 for n in rest])), width, gemm=True)


def check(net: Net, *ys: str, cut: bool | None = True, **options: Any) -> onnx.ModelProto:
    """Every tensor of ``ys`` is read by a contraction of its own; the whole is cut exactly, or left whole."""
    model = net.model(*(consume(net, y) for y in ys))
    assert_exact_cut(model, expect_cut=cut, **options)
    return model
