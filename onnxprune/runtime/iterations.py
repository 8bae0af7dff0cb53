"""Values from inside of bodies: one per iteration that counts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx

from onnxprune.model.exposing import Inner, show
from onnxprune.runtime.sessions import Array


def shown_in(
    proto: onnx.ModelProto, tensors: Iterable[str], conditions: Collection[str], types: Mapping[str, Inner]
) -> tuple[onnx.ModelProto, dict[str, str], dict[str, int]]:
    """The model with all that is asked for where it can be seen, {tensor: output}, and {tensor: axes stacked in front}.

    Conditions are outputs under another name: they may be inputs or constants of the model.
    """
    names = dict.fromkeys([*tensors, *sorted(conditions)])
    proto, shown = show(proto, {n: types[n] for n in names if n in types})
    outputs = {n: shown[n].output if n in shown else n for n in names}
    outside = sorted(set(conditions) - shown.keys())
    if outside:
        model = onnx.ModelProto()
        model.CopyFrom(proto)
        for name in outside:
            outputs[name] = f"{name}__condition"
            model.graph.node.append(onnx.helper.make_node("Identity", [name], [outputs[name]]))
        proto = model
    return proto, outputs, {n: s.stacked for n, s in shown.items()}


def counted(value: Array, stacked: int, conditions: Sequence[tuple[Array, bool, int]], joins: bool) -> list[Array]:
    """The values that iterations gave in which conditions are what they have to be.

    Args:
        value: with iterations along ``stacked`` leading axes; empty where a branch was not taken.
        conditions: (condition, what it has to be, leading axes of its own that count iterations).
        joins: as one value, joined along its own first axis.
    """
    if not value.size:
        return []
    counts = np.ones(value.shape[:stacked], bool)
    for condition, wanted, axes in conditions:
        counts &= _holds(condition, wanted, axes, counts.shape)
    flat = value.reshape(-1, *value.shape[stacked:])[counts.ravel()]
    if joins and flat.ndim > 1 and len(flat):
        return [flat.reshape(-1, *flat.shape[2:])]
    return list(flat)


def _holds(condition: Array, wanted: bool, stacked: int, shape: tuple[int, ...]) -> Array:
    """Whether a condition is what is wanted in iterations that are stacked like this.

    A tensor that iterations further in read alone counts as soon as it holds in one of them.
    """
    if not condition.size:  # what it decides is not come to
        return np.zeros(shape, bool)
    found = np.asarray(condition.reshape((*condition.shape[:stacked], -1))[..., 0] == wanted)
    found = np.any(found, axis=tuple(range(len(shape), stacked)))
    return np.broadcast_to(found.reshape(found.shape + (1,) * (len(shape) - found.ndim)), shape)
