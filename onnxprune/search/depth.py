"""How many residual branches go within a budget: a few numbers of them compete, channels make up the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from onnxprune.errors import BudgetError, UsageError, argument
from onnxprune.passes.calibration import TrialSplit
from onnxprune.passes.depth import Shortening, prove_branches
from onnxprune.passes.prune import Prune
from onnxprune.pipeline import Context, Model
from onnxprune.pruning.rewriting import CannotRewrite
from onnxprune.report.facts import AnswerFacts, Fact, Shortened
from onnxprune.search.evaluation import Quality, evaluate, pruned_model
from onnxprune.search.latency import latency_table, rewritable_sizes
from onnxprune.search.problem import SearchProblem
from onnxprune.search.spec import BudgetSpec
from onnxprune.targets import Target

# Shares of what has to be saved that branches take: each a number of branches to try.
_SHARES = (0.25, 0.5, 0.75, 1.0)


def for_fewer_branches(context: Context, spec: BudgetSpec) -> tuple[BudgetSpec, dict[str, float]]:
    """Return a budget that means the same of a model with fewer branches, and costs of the original by kind.

    Shares of the original become amounts, and times are those of the original's nodes.

    Raises:
        UsageError: a share of the peak memory.
    """
    analysis = context.analysis
    known = {
        "macs": float(sum(layer.macs_before for layer in analysis.layers)),
        "params": float(analysis.parameters),
        "size": float(analysis.loaded.size),
    }
    for target in spec.targets:
        if target.kind == "latency":
            sizes = rewritable_sizes(analysis)
            table = latency_table(context, sizes, source=spec.latency_table)
            known["latency"], spec = table.seconds, replace(spec, latency_table=table)
        elif target.kind == "peak-memory" and not target.absolute:
            raise UsageError(
                f"{argument('target')} {target}: with {argument('depth')} a peak memory is no share",
                hint="Give an amount, such as peak-memory=64MB.",
            )
    amounts = (t if t.absolute else Target(t.kind, t.limit(known[t.kind]), absolute=True) for t in spec.targets)
    return replace(spec, targets=tuple(amounts)), known


@dataclass(frozen=True, slots=True)
class ChosenDepth:
    """The model with the number of branches that did best.

    Attributes:
        model: it.
        facts: about its branches.
        answers: the numbers that were compared.
    """

    model: Model
    facts: Sequence[Fact]
    answers: Sequence[AnswerFacts]


def choose_depth(
    context: Context, model: Model, prune: Prune, spec: BudgetSpec, originals: Mapping[str, float], mode: str
) -> ChosenDepth:
    """Compare a few numbers of branches: each model is pruned to the targets, recovered and evaluated on trial samples.

    Args:
        context: the run, with data.
        model: the original.
        prune: scores units.
        spec: the budget, its targets as amounts.
        originals: costs of the original by kind.
        mode: of the recovery.
    """
    request = prune.request
    work = Shortening(context, request.include, request.exclude, by_cost=True)
    names = [0, *_numbers(work, spec.targets, originals)] if work.free else [0]
    removed = list(work.sequence(max(names)))
    tried: list[tuple[int, Quality]] = []
    for position, number in enumerate(names):
        short = work.model(removed[:number]) if number else model
        with suppress(BudgetError, CannotRewrite):
            tried.append((number, _trial(context, short, prune, spec, mode)))
        context.tell("depth", (position + 1) / len(names))
    best = max(tried, key=lambda pair: pair[1].fine)[0] if tried else 0
    words = {0: "no branch removed", 1: "1 branch removed"}
    answers = [AnswerFacts(words.get(n, f"{n} branches removed"), q.fine, q.points, chosen=n == best) for n, q in tried]
    if not best:
        return ChosenDepth(model, _shortened(work), answers)
    short, facts = work.result(removed[:best], {"depth": best})
    return ChosenDepth(short, [*facts, prove_branches(context, removed[:best], short.parts)], answers)


def _shortened(work: Shortening) -> list[Fact]:
    return [Shortened(work.others())]


def _numbers(work: Shortening, targets: Sequence[Target], originals: Mapping[str, float]) -> list[int]:
    """Return the numbers of branches to try: those that save some shares of the required saving."""
    total_macs = max(originals["macs"], 1.0)
    min_saving = max(
        (1 - t.limit(originals[t.kind]) / originals[t.kind] for t in targets if t.kind in originals), default=0.5
    )
    order = sorted((branch.macs / total_macs for branch in work.free), reverse=True)
    numbers = []
    for share in _SHARES:
        saved, number = 0.0, 0
        while number < len(order) and saved + order[number] <= share * min_saving:
            saved, number = saved + order[number], number + 1
        numbers.append(number)
    return sorted({n for n in numbers if n})


def _trial(context: Context, short: Model, prune: Prune, spec: BudgetSpec, mode: str) -> Quality:
    """Return the quality of a model that is pruned to the targets by scores alone.

    Raises:
        BudgetError: the targets are out of reach. CannotRewrite: a node has no form with the new sizes.
    """
    analysis, table = short.analysis, None
    if any(t.kind == "latency" for t in spec.targets):
        sizes = rewritable_sizes(analysis)
        table, analysis = latency_table(context, sizes, source=spec.latency_table), sizes.analysis
    selector = prune.selector(context, analysis)
    problem = SearchProblem.of(context, selector, spec.targets, table, quantize=spec.quantize)
    candidate = next(iter(problem.candidates()), None)
    if candidate is None:
        raise BudgetError("The targets are out of reach with this number of branches.")
    split = TrialSplit(context.effort.trial_samples)
    pruned = pruned_model(analysis, candidate.removed, short.plan.branches)
    return evaluate(context, pruned, mode=mode, metric=spec.metric, split=split).quality
