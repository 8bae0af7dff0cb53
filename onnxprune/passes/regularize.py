"""Regularize: train a model so that whole units become 0, for an exact removal behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import ModelError, Note, UsageError, argument
from onnxprune.graph.view import Node
from onnxprune.operators.contractions import Scale
from onnxprune.operators.registry import rule_of
from onnxprune.passes.finetune import Finetune
from onnxprune.passes.recover import HAS_INPUTS, split_for
from onnxprune.passes.training import RATE, Judgement, Training
from onnxprune.passes.training_sizes import BATCH, check_samples
from onnxprune.pipeline import UNPRUNED, Context, Model, Pass, PassResult
from onnxprune.report.facts import Regularized, Remark
from onnxprune.settings import checked, named_arguments
from onnxprune.training.loop import Course, Effort
from onnxprune.training.parameters import schema_name
from onnxprune.training.penalties import (
    MAKES,
    READS,
    ROLES,
    SCALES,
    SHIFTS,
    Ids,
    Penalty,
    Proximal,
    Slice,
    Units,
)
from onnxprune.training.step import Adam, Vector

RATIO = 0.3
"""Share of the units to bring to 0 where nothing else is given."""
_MOST = 0.9  # the largest share of a group that may become 0
_FIRST_LOSS = 0.1  # loss that the largest step may add at random: the model's own is 0 in the beginning
_MISSING = 100.0  # points of fidelity that all units which should be 0 are worth together


@named_arguments()
class Regularize(Pass):
    """Train with a penalty that brings whole units to 0, while the outputs stay near the original's, or the labels'.

    The loss is that of :class:`Finetune`. Behind every step of the optimiser comes a proximal step of the penalty. Its
    strength follows a schedule, so that a share of the units is 0 at three quarters of the training. All weights of
    such a unit are 0 then: :class:`RemoveDead` removes it exactly.

    Every eighth batch is a hold-out: the weights with the best penalised objective are kept, points of fidelity that
    are lost and a point for every percent of the units that should be 0 and are not. Where the objective grows, or the
    loss is no number, the training goes on from the best weights with half the step size, and ends the third time.

    Args:
        kind: ``group-lasso`` on the norms of all weights of a unit, ``slimming`` on the scale of a unit (that of a
            BatchNormalization, or one value per channel of a Mul), ``l1-mask`` on a mask in front of it.
        ratio: share of the units to bring to 0, 0 < ratio < 1; None: 0.3 without a strength.
        effort: steps (500), time (``"3m"``), or None: 1,000 steps or 3 minutes, whichever ends first.
        labels: labels of the samples, see :class:`Finetune`; None: distillation alone.
        groups: weights of one norm: ``unit``, the weights that make a unit and those that read it; ``filter``,
            those that make it; ``channel``, those that read it; ``shape``, one position of a kernel in all outputs of
            a layer, which becomes a pattern of zeros and shrinks the model where all positions of a unit do.
        strength: fixed strength of the penalty, above 0, in place of a ratio; None: adapted to the ratio.
        threshold: relative norm, or mask, below which a unit becomes 0, 0 <= threshold < 1; None: 0.05 for
            ``l1-mask``, else 0.001.
        rate: largest step, in units of each weight's own size, above 0.
        batch_size: samples of a step, 1 or more.

    Raises:
        UsageError: no data, fewer than 64 samples, an unknown kind, a value out of range, both a ratio and a strength,
            or a model without weights that the kind penalises.
        ModelError: no weight can be trained, or the model cannot be run as a training graph.
    """

    requires = (HAS_INPUTS, UNPRUNED)

    def __init__(
        self,
        kind: str = "group-lasso",
        ratio: float | None = None,
        effort: int | str | bool | Effort | None = None,
        *,
        labels: Any = None,
        groups: str = "unit",
        strength: float | None = None,
        threshold: float | None = None,
        rate: float = RATE,
        batch_size: int = BATCH,
    ) -> None:
        self.kind = checked("regularize", kind, "train")
        self.groups = checked("groups", groups, "train")
        self.strength = None if strength is None else checked("strength", strength, "train")
        self.ratio = None if ratio is None else checked("ratio", ratio, "train")
        if self.strength is not None and self.ratio is not None:
            raise UsageError(
                f"{argument('ratio')} and {argument('strength')} were both given, but each determines the zeros",
                hint="Drop one of the two.",
            )
        if self.strength is None and self.ratio is None:
            self.ratio = RATIO
        if self.groups != "unit" and self.kind != "group-lasso":
            raise UsageError(
                f"{argument('groups', groups)} has no meaning with {argument('regularize', kind)}",
                hint=f"Drop it, or use {argument('regularize', 'group-lasso')}.",
            )
        limit = None if threshold is None else checked("threshold", threshold, "train")
        self.threshold = limit if limit is not None else _THRESHOLDS[self.kind]
        self.training = Finetune(effort, labels=labels, rate=rate, batch_size=batch_size, features=0).settings

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Train, and return the model with its units at 0."""
        split = split_for(context, model.analysis, "full")
        check_samples(context, model.analysis, split)
        with context.stage("regularize"):
            training = _Regularization.prepare(self.training, context, model, split)
            training.options = self
            training.set_penalty()
            course = training.run()
        facts = training.regularized(course)
        if facts.stopped == "interrupted":
            context.stages.interrupted = f"the training ended after {facts.steps} steps"
        remarks = [Remark(Note(text)) for text in _remarks(facts)]
        if facts.undone:
            return PassResult(model, [facts, *remarks], changed=False)
        # Zeros that no removal takes away stay 0.
        locked = model.locked | training.roots()
        trained = model.with_parts(training.parts(), hold_out=split.validation, locked=locked)
        return PassResult(trained, [facts, *remarks])


