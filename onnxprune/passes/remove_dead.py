"""RemoveDead: remove units that change no output, and fold constants that they add into biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.dead import DeadUnits, Fold, find_dead
from onnxprune.channels.selection import make_plan, removed_atoms
from onnxprune.garbage import paused
from onnxprune.graph.view import Node, underscored_name
from onnxprune.io.constants import add_constant
from onnxprune.io.weights import Weight
from onnxprune.io.write import assemble
from onnxprune.operators.contractions import Form
from onnxprune.passes.preparation import hold_against_file
from onnxprune.passes.prepared import Prepared, cut_model
from onnxprune.passes.prune import describe_removal, frozen_at
from onnxprune.passes.workspace import Workspace, synthetic_feeds
from onnxprune.pipeline import UNPRUNED, Context, Model, ModelParts, Pass, PassResult
from onnxprune.pruning.rewriting import CannotRewrite
from onnxprune.recovery.targets import Layer, RecoveryTarget, layer_target
from onnxprune.report.facts import DeadChannels, Fact, Settings
from onnxprune.settings import named_arguments

CRITERION = "dead"
"""Name of the choice in plans and reports."""


@named_arguments()
class RemoveDead(Pass):
    """Remove dead units: those that are 0, that nothing reads, or that are the same number for all inputs.

    A unit whose weights are all 0 still adds its bias, through the activation, to its readers. That number times the
    weights becomes part of the bias behind, where it is the same at every position: not in front of a convolution that
    pads with zeros. Units that are constant only on some data stay, and the outputs do not change.

    Args:
        check: compare the result with the model that came in, on seeded inputs of two sizes.

    Raises:
        ValidationError: the result differs from the model that came in.
    """

    requires = (UNPRUNED,)

    def __init__(self, *, check: bool = True) -> None:
        self.check = check

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Remove the dead units of the model."""
        with context.stage("dead units"), paused():
            analysis = current_analysis(context, model)
            before, dead = analysis, find_dead(analysis, _Biases(analysis))
            facts = describe_dead(analysis, dead)
            if not dead.selected.any():
                return PassResult(model, [facts], changed=False)
            start: ModelParts = model.parts
            if dead.folds:
                start = fold(start, dead.folds, before)
                resizing = context.analysis.resizing
                analysis = Analysis(assemble(*start), input_shapes=context.input_shapes, resizing=resizing)
                analysis = analysis.with_digest_of(context.analysis)
            analysis, removed, parts = _cut(analysis)
        if self.check:
            with context.stage("exactness"), Workspace.of(before) as trial:
                hold_against_file(before, trial, parts, synthetic_feeds(context, before))
        plan = make_plan(analysis, removed, CRITERION)
        plan.factorized = model.plan.factorized
        changes: dict[str, Any] = {"analysis": analysis, "removed": removed, "plan": plan, "proof": None}
        pruned = model.with_parts(parts, **changes, refused=frozenset(), as_pruned=None, hold_out=None)
        described: list[Fact] = [Settings({"criterion": CRITERION}), *describe_removal(context, pruned), facts]
        return PassResult(pruned, described)


def current_analysis(context: Context, model: Model) -> Analysis:
    """Return the analysis of the model as it is, in which rows of grids may be removed as well as their cells."""
    analysis = model.analysis
    if not model.is_analyzed or analysis.approximate:
        resizing = context.analysis.resizing
        analysis = Analysis(assemble(*model.parts), input_shapes=context.input_shapes, resizing=resizing)
    return analysis.with_digest_of(context.analysis).with_reshape_axis("both")


def _cut(analysis: Analysis) -> tuple[Analysis, NDArray[np.bool_], ModelParts]:
    """Remove the dead units of a model; those of a node without a form at the new sizes stay."""
    analysis = analysis.with_reshape_axis("both")
    for _ in range(len(analysis.graph.nodes) + 1):
        dead = find_dead(analysis, lambda _node, _form: "constants were folded before")
        removed = removed_atoms(analysis.units, dead.selected)
        try:
            return analysis, removed, cut_model(analysis, removed)
        except CannotRewrite as stop:
            analysis = frozen_at(analysis, stop, removed)
    raise AssertionError("every node was frozen")  # pragma: no cover


