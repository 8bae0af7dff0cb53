"""Conv and ConvTranspose of any rank: plain, grouped, depthwise with multipliers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from math import prod
from typing import Any

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.labels.algebra import Shape, broadcast, known
from onnxprune.labels.atoms import Reason
from onnxprune.labels.label import Ids, Label, Labels, along, covering
from onnxprune.operators.context import Cut, Step, override, owned
from onnxprune.operators.contractions import Form, Transposed, Windows
from onnxprune.operators.factoring import Convolution, TransposedConvolution
from onnxprune.operators.registry import NewNode, Read, Rule, WithoutAddends, register, with_facts
from onnxprune.operators.sizes import window_sizes


class Conv(Rule):
    """Data [N, C, ...] with weight [O, C/group, ...]; a grouped convolution is a grid of (group, channels per group).

    Args:
        data: position of the data.
        weight: position of the weight.
        bias: position of the bias, or None.
        per_output: further inputs with one value per output channel (scales and zero points of quantised forms).
        addend: position of an input that is added to the result (FusedConv), or None.
    """

    slides = True

    def __init__(
        self,
        data: int = 0,
        weight: int = 1,
        bias: int | None = 2,
        per_output: tuple[int, ...] = (),
        addend: int | None = None,
    ) -> None:
        self.data, self.weight, self.bias, self.per_output, self.addend = data, weight, bias, per_output, addend
        self.weights = (weight,)

    def addends(self, node: Node) -> Sequence[int]:
        """Return the input that is added to the result."""
        return () if self.addend is None else (self.addend,)

    def factors(self, node: Node) -> Sequence[int]:
        """Return data and weight."""
        return (self.data, self.weight)

    def without(self, node: Node, positions: Collection[int], opset: int) -> WithoutAddends | None:
        """Return the convolution alone, with its activation."""
        inputs = ["" if i in positions else name for i, name in enumerate(node.inputs)]
        while not inputs[-1]:
            inputs.pop()
        return WithoutAddends([NewNode(node.op, inputs, node.outputs, node.name, node.domain, node.attrs)], {})

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the channels of the data and those that the kernel reads."""
        yield shapes[self.data][1], shapes[self.weight][1] * node.attrs.get("group", 1)

    def groups(self, step: Step) -> int:
        """Return the number of groups."""
        return int(step.attr("group", 1))

    def axis(self, step: Step) -> int:
        """Return the channel axis of the data and the output."""
        return 1

    def weight_axis(self, step: Step) -> int:
        """Return the weight's axis of input channels per group; its output channels are on axis 0."""
        return 1

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Count one sum over the kernel and the channels of a group per element of the output."""
        w = shapes[self.weight]
        return 0 if w is None or out is None or shapes[self.data] is None else prod(out) * prod(w[1:])

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Return axis 1."""
        return 1 if rank > 1 else rank - 1

    def propagate(self, step: Step) -> None:
        """Unite the data's channels with the weight's; the output takes the weight's other axis."""
        x, w = step.labels(self.data), step.labels(self.weight)
        axis, inner = self.axis(step), self.weight_axis(step)
        step.fix_all_but(x, (0, axis), Reason.SPATIAL, "a convolution slides over this axis")
        step.fix_all_but(w, (0, inner), Reason.KERNEL, "the kernel keeps its size")
        if self.groups(step) == 1:
            step.unite(step.axis_ids(x, axis), step.axis_ids(w, inner), "the convolution's input")
            out = step.axis_ids(w, 0)
        else:
            out = self._grouped(step, x, w)
        self._finish(step, x, out)

    def _finish(self, step: Step, x: Labels, out: Ids | None) -> None:
        for i in (*((self.bias,) if self.bias is not None else ()), *self.per_output):
            if step.has(i) and len(step.shape(i)) == 1 and step.shape(i)[0] > 1:
                step.unite(out, step.axis_ids(step.labels(i), 0), "a per-channel operand")
        rank = len(step.out_shape())
        labels: Labels = () if out is None else (along(out, self.axis(step), rank),)
        batch = covering(x, 0)
        if batch is not None and batch.is_grid:
            step.fix(x, 0, Reason.UNSUPPORTED_FORM, "a grid lies along the batch axis of a convolution")
        elif batch is not None:  # channels folded into the batch: each is convolved by itself
            labels = (*labels, along(batch.ids.ravel(), 0, rank))
        if self.addend is not None and step.has(self.addend):
            shape = step.out_shape()
            operands = [(labels, shape), (step.labels(self.addend), step.shape(self.addend))]
            labels = broadcast(step.atoms, operands, len(shape), step.reason)
        step.set(0, labels)

    def _grouped(self, step: Step, x: Labels, w: Labels) -> Ids | None:
        group = self.groups(step)
        input_ids, output_ids = step.axis_ids(x, self.axis(step)), step.axis_ids(w, 0)
        per_in = step.shape(self.weight)[self.weight_axis(step)]
        if input_ids is None or output_ids is None:
            step.freeze(
                (*x, *w), Reason.UNLABELLED_OPERAND, "a grouped convolution reads a tensor without removable channels"
            )
            return None
        grid_in, grid_out = input_ids.reshape(group, -1), output_ids.reshape(group, -1)
        if per_in == 1:
            step.atoms.unite(grid_in, grid_out)
            return output_ids
        self._tie_rows(step, grid_in, grid_out)
        self._spread(step, w, grid_in, output_ids.size)
        return output_ids

    @staticmethod
    def _tie_rows(step: Step, grid_in: Ids, grid_out: Ids) -> None:
        """Unite rows: whole groups of inputs and outputs are pruned, or all groups keep equal numbers of each."""
        in_label, out_label = Label(grid_in, 1), Label(grid_out, 1)
        step.atoms.view(in_label)
        step.atoms.view(out_label)
        step.atoms.unite(step.atoms.rows_of(in_label).ids, step.atoms.rows_of(out_label).ids)

    def _spread(self, step: Step, w: Labels, grid_in: Ids, outputs: int) -> None:
        """Lay a grid of (output, input) over the weight, whose input channel j is another atom in every group."""
        axis = self.weight_axis(step)
        chain = owned(step, self.weight, (axis,))
        if chain is None:
            columns = step.axis_ids(w, axis)
            step.unite(None if columns is None else np.broadcast_to(columns, grid_in.shape), grid_in)
            return
        per_group = outputs // len(grid_in)
        ids = np.repeat(grid_in, per_group, axis=0)
        shape = [1] * len(step.shape(self.weight))
        shape[0], shape[axis] = ids.shape
        grid = Label(ids.reshape(shape), axis)
        for link in chain:
            old = covering(step.table.get(link), axis)
            if old is not None:
                step.atoms.freeze(old.ids, step.reason(Reason.OPERAND, "replaced by the grid over groups"))
        override(step, chain, (grid,), (axis,))

    def rewrite(self, cut: Cut) -> None:
        """Set ``group`` to the number of surviving groups."""
        group = int(cut.attr("group", 1))
        if group > 1 and cut.touched():
            channels = cut.shape(self.data)[self.axis(cut.before)]
            per_group = cut.shape(self.weight)[self.weight_axis(cut.before)]
            if channels % per_group:
                cut.fail(f"{channels} channels do not divide into groups of {per_group}")
            cut.set_attr("group", channels // per_group)

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the channel axis of the data."""
        return [(self.data, (self.axis(step),))]

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [N, O, ...], where data and weight fit."""
        x, w = shapes[self.data], shapes[self.weight]
        if x is None or w is None or len(x) != len(w):
            return [None]
        if x[1] is not None and w[1] is not None and w[1] * int(node.attrs.get("group", 1)) != x[1]:
            return [None]
        return [(x[0], w[0], *window_sizes(x[2:], w[2:], node.attrs))]

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return windows of the data times the kernel."""
        w = known(shapes[self.weight])
        if data != self.data or w is None or self.per_output:
            return None
        plain = "activation" not in node.attrs and self.addend not in range(len(node.inputs))
        return Windows(w[2:], **window_settings(node), data=data, weight=self.weight, bias=self.bias, plain=plain)


def window_settings(node: Node) -> dict[str, Any]:
    """Return strides, dilations, pads and groups of a convolution as arguments of its form."""
    attrs = node.attrs
    auto = attrs.get("auto_pad", "NOTSET")
    pads = attrs.get("pads") if auto in ("NOTSET", "") else auto
    group = int(attrs.get("group", 1))
    return {"strides": attrs.get("strides"), "dilations": attrs.get("dilations"), "pads": pads, "group": group}


class ConvTranspose(Conv):
    """Data [N, C, ...] with weight [C, O/group, ...]."""

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the channels of the data and those of the kernel."""
        yield shapes[0][1], shapes[1][0]

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Count one kernel per element of the data and output channel of its group."""
        x, w = shapes[self.data], shapes[self.weight]
        return 0 if w is None or out is None or x is None else prod(x) * prod(w[1:])

    def propagate(self, step: Step) -> None:
        """Unite the data's channels with the weight's first axis; the output takes the second, per group."""
        x, w = step.labels(self.data), step.labels(self.weight)
        step.fix_all_but(x, (0, 1), Reason.SPATIAL, "a convolution slides over this axis")
        step.fix_all_but(w, (0, 1), Reason.KERNEL, "the kernel keeps its size")
        input_ids, group = step.axis_ids(x, 1), self.groups(step)
        step.unite(input_ids, step.axis_ids(w, 0), "the convolution's input")
        if group == 1:
            self._finish(step, x, step.axis_ids(w, 1))
            return
        self._finish(step, x, self._outputs(step, w, input_ids, group))

    def _outputs(self, step: Step, w: Labels, input_ids: Ids | None, group: int) -> Ids | None:
        shape = step.shape(self.weight)
        name = step.node.inputs[self.weight]
        if input_ids is None:
            step.freeze(w, Reason.UNLABELLED_OPERAND, "a grouped convolution reads a tensor without removable channels")
            return None
        if shape[0] == group:
            # Depthwise: all outputs of an input channel are pruned with it.
            step.fix(w, 1, Reason.FIXED_SIZE, "the channel multiplier keeps its size")
            return np.repeat(input_ids, shape[1])
        if name not in step.table.graph.weights or len(step.table.graph.consumers[name]) > 1:
            step.freeze(
                (*step.labels(self.data), *w), Reason.UNSUPPORTED_FORM, "a grouped ConvTranspose with a computed weight"
            )
            return None
        out = step.atoms.new(group * shape[1], name, 1)
        grid_out = out.reshape(group, shape[1])
        self._tie_rows(step, input_ids.reshape(group, -1), grid_out)
        if shape[1] == 1:
            return out  # one output per group: its rows are the output's channels themselves
        ids = np.repeat(grid_out, shape[0] // group, axis=0)
        grid = Label(ids.reshape(*ids.shape, *(1,) * (len(shape) - 2)), 1)
        old = covering(w, 1)
        if old is not None:
            step.atoms.freeze(old.ids, step.reason(Reason.OPERAND, "replaced by the grid over groups"))
        step.table.set(name, (*(x for x in w if x is not old), grid))
        return out

    def rewrite(self, cut: Cut) -> None:
        """Derive ``group`` from the output's channels and the weight's second axis."""
        if int(cut.attr("group", 1)) > 1 and cut.touched():
            cut.set_attr("group", cut.out_shape()[1] // cut.shape(self.weight)[1])

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return windows of the dilated data times the flipped kernel; None where pads follow from a target shape."""
        w, settings = known(shapes[1]), window_settings(node)
        if data != 0 or w is None or "output_shape" in node.attrs or isinstance(settings["pads"], str):
            return None
        return Transposed(w[2:], output_padding=node.attrs.get("output_padding"), **settings)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return None: onnx infers the shape."""
        return [None]


class DeformConv(Conv):
    """A convolution with taps shifted by offsets [N, offset groups * taps * 2, ...] and weighted by a mask.

    The channels are also split into offset groups: an offset group is pruned with its offsets, or all offset groups
    keep equal numbers of channels.
    """

    def propagate(self, step: Step) -> None:
        """Propagate as a convolution; offsets and masks vary with the position, the tap and the sample."""
        step.fix(step.labels(0), 0, Reason.FIXED_SIZE, "every sample has offsets of its own")
        super().propagate(step)
        groups = int(step.attr("offset_group", 1))
        input_ids = step.axis_ids(step.labels(0), 1)
        rows = None
        if input_ids is not None and groups > 1:
            grid = Label(input_ids.reshape(groups, -1), 1)
            step.atoms.view(grid)
            rows = step.atoms.rows_of(grid).ids.ravel()
        tap_labels = [self._taps(step, i, groups) for i in (2, 4) if step.has(i)]
        for other in tap_labels:
            if rows is None or other is None:
                for ids in (rows, other):
                    if ids is not None:
                        step.atoms.freeze(ids, step.reason(Reason.FIXED_SIZE, "the taps of a deformable convolution"))
            else:
                step.unite(rows, other, "an offset group")

    @staticmethod
    def _taps(step: Step, i: int, groups: int) -> Ids | None:
        """Return atoms of the offset groups, the outer axis of offsets or masks; the taps are tied to them."""
        labels = step.labels(i)
        step.fix_all_but(labels, (1,), Reason.SPATIAL, "a convolution slides over this axis")
        ids = step.axis_ids(labels, 1)
        if ids is None:
            return None
        grid = ids.reshape(groups, -1)
        step.atoms.unite(grid, np.broadcast_to(grid[:, :1], grid.shape))
        return grid[:, 0]

    def rewrite(self, cut: Cut) -> None:
        """Update the numbers of surviving groups and offset groups."""
        super().rewrite(cut)
        groups = int(cut.attr("offset_group", 1))
        if groups > 1 and cut.touched(cut.node.inputs[2]):
            cut.set_attr("offset_group", groups * cut.shape(2)[1] // cut.before.shape(2)[1])

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return None: the positions of the taps depend on the data."""
        return None


register("", "Conv", rule=with_facts(Conv(), factoring=Convolution()))
register("", "DeformConv", rule=DeformConv(bias=3))
register("", "ConvTranspose", rule=with_facts(ConvTranspose(), factoring=TransposedConvolution()))
register("com.microsoft", "FusedConv", rule=Conv(addend=3))
