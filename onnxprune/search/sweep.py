"""Sweep: the best model for every budget of a series, and the Pareto frontier among them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import joblib

from onnxprune.errors import BudgetError, OnnxpruneError
from onnxprune.importance.criteria import Criterion
from onnxprune.passes.flush import flush
from onnxprune.passes.prune import WITHOUT, Prune, with_criterion
from onnxprune.passes.workspace import Workspace, timing_feed
from onnxprune.pipeline import Context, Model, ModelParts
from onnxprune.report.facts import Fidelity, SweepFacts, SweepPoint
from onnxprune.runtime import sessions
from onnxprune.runtime.latency import in_turn
from onnxprune.search.budget import Budget, Scores, Search
from onnxprune.search.evaluation import Evaluation, points_name, points_of_original
from onnxprune.search.latency import rewritable_sizes
from onnxprune.search.problem import Candidate, SearchProblem
from onnxprune.search.spec import BudgetSpec
from onnxprune.search.workers import WorkerRun, in_workers
from onnxprune.targets import Target


@dataclass(frozen=True, slots=True)
class _Row:
    """The result of one budget: its facts, and the model to save; no model where the budget cannot be met."""

    point: SweepPoint
    parts: ModelParts | None = None


def sweep(
    context: Context, budget: Budget, shares: Sequence[float], *, kind: str = "macs", timed: bool = True,
    folder: Path | None = None,
) -> SweepFacts:  # fmt: skip
    """Prune to every share, in ``budget.spec.jobs`` processes; measure times of all models at the end, in turn.

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
    targets = [Target(kind, share) for share in shares]
    run: Callable[[str | Criterion], SweepFacts] = lambda c: _sweep(  # noqa: E731
        context, budget, budget.prune(c), targets, timed=timed, folder=folder
    )
    return with_criterion(context, budget.criterion, run)[0]


