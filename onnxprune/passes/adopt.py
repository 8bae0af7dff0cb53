"""Adopt: load a pruned model and its plan in place of pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from onnxprune.channels.plan import Plan
from onnxprune.channels.selection import make_plan, read_plan, removed_atoms
from onnxprune.errors import UsageError, argument
from onnxprune.graph.view import Graph
from onnxprune.io.read import load
from onnxprune.operators.registry import Rule, rule_of
from onnxprune.passes.depth import Shortening
from onnxprune.passes.factorize import Factorize
from onnxprune.passes.flush import flush
from onnxprune.passes.preparation import hold_against_file
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.prune import describe_removal
from onnxprune.passes.workspace import Workspace, synthetic_feeds
from onnxprune.pipeline import UNPRUNED, Context, Model, Pass, PassResult, apply
from onnxprune.pruning.rewriting import CannotRewrite
from onnxprune.report.facts import Exactness, Fact, Factorization, Settings, Sizes
from onnxprune.settings import named_arguments


@named_arguments()
class Adopt(Pass):
    """Load a pruned model: the original pruned by a plan, with the same weights or trained further.

    Args:
        cut: the pruned model: path, bytes or ModelProto.
        plan: a plan or its file.
        approximate: whether channels were removed through normalisations.

    Raises:
        UsageError: the plan is another model's, or does not lead from the original to this pruned model.
        ValidationError: the prepared graph of the pruned model computes other outputs than its file.
    """

    requires = (UNPRUNED,)

    def __init__(
        self, cut: str | Path | bytes | onnx.ModelProto, plan: Plan | str | Path, *, approximate: bool = False
    ) -> None:
        self.cut, self.approximate = cut, approximate
        self.plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan

    @property
    def resized(self) -> Sequence[str]:
        """Inputs and outputs that the plan lists."""
        return self.plan.resize_io

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Return the pruned model in place of the original."""
        if self.plan.experts or self.plan.vocabulary is not None:
            what = "experts" if self.plan.experts else "tokens"
            raise UsageError(
                f"This plan removes {what} as well, and such a model cannot be recovered afterwards",
                hint=f"Prune the original again with {argument('plan')} and {argument('data')}, which recovers it.",
            )
        shown, factors = list[Fact](), list[Fact]()
        if self.plan.branches:
            work = Shortening(context)
            model, shown = work.result(work.of_plan(self.plan), {})
        analysis, selected = read_plan(model.analysis, self.plan)
        removed = removed_atoms(analysis.units, selected)
        with context.stage("compare"):
            loaded = load(self.cut)
            try:
                expected = model.with_parts(cut_model(analysis, removed), analysis=analysis, removed=removed)
            except CannotRewrite as stop:
                raise UsageError(f"The plan cannot be applied to the original: {stop}.") from stop
            if self.plan.factorized:
                expected, factors = self._factorized(context, expected)
            changed, of = check_pair(Graph.of(*expected.parts), Graph.of(loaded.proto, loaded.weights))
        with context.stage("compare"), Workspace.of(analysis, loaded) as trial, trial.blaming():
            # The recovery starts from the function of the file, with subnormal weights as 0.
            start = flush((loaded.proto, dict(loaded.weights)))[0]
            hold_against_file(analysis, trial, start, synthetic_feeds(context, analysis))
        same = "its weights are the original's" if not changed else f"{changed} of its {of} weights were changed"
        proof = Exactness(note=f"came as a file, {same}")
        plan = make_plan(analysis, removed, self.plan.criterion)
        pruned = model.with_parts(
            (loaded.proto, loaded.weights),
            analysis=analysis,
            removed=removed,
            plan=replace(plan, branches=model.plan.branches, factorized=self.plan.factorized),
            as_pruned=expected.as_pruned,
            proof=proof,
            files=(*([loaded.path] if loaded.path else []), *loaded.external),
        )
        settings = Settings({"criterion": self.plan.criterion})
        return PassResult(pruned, [*shown, settings, *describe_removal(context, pruned), *factors, proof])

    def _factorized(self, context: Context, pruned: Model) -> tuple[Model, list[Fact]]:
        """Return the pruned original with the factorized layers of the plan, whose values do not matter here."""
        unseen = replace(context.for_trial(), calibration=None)
        result = apply(Factorize(plan=self.plan, check=False), unseen, pruned)
        product = Exactness(note="factorized layers came as a file")
        factors = [replace(fact, product=product) for fact in result.facts if isinstance(fact, Factorization)]
        return result.model, [*factors, *(fact for fact in result.facts if isinstance(fact, Sizes))]


