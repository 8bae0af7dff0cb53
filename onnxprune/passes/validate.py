"""Validate: is the result a model, is the cut exact, how faithful is the result, how fast is it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onnxprune.analysis import Analysis
from onnxprune.passes.calls import Calls
from onnxprune.passes.exact import prove, unproved
from onnxprune.passes.state import State
from onnxprune.passes.structure import check_file, check_sizes
from onnxprune.passes.trial import Trial, synthetic_feeds, timing_feed
from onnxprune.report.facts import Latency
from onnxprune.runtime import fidelity, latency

# Inputs of the user that tell enough, where nobody says how many to take.
ENOUGH = 256


class Validate:
    """Check the structure; compare with the masked original and with the original; time both.

    Exactness is asked of the cut, before any repair, and only if no pass in front has asked; fidelity and latency are
    those of the model as it is now. Behind a repair, fidelity is measured on what the repair set aside.

    Args:
        exact, faithful, timed: which questions to ask. With none, nothing is run: sizes alone are checked.

    Raises:
        ValidationError: the cut is not exact, or the result is not a valid model.
    """

    def __init__(self, *, exact: bool = True, faithful: bool = True, timed: bool = True) -> None:
        self.exact, self.faithful, self.timed = exact, faithful, timed

    def __call__(self, state: State) -> None:
        """Fill the report's exactness, fidelity and latency."""
        analysis = state.analyzed()
        assert state.proto is not None
        with state.stage("structure"):
            check_sizes(analysis.graph.proto, state.proto)
        if not (self.exact or self.faithful or self.timed):
            if unproved(state):
                state.later.append(lambda: _note(state))
            return
        with Trial.of(state.original) as trial:
            self._run(state, analysis, trial)

    def _run(self, state: State, analysis: Analysis, trial: Trial) -> None:
        assert state.proto is not None
        with state.stage("write"):
            final, state.report.totals.bytes_after = trial.write(state.proto, state.weights, "final")
            check_file(final, trial.original)
        with state.stage("inputs"):
            feeds, source = _inputs(state, analysis)
        if self.exact and unproved(state):
            _proved(state, analysis, trial, final)
        if self.faithful:
            with state.stage("fidelity"), trial.lend_original() as original:
                together = not trial.heavy
                state.report.fidelity = fidelity.fidelity(original, final, feeds, source, together=together)
        if self.timed and trial.large:
            state.report.warnings.append("Latency was not measured: original and result would be in memory at once.")
        elif self.timed:
            with state.stage("latency"):
                state.report.latency = _timed(state, trial, final)


def _timed(state: State, trial: Trial, final: Path) -> Latency:
    """Both models on one sample."""
    feed = timing_feed(state, trial)
    return latency.latency(
        trial.original, final, [feed], threads=state.device.threads, providers=state.device.providers
    )


def _proved(state: State, analysis: Analysis, trial: Trial, final: Path) -> None:
    if analysis is state.original:
        prove(state, analysis, trial, final)
        return
    with Trial.of(analysis) as own:  # what was cut is not what came in
        prove(state, analysis, own, final)


def _note(state: State) -> None:
    state.report.exactness.note = "not asked: models were not run"


def _inputs(state: State, analysis: Analysis) -> tuple[Iterable[Any], str]:
    """What to measure on, and what to call it."""
    if state.judged_on is not None:
        return state.judged_on
    if state.data is None:
        return synthetic_feeds(state, analysis), "synthetic"
    return Calls(state, analysis, ENOUGH), state.calibration().name
