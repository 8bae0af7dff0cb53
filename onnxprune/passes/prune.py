"""Prune: score, choose, remove, and describe the removal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.settings import AUTO, Options, Request, check_names, request_of
from onnxprune.channels.analysis import Analysis, GroupView
from onnxprune.channels.plan import Plan
from onnxprune.channels.selection import make_plan, read_plan, removed_atoms
from onnxprune.channels.survivors import Survivors
from onnxprune.errors import BudgetError, Note, argument
from onnxprune.garbage import paused
from onnxprune.graph.view import CONTROL
from onnxprune.importance.criteria import Criterion, get, needs_of
from onnxprune.importance.scores import NoScore
from onnxprune.io.write import assemble
from onnxprune.labels.atoms import Barrier, Reason
from onnxprune.labels.label import Ids
from onnxprune.operators.registry import rule_of
from onnxprune.passes.between import describe_between, train_pruned
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.select import Selector
from onnxprune.pipeline import UNPRUNED, Context, Model, ModelParts, Pass, PassResult
from onnxprune.pruning.rewriting import CannotRewrite
from onnxprune.report.facts import Fact, Finetuning, LayerFacts, Pruned, Remark, ResizedTensor, Settings, Sizes
from onnxprune.settings import default, named_arguments

Mask = NDArray[np.bool_]
T = TypeVar("T")
WITH_DATA, WITHOUT = "ziplm", "l2"
"""Default criteria with and without calibration data."""
COMPETING = {"scope": "global", "cost": "macs"}
"""Settings of competition, by default under the criterion from data."""


@named_arguments()
@dataclass(frozen=True, repr=False, eq=False)
class Prune(Pass, Options):
    """Remove the least important units.

    Args:
        criterion: a name, or a function from a slot (and its maps) to scores [channels]; None: with calibration data
            the recoverable error (``ziplm``), where units of all groups compete per MAC unless ``scope`` or ``cost``
            differ from ``auto``, and without data magnitude (``l2``) within each group.
        ratio: share of units to remove, 0 <= ratio < 1: of every group, or of all together, see ``scope``.
        plan: a plan or its file, replayed instead of scoring.
        approximate: also prune through normalisations, which is not exact.
        between: passes to run between two of ``steps``, such as ``Finetune("1m")``, on the model at its full size with
            units chosen so far at 0; the next step scores the weights behind them. Empty: none.

    Further arguments (``layers``, ``scope``, ``policy`` and so on) are those of
    :class:`onnxprune.allocation.settings.Options`; ``onnxprune.prune`` explains them.

    Raises:
        UsageError: a value out of range, a pattern that matches nothing, a plan that does not fit, data that a
            criterion needs and that are not there.
        BudgetError: nothing could be pruned.
    """

    requires = (UNPRUNED,)

    criterion: str | Criterion | None = None
    ratio: float = default("ratio")
    _: KW_ONLY
    plan: Plan | str | Path | None = None
    approximate: bool = False
    between: Sequence[Pass] = ()

    def __post_init__(self) -> None:
        self.request, self.replayed  # noqa: B018  # wrong values are errors of the construction

    @cached_property
    def score(self) -> Criterion:
        """The function that scores slots."""
        criterion = WITHOUT if self.criterion is None else self.criterion
        return get(criterion) if isinstance(criterion, str) else criterion

    @property
    def name(self) -> str:
        """The name of the criterion."""
        criterion = WITHOUT if self.criterion is None else self.criterion
        return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", "custom")

    @cached_property
    def request(self) -> Request:
        """The settings, checked."""
        request = request_of(self.ratio, self)
        if self.normalize != AUTO:
            return request
        return replace(request, normalize="none" if getattr(self.score, "comparable", False) else "mean")

    @cached_property
    def replayed(self) -> Plan | None:
        """The plan, read from its file."""
        return Plan.load(self.plan) if isinstance(self.plan, (str, Path)) else self.plan

    @property
    def resized(self) -> Sequence[str]:
        """Inputs and outputs that the plan lists."""
        return () if self.replayed is None else self.replayed.resize_io

    def __repr__(self) -> str:
        what = "plan" if self.replayed is not None else f"{self.name}, ratio {self.request.ratio:g}"
        return f"<Prune: {what}>"

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Choose units, prune the model, describe the removal."""
        if self.criterion is None and self.plan is None and context.calibration is not None:
            return run_by_criterion(context, None, lambda c: self.by(c)(context, model))
        # Scoring from data runs the model, for long; everything else makes what stays.
        with nullcontext() if self.replayed is None and needs_of(self.score) else paused():
            analysis = self.prepared(context, model)
            with context.stage("cut"):
                analysis, removed, parts, selector, trainings = self._cut(context, model, analysis)
        criterion = self.name if self.replayed is None else self.replayed.criterion
        plan = make_plan(analysis, removed, criterion)
        plan.factorized, plan.branches, plan.experts = model.plan.factorized, model.plan.branches, model.plan.experts
        pruned = model.with_parts(
            parts,
            analysis=analysis,
            removed=removed,
            plan=plan,
            proof=None,
            refused=frozenset(),
            as_pruned=None,
            hold_out=None,
        )
        selection = {} if selector is None else selector.settings
        settings = Settings({"criterion": criterion, **selection, **describe_between(trainings)})
        return PassResult(pruned, [settings, *describe_removal(context, pruned, selector)])

    def by(self, criterion: str | Criterion) -> Prune:
        """Return the pass with a criterion of the defaults; scores from data compare between groups."""
        competing: dict[str, Any] = {}
        if criterion == WITH_DATA:
            competing = {name: value for name, value in COMPETING.items() if getattr(self, name) in (None, AUTO)}
        return replace(self, criterion=criterion, **competing)

    def selector(self, context: Context, analysis: Analysis) -> Selector:
        """Return the selector of units, to select units without pruning: ``selector(...).at(ratio)``."""
        return Selector(context, analysis, self.request, self.score, self.name)

    def prepared(self, context: Context, model: Model, *, shorter: bool = False) -> Analysis:
        """Return the analysis of the current model, renewed where a pass has changed the model since.

        Args:
            context: the run.
            model: the current model.
            shorter: whether patterns are about residual branches as well, and may match the tensors that these end in.

        Raises:
            UsageError: a pattern matches nothing.
        """
        analysis = model.analysis
        if not model.is_analyzed:
            with context.stage("analyze"):
                source = assemble(*model.parts)
                known: dict[str, Any] = {"input_shapes": context.input_shapes, "resizing": context.analysis.resizing}
                analysis = Analysis(source, approximate=self.approximate, **known)
            analysis = analysis.with_digest_of(context.analysis)
        labels = (n.label for n in analysis.graph.nodes)
        names = [*analysis.loaded.weights, *analysis.graph.weights, *labels]
        if shorter or model.is_shortened:
            original = context.analysis
            names += [*original.loaded.weights, *original.graph.weights]
            names += [name for n in original.graph.nodes for name in (n.label, *n.outputs)]
        check_names(self.request, names)
        return analysis

    def _cut(
        self, context: Context, model: Model, analysis: Analysis
    ) -> tuple[Analysis, Mask, ModelParts, Selector | None, list[Finetuning]]:
        """Prune; a node without a form at the new sizes is frozen, and the units are chosen again."""
        seconds: dict[str, float] = {}
        trainings: list[Finetuning] = []

        def retrain(current: Analysis, removed: Mask) -> Analysis:
            new, facts = train_pruned(context, model, current, removed, self.between)
            trainings.extend(facts)
            return new

        for _ in range(len(analysis.graph.nodes) + 1):
            selector = None
            if self.replayed is not None:
                analysis, mask = read_plan(analysis, self.replayed)
            else:
                # Units that are chosen again have been trained for before.
                trains = self.between and not trainings
                selector = Selector(
                    context, analysis, self.request, self.score, self.name, seconds, retrain if trains else None
                )
                analysis = selector.analysis
                if not selector.ratios:
                    raise BudgetError("No channel of this model can be removed.", hint=reasons(analysis))
            removed = np.zeros(analysis.units.component.size, dtype=bool)
            try:
                if selector is not None:
                    mask = selector()
                    analysis = selector.analysis
                    analysis = analysis.with_digest_of(context.analysis) if trainings else analysis
                removed = removed_atoms(analysis.units, mask)
                return analysis, removed, cut_model(analysis, removed), selector, trainings
            except CannotRewrite as stop:
                # Feature maps of a model that is pruned in several steps are captured in the pruned model.
                attempted = removed if removed.any() or selector is None else selector.removed
                analysis = frozen_at(analysis, stop, attempted)
        raise AssertionError("every node was frozen")  # pragma: no cover