_THRESHOLDS = {"group-lasso": 1e-3, "slimming": 1e-3, "l1-mask": 0.05}
_NO_UNITS = "no weight that is trained belongs to a unit that can be removed"
_NOTHING_OF = {
    "slimming": "no unit has a scale of its own that is trained: BatchNormalizations were folded into the layers",
    "group-lasso": _NO_UNITS,
    "l1-mask": _NO_UNITS,
}


def _remarks(facts: Regularized) -> list[str]:
    texts = []
    if facts.stopped and facts.stopped != "interrupted":
        texts.append(f"the training with a penalty ended after {facts.steps} steps: {facts.stopped}")
    if facts.undone:
        texts.append(
            f"no unit became 0, and the training with a penalty was undone: give more time ({argument('finetune')}), "
            f"a larger {argument('ratio')}, or a larger {argument('strength')}"
        )
    return texts


@dataclass(slots=True)
class _Regularization(Training):
    """A training with a penalty, which takes part in the judgement on the hold-out."""

    options: Regularize = field(default_factory=Regularize)
    penalty: Penalty | None = None

    @property
    def least_gain(self) -> float:
        """0: units that become 0 are gained, and not points."""
        return 0.0

    @property
    def stage(self) -> str:
        """The name of the stage that progress is told of."""
        return "regularize"

    @property
    def least_loss(self) -> float:
        """The smallest loss that the first steps may double."""
        return _FIRST_LOSS

    def set_penalty(self) -> None:
        """Find the units to penalise.

        Raises:
            UsageError: there are none of this kind.
            ModelError: there are none of any kind.
        """
        options, analysis = self.options, self.model.analysis
        units = _positions(analysis, self) if options.groups == "shape" else penalized_units(analysis, self)
        is_scale = options.kind == "slimming"
        roles = (SCALES,) if is_scale else (*ROLES[options.groups], SCALES)
        slices = [s for s in units.slices if s.role in roles]
        if not any((s.units >= 0).any() for s in units.slices):
            raise ModelError(f"{argument('regularize', options.kind)} finds nothing to penalise: {_NO_UNITS}.")
        if not slices:
            raise UsageError(
                f"{argument('regularize', options.kind)} finds nothing to penalise: {_NOTHING_OF[options.kind]}",
                hint=f"Use {argument('regularize', 'group-lasso')}, which looks at all weights of a unit.",
            )
        masked = options.kind == "l1-mask"
        self.penalty = Penalty(
            units, slices, self.parameters, options.ratio, options.strength, options.threshold, masked=masked
        )

    def optimizer(self, sizes: Vector) -> Adam:
        """Return an optimiser with the penalty's step behind its own."""
        assert self.penalty is not None
        return Proximal(self.parameters, sizes, self.penalty, self.curvature())

    def judgement(self) -> Judgement:
        """Judge the present weights on the hold-out, with the share of the units that should be 0 and are not."""
        assert self.penalty is not None
        judgement = Training.judgement(self)
        return Judgement(judgement.fidelity, judgement.by_labels, _MISSING * self.penalty.missing)

    def key(self) -> list[Any]:
        """Return the key of the training's state, beside its settings."""
        options = self.options
        settings = options.kind, options.ratio, options.strength, options.threshold, options.groups
        return [*Training.key(self), *settings]

    def roots(self) -> frozenset[str]:
        """Return the weights that hold zeros."""
        assert self.penalty is not None
        return frozenset(item.weight for item in self.penalty.units.slices)

    def regularized(self, course: Course) -> Regularized:
        """Return the facts of the training."""
        assert self.penalty is not None
        vector, zeros = self.parameters.vector, self.penalty.num_zeros
        return Regularized(
            kind=self.options.kind,
            groups=self.options.groups,
            strength=self.penalty.strength,
            units=int(self.penalty.penalized.sum()),
            zeros=zeros,
            density=float(np.count_nonzero(vector)) / max(vector.size, 1),
            **self.course_facts(course),
        )


