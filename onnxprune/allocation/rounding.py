"""Rounding: the multiples of channels that a device's kernels like, per group of a model, and counts that keep to them.

The rule, for ``round_to="auto"``:

1. Every layer has multiples for the channels that it writes and reads, by the kernels of the device (:class:`Kernels`).
2. A group keeps the least common multiple of those of its layers, counted in its own steps: where a step stands for
   several channels (heads, groups of a convolution, a flattened map), fewer steps make a whole block.
3. A group of fewer than two multiples takes half the multiple, and again until two fit: 24 channels on AVX-512 may keep
   8 or 16, 16 channels 8, 8 channels 4, 2 channels 1. Any group may stay whole.
4. Where the cut alone decides (a ratio of every group), each group takes the allowed count nearest to its ratio, but
   one whole block rather than less of it where half a block or more is asked: below a block MACs go and hardly any
   time. Where that leaves less than 0.7 of the MACs to save, the nearest counts hold after all. Then the groups
   nearest to the middle of two counts take the other one, until the multiply-accumulates of the model (its units, where
   it has none) are as near as they get to those without rounding: :meth:`Rounding.balanced`. Not for that: a count
   further than 3/4 of the gap from the ratio, one below a whole block, or another for a group with a ratio of its own.

Measured by ``tools/bench_rounding.py`` with onnxruntime 1.32.0 on a processor with AVX-512, one thread, 28 x 28
positions: microseconds of 64 → n → n → 64 channels (matrix products 128 → n → n → 128, 64 rows):

============  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====
n                4     8    12    15    16    17    20    24    31    32    36    47    48    64
============  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====
3 x 3          337   413   478   519   476   734   791   778  1072   784  1121  1547  1154  1456
1 x 1           91   110   126   135   100   112   129   125   127   124   168   170   171   142
depthwise       93   116   119   158   110   152   131   136   194   140   171   260   172   126
3 x 3, int8    213   222   261   286   207   281   226   240   314   250   299   409   327   395
matrices        13    14    16    17    17    21    21    23    24    24    27    29    29    29
============  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====  ====

A convolution takes as long as the next whole block of 16: 20, 24 and 28 channels cost what 32 do, so nothing between is
worth a channel. Counts that are no multiple of 4 leave the blocked layout and take up to 1.5 times as long (depthwise
up to 2.2 times) as the next that is. Below one block the time falls slowly and only for wide kernels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.costs import Macs, Sizes, total
from onnxprune.allocation.ranked import RankedGroup
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.groups import Group
from onnxprune.devices import Kernels
from onnxprune.graph import cost
from onnxprune.graph.view import Node
from onnxprune.labels.label import Ids
from onnxprune.operators.registry import rule_of

AUTO = "auto"


# -- counts ------------------------------------------------------------------------------------------------------------


def rounded_counts(size: int, steps: int, multiple: int, *, step: int = 1, widest: float = 1.0) -> Ids:
    """Return numbers of steps that may be removed from a group, ascending, 0 first.

    Args:
        size: number of units.
        steps: number of equal steps in which the group can be pruned.
        multiple: the number of remaining steps is a multiple of it, or of a half of it where none such is allowed.
        step: the number of removed units is always a multiple of it.
        widest: the largest share to remove, 0 to 1.
    """
    counts = np.arange(steps)
    units = counts * (size // steps)
    allowed = (units % step == 0) & (units <= widest * size + 1e-9)
    while multiple > 1:
        even = allowed & ((steps - counts) % multiple == 0)
        if even[1:].any():
            even[0] = True
            return np.asarray(counts[even])
        multiple //= 2
    return np.asarray(counts[allowed])


def halved(multiple: int, steps: int) -> int:
    """Return the multiple for a group of so many steps: halved until two fit."""
    while multiple > 1 and steps < 2 * multiple:
        multiple //= 2
    return multiple


# -- the groups of a model ---------------------------------------------------------------------------------------------

# Share of the gap between two allowed counts that the one taken may be away from the ratio.
_FAR = 0.75
# Groups that are moved to another count at most: each needs a row of costs.
_MOST_MOVED = 512
# Share of the MACs to save that has to be left where groups keep whole blocks.
_TOO_LITTLE = 0.7
# Groups of which all sets are tried; of more, rounds in which one is moved, or moved back; and the share of the cost
# that is near enough.
_FEW, _ROUNDS, _CLOSE = 10, 16, 0.01


class Rounding:
    """The multiples of the groups of one model on one device.

    Args:
        analysis: the analysis of the model.
        groups: the groups that may be pruned.
        kernels: the multiples of the device.

    Attributes:
        multiples: of the remaining steps of every group, by its id.
    """

    def __init__(self, analysis: Analysis, groups: Sequence[Group], kernels: Kernels) -> None:
        self.kernels = kernels
        self._analysis, self._groups = analysis, list(groups)
        self._sizes = Sizes(analysis, groups)
        multiples = [1] * len(groups)
        for node in analysis.graph.nodes:
            if cost.is_layer(node, analysis.graph):
                for name, axis, channels in self._multiples_of_layer(node):
                    for column, multiple in self._in_steps(name, axis, channels):
                        multiples[column] = math.lcm(multiples[column], multiple)
        self._full_multiples = {g.id: m if m <= g.steps else 1 for g, m in zip(groups, multiples, strict=True)}
        self.multiples = {g.id: halved(m, g.steps) for g, m in zip(groups, multiples, strict=True)}

    def _multiples_of_layer(self, node: Node) -> list[tuple[str, int, int]]:
        """Return (tensor, axis, multiple of its channels) for the output and the data of a layer."""
        graph, shape, rule = self._analysis.graph, self._analysis.facts.shape, rule_of(node)
        data, out = node.inputs[rule.data], node.outputs[0]
        producer = graph.producer.get(data)
        quantized = rule.integer or (producer is not None and rule_of(producer).decodes)
        multiple = functools.partial(self.kernels.of, quantized=quantized)
        before, after = shape(data), shape(out)
        if not before or not after:
            return []
        axis = cost.channel_axis(node, graph, shape)
        if not rule.slides:
            form = rule.form(node, [shape(n) if n else None for n in node.inputs], rule.data)
            inner = len(before) - 1 if form is None else form.axes[-1]
            written = [] if axis is None else [(out, axis, multiple("features"))]
            return [*written, (data, inner, multiple("inner"))]
        if axis is None:
            return []
        other = 1 if axis == 1 else len(before) - 1
        groups = int(node.attrs.get("group", 1))
        if groups == 1:
            return [(out, axis, multiple("writes")), (data, other, multiple("reads"))]
        if groups == before[other] == after[axis]:
            return [(out, axis, multiple("depthwise")), (data, other, multiple("depthwise"))]
        return [(out, axis, groups * multiple("grouped")), (data, other, groups * multiple("grouped"))]

    def _in_steps(self, name: str, axis: int, channels: int) -> list[tuple[int, int]]:
        """Return (column, multiple of its steps) of the groups along an axis that is to keep multiples of channels."""
        multiples = []
        for term, positions in self._sizes.terms(name, axis).items():
            for column in term:
                steps = int(self._sizes.steps[column])
                each = max(1, positions // steps)
                multiples.append((column, channels // math.gcd(channels, each)))
        return multiples

    def balanced(self, ranked: Mapping[int, RankedGroup], counts: Sequence[int], exact: Sequence[int]) -> list[int]:
        """Return counts of which some are the next allowed ones, so that the model costs as much as without rounding.

        Args:
            ranked: the groups, by their id.
            counts: steps that each of them loses, the allowed ones nearest to its ratio.
            exact: steps that each of them would lose without multiples.
        """
        blocks = self._in_blocks(ranked, counts, exact)
        if blocks == list(exact):
            return blocks
        columns = {g.id: i for i, g in enumerate(self._groups)}
        who = np.array([columns[n] for n in ranked], dtype=np.int64)
        groups = list(ranked.values())
        # A group with a ratio of its own is rounded by itself: the others do not make up for it.
        targets = np.where([g.is_local for g in groups], counts, exact)
        before = [g.num_removed for g in groups]
        full_cost, target, start = self._costs(who, np.stack([before, targets, blocks]).astype(np.int64))
        if full_cost - start < _TOO_LITTLE * (full_cost - target):
            blocks, start = list(counts), float(self._costs(who, np.array([counts], np.int64))[0])
        now = np.asarray(blocks, dtype=np.int64)
        more = bool(start > target)
        moves = [
            _other(c, int(n), self._full_multiples[i], more=more) for (i, c), n in zip(ranked.items(), now, strict=True)
        ]
        order = sorted((far, i, other) for i, move in enumerate(moves) if move is not None for other, far in [move])
        movable = [(i, other) for _, i, other in order[:_MOST_MOVED]]
        if len(movable) <= _FEW:
            moved = np.array([[row >> i & 1 for i in range(len(movable))] for row in range(1 << len(movable))], bool)
            # All ways to move few groups, those of the nearest first.
            moved = moved[np.argsort(moved @ np.array([far for far, _, _ in order]), kind="stable")]
        else:
            moved = np.tri(len(movable) + 1, len(movable), -1, dtype=bool)
        best, off = self._nearest(who, now, movable, moved, target)
        for _ in range(_ROUNDS):
            if off <= _CLOSE * target or len(movable) <= _FEW:
                break
            best, off = self._nearest(
                who, now, movable, best ^ np.eye(len(movable) + 1, len(movable), -1, bool), target
            )
        return [int(c) for c in _moved(now, movable, best[None])[0]]

    def _in_blocks(self, ranked: Mapping[int, RankedGroup], counts: Sequence[int], exact: Sequence[int]) -> list[int]:
        """Return counts that keep one whole block of groups of which less is left, but half of it or more is asked."""
        result = [int(c) for c in counts]
        for i, (number, group) in enumerate(ranked.items()):
            block = self._full_multiples[number]
            other = group.steps - block
            if not group.is_local and group.steps - result[i] < block <= 2 * (group.steps - exact[i]):
                result[i] = other if other >= group.num_removed and other in group.counts else result[i]
        return result

    def _nearest(
        self, who: Ids, now: Ids, movable: Sequence[tuple[int, int]], moved: NDArray[np.bool_], target: float
    ) -> tuple[NDArray[np.bool_], float]:
        """Return the first of several sets of moves [cuts, moves] whose cost is nearest to the target, and how far."""
        off = np.abs(self._costs(who, _moved(now, movable, moved)) - target)
        best = int(np.argmax(off <= off.min() + _CLOSE * target))
        return moved[best], float(off[best])

    def _costs(self, who: Ids, removed: Ids) -> NDArray[np.float64]:
        """Return multiply-accumulates [cuts], or units where the model has none, for removed steps [cuts, groups]."""
        counts = np.repeat(self._sizes.full_counts, len(removed), axis=0)
        counts[:, who] -= removed
        if self._macs is not None:
            return np.asarray(total(self._macs, counts), dtype=np.float64)
        each = np.array([g.size / g.steps for g in self._groups])
        return np.asarray(counts @ each, dtype=np.float64)

    @functools.cached_property
    def _macs(self) -> Macs | None:
        macs = Macs(self._sizes)
        return macs if float(total(macs, self._sizes.full_counts)[0]) > 0 else None


def _moved(now: Ids, movable: Sequence[tuple[int, int]], moved: NDArray[np.bool_]) -> Ids:
    """Return counts [cuts, groups] after moves [cuts, moves] of groups to their other counts."""
    result = np.repeat(now[None], len(moved), axis=0)
    for column, (group, other) in enumerate(movable):
        result[moved[:, column], group] = other
    return result


def _other(group: RankedGroup, count: int, multiple: int, *, more: bool) -> tuple[int, float] | None:
    """Return the allowed count on the other side of a group's ratio and how far from it; None where there is none.

    Args:
        group: the group.
        count: steps that it loses.
        multiple: steps of a whole block: fewer save hardly any time.
        more: whether it is to lose more rather than less.
    """
    target = group.ratio * group.steps
    counts = group.counts[((group.steps - group.counts) % multiple == 0) | (group.counts == 0)]
    side = counts[counts > count] if more else counts[counts < count]
    if group.is_local or not side.size or (count >= target if more else count <= target):
        return None
    other = int(side[0] if more else side[-1])
    far = abs(other - target) / abs(other - count)
    return None if far > _FAR or other < group.num_removed else (other, far)