def reasons(analysis: Analysis) -> str:
    """Return the reasons why nothing can be pruned, for a hint."""
    shapeless = [spec.name for spec in analysis.facts.settler.dimensions.specs if not spec.shape and not spec.scalar]
    if shapeless:
        return (
            f"Input {shapeless[0]!r} declares no shape, so later sizes are not known. Give its shape, for example "
            f"{argument('input_shapes')} {shapeless[0]}=1,3,224,224."
        )
    if analysis.facts.conflict is not None:
        shapes = argument("input_shapes")
        return f"{analysis.facts.conflict} Give sizes of the open dimensions that fit with {shapes} NAME=N,C,..."
    top = analysis.barriers[:3]
    text = "; ".join(f"{b.channels} channels: {b.code}, {b.detail}" for b in top)
    if text:
        return f"Reasons: {text}. 'onnxprune inspect' lists all barriers."
    closed = next((node for node in analysis.graph.nodes if node.op in CONTROL and not node.domain), None)
    if closed is not None:
        return (
            f"Layers inside the body of {closed.op} {closed.label!r} are not pruned: this form of body is not "
            "supported."
        )
    return "The model has no weights to prune."


def with_criterion(
    context: Context, criterion: str | Criterion | None, run: Callable[[str | Criterion], T]
) -> tuple[T, str]:
    """Call ``run`` with a criterion; by default recoverable error with data, magnitude without.

    Returns:
        the result, and a remark where the default has no score for any channel, so that magnitude took its place.
    """
    if criterion is not None or context.calibration is None:
        return run(criterion or WITHOUT), ""
    try:
        return run(WITH_DATA), ""
    except NoScore:
        note = f"no layer of the model can be scored from data by {WITH_DATA}, the default: scored by {WITHOUT} instead"
        return run(WITHOUT), note


