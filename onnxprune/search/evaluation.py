"""Evaluation of candidates: prune, factorize, recover, and measure the quality of the model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.selection import macs_after
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import Plan, PlanBranch
from onnxprune.errors import UsageError, argument
from onnxprune.passes.calibration import TrialSplit
from onnxprune.passes.factorize import Factorize
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.recover import Recover, noise
from onnxprune.passes.workspace import Workspace, synthetic_feeds
from onnxprune.pipeline import Context, Model, PassResult, Progress, apply
from onnxprune.plugins import in_words, is_interrupt, load_function
from onnxprune.report.facts import Fact, Fidelity, Recovered, Recovery, Sizes
from onnxprune.runtime.fidelity import fidelity, hints_of
from onnxprune.runtime.sessions import Feed

Mask = NDArray[np.bool_]


# -- quality -----------------------------------------------------------------------------------------------------------

Metric = Callable[[str], float]


@dataclass(frozen=True, slots=True)
class Quality:
    """A model's quality.

    Attributes:
        points: the unit of ``--max-drop``: the metric, or points of fidelity.
        fine: the value that candidates are compared by; higher is better.
        fidelity: to the original, where it was measured.
    """

    points: float
    fine: float
    fidelity: Fidelity | None = None


def _of_fidelity(facts: Fidelity) -> Quality:
    """Return the quality without a metric: points are those of the worst answer, ``fine`` is the distance of all."""
    points = math.nan if facts.points is None else facts.points
    distances = [answer.distance for answer in facts.answers] or [noise(facts)]
    return Quality(points, -sum(distances) / len(distances), facts)


def points_name(metric: Metric | None) -> str:
    """Return the name of the points."""
    if metric is not None:
        return str(getattr(metric, "label", getattr(metric, "__name__", "metric")))
    return "points of fidelity"


def measure_metric(metric: Metric, path: Path) -> float:
    """Return the metric of a model file, which the metric may change or delete: no other code may need the file later.

    Raises:
        UsageError: the metric raises, or returns no finite number.
    """
    label = getattr(metric, "label", getattr(metric, "__name__", "metric"))
    folder = Path.cwd()
    try:
        value = metric(str(path))
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise UsageError(
            f"The metric {label} failed: {in_words(error)}",
            hint="Write a function from the path of a model to a number, higher is better.",
        ) from error
    finally:
        os.chdir(folder)  # paths of outputs are relative to it
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UsageError(
            f"The metric {label} returned a {type(value).__name__}, expected a number.",
            hint="Write a function from the path of a model to a number, higher is better.",
        ) from None
    if not math.isfinite(number):
        raise UsageError(f"The metric {label} returned {number}.", hint="Return a finite number for every model.")
    return number


def load_metric(text: str) -> Metric:
    """Load the function that ``script.py:function`` names.

    Raises:
        UsageError: no such file or function, or a file that does not run.
    """
    hint = "Give script.py:function, a function from the path of a model to a number, higher is better."
    function = load_function(text, argument("metric"), hint)
    return ScriptMetric(function, text)


@dataclass(frozen=True, slots=True)
class ScriptMetric:
    """A metric with the name that the user gave it."""

    function: Metric
    label: str

    def __call__(self, path: str) -> float:
        """Return the metric of a model file."""
        return self.function(path)

    def __reduce__(self) -> tuple[Callable[[str], Metric], tuple[str]]:
        """Return the name alone: workers load the script themselves."""
        return load_metric, (self.label,)


# -- evaluation --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A pruned and recovered model, and its costs.

    Attributes:
        model: the model, ready to be saved.
        facts: the facts of all passes.
        quality: its quality.
        size, params: bytes of the saved file, and elements of its weights.
        macs: multiply-accumulates.
    """

    model: Model
    facts: Sequence[Fact]
    quality: Quality
    size: int
    params: int
    macs: int

    @property
    def recovery(self) -> Recovered:
        """Return the facts of the recovery."""
        return next((fact for fact in self.facts if isinstance(fact, Recovered)), Recovered(Recovery()))


