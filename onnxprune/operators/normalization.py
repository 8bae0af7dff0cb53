"""Operators that normalise or reduce: a barrier along the labelled axes they work on, transparent along the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from onnxprune.graph.inference import FLOATS
from onnxprune.graph.view import Node
from onnxprune.labels.algebra import Shape, remove_axis
from onnxprune.labels.atoms import Reason
from onnxprune.labels.label import Labels
from onnxprune.operators.context import Cut, Step
from onnxprune.operators.contractions import Form, Scale
from onnxprune.operators.elementwise import divided
from onnxprune.operators.operands import Values, axes_of, axis_of, read_integers, require_value, where_known
from onnxprune.operators.registry import Array, Inverse, Read, Rule, register, with_facts
from onnxprune.operators.sizes import broadcast_pairs

_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceProd": np.prod,
    "ReduceSum": np.sum,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
}


# Opset from which Pad and Slice take sizes as inputs, for every type of the tensors that are normalised.
_PAD_SINCE = 11


class OverAxes(Rule):
    """Normalisation over some axes of input 0, with optional operands that broadcast against it.

    Args:
        approximate: whether normalisation over fewer channels is a usable approximation (``--approximate``).
        exact: whether channels that are 0 leave the result unchanged, as for a norm.
        inputs: positions of the operands that broadcast with input 0.
    """

    def __init__(self, *, approximate: bool = False, exact: bool = False, inputs: Sequence[int] = (0,)) -> None:
        self.approximate, self.exact, self.inputs = approximate, exact, inputs

    def axes(self, step: Step) -> list[int]:
        """Return the normalised axes."""
        return [step.axis(-1)]

    def is_exact(self, step: Step) -> bool:
        """Return whether the node has a form for fewer channels that leaves the values of the others unchanged."""
        return self.exact

    def propagate(self, step: Step) -> None:
        """Pass the labels; freeze normalised axes unless pruning them is exact or enabled; tie the rows of grids."""
        labels = step.broadcast([i for i in self.inputs if step.has(i)])
        for axis in self.axes(step):
            if step.may_lose_choices or self.is_exact(step) or (self.approximate and step.approximate(labels, axis)):
                step.tie(labels, axis)
            else:
                step.fix(labels, axis, Reason.NORMALISED, f"{step.node.op} normalises over these channels")
        step.set(0, labels)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the axes of a norm, which sums over them."""
        return [(0, tuple(self.axes(step)))] if self.exact else []

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the data's shape; statistics have size 1 on the normalised axes (the last, or all from ``axis``)."""
        x = shapes[0]
        if x is None:
            return [None]
        first = int(node.attrs.get("axis", -1)) % len(x)
        return [x, *[(*x[:first], *(1,) * (len(x) - first))] * (len(node.outputs) - 1)]


class Softmax(OverAxes):
    """Softmax and its relatives; before opset 13 all axes from ``axis`` on are one axis."""

    def axes(self, step: Step) -> list[int]:
        """Return one axis, or all from it on."""
        if step.node.version >= 13:
            return [step.axis(-1)]
        return list(range(step.axis(1), len(step.shape(0))))

    def score_axis(self, node: Node, rank: int) -> int | None:
        """Return the axis, where it is one."""
        axis = int(node.attrs.get("axis", -1 if node.version >= 13 else 1)) % rank
        return axis if node.version >= 13 or axis == rank - 1 else None

    def evaluate(self, node: Node, values: Values) -> Any:
        """Leave the work to onnx's reference evaluator.

        Raises:
            NotImplementedError: it does not know the form before opset 13.
        """
        if node.version < 13:
            raise NotImplementedError
        return None


class Hardmax(Softmax):
    """1 at the largest value, 0 elsewhere."""

    jumps = True

    def score_axis(self, node: Node, rank: int) -> int | None:
        """Return None: the results are no probabilities."""
        return None