def run_by_criterion(
    context: Context, criterion: str | Criterion | None, run: Callable[[str | Criterion], PassResult]
) -> PassResult:
    """Call ``run`` with a criterion as :func:`with_criterion` does; its remark becomes one of the facts."""
    result, note = with_criterion(context, criterion, run)
    return replace(result, facts=[*result.facts, Remark(note)]) if note else result


# -- nodes that cannot be rewritten ------------------------------------------------------------------------------------


def frozen_at(analysis: Analysis, stop: CannotRewrite, removed: NDArray[np.bool_]) -> Analysis:
    """Return the analysis with the channels frozen of a node that cannot be rewritten.

    Args:
        analysis: analysis of the model.
        stop: error that was raised for the node.
        removed: mask over atoms [atoms], bool: the removal that failed.
    """
    why = Barrier(Reason.UNSUPPORTED_FORM, stop.node.label, stop.node.kind, stop.detail)
    freezes: list[tuple[Ids, Barrier]] = []
    for name in (*stop.node.inputs, *stop.node.outputs):
        for label in analysis.table.get(name) if name else ():
            if removed[label.ids].any():
                component = analysis.units.component
                ids = np.flatnonzero(np.isin(component, np.unique(component[label.ids])))
                freezes.append((ids, why))
    if not freezes:  # the node only reads sizes: the channels of their tensors are frozen
        ids = _sized(analysis, stop, removed)
        freezes.append((ids if ids.size else np.flatnonzero(removed), why))
    return analysis.with_frozen(freezes)