def describe_dead(analysis: Analysis, dead: DeadUnits) -> DeadChannels:
    """Return the number of dead units, that of the removed ones, and the reasons why others stay."""
    reasons = {name: f"{count} constant: {why}" for name, (count, why) in dead.reasons.items()}
    total = sum(group.size for group in analysis.units.groups if group.prunable)
    return DeadChannels(total, dead.num_dead, dead.num_selected, sum(f.channels.size for f in dead.folds), reasons)


# -- constants that become biases --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Biases:
    """Whether layers can take a constant of their data into their bias; an answer per node."""

    analysis: Analysis
    _prepared: Prepared | None = None
    _answers: dict[str, str] = field(default_factory=dict)

    def __call__(self, node: Node, form: Form) -> str:
        name = node.outputs[0]
        if name not in self._answers:
            if self._prepared is None:
                loaded = self.analysis.loaded
                self._prepared = Prepared(loaded.proto, loaded.weights)
            target = _target(self._prepared, name, self.analysis)
            self._answers[name] = target if isinstance(target, str) else ""
        return self._answers[name]


def _target(prepared: Prepared, name: str, analysis: Analysis) -> RecoveryTarget | str:
    """Return the layer that makes a tensor, as one that can be written."""
    node = prepared.graph.producer.get(name)
    if node is None:
        return "the layer is shared with others"
    target = layer_target(prepared.graph, node, analysis.facts.shape)
    if isinstance(target, str):
        return target
    if target.weight.quantised is not None:
        return "its weight is quantised, and its bias would be rounded"
    rank = len(analysis.facts.shape(name) or ())
    if target.form.output_axis(rank) is None:
        return "its outputs lie along several axes"
    return target


def fold(parts: ModelParts, folds: Sequence[Fold], analysis: Analysis) -> ModelParts:
    """Return the model with the weights of constant channels 0, and their sums in the biases; its outputs are the same.

    Args:
        parts: the model.
        folds: constant channels of layers.
        analysis: analysis of the model.
    """
    prepared = Prepared(*parts)
    added: dict[str, tuple[int, NDArray[Any]]] = {}
    for item in folds:
        name = item.node.outputs[0]
        target = _target(prepared, name, analysis)
        assert not isinstance(target, str)
        layer, axis = Layer(prepared.graph, prepared.weights, target), target.form.output_axis(_rank(analysis, name))
        matrix, bias = layer.read()
        columns = matrix.reshape(matrix.shape[0], -1, target.form.taps, matrix.shape[2])
        part, channel = np.divmod(item.channels, columns.shape[1])
        shift = np.zeros_like(bias)
        np.add.at(shift, part, columns[part, channel].sum(axis=1) * item.values[:, None])
        columns = columns.copy()
        columns[part, channel] = 0
        assert axis is not None
        if layer.fixed_bias:
            shape = [-1 if a == axis else 1 for a in range(_rank(analysis, name))]
            dtype = prepared.weights[target.weight.root].dtype
            added[name] = axis, shift.reshape(shape).astype(dtype)
        layer.write(columns.reshape(matrix.shape), bias + (0 if layer.fixed_bias else shift))
    proto, weights = prepared.model()
    return _with_additions(proto, weights, {name: value for name, (_, value) in added.items()})


def _rank(analysis: Analysis, name: str) -> int:
    return len(analysis.facts.shape(name))


def _with_additions(
    proto: onnx.ModelProto, weights: Mapping[str, Weight], added: Mapping[str, NDArray[Any]]
) -> ModelParts:
    """Return a model with constants added to some tensors, right behind the nodes that make them."""
    if not added:
        return proto, weights
    result, known = onnx.ModelProto(), dict(weights)
    result.CopyFrom(proto)
    nodes = list(result.graph.node)
    names = {n for node in nodes for n in (*node.input, *node.output)} | known.keys()
    del result.graph.node[:]
    for node in nodes:
        name = node.output[0] if node.output else ""
        if name not in added:
            result.graph.node.append(node)
            continue
        product, constant = (underscored_name(f"{name}_{suffix}", names) for suffix in ("product", "constant"))
        node.output[0] = product
        result.graph.node.extend([node, onnx.helper.make_node("Add", [product, constant], [name], name=f"{name}_add")])
        add_constant(result, known, constant, added[name], behind=True)
    return result, known
