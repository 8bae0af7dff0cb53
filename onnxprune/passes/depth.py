"""Depth: remove whole residual branches, chosen by the loss of the outputs, and prove the removal."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import Plan, PlanBranch, check_model
from onnxprune.errors import BudgetError, ModelError, UsageError, argument, nearest
from onnxprune.globs import check_patterns, reason_to_exclude
from onnxprune.graph.view import Graph
from onnxprune.io.read import with_parts
from onnxprune.io.subgraphs import outline_bodies
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.comparing import Pair, calls_of, compare_everywhere, kinds_of, rounding_of
from onnxprune.passes.output_sensitivity import MAX_SAMPLES, spread_about_mean, square_error
from onnxprune.passes.preparation import hold_against_file
from onnxprune.passes.prune import with_layers_of_branches
from onnxprune.passes.workspace import Workspace, synthetic_feeds
from onnxprune.pipeline import UNPRUNED, Context, Model, ModelParts, Pass, PassResult
from onnxprune.pruning.branches import Branch, Branches, masked_branches, without_branches
from onnxprune.report.facts import BranchFacts, Exactness, Fact, Pruned, Settings, Shortened, Sizes
from onnxprune.runtime.capture import count
from onnxprune.runtime.compare import TOLERANCE
from onnxprune.runtime.fidelity import are_probabilities, roots
from onnxprune.runtime.masks import without_padding
from onnxprune.runtime.sessions import Array, Feed, measures, open_session, run
from onnxprune.settings import checked, named_arguments

AUTO = "auto"
# Samples per call of a measurement, branches to measure again before each removal, and seconds of a run: to load a
# model, and per billion multiply-accumulates of a sample.
_CALL, _AGAIN = 8, 4
_OPENED, _RUN = 0.1, 0.03


@named_arguments()
class Depth(Pass):
    """Remove residual branches: f(x) of sums y = x + f(x), one layer or a whole block.

    The branch whose removal changes the outputs on the data least goes first; the others are measured again behind it.

    Args:
        amount: number of branches from 1, or the share of all branches, 0 < share < 1.
        plan: a plan or its file, whose branches are removed instead of choosing.
        keep_cache: keep inputs and outputs of the caches of removed branches, each output then equal to its input.
        include: globs; only branches with a node or weight of such a name may go. Empty: all.
        exclude: globs; no branch with a node or weight of such a name goes. Empty: none is excluded.
        check: prove that the removal is exact.

    Raises:
        UsageError: a value out of range, no data, a pattern that matches nothing, a plan that does not fit.
        BudgetError: there are not so many branches.
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
        keep_cache: bool = False,
        check: bool = True,
    ) -> None:
        self.keep_cache = keep_cache
        self.amount = checked("depth", amount)
        self.plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
        self.include, self.exclude, self.check = tuple(include), tuple(exclude), check

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Choose branches, remove them, prove the removal."""
        with context.stage("depth"):
            work = Shortening(context, self.include, self.exclude, keep_cache=self.keep_cache)
            removed = work.of_plan(self.plan) if self.plan is not None else work.select(self.amount)
            short, facts = work.result(removed, {} if self.plan is not None else {"depth": self.amount})
        if self.check:
            with context.stage("exactness"):
                facts.append(prove_branches(context, removed, short.parts))
        return PassResult(short, facts)


@dataclass(slots=True)
class Shortening:
    """The branches of a model, the loss of the outputs without each, and the model without some.

    Args:
        context: context of the run.
        include, exclude: globs over names.
        keep_cache: whether caches of removed branches stay as inputs and outputs.

    Attributes:
        errors: loss of the outputs when a branch went behind those before it, by tensor.
        alone: loss of the outputs without each branch alone, as far as it was measured.
    """

    context: Context
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    keep_cache: bool = False
    scan: Branches = field(init=False)
    branches: list[Branch] = field(init=False)
    reasons: dict[str, str] = field(init=False)
    errors: dict[str, float] = field(default_factory=dict)
    alone: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        analysis = self.context.analysis
        loaded = analysis.loaded
        self.scan = Branches(Graph.of(loaded.proto, loaded.weights), analysis.facts)
        self.branches, self.reasons = self.scan.find(), self.scan.reasons
        labels = [node.label for node in analysis.graph.nodes]
        ends = [name for branch in self.branches for name in branch.names]
        patterns = [(argument(name), getattr(self, name)) for name in ("include", "exclude")]
        check_patterns(patterns, [*loaded.weights, *analysis.graph.weights, *labels, *ends])

    @property
    def free(self) -> list[Branch]:
        """The branches that patterns let go; ``reasons`` has why others do not."""
        free = []
        for branch in self.branches:
            if reason := reason_to_exclude(branch.names, self.include, self.exclude):
                self.reasons[branch.tensor] = reason
            else:
                free.append(branch)
        return free

    def of_plan(self, plan: Plan) -> list[Branch]:
        """Return the branches that a plan lists.

        Raises:
            UsageError: the plan is another model's, or lists a tensor in which no branch ends.
        """
        check_model(plan.model_sha256, self.context.analysis.loaded.sha256)
        known = {branch.tensor: branch for branch in self.branches}
        for item in plan.branches:
            if item.tensor not in known:
                why = self.reasons.get(item.tensor)
                raise UsageError(
                    f"The plan removes the branch that ends in {item.tensor!r}, which is no branch of this model"
                    f"{f': {why}' if why else ''}.",
                    hint=nearest(item.tensor, known) if known else "The model has no branches.",
                )
        self.keep_cache |= any(item.keep_cache for item in plan.branches)
        return [known[item.tensor] for item in plan.branches]

    def num_to_remove(self, amount: float) -> int:
        """Return the number of branches to remove.

        Raises:
            BudgetError: there are none, or not so many.
        """
        free = self.free
        if not free:
            raise BudgetError("The model has no residual branch that can be removed.", hint=self._why())
        number = amount if isinstance(amount, int) else max(1, round(amount * len(free)))
        if number > len(free):
            raise BudgetError(
                f"{argument('depth', amount)}: the model has {len(free)} branches that can be removed.",
                hint="Give a smaller number, or a share of them such as 0.3.",
            )
        return int(number)

    def _why(self) -> str:
        """Return reasons, for a hint."""
        reasons = [f"{name}: {why}" for name, why in self.reasons.items()][:3]
        if reasons:
            return f"Reasons: {'; '.join(reasons)}."
        return "A branch is an addend that is computed from the other one and holds a layer: f(x) in y = x + f(x)."

    def select(self, amount: float) -> list[Branch]:
        """Return the branches to remove, in the order of their removal; ``errors`` has the cost of each."""
        return list(self.sequence(self.num_to_remove(amount)))

    def sequence(self, number: int) -> Iterator[Branch]:
        """Yield up to so many branches in the order in which they go, each measured behind those before it."""
        measure = self.measure_alone(number + _AGAIN, ahead=_AGAIN * number)
        by_tensor = {branch.tensor: branch for branch in self.free}
        stale, removed = dict(self.alone), list[Branch]()
        while stale and len(removed) < number:
            best = self._next(measure, removed, [by_tensor[name] for name in stale], stale)
            if best is None:
                break
            removed.append(best)
            num_alone = len(self.alone)
            self.context.tell("depth", (num_alone + _AGAIN * len(removed)) / (num_alone + _AGAIN * number))
            yield removed[-1]

    def measure_alone(self, least: int, ahead: int = 0) -> Measure:
        """Measure the loss of the outputs without each branch alone; return the measure for several together.

        Args:
            least: number of branches to measure where the effort allows fewer, those of the most similar sums first.
            ahead: number of measurements that are to follow, for the progress.
        """
        measure = Measure(self.context, self.scan)
        free = self.free
        guesses = measure.cosines(free)
        limit = max(least, int(self.context.effort.seconds / measure.seconds))
        first = sorted(free, key=lambda b: guesses.get(b.tensor, 0.0))[:limit]
        if len(first) < len(free):
            self.context.stages.leave_out(f"measuring {len(free) - len(first)} of {len(free)} branches by their effect")
        for position, branch in enumerate(first):
            with suppress(UsageError):  # nothing else gives the sizes of its cache
                self.alone[branch.tensor] = measure.without([branch])
            self.context.tell("depth", (position + 1) / (len(first) + ahead))
        return measure

    def goes_with(self, branch: Branch, removed: Sequence[Branch]) -> bool:
        """Return whether a branch lies within one that is removed."""
        producer = self.scan.graph.producer[branch.tensor].index
        return any(producer in other.nodes for other in removed)

    def _next(
        self, measure: Measure, removed: Sequence[Branch], others: Sequence[Branch], stale: dict[str, float]
    ) -> Branch | None:
        """Return the branch to remove next: the best of a few, of those that looked best before the last removal."""
        fresh: dict[str, float] = {}
        for branch in sorted(others, key=lambda b: stale[b.tensor]):
            name = branch.tensor
            if self.goes_with(branch, removed):
                del stale[name]
                continue
            if len(fresh) == _AGAIN or any(error <= stale[name] for error in fresh.values()):
                break
            try:
                fresh[name] = measure.without([*removed, branch]) if removed else stale[name]
            except UsageError:  # the other addend of a sum went already, or the last cache would
                del stale[name]
        stale.update(fresh)
        if not fresh:
            return None
        best = min(fresh, key=lambda n: fresh[n])
        self.errors[best] = stale.pop(best)
        return next(branch for branch in others if branch.tensor == best)

    def model(self, removed: Sequence[Branch]) -> Model:
        """Return the model without branches, analysed."""
        context, analysis = self.context, self.context.analysis
        parts = without_branches(self.scan, analysis.loaded.weights, removed, keep_cache=self.keep_cache)
        loaded = with_parts(analysis.loaded, *parts)
        known: dict[str, Any] = {"approximate": analysis.approximate, "resizing": analysis.resizing}
        short = Analysis(loaded, input_shapes=context.input_shapes, **known)
        plan = Plan(loaded.sha256, branches=[PlanBranch(b.tensor, b.sum, self.keep_cache) for b in removed])
        return replace(Model.of(short), plan=plan)

    def others(self, removed: Sequence[Branch] = ()) -> list[BranchFacts]:
        """Return the facts about all branches that stay, with the reasons of those that may not go."""
        names = {branch.tensor for branch in removed}
        branches = [branch for branch in self.branches if branch.tensor not in names]
        facts = [f for f in _facts_of_all(self.scan, branches, self.context.analysis) if f.name not in names]
        return [replace(f, error=self.alone.get(f.name)) for f in facts]

    def result(self, removed: Sequence[Branch], settings: Mapping[str, Any]) -> tuple[Model, list[Fact]]:
        """Return the model without branches and the facts about it."""
        short = self.model(removed)
        original = self.context.analysis
        records = [facts_of(branch, original, self.errors.get(branch.tensor), removed=True) for branch in removed]
        for facts, branch in zip(records, () if self.keep_cache else removed, strict=False):
            facts.cache = [name for cache in branch.caches for name in cache.names]
        records += self.others(removed)
        sizes = Sizes(
            params_before=original.parameters,
            params_after=short.num_parameters,
            macs_before=sum(layer.macs_before for layer in original.layers),
            macs_after=sum(layer.macs_before for layer in short.analysis.layers),
        )
        layers = with_layers_of_branches(original, short, short.analysis.layers)
        return short, [Settings(settings), Shortened(records), Pruned(layers, [], []), sizes]


def residual_branches(analysis: Analysis) -> list[BranchFacts]:
    """Return the facts about every residual branch of a model: those without a reason can be removed."""
    scan = Branches(Graph.of(analysis.loaded.proto, analysis.loaded.weights), analysis.facts)
    branches = scan.find()
    return _facts_of_all(scan, branches, analysis)


def _facts_of_all(scan: Branches, branches: Sequence[Branch], analysis: Analysis) -> list[BranchFacts]:
    """Return the facts about branches that stay, and about addends that are none for a reason, in order of the sums."""
    names = {branch.tensor for branch in branches}
    fixed = [branch for name, branch in scan.fixed.items() if name not in names]
    order = {node.label: node.index for node in scan.graph.nodes}
    ordered = sorted([*branches, *fixed], key=lambda branch: order[branch.sum])
    return [facts_of(b, analysis, None, removed=False, reason=scan.reasons.get(b.tensor, "")) for b in ordered]


def facts_of(
    branch: Branch, analysis: Analysis, error: float | None, *, removed: bool, reason: str = ""
) -> BranchFacts:
    """Return the facts about a branch of a model."""
    macs = sum(layer.macs_before for layer in analysis.layers)
    return BranchFacts(
        branch.tensor,
        branch.sum,
        branch.source,
        list(branch.layers),
        branch.macs,
        branch.params,
        error,
        removed,
        reason,
        macs_share=branch.macs / macs if macs else 0.0,
        params_share=branch.params / analysis.parameters if analysis.parameters else 0.0,
    )


# -- what the outputs lose ---------------------------------------------------------------------------------------------


class Measure:
    """Runs without branches on a few samples.

    Args:
        context: context of the run, with data.
        scan: the branches of the model.
    """

    def __init__(self, context: Context, scan: Branches) -> None:
        self._context, self._scan = context, scan
        self._graph = graph = scan.graph
        batches = CalibrationBatches(context, context.analysis)
        feeds: list[Feed] = []
        for feed in batches.batches(_CALL):
            feeds.append(feed)
            if sum(map(count, feeds)) >= MAX_SAMPLES:
                break
        if not feeds:
            raise UsageError("The data has too few samples for one call of the model.")
        self._feeds = feeds
        self._expected = [self._values(out) for out in self._outputs(graph.proto, self._weights, feeds)]
        scale = {name: spread_about_mean([w[name] for w in self._expected]) for name in self._expected[0]}
        self._scale = {name: value for name, value in scale.items() if value > 0}
        if not self._scale:
            raise UsageError(
                f"{argument('depth')} compares outputs, but the outputs of this model do not vary over the data.",
                hint="Give more, and more varied, samples.",
            )

    @property
    def _weights(self) -> Mapping[str, Any]:
        return self._context.analysis.loaded.weights

    @property
    def seconds(self) -> float:
        """Seconds that a run without a branch takes, about."""
        per_call = sum(layer.macs_before for layer in self._context.analysis.layers)
        return _OPENED + _RUN * per_call * 1e-9 * len(self._feeds)

    def _outputs(self, proto: onnx.ModelProto, weights: Mapping[str, Any], feeds: Sequence[Feed]) -> Iterator[Feed]:
        parts = outline_bodies(proto, weights)
        with Workspace.of(self._context.analysis) as trial, trial.lend(*parts, "short") as model:
            session = open_session(model, spin=False)
            for feed in feeds:
                yield from without_padding(feed, run(session, feed))

    def _values(self, outputs: Feed) -> dict[str, Array]:
        """Return the outputs that are numbers; of class probabilities the square roots."""
        floats = {n: a for n, a in outputs.items() if measures(a.dtype) and a.dtype.kind != "c"}
        return {name: roots(a) if are_probabilities(a) else a for name, a in floats.items()}

    def without(self, removed: Sequence[Branch]) -> float:
        """Return |y' - y|^2 / |y - mean y|^2 without branches, averaged over the outputs.

        Raises:
            UsageError: nothing would be left of a sum.
        """
        parts = without_branches(self._scan, self._weights, removed)
        errors = dict.fromkeys(self._scale, 0.0)
        try:
            for outputs, expected in zip(self._outputs(*parts, self._feeds), self._expected, strict=True):
                values = self._values(outputs)
                for name in errors:
                    if name in values:
                        errors[name] += square_error(values[name], expected[name])
        except ModelError:
            return float("inf")
        absent = {cache.present for branch in removed for cache in branch.caches}
        return float(np.mean([errors[n] / self._scale[n] for n in self._scale if n not in absent]))

    def cosines(self, branches: Sequence[Branch]) -> dict[str, float]:
        """Return 1 - cosine of the sum with the tensor beside the branch, by branch, in one run of the original."""
        shown = [b for b in branches if b.result not in self._graph.inner and b.source not in self._graph.inner]
        proto = onnx.ModelProto()
        proto.CopyFrom(self._graph.proto)
        present = {output.name for output in proto.graph.output}
        tensors = dict.fromkeys(name for b in shown for name in (b.source, b.result))
        inputs = set(self._graph.inputs)
        added = [name for name in tensors if name not in present and name not in inputs]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in added)
        feed = self._feeds[0]
        try:
            outputs = list(self._outputs(proto, self._weights, [feed]))
        except ModelError:
            return {}
        values = [{**i, **o} for i, o in zip(without_padding(feed, feed), outputs, strict=True)]
        pairs = {b.tensor: ([v[b.source] for v in values], [v[b.result] for v in values]) for b in shown}
        return {
            name: 1.0 - _cosine(one, total)
            for name, (one, total) in pairs.items()
            if [v.shape for v in one] == [v.shape for v in total]
        }


def _cosine(one: Sequence[Array], other: Sequence[Array]) -> float:
    """Return the cosine of two tensors in the same parts, 0 where one of them is 0."""
    a, b = (np.concatenate([part.astype(np.float64).ravel() for part in parts]) for parts in (one, other))
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 and np.isfinite(norm) else 0.0


# -- the proof ---------------------------------------------------------------------------------------------------------


def prove_branches(context: Context, removed: Sequence[Branch], short: ModelParts) -> Exactness:
    """Compare the model without branches with the original whose branches are multiplied with 0.

    Both run at the sizes of every probe, and at others where the model leaves sizes open.

    Raises:
        ValidationError: they differ.
    """
    analysis = context.analysis
    loaded = analysis.loaded
    graph = Graph.of(loaded.proto, loaded.weights)
    tensors = [branch.tensor for branch in removed]
    presents = {cache.present for branch in removed for cache in branch.caches}
    masked = outline_bodies(*masked_branches(graph, loaded.weights, tensors, kinds_of(analysis)))
    masked, result = (_without_outputs(*model, presents) for model in (masked, outline_bodies(*short)))
    with Workspace.of(analysis) as trial, trial.blaming():
        if loaded.as_read is not loaded.proto:
            feeds = synthetic_feeds(context, analysis)
            hold_against_file(analysis, trial, (loaded.proto, loaded.weights), feeds)
        pair = Pair(trial, masked, result, kinds_of(analysis), rounding_of(analysis, TOLERANCE))
        return compare_everywhere(pair, calls_of(context, analysis), "The model without branches")


def _without_outputs(proto: onnx.ModelProto, weights: Mapping[str, Any], names: Collection[str]) -> ModelParts:
    """Return a model without some of its outputs: the caches of removed branches."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.output[:]
    copy.graph.output.extend(output for output in proto.graph.output if output.name not in names)
    return copy, weights