class LayerNorm(OverAxes):
    """Normalisation over all axes from ``axis`` on, then a scale and a shift.

    Removed channels are 0 and still count in the mean and the variance: the pruned tensor is padded with zeros to the
    old size, normalised, and cropped. With ``--approximate`` it is normalised over the channels that are left.

    Args:
        parameters: positions of the scale and the shift.
        inputs: positions of the operands that broadcast with input 0.
    """

    def __init__(self, parameters: Sequence[int] = (1, 2), inputs: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__(approximate=True, inputs=inputs)
        self.parameters = parameters

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the normalised sizes and those of the scale."""
        axis = node.attrs.get("axis", -1)
        axis = axis + len(shapes[0]) if axis < 0 else axis
        return broadcast_pairs(shapes[0][axis:], shapes[1])

    def axes(self, step: Step) -> list[int]:
        """Return all axes from ``axis`` on."""
        return list(range(step.axis(-1), len(step.shape(0))))

    def is_exact(self, step: Step) -> bool:
        """Return whether the node is padded: from the opset on that can, unless less work is enough."""
        return not step.table.approximate and step.table.graph.opsets.get("", 1) >= _PAD_SINCE

    def propagate(self, step: Step) -> None:
        """Propagate as any normalisation; freeze the data where the statistics are read."""
        super().propagate(step)
        if any(o and step.table.graph.consumers.get(o) for o in step.node.outputs[1:3]):
            why = "the normalisation's statistics are used"
            step.freeze(step.table.get(step.node.outputs[0]), Reason.UNSUPPORTED_FORM, why)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the normalised axes of every operand that is summed before."""
        axes, rank = self.axes(step), len(step.shape(0))
        ranks = {i: len(step.shape(i)) for i in self.inputs if i not in self.parameters and step.has(i)}
        return [(i, tuple(a - rank + n for a in axes if a - rank + n >= 0)) for i, n in ranks.items()]

    def rewrite(self, cut: Cut) -> None:
        """Pad the operands to the old size, and crop the results."""
        before, after = cut.before.shape(0), cut.shape(0)
        if not self.is_exact(cut.before):
            return
        axes = [a for a in self.axes(cut.before) if before[a] != after[a]]
        for axis in axes:
            if cut.before.table.facts.varies(cut.node.inputs[0], axis):
                cut.fail("the number of channels it normalises over follows the size of an input")
            for i in self.inputs:
                own_axis = axis - len(before) + len(cut.shape(i)) if cut.before.has(i) else -1
                if own_axis >= 0 and cut.before.shape(i)[own_axis] != 1:
                    cut.pad_input(i, own_axis, before[axis])
        for o, name in enumerate(cut.node.outputs):
            if name and o in (0, 3) and axes:  # the others are statistics, or the sum that was normalised
                cut.crop_output(o, {axis: after[axis] for axis in axes})


class RMSNorm(LayerNorm):
    """Division by the root mean square over all axes from ``axis`` on, then a scale.

    Removed channels are 0 and change nothing but the number that the sum of squares is divided by. With n of N channels
    left, x / sqrt(sum / N + eps) = sqrt(N / n) x / sqrt(sum / n + eps N / n).

    Args:
        scale: position of the scale.
        inputs: positions of the operands that broadcast with input 0.
        epsilon: default of the attribute.
    """

    def __init__(self, scale: int = 1, inputs: Sequence[int] = (0, 1), epsilon: float = 1e-5) -> None:
        super().__init__((scale,), inputs)
        self._scale, self._epsilon = scale, epsilon

    def is_exact(self, step: Step) -> bool:
        """Return True."""
        return True

    def rewrite(self, cut: Cut) -> None:
        """Adapt epsilon and the scale to the number of channels left."""
        share = kept_share(cut, self.axes(cut.before))
        if share != 1.0:
            cut.set_attr("epsilon", float(cut.attr("epsilon", self._epsilon)) / share)
            cut.scale_input(self._scale, 1.0 / math.sqrt(share))


def kept_share(cut: Cut, axes: Sequence[int]) -> float:
    """Return the share of positions along some axes of input 0 that survive."""
    before, after = cut.before.shape(0), cut.shape(0)
    return math.prod(after[a] / before[a] for a in axes)


class InstanceNorm(Rule):
    """Normalisation of every channel over its own positions."""

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the channels of data and scale."""
        yield shapes[0][1], shapes[1][0]

    def propagate(self, step: Step) -> None:
        """Pass the channels; freeze their positions (the positions of a decomposed GroupNorm include channels)."""
        labels = step.labels(0)
        for axis in sorted({a for x in labels for a in x.axes} - {0, 1}):
            if step.approximate(labels, axis):
                step.tie(labels, axis)
            else:
                step.fix(labels, axis, Reason.NORMALISED, f"{step.node.op} normalises over these positions")
        for i in range(1, len(step.node.inputs)):
            if step.has(i):
                step.unite(step.axis_ids(labels, 1), step.axis_ids(step.labels(i), 0), "a per-channel operand")
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Any], values: Any) -> list[Any] | None:
        """Return the data's shape."""
        return [shapes[0]] if len(node.outputs) == 1 else None


class MeanVariance(OverAxes):
    """MeanVarianceNormalization over any axes: per-channel means where the channel axis is not among them."""

    def axes(self, step: Step) -> list[int]:
        """Return the axes; by default the batch and all positions of [N, C, H, W]."""
        rank = len(step.shape(0))
        return [int(a) % rank for a in step.attr("axes", [0, 2, 3])]


class Response(OverAxes):
    """LRN: sums over neighbouring channels at every position."""

    def axes(self, step: Step) -> list[int]:
        """Return the channel axis."""
        return [1]


class GroupNorm(Rule):
    """Normalisation within groups of channels: whole groups may be pruned."""

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the channels of data and scale; before opset 21 there is one scale per group."""
        if node.version >= 21:
            yield shapes[0][1], shapes[1][0]

    def group_attribute(self) -> str:
        """Return the name of the attribute with the number of groups."""
        return "num_groups"

    def channel_axis(self, step: Step) -> int:
        """Return the channel axis of the data."""
        return 1

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the shape of the data."""
        return [shapes[0]]

    def propagate(self, step: Step) -> None:
        """Tie the channels of each group; scale and bias have one value per channel or per group."""
        labels, axis = step.labels(0), self.channel_axis(step)
        step.fix_all_but(labels, (0, axis), Reason.NORMALISED, f"{step.node.op} normalises over these positions")
        step.tie(labels, axis)
        ids, group = step.axis_ids(labels, axis), int(step.attr(self.group_attribute()))
        if ids is not None and not step.approximate(labels, axis):
            grid = ids.reshape(group, -1)
            step.atoms.unite(grid, np.broadcast_to(grid[:, :1], grid.shape))
        for i in (1, 2):
            parameter_ids = step.axis_ids(step.labels(i), 0)
            if (
                ids is not None
                and parameter_ids is not None
                and parameter_ids.size == group
                and parameter_ids.size != ids.size
            ):
                parameter_ids = np.repeat(parameter_ids, ids.size // group)
            step.unite(ids, parameter_ids, "a per-channel operand")
        step.set(0, labels)

    def rewrite(self, cut: Cut) -> None:
        """Keep the size of a group and reduce the number of groups."""
        if cut.touched(cut.node.inputs[0]):
            axis, name = self.channel_axis(cut.before), self.group_attribute()
            groups, before = int(cut.attr(name)), cut.before.shape(0)[axis]
            after = cut.shape(0)[axis] * groups // before
            cut.set_attr(name, max(after, 1) if cut.shape(0)[axis] % max(after, 1) == 0 else groups)


class BatchNorm(Rule):
    """Normalisation with one scale, shift, mean and variance per channel."""

    statistics = (3, 4)

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the channels of data and scale."""
        yield shapes[0][1], shapes[1][0]

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return a form with one weight per channel, into which the statistics are folded."""
        return Scale.of(len(node.inputs), shapes[0]) if data == 0 else None

    def inverse(self, node: Node, i: int, constant: Read) -> Inverse | None:
        """Subtract the shift and divide by the gain of every channel."""
        parameters = [g for k in range(1, 5) if (g := constant(k)) is not None]
        if i or node.attrs.get("training_mode", 0) or any(node.outputs[1:]) or len(parameters) < 4:
            return None
        scale, shift, mean, variance = (np.asarray(g, np.float64) for g in parameters)
        gain = scale / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
        offset = shift - mean * gain

        def undo(value: Array, _addends: Sequence[Array], _shape: Sequence[int]) -> Array:
            along = (1, -1, *(1,) * (value.ndim - 2))
            return divided(value - offset.reshape(along), gain.reshape(along))

        return Inverse(undo)

    def propagate(self, step: Step) -> None:
        """Unite the channel axis with all four vectors."""
        labels = step.labels(0)
        vectors = [step.labels(i) for i in range(1, 5)]
        if step.attr("training_mode", 0) or any(step.node.outputs[1:]):
            for x in (labels, *vectors):
                step.freeze(x, Reason.UNSUPPORTED_FORM, "BatchNormalization in training mode")
            return
        if len(step.shape(0)) > 1:
            ids = step.axis_ids(labels, 1)
            for vector in vectors:
                step.unite(ids, step.axis_ids(vector, 0), "a per-channel operand")
        step.set(0, labels)

    def infer(self, node: Node, shapes: list[Any], values: Any) -> list[Any] | None:
        """Return the data's shape."""
        return [shapes[0]] if len(node.outputs) == 1 else None


class Reduce(Rule):
    """Reductions over axes. A sum, or a norm, is a contraction: a channel that is 0 contributes nothing.

    Args:
        contraction: whether channels multiplied by 0 leave the result unchanged.
        approximate: whether a mean over fewer channels is a usable approximation (``--approximate``).
    """

    def __init__(self, *, contraction: bool = False, approximate: bool = False) -> None:
        self.contraction, self.approximate = contraction, approximate

    def axes(self, step: Step) -> list[int] | None:
        """Return the reduced axes; None where they are not known."""
        rank = len(step.shape(0))
        axes = step.attr("axes")
        if step.has(1):
            value = step.value(1)
            if value is None:
                return None
            axes = value.tolist() if value.size else None
        if axes is None:
            return [] if step.attr("noop_with_empty_axes", 0) else list(range(rank))
        return [int(a) % rank for a in np.atleast_1d(axes)]

    def propagate(self, step: Step) -> None:
        """Remove the reduced axes from the labels; freeze them first unless the reduction is a contraction."""
        axes, labels = self.axes(step), step.labels(0)
        if axes is None:
            step.freeze(labels, Reason.MISSING_CONSTANT, "the reduced axes are not known")
            return
        for axis in axes:
            if self.contraction or step.may_lose_choices or (self.approximate and step.approximate(labels, axis)):
                continue
            step.fix(labels, axis, Reason.NORMALISED, f"{step.node.op} mixes these channels")
        result: Labels = ()
        for label in labels:
            other_axes = tuple(a for a in label.axes if a not in axes)
            if other_axes:
                pack = label.pack if label.pack in other_axes else other_axes[-1]
                ids = label.ids if other_axes == label.axes else step.atoms.project(label, other_axes)
                result = (*result, type(label)(ids, pack))
        if not step.attr("keepdims", 1):
            for axis in sorted(axes, reverse=True):
                result = remove_axis(result, axis)
        step.set(0, result)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the axes of a contraction."""
        return [(0, tuple(self.axes(step) or ()))] if self.contraction else []

    @where_known
    def infer(self, node: Node, shapes: list[Any], values: Values) -> list[Any] | None:
        """Return the shape without the reduced axes, or with size 1 there."""
        shape, since = shapes[0], 13 if node.op == "ReduceSum" else 18
        axes = read_integers(node, values, 1, "axes", since)
        if not axes:
            if node.version >= since and node.attrs.get("noop_with_empty_axes", 0):
                return [shape]
            axes = list(range(len(shape)))
        out = {axis_of(a, len(shape)) for a in axes}
        if node.attrs.get("keepdims", 1):
            return [tuple(1 if i in out else n for i, n in enumerate(shape))]
        return [tuple(n for i, n in enumerate(shape) if i not in out)]

    def evaluate(self, node: Node, values: Values) -> Any:
        """Apply numpy's reduction, where it has one."""
        function = _REDUCTIONS.get(node.op)
        if function is None:
            return None
        axes = axes_of(node, values)
        if axes is None and node.attrs.get("noop_with_empty_axes", 0):
            return values[0]
        return np.asarray(function(require_value(values, 0), axis=axes, keepdims=bool(node.attrs.get("keepdims", 1))))


class AlongAxes(Rule):
    """Transforms that mix positions along some axes; the other axes pass."""

    def axes(self, step: Step) -> list[int] | None:
        """Return the transformed axes; None where they are not known."""
        raise NotImplementedError

    def propagate(self, step: Step) -> None:
        """Freeze these axes, pass the others."""
        axes, labels = self.axes(step), step.labels(0)
        if axes is None:
            step.freeze(labels, Reason.MISSING_CONSTANT, "the axis is not known")
            return
        for axis in axes:
            labels = step.drop_axis(labels, axis, Reason.NORMALISED, f"{step.node.op} mixes these channels")
        step.set(0, labels)


class Fourier(AlongAxes):
    """DFT along an axis of [..., 1 or 2]; the last axis holds the real and imaginary part."""

    operands = (1,)

    def axes(self, step: Step) -> list[int] | None:
        """Return the transformed axis, an input since opset 20, and the last axis."""
        rank = len(step.shape(0))
        if step.node.version < 20:
            return [int(step.attr("axis", 1)) % rank, rank - 1]
        value = step.value(2)
        if step.has(2) and value is None:
            return None
        return [(-2 if value is None else int(value.ravel()[0])) % rank, rank - 1]


class Reversal(AlongAxes):
    """ReverseSequence: reverses a prefix of the time axis, of one length per sample."""

    def axes(self, step: Step) -> list[int]:
        """Return the axes of samples and time."""
        step.labels(1)
        return [int(step.attr("batch_axis", 1)), int(step.attr("time_axis", 0))]


class Determinant(AlongAxes):
    """Determinant of square matrices in the last two axes, which are removed."""

    def axes(self, step: Step) -> list[int]:
        """Return the last two axes."""
        rank = len(step.shape(0))
        return [rank - 2, rank - 1]

    def propagate(self, step: Step) -> None:
        """Pass the batch axes."""
        labels = step.labels(0)
        for axis in self.axes(step)[::-1]:
            labels = step.drop_axis(labels, axis, Reason.NORMALISED, "Det mixes these channels")
            labels = remove_axis(labels, axis)
        step.set(0, labels)


class Pick(Rule):
    """ArgMax, ArgMin, TopK, CumSum, CumProd: results depend on positions along one axis; the others pass."""

    def propagate(self, step: Step) -> None:
        """Freeze the axis, pass the others."""
        labels = step.labels(0)
        rank = len(step.shape(0))
        axis = int(step.attr("axis", -1 if step.node.op == "TopK" else 0))
        if step.node.op in ("CumSum", "CumProd"):
            value = step.value(1)
            if value is None:
                step.freeze(labels, Reason.MISSING_CONSTANT, "the axis is not known")
                return
            axis = int(value.ravel()[0])
        axis %= rank
        if step.may_lose_choices:
            labels = step.without_rows(labels, axis)
        labels = step.drop_axis(
            labels, axis, Reason.NORMALISED, f"{step.node.op} depends on the position of these channels"
        )
        if step.node.op in ("ArgMax", "ArgMin") and not step.attr("keepdims", 1):
            labels = remove_axis(labels, axis)
        for o in range(len(step.node.outputs)):
            step.set(o, labels)

    def infer(self, node: Node, shapes: list[Any], values: Any) -> list[Any] | None:
        """Return the data's shape for cumulative sums."""
        return [shapes[0]] if node.op in ("CumSum", "CumProd") else None


class ReduceExtreme(Reduce):
    """The largest or smallest value over axes."""

    chooses = True


class ReduceMean(Reduce):
    """The mean over axes: a sum with a constant factor, which changes by the share of channels that survive."""

    averages = True

    def propagate(self, step: Step) -> None:
        """Pass the labels as a sum does; freeze those of integers, whose means are truncated."""
        kind = step.table.facts.probes[0].dtypes.get(step.node.inputs[0])
        if kind not in FLOATS:
            for axis in self.axes(step) or ():
                step.fix(step.labels(0), axis, Reason.NORMALISED, "a mean of integers is truncated")
        super().propagate(step)

    def rewrite(self, cut: Cut) -> None:
        """Multiply the mean by the share of values that survive."""
        share = kept_share(cut, self.axes(cut.before) or ())
        if share != 1.0:
            cut.scale_output(0, share)


register("", "Softmax", "LogSoftmax", rule=Softmax())
register("", "Hardmax", rule=Hardmax())
register("", "LayerNormalization", rule=LayerNorm())
register("", "RMSNormalization", "SimplifiedLayerNormalization", rule=RMSNorm())
register("", "LpNormalization", rule=OverAxes(exact=True))
register("", "MeanVarianceNormalization", rule=MeanVariance(approximate=True))
register("", "LRN", rule=Response())
register("", "InstanceNormalization", rule=InstanceNorm())
register("", "GroupNormalization", rule=GroupNorm())
register("", "BatchNormalization", rule=BatchNorm())
register("", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", rule=Reduce(contraction=True))
register("", "ReduceMean", rule=ReduceMean(contraction=True))
register("", "ReduceMax", "ReduceMin", rule=ReduceExtreme())
register("", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp", rule=Reduce())
register("", "ArgMax", "ArgMin", "TopK", rule=with_facts(Pick(), jumps=True))
register("", "CumSum", "CumProd", rule=Pick())
register("", "DFT", rule=Fourier())
register("", "ReverseSequence", rule=Reversal())
register("", "Det", rule=Determinant())
