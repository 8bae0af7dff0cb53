"""Experts: remove whole experts of mixtures, chosen by their outputs, and prove the removal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import Plan, PlanExperts, check_model
from onnxprune.channels.selection import removed_atoms
from onnxprune.errors import BudgetError, Note, UsageError, argument, nearest
from onnxprune.globs import check_patterns, reason_to_exclude
from onnxprune.graph.cost import constant_source
from onnxprune.graph.view import Graph, Node
from onnxprune.io.read import Loaded, with_parts
from onnxprune.io.subgraphs import outline_bodies
from onnxprune.labels.label import Ids, covering
from onnxprune.operators.context import Opened
from onnxprune.operators.registry import rule_of
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.comparing import Pair, calls_of, compare_everywhere, kinds_of, rounding_of
from onnxprune.passes.output_sensitivity import MAX_SAMPLES
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.prune import with_layers_of_branches
from onnxprune.passes.workspace import Workspace
from onnxprune.pipeline import UNPRUNED, Context, Model, ModelParts, Pass, PassResult
from onnxprune.pruning.branches import Branch, Branches, without_branches
from onnxprune.pruning.experts import Mixture, find_mixtures, kept_of, masked_experts
from onnxprune.pruning.rewriting import CannotRewrite
from onnxprune.pruning.vocabulary import Lookup, renumbered_ids
from onnxprune.report.facts import Exactness, ExpertFacts, Fact, Pruned, Remark, Settings, Sizes, WithoutExperts
from onnxprune.runtime.capture import count
from onnxprune.runtime.compare import TOLERANCE
from onnxprune.runtime.masks import without_padding
from onnxprune.runtime.sessions import Array, Feed, open_session, run
from onnxprune.settings import checked, named_arguments

_CALL = 8
_NEVER = -1e4  # a score that half precision has, too


@named_arguments()
class Experts(Pass):
    """Remove experts of every mixture: those that give least on the data.

    An expert's score is the mean over the tokens that it is chosen for of its routing weight times the norm of its
    output (REAP, 2025); where outputs of single experts are no tensors of the graph, the mean routing weight times the
    norm of its weights; without data that norm alone.

    Args:
        amount: number of experts from 1, or the share of each mixture's, 0 < share < 1. As many stay as are chosen.
        plan: a plan whose experts are removed instead of choosing.
        include: globs; only mixtures with a node or weight of such a name lose experts. Empty: all.
        exclude: globs; no mixture with a node or weight of such a name loses any. Empty: none is excluded.
        check: prove that the removal is exact.

    Raises:
        UsageError: a value out of range, a pattern that matches nothing, a plan that does not fit.
        BudgetError: there is no mixture of experts, or none can lose any.
        ValidationError: the removal is not exact.
    """

    requires = (UNPRUNED,)

    def __init__(
        self,
        amount: float = 1,
        *,
        plan: Plan | str | Path | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        check: bool = True,
    ) -> None:
        self.amount = checked("experts", amount)
        self.plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
        self.include, self.exclude, self.check = tuple(include), tuple(exclude), check

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Choose experts, remove them, prove the removal."""
        with context.stage("experts"):
            work = _Work.of(context, model.analysis, self.include, self.exclude)
            removed = work.of_plan(self.plan) if self.plan is not None else work.of_scores(self.amount)
            parts = work.cut(removed)
            small, facts = work.result(model, removed, parts)
            if self.plan is None:
                facts.append(Settings({"experts": self.amount}))
        if self.check:
            with context.stage("exactness"):
                facts.append(_proof(context, model.analysis, work, removed, parts))
        return PassResult(small, facts)


Removed = list[tuple[Mixture, list[int]]]


