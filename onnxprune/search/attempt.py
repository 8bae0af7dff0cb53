"""One way to cut, tried: cut, repaired and measured, beside the run that it may become part of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.passes.calls import Calls
from onnxprune.passes.factorize import Factorize
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.recover import Recover
from onnxprune.passes.state import State
from onnxprune.passes.trial import Trial, synthetic_feeds
from onnxprune.report.facts import Fidelity
from onnxprune.runtime.capture import count
from onnxprune.runtime.fidelity import fidelity
from onnxprune.runtime.sessions import Feed
from onnxprune.search.measure import Metric, Quality, measured, of_fidelity
from onnxprune.selection.costs import macs_after

Mask = NDArray[np.bool_]

ENOUGH = 128
"""Samples that tell one way to cut from another."""
JUDGES, _FEWEST_JUDGES = 256, 32


@dataclass(slots=True)
class Attempt:
    """A cut model with what it costs.

    Attributes:
        state: a run of its own, with the cut and repaired model. quality: how good it is. size, params: as saved.
        macs: multiply-accumulates.
    """

    state: State
    quality: Quality
    size: int
    params: int
    macs: int


def attempt(
    state: State,
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
        removed: mask over atoms. mode: how to repair. samples: how many of the data to repair from, None for all; the
            result is then judged on others, up to ``judges``: where there are few, half is for either. near: repair
            only what reads less.
        apart: what takes layers apart after the cut; its products are checked where all data are used.

    Raises:
        CannotRewrite: a node has no form with the new sizes. UsageError: the metric fails.
        BudgetError: no ranks save as much as they are to. ValidationError: new layers are not what they should be.
    """
    samples = _some(state, analysis, samples)
    if apart is not None and samples is not None:
        apart = apart.unchecked()
    own = carried_out(state, analysis, removed, samples, apart)
    if mode != "none":
        Recover(mode, near=near)(own)
    assert own.proto is not None
    with Trial.of(analysis) as trial:
        path, size = trial.write(own.proto, own.weights, "attempt")
        facts = _repaired(own)
        others = _others(state, analysis, samples, judges)
        if facts is None or others:
            feeds = others or _inputs(state, analysis, judges)
            facts = fidelity(trial.original, path, feeds, together=not trial.heavy)
        quality = of_fidelity(facts)
        if metric is not None:
            points = measured(metric, path)
            quality = Quality(points, points, facts)
    params = sum(int(np.prod(w.shape)) for w in own.weights.values())
    macs = own.report.totals.macs_after if apart is not None else macs_after(analysis, removed)
    return Attempt(own, quality, size, params, macs)


def carried_out(state: State, analysis: Analysis, removed: Mask, samples: int | None, apart: Factorize | None) -> State:
    """A run of its own with the model cut, and layers taken apart: not repaired.

    Raises:
        CannotRewrite: a node has no form with the new sizes. BudgetError: no ranks save as much as they are to.
    """
    own = state.branch(*cut_model(analysis, removed), removed, samples)
    if apart is not None:
        apart(own)
    return own


def _some(state: State, analysis: Analysis, samples: int | None) -> int | None:
    """So many samples, but no more than half of what there are, if their number is known."""
    held = None if state.data is None or samples is None else Calls(state, analysis).samples
    return samples if samples is None or held is None else min(samples, max(1, held // 2))


def _repaired(own: State) -> Fidelity | None:
    """What the repair found on the samples that it had set aside, if there was one."""
    facts = own.report.recovery
    return facts.before if facts.undone else facts.after


def _inputs(state: State, analysis: Analysis, judges: int) -> list[Feed]:
    if state.data is None:
        return list(synthetic_feeds(state, analysis))
    return list(_first(Calls(state, analysis).batches(), judges))


def _others(state: State, analysis: Analysis, samples: int | None, judges: int) -> list[Feed]:
    """Samples behind the first so many; none where they are too few to judge by."""
    if samples is None or state.data is None:
        return []
    seen, later = 0, []
    for feed in Calls(state, analysis).batches():
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
