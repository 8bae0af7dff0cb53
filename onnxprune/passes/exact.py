"""Exact: the proof that the cut is what it should be, wherever in the pipeline it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onnxprune.passes.exactness import check_exactness
from onnxprune.passes.structure import check_file
from onnxprune.passes.trial import Trial, synthetic_feeds
from onnxprune.pipeline import SAME_REMOVAL, Context, Guarantee, Model, Pass, PassResult
from onnxprune.report.facts import Exactness

PROVED = Guarantee("a proof of every removal", lambda _, after: not after.is_unproved)


class Exact(Pass):
    """Compare the cut with the original whose removed channels are multiplied by 0.

    A recovery changes weights on purpose: behind one, the model as it was pruned is compared. Every removal is proved
    once, so that ``Validate`` behind this pass does not ask again.

    Raises:
        ValidationError: the cut is not exact, or is not a valid model.
    """

    ensures: Sequence[Guarantee] = (SAME_REMOVAL, PROVED)

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Prove the removal, if there is one without a proof."""
        if not model.is_unproved:
            return PassResult(model, changed=False)
        with Trial.of(model.analysis) as trial:
            proof = prove(context, model, trial)
        return PassResult(replace(model, proof=proof), [proof])


def prove(context: Context, model: Model, trial: Trial, written: Path | None = None) -> Exactness:
    """Ask whether the removal is exact.

    Args:
        context: the run. model: pruned. trial: of the model that was pruned. written: the present model's file, if any.

    Raises:
        ValidationError: it is not.
    """
    assert model.removed is not None
    parts = model.as_pruned or model.parts
    if written is None or model.as_pruned is not None:
        with context.stage("write"):
            written, _ = trial.write(*parts, "cut")
            check_file(written, trial.original)
    with context.stage("exactness"), trial.blaming():
        feeds = synthetic_feeds(context, model.analysis)
        return check_exactness(model.analysis, model.removed, trial, written, parts, feeds, context.seed)