def evaluate(
    context: Context,
    pruned: Model,
    *,
    mode: str,
    metric: Metric | None = None,
    split: TrialSplit | None = None,
    near: bool = False,
    factorize: Factorize | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Factorize, recover and measure a pruned model, without changing the run.

    Args:
        context: the run.
        pruned: the model, see :func:`pruned_model`.
        mode: of the recovery.
        metric: the user's, None for fidelity.
        split: samples to recover from and to measure on; None for all, measured on the recovery's hold-out.
        near: recover only the layers whose inputs were pruned.
        factorize: the pass to run after pruning; its products are checked where all data are used.
        progress: callback for the stages of the recovery.

    Raises:
        ModelError: the model cannot be run. UsageError: the metric fails.
        BudgetError: no ranks save as much as they are to.
        ValidationError: new layers differ from their reference.
    """
    analysis = pruned.analysis
    num_fit = None if split is None else split.num_fit(context, analysis)
    trial_context = context.for_trial(num_fit, progress)
    if factorize is not None and split is not None:
        factorize = factorize.unchecked()
    result = PassResult(pruned) if factorize is None else apply(factorize, trial_context, pruned)
    facts, macs = list(result.facts), _macs(result, pruned)
    if mode != "none":
        result = apply(Recover(mode, near=near), trial_context, result.model)
        facts += result.facts
    model = result.model
    with Workspace.of(context.analysis) as trial:
        path, size = trial.write(*model.parts, "candidate")
        inputs = [] if split is None else split.validation(context, analysis)
        quality = _of_fidelity(_recovered_fidelity(facts, inputs) or _fidelity(context, trial, path, inputs))
        if metric is not None:
            points = measure_metric(metric, path)
            quality = Quality(points, points, quality.fidelity)
    return Evaluation(model, facts, quality, size, model.num_parameters, macs)


def unseen(context: Context, pruned: Model, factorize: Factorize | None = None) -> Evaluation:
    """Return a pruned model that onnxruntime cannot run, factorized where requested, without its quality."""
    trial_context = context.for_trial(None, None)
    result = PassResult(pruned) if factorize is None else apply(factorize.unchecked(), trial_context, pruned)
    with Workspace.of(context.analysis) as trial:
        _, size = trial.write(*result.model.parts, "candidate")
    quality, macs = Quality(math.nan, 0.0), _macs(result, pruned)
    return Evaluation(result.model, list(result.facts), quality, size, result.model.num_parameters, macs)


def _macs(result: PassResult, pruned: Model) -> int:
    """Return the multiply-accumulates of a model behind a factorization, or without one."""
    counts = (fact.macs_after for fact in result.facts if isinstance(fact, Sizes))
    return next((n for n in counts if n is not None), macs_after(pruned.analysis, pruned.removal))


def pruned_model(analysis: Analysis, removed: Mask, branches: Sequence[PlanBranch] = ()) -> Model:
    """Return a model without some channels, not recovered.

    Args:
        analysis: of the original, or of the original without some branches.
        removed: mask over atoms.
        branches: residual branches that the analysed model lacks.

    Raises:
        CannotRewrite: a node has no form with the new sizes.
    """
    plan = Plan(branches=list(branches))
    return Model.of(analysis).with_parts(cut_model(analysis, removed), removed=removed, plan=plan)


def _recovered_fidelity(facts: Sequence[Fact], inputs: Sequence[Feed]) -> Fidelity | None:
    """Return the fidelity on the recovery's hold-out; None without one, or with other inputs to measure on."""
    fidelity = next((fact.recovery for fact in facts if isinstance(fact, Recovered)), None)
    if fidelity is None or inputs:
        return None
    return fidelity.before if fidelity.undone else fidelity.after


def _fidelity(context: Context, trial: Workspace, path: Path, inputs: Sequence[Feed]) -> Fidelity:
    """Return the fidelity on these inputs, else on the first calibration samples."""
    feeds = inputs or (TrialSplit().first(context, trial.analysis) if context.calibration is not None else [])
    feeds = feeds or synthetic_feeds(context, trial.analysis)
    return fidelity(
        trial.original,
        path,
        feeds,
        hints=hints_of(trial.analysis),
        outputs=context.outputs,
        together=not trial.heavy,
        known=None if trial.drawing else context.known,
    )


def points_of_original(analysis: Analysis, metric: Metric | None) -> float:
    """Return the points of the original: the metric, 100 without one."""
    if metric is None:
        return 100.0
    with Workspace.of(analysis) as trial:
        return measure_metric(metric, trial.copy_of_original())
