"""Gradients of operators that move elements: by hand where that is faster, else by running them on positions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx

from onnxprune.gradients.tape import Array, NoGradient, Reverse
from onnxprune.operators.registry import register_gradient
from onnxprune.runtime.sessions import open_session, run

# -- by running the operator on positions ------------------------------------------------------------------------------


@register_gradient("", "Tile", "Trilu", "ReverseSequence", "Compress", "CenterCropPad", "Unfold")
@register_gradient("com.microsoft", "Trilu", "ExpandDims", "UnfoldTensor")
def moved(r: Reverse) -> None:
    """Run the operator on the number of every element, and send the gradient back to where each came from."""
    t = r.tape
    for i in range(len(r.node.inputs)):
        if not r.wants(i):
            continue
        size = prod(r.shape(i))
        for output, origin in zip(r.node.outputs, _origins(r, i), strict=True):
            gradient = r.gradients[r.node.outputs.index(output)] if output else None
            if gradient is None:
                continue
            flat = t.reshape(gradient, (origin.size,))
            r.send(i, t.reshape(_returned(r, flat, origin.ravel(), size), r.shape(i)))


def _origins(r: Reverse, i: int) -> list[Array]:
    """Return for every output the flat positions in input ``i`` of its elements, -1 for those that are none of it."""
    t, feeds = r.tape, {}
    for k, name in enumerate(r.node.inputs):
        if not name:
            continue
        if k == i:
            feeds[name] = np.arange(1, prod(r.shape(k)) + 1, dtype=np.float64).reshape(r.shape(k))
        elif t.kinds[name].kind == "f":
            feeds[name] = np.zeros(r.shape(k), np.float64)
        else:
            feeds[name] = r.constant_value(k, "positions")
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(v.dtype) for name, v in feeds.items()}
    outputs = [o for o in r.node.outputs if o]
    graph = onnx.helper.make_graph(
        [r.node.proto],
        "positions",
        [onnx.helper.make_tensor_value_info(name, kinds[name], v.shape) for name, v in feeds.items()],
        [onnx.ValueInfoProto(name=o) for o in outputs],
    )
    opsets = [onnx.helper.make_opsetid(r.node.domain, r.node.version)]
    if r.node.domain:
        opsets.append(onnx.helper.make_opsetid("", 17))
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    values = run(open_session(model.SerializeToString(), threads=1), feeds)
    return [values[o].astype(np.int64) - 1 if o else np.zeros(0, np.int64) for o in r.node.outputs]


def _returned(r: Reverse, flat: str, origin: Array, size: int) -> str:
    """Return the gradient of ``size`` elements from the flat gradient of elements that came from ``origin``."""
    t = r.tape
    hit = origin >= 0
    if np.unique(origin[hit]).size == hit.sum():  # every element came out at most once: look up where
        place = np.full(size, origin.size, np.int64)
        place[origin[hit]] = np.flatnonzero(hit)
        padded = flat if (place < origin.size).all() else t.pad(flat, [0], [1])
        return t.emit("Gather", [padded, t.constant(place)], (size,), axis=0)
    if not hit.all():
        flat = t.emit("Gather", [flat, t.constant(np.flatnonzero(hit))], (int(hit.sum()),), axis=0)
    operands = [t.zeros((size,), t.kinds[flat]), t.constant(origin[hit]), flat]
    return t.emit("ScatterElements", operands, (size,), axis=0, reduction="add")


# -- by hand -----------------------------------------------------------------------------------------------------------


@register_gradient("", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(r: Reverse) -> None:
    """Return to the shape of the input."""
    r.send(0, r.tape.reshape(r.dy, r.shape(0)))


@register_gradient("", "Transpose")
def transpose(r: Reverse) -> None:
    """Put the axes back."""
    rank = len(r.shape(0))
    order = r.attr("perm", list(range(rank))[::-1])
    r.send(0, r.tape.transpose(r.dy, [int(k) for k in np.argsort(order)]))


@register_gradient("", "Expand")
def expand(r: Reverse) -> None:
    """Sum over repetitions."""
    r.send(0, r.dy)


@register_gradient("", "Concat")
def concat(r: Reverse) -> None:
    """Cut the gradient into the parts."""
    axis = r.attr("axis", 1) % len(r.tape.shape(r.y))
    start = 0
    for i in range(len(r.node.inputs)):
        end = start + r.shape(i)[axis]
        if r.wants(i):
            r.send(i, r.tape.slice(r.dy, [start], [end], [axis]))
        start = end


@register_gradient("", "Split")
def split(r: Reverse) -> None:
    """Join the gradients of the parts."""
    t, axis = r.tape, r.attr("axis", 0) % len(r.shape(0))
    parts = []
    for output, gradient in zip(r.node.outputs, r.gradients, strict=True):
        parts.append(gradient if gradient is not None else t.zeros(t.shape(output), t.kinds[r.x]))
    r.send(0, t.concat(parts, axis))


@register_gradient("", "Slice")
def cut(r: Reverse) -> None:
    """Pad with zeros where steps are 1, else look the elements up."""
    shape = r.shape(0)
    starts, ends = (r.constant_value(i, "bounds").ravel().tolist() for i in (1, 2))
    axes = r.constant_value(3, "axes").ravel().tolist() if r.has(3) else list(range(len(starts)))
    steps = r.constant_value(4, "steps").ravel().tolist() if r.has(4) else [1] * len(starts)
    before, after = [0] * len(shape), [0] * len(shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step != 1:
            _strided(r, axes, starts, ends, steps)
            return
        first, last, _ = slice(start, end).indices(shape[axis])
        before[axis], after[axis] = first, shape[axis] - max(first, last)
    r.send(0, r.tape.pad(r.dy, before, after))


def _strided(r: Reverse, axes: Sequence[int], starts: Sequence[int], ends: Sequence[int], steps: Sequence[int]) -> None:
    """Send the gradient of a Slice with steps: per axis, zeros are put between, before and behind."""
    t, value = r.tape, r.dy
    for axis, start, end, step in zip((a % len(r.shape(0)) for a in axes), starts, ends, steps, strict=True):
        size = r.shape(0)[axis]
        positions = _range(start, end, step, size)
        place = np.full(size, len(positions), np.int64)
        place[positions] = np.arange(len(positions))
        after = [int(k == axis) for k in range(len(r.shape(0)))]
        shape = [size if k == axis else n for k, n in enumerate(t.shape(value))]
        value = t.emit("Gather", [t.pad(value, [0] * len(after), after), t.constant(place)], shape, axis=axis)
    r.send(0, value)


def _range(start: int, end: int, step: int, size: int) -> Array:
    """Return the positions along an axis that a Slice takes."""
    if step > 0:
        return np.arange(size)[slice(start, end, step)]
    # As the operator defines it: a start or end below 0 counts from the back, and is then clamped.
    first = min(max(start + size if start < 0 else start, 0), size - 1)
    last = min(max(end + size if end < 0 else end, -1), size - 1)
    return np.arange(first, last, step)


@register_gradient("", "Pad")
def pad(r: Reverse) -> None:
    """Cut constants off; of other modes, send each element back to where it came from."""
    t, rank = r.tape, len(r.shape(0))
    if r.attr("mode", "constant") != "constant":
        moved(r)
        return
    pads = r.constant_value(1, "pads").ravel().tolist()
    axes = [int(k) % rank for k in r.constant_value(3, "axes").ravel()] if r.has(3) else list(range(rank))
    before, after = [0] * rank, [0] * rank
    for k, axis in enumerate(axes):
        before[axis], after[axis] = -pads[k], -pads[len(axes) + k]
    r.send(0, t.pad(r.dy, before, after))
    if r.wants(2):
        r.send(2, t.sub(t.total(r.dy), t.total(t.pad(r.dy, before, after))))


@register_gradient("", "DepthToSpace")
def depth_to_space(r: Reverse) -> None:
    """Collect the blocks again."""
    t, block = r.tape, r.attr("blocksize")
    n, c, h, w = t.shape(r.y)
    parts = t.reshape(r.dy, (n, c, h // block, block, w // block, block))
    order = (0, 3, 5, 1, 2, 4) if r.attr("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    r.send(0, t.reshape(t.transpose(parts, order), r.shape(0)))


@register_gradient("", "SpaceToDepth")
def space_to_depth(r: Reverse) -> None:
    """Spread the blocks again."""
    r.send(0, r.tape.emit("DepthToSpace", [r.dy], r.shape(0), blocksize=r.attr("blocksize"), mode="DCR"))


# -- by index ----------------------------------------------------------------------------------------------------------


@register_gradient("", "Gather")
def gather(r: Reverse) -> None:
    """Add the gradient of every slice to the one that it was read from."""
    t, shape = r.tape, r.shape(0)
    axis = r.attr("axis", 0) % len(shape)
    count = prod(r.shape(1))
    others = [*range(axis), *range(axis + 1, len(shape))]
    rows = t.reshape(r.dy, (*shape[:axis], count, *shape[axis + 1 :]))
    rows = t.transpose(rows, (axis, *others))
    moved_shape = (shape[axis], *(shape[k] for k in others))
    indices = t.reshape(t.cast(r.node.inputs[1], np.int64), (count, 1))
    zeros = t.zeros(moved_shape, t.kinds[r.x])
    value = t.emit("ScatterND", [zeros, indices, rows], moved_shape, reduction="add")
    r.send(0, t.transpose(value, [int(k) for k in np.argsort((axis, *others))]))


@register_gradient("", "GatherElements")
def gather_elements(r: Reverse) -> None:
    """Add every gradient at the position that it was read from."""
    t = r.tape
    zeros = t.zeros(r.shape(0), t.kinds[r.x])
    axis = r.attr("axis", 0) % len(r.shape(0))
    r.send(0, t.emit("ScatterElements", [zeros, r.node.inputs[1], r.dy], r.shape(0), axis=axis, reduction="add"))


@register_gradient("", "GatherND")
def gather_nd(r: Reverse) -> None:
    """Add every slice at the position that it was read from."""
    t = r.tape
    if r.attr("batch_dims", 0):
        raise NoGradient("gathers per batch")
    zeros = t.zeros(r.shape(0), t.kinds[r.x])
    r.send(0, t.emit("ScatterND", [zeros, r.node.inputs[1], r.dy], r.shape(0), reduction="add"))


@register_gradient("", "ScatterND")
def scatter_nd(r: Reverse) -> None:
    """Give updates the gradient at their places, and the data that of all others."""
    t, indices = r.tape, r.node.inputs[1]
    mode = _mode(r)
    if r.wants(0):
        zeros = t.zeros(r.shape(2), t.kinds[r.x])
        r.send(0, r.dy if mode == "add" else t.emit("ScatterND", [r.dy, indices, zeros], r.shape(0)))
    if r.wants(2):
        r.send(2, t.emit("GatherND", [r.dy, indices], r.shape(2)))


@register_gradient("", "ScatterElements", "Scatter")
def scatter_elements(r: Reverse) -> None:
    """Give updates the gradient at their places, and the data that of all others."""
    t, indices = r.tape, r.node.inputs[1]
    axis, mode = r.attr("axis", 0) % len(r.shape(0)), _mode(r)
    if r.wants(0):
        zeros = t.zeros(r.shape(2), t.kinds[r.x])
        operands = [r.dy, indices, zeros]
        r.send(0, r.dy if mode == "add" else t.emit("ScatterElements", operands, r.shape(0), axis=axis))
    if r.wants(2):
        r.send(2, t.emit("GatherElements", [r.dy, indices], r.shape(2), axis=axis))


def _mode(r: Reverse) -> str:
    """Return the reduction of a scatter.

    Raises:
        NoGradient: it is a product or an extreme.
    """
    mode = str(r.attr("reduction", "none"))
    if mode not in ("none", "add"):
        raise NoGradient(f"reduces by {mode}")
    return mode
