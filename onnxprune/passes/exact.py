"""Exact: the proof that the cut is what it should be, wherever in the pipeline it is asked for."""

from __future__ import annotations

from pathlib import Path

from onnxprune.analysis import Analysis
from onnxprune.passes.exactness import check_exactness
from onnxprune.passes.state import State
from onnxprune.passes.structure import check_file
from onnxprune.passes.trial import Trial, synthetic_feeds


class Exact:
    """Compare the cut with the original whose removed channels are multiplied by 0.

    A repair changes weights on purpose: behind one, the model as it was before the repair is compared. Every cut is
    proved once, so that ``Validate`` behind this pass does not ask again.

    Raises:
        ValidationError: the cut is not exact, or is not a valid model.
    """

    def __call__(self, state: State) -> None:
        """Fill the report's exactness."""
        if unproved(state):
            analysis = state.analyzed()
            with Trial.of(analysis) as trial:
                prove(state, analysis, trial)


def unproved(state: State) -> bool:
    """Whether there is a cut that exactness was not asked of."""
    return state.removed is not None and state.proved is not state.removed


def prove(state: State, analysis: Analysis, trial: Trial, written: Path | None = None) -> None:
    """Ask whether the cut is exact. ``written``: the present model's file, if there is one.

    Raises:
        ValidationError: it is not.
    """
    model = state.unrepaired
    if model is None:
        assert state.proto is not None
        model = state.proto, state.weights
    else:
        written = None
    if written is None:
        with state.stage("write"):
            written, _ = trial.write(*model, "cut")
            check_file(written, trial.original)
    with state.stage("exactness"), trial.blaming():
        feeds = synthetic_feeds(state, analysis)
        state.report.exactness = check_exactness(state, analysis, trial, written, model, feeds)
    state.proved = state.removed
