"""One way to cut, tried: cut, repaired and measured, beside the run that it may become part of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.passes.calls import CalibrationBatches
from onnxprune.passes.factorize import Factorize
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.recover import Recover
from onnxprune.passes.trial import Trial, synthetic_feeds
from onnxprune.pipeline import Context, Model, PassResult, apply
from onnxprune.report.facts import Fact, Fidelity, Recovered, Recovery, Sizes
from onnxprune.runtime.capture import count
from onnxprune.runtime.fidelity import fidelity
from onnxprune.runtime.sessions import Feed
from onnxprune.search.measure import Metric, Quality, measured, of_fidelity
from onnxprune.selection.costs import macs_after

Mask = NDArray[np.bool_]

ENOUGH = 128
"""Samples that tell one way to cut from another."""
JUDGES, _FEWEST_JUDGES = 256, 32


@dataclass(frozen=True, slots=True)
class Attempt:
    """A cut model with what it costs.

    Attributes:
        model: cut and recovered. facts: what passes found on the way. quality: how good it is.
        size, params: as saved. macs: multiply-accumulates.
    """

    model: Model
    facts: Sequence[Fact]
    quality: Quality
    size: int
    params: int
    macs: int

    @property
    def recovery(self) -> Recovered:
        """What the recovery did."""
        return next((fact for fact in self.facts if isinstance(fact, Recovered)), Recovered(Recovery()))


def attempt(
    context: Context,
    analysis: Analysis,
    removed: Mask,
    *,
    mode: str,
    metric: Metric | None = None,
    samples: int | None = None,
    judges: int = JUDGES,
    near: bool = False,
    apart: Factorize | None = None,
) -> Attempt:
    """Cut, repair and measure, without touching the run.

    Args:
        context: the run. analysis: of the original. removed: mask over atoms. mode: how to repair.
        metric: the user's, None for fidelity. samples: how many of the data to repair from, None for all; the
            result is then judged on others, up to ``judges``: where there are few, half is for either. near: repair
            only what reads less.
        apart: what takes layers apart after the cut; its products are checked where all data are used.

    Raises:
        CannotRewrite: a node has no form with the new sizes. UsageError: the metric fails.
        BudgetError: no ranks save as much as they are to. ValidationError: new layers are not what they should be.
    """
    samples = _some(context, analysis, samples)
    own = context.for_trial(samples)
    if apart is not None and samples is not None:
        apart = apart.unchecked()
    result = carried_out(own, analysis, removed, apart)
    facts = list(result.facts)
    macs = next((fact.macs_after for fact in facts if isinstance(fact, Sizes)), None)
    if mode != "none":
        result = apply(Recover(mode, near=near), own, result.model)
        facts += result.facts
    model = result.model
    with Trial.of(analysis) as trial:
        path, size = trial.write(*model.parts, "attempt")
        fidelity_facts = _repaired(facts)
        others = _others(context, analysis, samples, judges)
        if fidelity_facts is None or others:
            feeds = others or _inputs(context, analysis, judges)
            fidelity_facts = fidelity(trial.original, path, feeds, together=not trial.heavy)
        quality = of_fidelity(fidelity_facts)
        if metric is not None:
            points = measured(metric, path)
            quality = Quality(points, points, fidelity_facts)
    return Attempt(
        model, facts, quality, size, model.num_parameters, macs_after(analysis, removed) if macs is None else macs
    )


def carried_out(context: Context, analysis: Analysis, removed: Mask, apart: Factorize | None) -> PassResult:
    """The model cut, and layers taken apart: not repaired.

    Raises:
        CannotRewrite: a node has no form with the new sizes. BudgetError: no ranks save as much as they are to.
    """
    model = Model.of(analysis).with_parts(cut_model(analysis, removed), removed=removed)
    return PassResult(model) if apart is None else apply(apart, context, model)


def _some(context: Context, analysis: Analysis, samples: int | None) -> int | None:
    """So many samples, but no more than half of what there are, if their number is known."""
    if context.calibration is None or samples is None:
        return samples
    total = CalibrationBatches(context, analysis).samples
    return samples if total is None else min(samples, max(1, total // 2))


def _repaired(facts: Sequence[Fact]) -> Fidelity | None:
    """What the repair found on the samples that it had set aside, if there was one."""
    whole = next((fact.whole for fact in facts if isinstance(fact, Recovered)), None)
    if whole is None:
        return None
    return whole.before if whole.undone else whole.after


def _inputs(context: Context, analysis: Analysis, judges: int) -> list[Feed]:
    if context.calibration is None:
        return list(synthetic_feeds(context, analysis))
    return list(_first(CalibrationBatches(context, analysis).batches(), judges))


def _others(context: Context, analysis: Analysis, samples: int | None, judges: int) -> list[Feed]:
    """Samples behind the first so many; none where they are too few to judge by."""
    if samples is None or context.calibration is None:
        return []
    seen, later = 0, []
    for feed in CalibrationBatches(context, analysis).batches():
        if seen >= samples:
            later.append(feed)
        seen += count(feed)
        if seen >= samples + judges:
            break
    return later if sum(map(count, later)) >= _FEWEST_JUDGES else []


def _first(feeds: Iterator[Feed], samples: int) -> Iterator[Feed]:
    seen = 0
    for feed in feeds:
        yield feed
        seen += count(feed)
        if seen >= samples:
            return


def of_original(analysis: Analysis, metric: Metric | None) -> float:
    """The points of the original."""
    if metric is None:
        return 100.0
    with Trial.of(analysis) as trial:
        return measured(metric, trial.copy_of_original())