@dataclass(slots=True)
class _Work:
    """The mixtures of a model, how their experts can go, and the model without some.

    Attributes:
        graph: view of the model.
        analysis: analysis in which choices may lose positions.
        mixtures: those whose experts can go.
        reasons: why others cannot, by name, or why fewer go than asked.
        unsliced: names of mixtures whose scores keep their size: those of removed experts are minus infinity.
        scores: of experts, by name of the mixture.
    """

    context: Context
    original: Analysis
    graph: Graph
    analysis: Analysis
    mixtures: list[Mixture] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    unsliced: set[str] = field(default_factory=set)
    scores: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, context: Context, original: Analysis, include: Sequence[str], exclude: Sequence[str]) -> _Work:
        """Find the mixtures; raises UsageError for a pattern that matches nothing, BudgetError where there is none."""
        loaded = original.loaded
        graph = Graph.of(loaded.proto, loaded.weights)
        mixtures = find_mixtures(graph, original.facts)
        work = cls(context, original, graph, _opened(context, loaded, [m.opened for m in mixtures]))
        for mixture in mixtures:
            work._judge(mixture)
        names = [name for m in work.mixtures for name in work.names_of(m)]
        patterns = [(argument("include"), include), (argument("exclude"), exclude)]
        check_patterns(
            patterns, [*loaded.weights, *original.graph.weights, *(n.label for n in original.graph.nodes), *names]
        )
        work._filter(include, exclude)
        if not work.mixtures:
            reasons = [f"{name}: {why}" for name, why in work.reasons.items()][:3]
            none = "A mixture is a TopK or ArgMax over a router's scores and the experts chosen by it, or MoE or QMoE."
            hint = f"Reasons: {'; '.join(reasons)}." if reasons else none
            raise BudgetError("No expert was found that can be removed.", hint=hint)
        return work

    def _judge(self, mixture: Mixture) -> None:
        """Record whether the experts of a mixture can be removed, and how; other choices are left out."""
        components, why = self._components(mixture)
        if mixture.are_terms:
            if components is None:
                self.unsliced.add(mixture.name)
            self.mixtures.append(mixture)
        elif self._is_fused(mixture) or (components is not None and self._stacks(components)):
            if components is None:
                self.reasons[mixture.name] = why
            else:
                self.mixtures.append(mixture)
        elif mixture.terms or mixture.readers:
            self.reasons[mixture.name] = why or "its experts are not separate in the graph"

    @staticmethod
    def _is_fused(mixture: Mixture) -> bool:
        return not mixture.ids

    def _components(self, mixture: Mixture) -> tuple[Ids | None, str]:
        """Return the units along the axis of the experts; None, and the reason, where they cannot go one by one."""
        several, tied = "its scores are not those of one layer", "several of its experts go together"
        return self.analysis.single_units(mixture.scores, mixture.axis, several, tied)

    def _stacks(self, components: Ids) -> list[tuple[str, int]]:
        """Return the weights that hold a matrix per expert, with the axis of the experts."""
        result, units = [], self.analysis.units
        for name, labels in self.analysis.table.items().items():
            if name in self.analysis.graph.weights and len(self.analysis.graph.weights[name].shape) > 2:
                for label in labels:
                    ids = units.component[label.ids.ravel()]
                    if not label.is_grid and ids.size == components.size and (ids == components).all():
                        result.append((name, label.pack))
        return result

    def names_of(self, mixture: Mixture) -> list[str]:
        """Return the names that patterns match: the choice, the router and its weights, the layers and weights."""
        nodes = [self.graph.producer[mixture.choice], self.graph.producer.get(mixture.chain[-1])]
        weights = [n for node in nodes if node is not None for n in node.inputs if n in self.graph.weights]
        labels = [node.label for node in nodes if node is not None]
        components, _ = self._components(mixture)
        stacks = [] if components is None else [name for name, _ in self._stacks(components)]
        return [*labels, mixture.choice, *weights, *stacks, *mixture.layers, *chain(*mixture.weights.values())]

    def _filter(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        """Remove mixtures that patterns exclude, and note why."""
        for mixture in list(self.mixtures):
            if reason := reason_to_exclude(self.names_of(mixture), include, exclude):
                self.reasons[mixture.name] = reason
                self.mixtures.remove(mixture)

    def of_plan(self, plan: Plan) -> Removed:
        """Return the experts that a plan lists; raises UsageError where they are none of this model's."""
        check_model(plan.model_sha256, self.context.origin.loaded.sha256)
        known = {m.choice: m for m in self.mixtures}
        removed: Removed = []
        for item in plan.experts:
            mixture = known.get(item.choice)
            if mixture is None:
                raise UsageError(
                    f"The plan removes experts of {item.choice!r}, which is no choice among experts of this model.",
                    hint=nearest(item.choice, known),
                )
            experts = sorted(set(item.removed))
            if not all(0 <= e < mixture.size for e in experts) or len(experts) > mixture.size - mixture.top_k:
                raise UsageError(
                    f"The plan removes the experts {experts} of {item.choice!r}, which has {mixture.size} and chooses "
                    f"{mixture.top_k}.",
                    hint="Remove fewer, with numbers from 0.",
                )
            removed.append((mixture, experts))
        return removed

    def of_scores(self, amount: float) -> Removed:
        """Return the experts of the least score.

        Raises:
            BudgetError: no mixture has more experts than it chooses.
        """
        removed: Removed = []
        scores = _Scores(self)
        for number, mixture in enumerate(self.mixtures):
            count = amount if isinstance(amount, int) else round(amount * mixture.size)
            max_count = mixture.size - mixture.top_k
            if count > max_count:
                what = f"{mixture.top_k} of {mixture.size} are chosen for every token"
                self.reasons[mixture.name] = f"not more than {max_count}: {what}"
                text = f"{argument('experts', amount)}: {mixture.name} loses {max_count}, since {what}"
                self.notes.append(Note(text))
            values = scores.of(mixture)
            self.scores[mixture.name] = values
            order = np.argsort(values, kind="stable")[: min(count, max_count)]
            removed.append((mixture, sorted(int(e) for e in order)))
            self.context.tell("experts", (number + 1) / len(self.mixtures))
        if not any(experts for _, experts in removed):
            raise BudgetError(
                f"{argument('experts', amount)} removes no expert: the mixtures have "
                f"{', '.join(str(m.size) for m in self.mixtures[:4])} of them.",
                hint="Give a larger share, or a number.",
            )
        return [(mixture, experts) for mixture, experts in removed if experts]

    def cut(self, removed: Removed) -> ModelParts:
        """Return the model without experts; raises BudgetError where a node has no form without them."""
        context, loaded = self.context, self.original.loaded
        parts: ModelParts = loaded.proto, loaded.weights
        lost_terms = [t.tensor for m, experts in removed for t in m.terms if m.are_terms and t.expert in experts]
        for node in self.graph.steps if lost_terms else ():  # a sum of removed experts alone is a removed term, too
            if rule_of(node).factors(node):
                continue
            addends = [node.inputs[i] for i in rule_of(node).addends(node) if i < len(node.inputs)]
            lost_terms += [rule_of(node).total(node)] if addends and set(addends) <= set(lost_terms) else []
        if lost_terms:
            scan = Branches(self.graph, self.original.facts)
            stubs = [Branch(name, "", "", "", frozenset(), (), (), 0, 0) for name in lost_terms]
            parts = without_branches(scan, loaded.weights, stubs)
        facts = self.original.facts
        masked = [(m, experts) for m, experts in removed if m.name in self.unsliced]
        if masked:
            parts = masked_experts(parts, facts, masked)
        sliced = [(m, experts) for m, experts in removed if m.name not in self.unsliced]
        if not sliced:
            return parts
        base = with_parts(loaded, *parts) if lost_terms or masked else loaded
        opened = _opened(context, base, [m.opened for m, _ in sliced])
        units = opened.units
        lost = np.zeros(units.frozen.size, bool)
        for mixture, experts in sliced:
            label = covering(opened.table.get(mixture.scores), mixture.axis)
            assert label is not None
            lost[units.component[label.ids.ravel()[experts]]] = True
        try:
            parts = cut_model(opened, removed_atoms(units, lost))
        except CannotRewrite as stop:
            raise BudgetError(f"Experts cannot be removed: {stop}.") from stop
        for mixture, experts in sliced:
            if mixture.ids:
                picks = [
                    Lookup(r.output, r.index, r.table, r.name, frozenset(), 0, frozenset()) for r in mixture.readers
                ]
                kept_experts = kept_of(mixture, experts)
                parts = renumbered_ids(
                    (parts[0], dict(parts[1])), picks, [mixture.ids], facts, kept_experts, mixture.size
                )
        return parts

    def result(self, model: Model, removed: Removed, parts: ModelParts) -> tuple[Model, list[Fact]]:
        """Return the model without experts, analysed, and the facts about it."""
        context, original = self.context, self.context.analysis
        loaded = with_parts(self.original.loaded, *parts)
        settings: dict[str, Any] = {"approximate": self.original.approximate, "resizing": self.original.resizing}
        short = Analysis(loaded, input_shapes=context.input_shapes, **settings)
        entries = [PlanExperts(m.choice, experts) for m, experts in removed]
        plan = replace(model.plan, model_sha256=loaded.sha256, experts=entries)
        small = replace(Model.of(short), plan=plan)
        lost = self.original.parameters - short.parameters
        by_name = {m.name: experts for m, experts in removed}
        facts = [
            ExpertFacts(
                m.name,
                m.size,
                m.top_k,
                by_name.get(m.name, []),
                self.scores.get(m.name, []),
                reason=self.reasons.get(m.name, ""),
            )
            for m in self.mixtures
        ]
        num_removed = sum(len(one.removed) for one in facts)
        for one in facts:
            one.params = round(lost * len(one.removed) / max(num_removed, 1))
        facts += [ExpertFacts(name, 0, 0, reason=why) for name, why in self.reasons.items() if name not in by_name]
        listed = list({one.name: one for one in reversed(facts)}.values())[::-1]
        layers = with_layers_of_branches(original, small, short.layers)
        sizes = Sizes(
            params_before=original.parameters,
            params_after=small.num_parameters,
            macs_before=sum(layer.macs_before for layer in original.layers),
            macs_after=sum(layer.macs_before for layer in short.layers),
        )
        return small, [WithoutExperts(listed), Pruned(layers, [], []), sizes, *map(Remark, self.notes)]


def _opened(context: Context, loaded: Loaded, opened: Sequence[Opened]) -> Analysis:
    """Return the analysis of a model in which choices among experts may lose positions."""

    def join(one: Opened, other: Opened) -> Opened:
        return Opened(
            lookups=one.lookups | other.lookups, choices=one.choices | other.choices, tied=(*one.tied, *other.tied)
        )

    return Analysis(loaded, input_shapes=context.input_shapes, opened=reduce(join, opened, Opened()))


# -- what an expert gives ----------------------------------------------------------------------------------------------


class _Scores:
    """Scores of experts: one run of the original on a few samples gives the statistics of every mixture."""

    def __init__(self, work: _Work) -> None:
        self._work, self._graph = work, work.graph
        self._feeds: list[Feed] = []
        if work.context.calibration is not None:
            for feed in CalibrationBatches(work.context, work.original).batches(_CALL):
                self._feeds.append(feed)
                if sum(map(count, self._feeds)) >= MAX_SAMPLES:
                    break

    def of(self, mixture: Mixture) -> list[float]:
        """Return the score of every expert of a mixture."""
        norms = self._norms(mixture)
        if not self._feeds:
            return _listed(norms)
        if mixture.are_terms:
            return self._of_terms(mixture)
        captured = self._captured([mixture.scores, *self._tokens(mixture)])
        if not captured:
            return _listed(norms)
        shares = [self._shares(mixture, feed[mixture.scores]) for feed in captured]
        outputs = self._outputs(mixture, captured) if not mixture.ids else None
        if outputs is None:
            return _listed(np.mean(np.concatenate(shares), axis=0) * norms)
        total, uses = np.zeros(mixture.size), np.zeros(mixture.size)
        for share, norm in zip(shares, outputs, strict=True):
            total += (share * norm).sum(axis=0)
            uses += (share > 0).sum(axis=0)
        return _listed(total / np.maximum(uses, 1))

    def _captured(self, names: Sequence[str]) -> list[Feed]:
        """Return some tensors of the original, per call and without padding."""
        loaded = self._work.original.loaded
        proto = onnx.ModelProto()
        proto.CopyFrom(loaded.proto)
        present = {output.name for output in proto.graph.output} | set(self._graph.inputs)
        if not self._graph.inner.isdisjoint(names):
            return []
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
        parts = outline_bodies(proto, loaded.weights)
        with Workspace.of(self._work.original) as trial, trial.lend(*parts, "captured") as model:
            session = open_session(model, spin=False)
            values = [(feed, {**feed, **run(session, feed)}) for feed in self._feeds]
            return [part for feed, tensors in values for part in without_padding(feed, tensors)]

    def _of_terms(self, mixture: Mixture) -> list[float]:
        """Return the mean norm of every expert's addend, over the tokens that it adds anything to."""
        names = {term.tensor: term.expert for term in mixture.terms}
        total, uses = np.zeros(mixture.size), np.zeros(mixture.size)
        for feed in self._captured(list(names)):
            for name, expert in names.items():
                value = np.asarray(feed[name], np.float64)
                rows = np.linalg.norm(value.reshape(-1, value.shape[-1]), axis=1)
                total[expert] += rows.sum()
                uses[expert] += (rows > 0).sum()
        if not uses.any():
            return _listed(self._norms(mixture))
        return _listed(total / np.maximum(uses, 1))

    def _tokens(self, mixture: Mixture) -> list[str]:
        return [] if mixture.ids else [self._graph.producer[mixture.choice].inputs[0]]

    def _shares(self, mixture: Mixture, scores: Array) -> Array:
        """Return routing weights of the chosen experts, 0 of others, [tokens, experts]."""
        values = np.moveaxis(np.asarray(scores, np.float64), mixture.axis, -1).reshape(-1, mixture.size)
        if (values < 0).any() or (values > 1).any():
            values = np.exp(values - values.max(axis=1, keepdims=True))
            values /= values.sum(axis=1, keepdims=True)
        least = np.sort(values, axis=1)[:, -mixture.top_k]
        return np.where(values >= least[:, None], values, 0.0)

    def _outputs(self, mixture: Mixture, captured: Sequence[Feed]) -> list[Array] | None:
        """Return norms of every expert's output for all tokens, per call; None where the node reads computed weights.

        The node runs by itself, with scores by which one expert is chosen.
        """
        node = self._graph.producer[mixture.choice]
        names = [n for n in node.inputs[2:] if n]
        if any(name not in self._graph.weights for name in names):
            return None
        session = open_session(_alone(node, self._graph, kinds_of(self._work.original)), spin=False)
        result = []
        for feed in captured:
            tokens, scores = feed[node.inputs[0]], feed[mixture.scores]
            norms = np.zeros((scores.shape[0], mixture.size))
            for expert in range(mixture.size):
                only = np.full(scores.shape, _NEVER, scores.dtype)
                only[:, expert] = 0
                output = run(session, {"tokens": tokens, "scores": only})["output"]
                norms[:, expert] = np.linalg.norm(output.astype(np.float64).reshape(scores.shape[0], -1), axis=1)
            result.append(norms)
        return result

    def _norms(self, mixture: Mixture) -> Array:
        """Return the norm of all weights of every expert."""
        squares = np.zeros(mixture.size)
        for expert, names in mixture.weights.items():
            squares[expert] = sum(float((self._read(name) ** 2).sum()) for name in names)
        components, _ = self._work._components(mixture)
        for name, axis in [] if components is None else self._work._stacks(components):
            values = np.moveaxis(self._read(name), axis, 0)
            squares += (values.reshape(mixture.size, -1) ** 2).sum(axis=1)
        return np.asarray(np.sqrt(squares))

    def _read(self, name: str) -> Array:
        """Return a weight as numbers: codes are dequantised where their operator can."""
        graph = self._work.analysis.graph
        value = graph.weights[name].read()
        for node, i in graph.consumers.get(name, ()):
            inputs = node.inputs

            def read(j: int, inputs: Sequence[str] = inputs) -> Array | None:
                source = constant_source(graph, inputs[j]) if j < len(inputs) and inputs[j] else None
                return None if source is None else graph.weights[source].read()

            numbers = rule_of(node).numbers(node, i, value, read) if value.dtype.kind in "iu" else None
            if numbers is not None:
                return np.asarray(numbers, np.float64)
        return np.asarray(value, np.float64)


def _listed(values: Array) -> list[float]:
    return [float(value) for value in values]


def _alone(node: Node, graph: Graph, kinds: Mapping[str, int]) -> bytes:
    """Return a MoE operator as a model of tokens and scores that chooses one expert."""
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    proto.input[0], proto.input[1] = "tokens", "scores"
    del proto.output[:]
    proto.output.append("output")
    for k in reversed(range(len(proto.attribute))):
        if proto.attribute[k].name in ("k", "use_sparse_mixer"):
            del proto.attribute[k]
    proto.attribute.append(onnx.helper.make_attribute("k", 1))
    kind = [kinds.get(name, onnx.TensorProto.FLOAT) for name in node.inputs[:2]]
    values = [onnx.helper.make_tensor_value_info(n, k, None) for n, k in zip(("tokens", "scores"), kind, strict=True)]
    output = onnx.helper.make_tensor_value_info("output", kind[0], None)
    model = onnx.helper.make_model(onnx.helper.make_graph([proto], "alone", values, [output]))
    del model.opset_import[:]
    model.opset_import.extend(graph.proto.opset_import)
    model.ir_version = max(graph.proto.ir_version, 4)
    weights = {name: graph.weights[name] for name in proto.input[2:] if name}
    for name, weight in weights.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight.read(), name))
    return bytes(model.SerializeToString())


# -- the proof ---------------------------------------------------------------------------------------------------------


def _proof(context: Context, analysis: Analysis, work: _Work, removed: Removed, parts: ModelParts) -> Exactness:
    """Compare with the original whose scores of removed experts are minus infinity, in front of every choice.

    Raises:
        ValidationError: they differ.
    """
    loaded = analysis.loaded
    choices: list[tuple[Mixture, Collection[int]]] = [(m, experts) for m, experts in removed]
    reference = masked_experts((loaded.proto, loaded.weights), analysis.facts, choices)
    with Workspace.of(analysis) as trial, trial.blaming():
        models = outline_bodies(*reference), outline_bodies(*parts)
        pair = Pair(trial, *models, kinds_of(analysis), rounding_of(analysis, TOLERANCE))
        return compare_everywhere(pair, calls_of(context, analysis), "The model without experts")