def _sized(analysis: Analysis, stop: CannotRewrite, removed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the removed atoms on tensors whose size reaches the node by computation."""
    queue, visited, atoms = list(stop.node.inputs), set(stop.node.inputs), [np.zeros(0, np.int64)]
    while queue:
        producer = analysis.graph.producer.get(queue.pop())
        if producer is None:
            continue
        if rule_of(producer).reads_sizes:
            labels = analysis.table.get(producer.inputs[0])
            atoms.extend(x.ids[removed[x.ids]] for x in labels)
            continue
        fresh = [n for n in producer.inputs if n and n not in visited]
        visited.update(fresh)
        queue.extend(fresh)
    return np.unique(np.concatenate([f.ravel() for f in atoms]))


# -- facts about a removal ---------------------------------------------------------------------------------------------


def describe_removal(context: Context, model: Model, selector: Selector | None = None) -> Iterable[Fact]:
    """Describe the removal as facts.

    Args:
        context: context of the run.
        model: the pruned model, with its plan.
        selector: selector of the units; None where they come from a plan.
    """
    analysis, original = model.analysis, context.analysis
    num_removed = {g.id: len(g.removed or ()) for g in model.plan.groups}
    layers = with_layers_of_branches(original, model, _layer_facts(model, selector))
    ratios = {} if selector is None else selector.ratios
    excluded = {} if selector is None else selector.excluded
    multiples = {} if selector is None else selector.multiples
    groups = [
        _group_facts(g, num_removed.get(g.id, 0), ratios.get(g.id), multiples.get(g.id, 1)) for g in analysis.groups
    ]
    for group in groups:
        group["reason"] = group["reason"] or excluded.get(group["id"], "")
    yield Pruned(layers, groups, [asdict(b) for b in analysis.barriers], _resized_facts(model))
    yield Sizes(
        params_before=original.parameters,
        params_after=model.num_parameters,
        macs_before=sum(x.macs_before for x in original.layers),
        macs_after=sum(x.macs_after for x in layers),
    )
    if selector is not None:
        yield from map(Remark, selector.warnings)
    approximate = sum(1 for g in analysis.units.groups if not g.exact and num_removed.get(g.id))
    if approximate:
        what = "1 group was" if approximate == 1 else f"{approximate} groups were"
        yield Remark(Note(f"{what} pruned through a normalisation ({argument('approximate')}) and not exact there."))


def _resized_facts(model: Model) -> list[ResizedTensor]:
    """Return the inputs and outputs that lost channels, inputs first."""
    graph, after = model.analysis.graph, Survivors(model.analysis.table, model.removal)
    names = [name for name in dict.fromkeys([*graph.inputs, *graph.outputs]) if after.touched(name)]
    declared = {value.name: value for value in (*graph.proto.graph.input, *graph.proto.graph.output)}
    return [ResizedTensor(n, *_declared(declared[n], model.analysis, after)) for n in names]


def _declared(value: Any, analysis: Analysis, after: Survivors) -> tuple[list[int | str], list[int | str]]:
    """Return the shape of an input or output before and after, with the names of its open sizes."""
    dims = value.type.tensor_type.shape.dim
    shape, sizes = analysis.facts.shape(value.name) or (), after.sizes(value.name)
    is_open = [analysis.facts.varies(value.name, axis) for axis in range(len(shape))]
    names = [dims[axis].dim_param if axis < len(dims) else "" for axis in range(len(shape))]
    before: list[int | str] = [
        (name or "?") if open_axis and axis not in sizes else int(size or 0)
        for axis, (size, name, open_axis) in enumerate(zip(shape, names, is_open, strict=True))
    ]
    return before, [sizes.get(axis, size) for axis, size in enumerate(before)]


def with_layers_of_branches(original: Analysis, model: Model, layers: Sequence[LayerFacts]) -> list[LayerFacts]:
    """Return layers of a model in the order of the original, with those that went with branches, of which none is left.

    Args:
        original: analysis of the original.
        model: the model.
        layers: its layers.
    """
    if not model.is_shortened:
        return [*layers]
    present = {layer.name for layer in layers}
    removed = [layer for layer in original.layers if layer.name not in present]
    absent = [replace(layer, channels_after=0, params_after=0, macs_after=0, reason="") for layer in removed]
    order = {layer.name: k for k, layer in enumerate(original.layers)}
    return sorted([*layers, *absent], key=lambda layer: order.get(layer.name, len(order)))


def _layer_facts(model: Model, selector: Selector | None) -> list[LayerFacts]:
    """Return every layer before and after, with the reason where it is unchanged."""
    analysis = model.analysis
    after = Survivors(analysis.table, model.removal)

    def size(name: str) -> int:
        return int(np.prod(after.shape(name) or (), dtype=np.int64))

    layers = analysis.layer_facts(after.shape, size)
    if selector is not None:
        reasons = _reasons(analysis, selector)
        for layer in layers:
            if layer.name in reasons and layer.channels_after == layer.channels_before:
                layer.reason = reasons[layer.name]
    return layers


def _reasons(analysis: Analysis, selector: Selector) -> dict[str, str]:
    """Return the reasons why layers were left out of the choice, by their names."""
    excluded = {n.label for i, ratio in selector.ratios.items() if ratio is None for n in analysis.producers.get(i, ())}
    reasons = dict.fromkeys(excluded, f"{Reason.EXCLUDED}: by its name")
    return reasons | {n.label: why for i, why in selector.excluded.items() for n in analysis.producers.get(i, ())}


def _group_facts(group: GroupView, removed: int, ratio: float | None, multiple: int) -> dict[str, Any]:
    """One group as plain data. Spelled out, since dataclasses.asdict copies deeply and groups have many slots."""
    slots = [{"tensor": s.tensor, "axis": s.axis, "size": s.size} for s in group.slots]
    facts = {f.name: getattr(group, f.name) for f in fields(group)}
    return {**facts, "slots": slots, "removed": removed, "asked": ratio, "multiple": multiple}