def _sweep(
    context: Context, budget: Budget, prune: Prune, targets: Sequence[Target], *, timed: bool, folder: Path | None
) -> SweepFacts:
    metric, kind = budget.spec.metric, targets[0].kind
    search = _search(context, budget.spec, prune, budget.recover)
    analysis, before = search.analysis, search.before
    original = SweepPoint("", sum(x.macs_before for x in analysis.layers), analysis.parameters, analysis.loaded.size)
    original.points, original.cosine = before, 1.0
    facts = SweepFacts(str(analysis.loaded.path or "the model"), points_name(metric), context.device.threads)
    facts.settings = {"criterion": prune.name, "recover": budget.recover, "kind": kind}
    points: dict[int, SweepPoint] = {}
    with context.stage("sweep"), Workspace.of(analysis) as trial:
        files: dict[int, Path] = {}
        rows = _rows(search, search.problem([Target(kind, 1.0)]), targets)
        with context.stages.until_interrupted(lambda: _so_far(points.values(), targets)), closing(rows):
            for number, row in rows:
                if row.parts is not None:
                    files[number] = trial.write(*row.parts, f"sweep{number}")[0]
                    if folder is not None:
                        row.point.file = str(_keep(files[number], folder, trial.original.stem, targets[number].value))
                points[number] = row.point
                if context.stages.interrupted:
                    break
        facts.interrupted = context.stages.interrupted
        facts.points = [original]
        facts.points += [points.get(n) or SweepPoint(str(t), error="interrupted") for n, t in enumerate(targets)]
        if timed:
            feed = timing_feed(context, trial)
            paths = [trial.original, *(files[number] for number in sorted(files))]
            times = in_turn(paths, [feed], context.device, runs=30, budget_s=20.0)
            for point, found_ms in zip((p for p in facts.points if not p.error), times, strict=True):
                point.ms = sorted(found_ms)[len(found_ms) // 2]
    if all(p.error for p in facts.points[1:]):
        raise BudgetError("No budget of the sweep can be met.", hint=facts.points[-1].error)
    mark_pareto(facts.points)
    return facts


# -- rows, here or in workers ------------------------------------------------------------------------------------------


def _search(context: Context, spec: BudgetSpec, prune: Prune, mode: str, before: float | None = None) -> Search:
    """Return the search for the best models, over an analysis of nodes that can all be rewritten.

    Args:
        context: the run.
        spec: the metric and what else is asked for.
        prune: scores units.
        mode: mode of the recovery.
        before: points of the original; None: they are measured.
    """
    analysis = rewritable_sizes(prune.prepared(context, Model.of(context.analysis))).analysis
    before = points_of_original(analysis, spec.metric) if before is None else before
    return Search(context, analysis, spec, prune, mode, before)


def _rows(search: Search, problem: SearchProblem, targets: Sequence[Target]) -> Generator[tuple[int, _Row], None, None]:
    """Iterate over the rows with their numbers, as they are finished; a row does not depend on others.

    Rows follow each other in this process where their models are timed.

    Raises:
        OnnxpruneError: the error of the first row that has one, where it is no budget that cannot be met.
    """
    several = len(targets) > 1 and joblib.effective_n_jobs(search.spec.jobs) > 1
    if several and targets[0].kind != "latency":
        yield from _rows_in_workers(search, problem, targets)
        return
    context = search.context
    for number, target in enumerate(targets):
        search.report_to(lambda fraction, n=number: context.tell("sweep", (n + fraction) / len(targets)))  # type: ignore[misc]
        yield number, _row(search, problem, target)
        context.tell("sweep", (number + 1) / len(targets))


def _row(search: Search, problem: SearchProblem, target: Target) -> _Row:
    """Prune to one budget."""
    search.restart()
    try:
        result = search.within(replace(problem, targets=(target,)), explained=False)
    except BudgetError as error:
        return _Row(SweepPoint(str(target), error=error.message))
    (proto, weights), _ = flush(result.final.model.parts)
    return _Row(_point(target, result.best, result.final), (proto, dict(weights)))


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """One budget of a sweep to prune to in a worker, from scores that are there already."""

    run: WorkerRun
    spec: BudgetSpec
    prune: Prune
    mode: str
    before: float
    scores: Scores
    number: int
    target: Target


def _rows_in_workers(search: Search, problem: SearchProblem, targets: Sequence[Target]) -> Iterator[tuple[int, _Row]]:
    context, num_done = search.context, 0
    run = WorkerRun.of(context, search.analysis)
    # Scores are there, and the device is this machine: neither a function of the user's nor a file of theirs is sent.
    rounding = problem.selector.rounding
    prune = replace(search.prune, criterion=WITHOUT, device=rounding.kernels if rounding else search.prune.device)
    assert search.scores is not None
    task = partial(_Task, run, search.spec, prune, search.mode, search.before, search.scores)
    tasks = [task(number, target) for number, target in enumerate(targets)]
    waiting, errors = set(range(len(tasks))), dict[int, OnnxpruneError]()
    for number, row in in_workers(_finished_row, tasks, search.spec.jobs, ordered=False):
        waiting.remove(number)
        if isinstance(row, OnnxpruneError):
            errors[number] = row
        else:
            yield number, row
            num_done += 1
            context.tell("sweep", num_done / len(tasks))
        first = min(errors, default=None)
        if first is not None and all(other > first for other in waiting):
            raise errors[first]


def _finished_row(task: _Task) -> tuple[int, _Row | OnnxpruneError]:
    """Return a row, or the error that it ends with; runs in a worker."""
    with sessions.custom_ops(task.run.libraries), joblib.parallel_config(backend="sequential"):
        try:
            context = task.run.open()[0].for_trial()
            search = _search(context, task.spec, task.prune, task.mode, task.before)
            problem = search.problem_of(task.scores, [Target(task.target.kind, 1.0)])
            return task.number, _row(search, problem, task.target)
        except OnnxpruneError as error:
            return task.number, error


# -- the table ---------------------------------------------------------------------------------------------------------


def _so_far(points: Collection[SweepPoint], targets: Sequence[Target]) -> str:
    """Describe a sweep that ends early; empty where it has no model yet."""
    models = sum(not point.error for point in points)
    return f"the sweep ended after {len(points)} of {len(targets)} budgets" if models else ""


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