def check_pair(expected: Graph, actual: Graph) -> tuple[int, int]:
    """Compare a pruned model with the original pruned by the plan; returns differing and all floating weights.

    Weights may have other values. Changes by an earlier recovery are allowed too: a bias where there was none, and
    separate constants for nodes that shared one.

    Raises:
        UsageError: another tensor, shape or operator; the message names the first.
    """
    pairs, added = _check_nodes(expected, actual)
    for name in expected.weights:
        if all(name != own_name for own_name, _ in pairs):  # read by the body of an If, Loop or Scan, or by nobody
            pairs.append((name, name))
    for name, other in pairs:
        weight, actual_weight = expected.weights[name], actual.weights.get(other)
        if actual_weight is None:
            raise _stranger(f"the pruned model has no tensor {name!r}")
        if actual_weight.shape != weight.shape:
            raise _stranger(
                f"tensor {name!r} has shape {list(actual_weight.shape)}, by the plan it has {list(weight.shape)}"
            )
        if actual_weight.dtype != weight.dtype:
            raise _stranger(f"tensor {name!r} holds {actual_weight.dtype}, the original's {weight.dtype}")
    paired = added.union(other for _, other in pairs)
    for name in actual.weights:
        if name not in paired:
            raise _stranger(f"the pruned model has an additional tensor {name!r}")
    return _compare_values(expected, actual, pairs)


def _check_nodes(expected: Graph, actual: Graph) -> tuple[list[tuple[str, str]], set[str]]:
    """Check that nodes have equal operators and inputs; returns pairs of weights and the names of added weights."""
    pairs: dict[tuple[str, str], None] = {}
    added: set[str] = set()
    for node in expected.steps:
        name = next((o for o in node.outputs if o), "")
        other = actual.producer.get(name)
        if other is None:
            raise _stranger(f"the pruned model has no tensor {name!r}")
        same = (other.op, other.domain) == (node.op, node.domain) and len(other.inputs) >= len(node.inputs)
        for own_name, theirs in zip(node.inputs, other.inputs, strict=False):
            apart = own_name in expected.weights and theirs in actual.weights and theirs not in expected.weights
            same &= own_name == theirs or apart or not own_name
            if own_name in expected.weights:
                pairs[own_name, theirs] = None
        if not same:
            raise _stranger(f"tensor {name!r} comes from {other.op}, by the plan from {node.op}")
        own_names = dict(enumerate(node.inputs))
        added.update(n for i, n in enumerate(other.inputs) if n and not own_names.get(i))
    expected_names = {o for node in expected.steps for o in node.outputs}
    for node in actual.steps:
        for name in node.outputs:
            if name and name not in expected_names:
                raise _stranger(f"the pruned model has an additional tensor {name!r}")
    return list(pairs), added & actual.weights.keys()


def _compare_values(expected: Graph, actual: Graph, pairs: Sequence[tuple[str, str]]) -> tuple[int, int]:
    changed: set[str] = set()
    names: set[str] = set()
    for name, other in pairs:
        weight = expected.weights[name]
        same = np.array_equal(weight.read(), actual.weights[other].read())
        if weight.dtype.kind in "fV" or weight.dtype.itemsize == 1 or _is_code(expected, name):
            names.add(name)
            changed.update(() if same else (name,))
        elif not same:
            raise _stranger(f"tensor {name!r} (sizes or indices) differs from its values by the plan")
    return len(changed), len(names)


def _is_code(graph: Graph, name: str) -> bool:
    """Return whether a weight holds codes of numbers, such as the 32 bits of a quantized bias."""
    readers = graph.consumers.get(name, ())
    return any(rule_of(node).decodes or type(rule_of(node)).encode is not Rule.encode for node, _ in readers)


def _stranger(what: str) -> UsageError:
    return UsageError(
        f"The plan does not belong to this pair: {what}.",
        hint=f"Give the plan that was written with this pruned model, its original, and {argument('approximate')} if "
        "it was given then.",
    )