# -- where units lie ---------------------------------------------------------------------------------------------------


def penalized_units(analysis: Analysis, training: Training) -> Units:
    """Return the units of all groups that can be pruned, with their places in the weights that are trained."""
    units, component = analysis.units, analysis.units.component
    groups = [g for g in units.groups if g.prunable and g.exact]
    owner = np.full(units.frozen.size, -1, np.int64)
    numbers, max_zeros, count = [], [], 0
    for index, group in enumerate(groups):
        owner[group.units] = np.arange(count, count + group.size)
        numbers.append(np.full(group.size, index))
        max_zeros.append(min(group.size - 1, int(_MOST * group.size)))
        count += group.size
    for rows in units.atoms.rows:  # cells go with their rows
        above, cells = owner[component[rows.rows]], component[rows.cells]
        for column in cells.T:
            owner[column] = np.where(owner[column] < 0, above, owner[column])
    slices = [s for name in analysis.table.items() for s in _slices(analysis, owner, name, training)]
    group_of = np.concatenate(numbers) if numbers else np.zeros(0, np.int64)
    return Units(slices, group_of, np.asarray(max_zeros, np.int64))


def _slices(analysis: Analysis, owner: Ids, name: str, training: Training) -> list[Slice]:
    """Return the places of units in one weight; none where 0 would mean something else to one of its readers."""
    graph, stored = analysis.graph, analysis.copies.get(name, name)
    shape = training.parameters.shapes.get(stored)
    if name not in graph.weights or shape is None:
        return []
    result = []
    for label in analysis.table.get(name):
        ids = owner[analysis.units.component[label.ids]]
        fits = len(label.ids.shape) == len(shape) and all(n in (1, m) for n, m in zip(ids.shape, shape, strict=True))
        roles = {weight_role(analysis, node, i, shape, label.axes) for node, i in graph.consumers.get(name, ())}
        if fits and (ids >= 0).any() and len(roles) == 1 and "" not in roles:
            result.append(Slice(stored, ids, *roles))
    return result


def weight_role(analysis: Analysis, node: Node, i: int, shape: Sequence[int], axes: Sequence[int]) -> str:
    """Return the role of a weight for units along some of its axes; empty where it is not known.

    Args:
        analysis: analysis of the model.
        node: operator that reads the weight.
        i: position of the input.
        shape: shape of the weight.
        axes: axes that the units lie along.
    """
    rule = rule_of(node)
    if rule.statistics:
        return SCALES if i == Scale.weight else SHIFTS
    if rule.pointwise:
        scaling = rule.scaling(node, i, 2.0, lambda _: None)
        return SCALES if scaling is not None and scaling.factor == 2 else SHIFTS if i in rule.addends(node) else ""
    summed = _summed(analysis, node, i, shape)
    if summed is None:
        is_scale = schema_name(node, i) in ("scale", "gamma")
        return MAKES if i in rule.weights else SCALES if is_scale else SHIFTS
    return MAKES if summed.isdisjoint(axes) else READS


def _summed(analysis: Analysis, node: Node, i: int, shape: Sequence[int]) -> set[int] | None:
    """Return the axes of a layer's weight that it sums over; None where it is no such weight."""
    shapes = [analysis.facts.shape(n) if n else None for n in node.inputs]
    for data in (0, 1):
        form = rule_of(node).form(node, shapes, data) if data != i and data < len(shapes) else None
        if form is not None and form.weight == i and not isinstance(form, Scale):
            return form.summed_axes(shape)
    return None


def _positions(analysis: Analysis, training: Training) -> Units:
    """Return the positions in the kernels of layers as units: one column of all outputs of a layer each."""
    slices: list[Slice] = []
    numbers: list[NDArray[np.int64]] = []
    max_zeros: list[int] = []
    count = 0
    for node in analysis.graph.steps:
        for i, name in enumerate(node.inputs):
            stored = analysis.copies.get(name, name)
            shape = training.parameters.shapes.get(stored)
            if name not in analysis.graph.weights or shape is None or any(s.weight == stored for s in slices):
                continue
            axes = _summed(analysis, node, i, shape)
            if not axes or len(axes) == len(shape):
                continue
            sizes = [n if a in axes else 1 for a, n in enumerate(shape)]
            size = int(np.prod(sizes))
            slices.append(Slice(stored, np.arange(count, count + size).reshape(sizes), READS))
            numbers.append(np.full(size, len(max_zeros)))
            max_zeros.append(min(size - 1, int(_MOST * size)))
            count += size
    group_of = np.concatenate(numbers) if numbers else np.zeros(0, np.int64)
    return Units(slices, group_of, np.asarray(max_zeros, np.int64))
