"""Sweep: the best model for every budget of a series, and the Pareto frontier among them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from onnxprune.errors import BudgetError
from onnxprune.importance.criteria import Criterion
from onnxprune.passes.flush import flush
from onnxprune.passes.prune import Prune, with_criterion
from onnxprune.passes.workspace import Workspace, timing_feed
from onnxprune.pipeline import Context, Model
from onnxprune.report.facts import Fidelity, SweepFacts, SweepPoint
from onnxprune.runtime.latency import in_turn
from onnxprune.search.budget import Budget, Search
from onnxprune.search.evaluation import Evaluation, points_name, points_of_original
from onnxprune.search.latency import rewritable_sizes
from onnxprune.search.problem import Candidate
from onnxprune.targets import Target


def sweep(
    context: Context, budget: Budget, shares: Sequence[float], *, kind: str = "macs", timed: bool = True,
    folder: Path | None = None,
) -> SweepFacts:  # fmt: skip
    """Prune to every share in turn; measure times of all models at the end, in turn.

    Args:
        context: the run.
        budget: the pass that prunes to one budget.
        shares: shares of the original's cost.
        kind: kind of that cost.
        timed: measure times.
        folder: folder for the models.

    Raises:
        BudgetError: none of the budgets can be met.
    """
    run: Callable[[str | Criterion], SweepFacts] = lambda c: _sweep(  # noqa: E731
        context, budget, budget.prune(c), shares, kind=kind, timed=timed, folder=folder
    )
    return with_criterion(context, budget.criterion, run)[0]


def _sweep(
    context: Context,
    budget: Budget,
    prune: Prune,
    shares: Sequence[float],
    *,
    kind: str,
    timed: bool,
    folder: Path | None,
) -> SweepFacts:
    analysis = rewritable_sizes(prune.prepared(context, Model.of(context.analysis))).analysis
    metric = budget.spec.metric
    before = points_of_original(analysis, metric)
    search = Search(context, analysis, budget.spec, prune, budget.recover, before)
    original = SweepPoint("", sum(x.macs_before for x in analysis.layers), analysis.parameters, analysis.loaded.size)
    original.points, original.cosine = before, 1.0
    facts = SweepFacts(
        str(analysis.loaded.path or "the model"), points_name(metric), context.device.threads, points=[original]
    )
    facts.settings = {"criterion": prune.name, "recover": budget.recover, "kind": kind}
    with context.stage("sweep"), Workspace.of(analysis) as trial:
        problem = search.problem([Target(kind, 1.0)])
        files = [trial.original]
        targets = [Target(kind, share) for share in shares]
        with context.stages.until_interrupted(lambda: _so_far(facts.points[1:], shares)):
            for number, target in enumerate(targets):
                search.report_to(lambda fraction, n=number: context.tell("sweep", (n + fraction) / len(shares)))  # type: ignore[misc]
                problem = replace(problem, targets=(target,), corrections={})
                try:
                    result = search.within(problem)
                except BudgetError as error:
                    facts.points.append(SweepPoint(str(target), error=error.message))
                    continue
                problem = replace(problem, lead=result.problem.lead)
                point = _point(target, result.best, result.final)
                facts.what = points_name(metric)
                small, _ = flush(result.final.model.parts)
                files.append(trial.write(*small, f"sweep{number}")[0])
                if folder is not None:
                    point.file = str(_keep(files[-1], folder, trial.original.stem, shares[number]))
                facts.points.append(point)
                if context.stages.interrupted:
                    break
        facts.interrupted = context.stages.interrupted
        facts.points += [SweepPoint(str(t), error="interrupted") for t in targets[len(facts.points) - 1 :]]
        if timed:
            feed = timing_feed(context, trial)
            times = in_turn(files, [feed], context.device, runs=30, budget_s=20.0)
            for point, found_ms in zip((p for p in facts.points if not p.error), times, strict=True):
                point.ms = sorted(found_ms)[len(found_ms) // 2]
    if all(p.error for p in facts.points[1:]):
        raise BudgetError("No budget of the sweep can be met.", hint=facts.points[-1].error)
    mark_pareto(facts.points)
    return facts


def _so_far(points: Sequence[SweepPoint], shares: Sequence[float]) -> str:
    """Describe a sweep that ends early; empty where it has no model yet."""
    models = sum(not point.error for point in points)
    return f"the sweep ended after {len(points)} of {len(shares)} budgets" if models else ""


def mark_pareto(points: Sequence[SweepPoint]) -> None:
    """Mark the points of the frontier: of those with as many points or more, none has fewer MACs."""
    valid = [p for p in points if not p.error]
    for point in valid:
        point.best = not any(
            other.points >= point.points
            and other.macs <= point.macs
            and (other.points, other.macs) != (point.points, point.macs)
            for other in valid
        )


def _point(target: Target, candidate: Candidate, final: Evaluation) -> SweepPoint:
    facts: Fidelity | None = final.quality.fidelity
    cosine = 0.0 if facts is None else facts.worst_centred_cosine
    return SweepPoint(
        str(target), final.macs, final.params, final.size, 0.0, final.quality.points, cosine, candidate.name
    )


def _keep(file: Path, folder: Path, stem: str, share: float) -> Path:
    """Copy a model (and its external data) to the user's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{stem}.{share:.3g}.onnx"
    shutil.copyfile(file, target)
    data = file.with_name(file.name + ".data")
    if data.exists():
        shutil.copyfile(data, target.with_name(data.name))
    return target
