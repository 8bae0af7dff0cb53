"""Validate: check structure and exactness of the result, measure its fidelity and latency."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from onnxprune.allocation.selection import spread
from onnxprune.channels.analysis import Analysis
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.exact import Proof, prove
from onnxprune.passes.ranges import range_doubts
from onnxprune.passes.structure import check_file, check_sizes
from onnxprune.passes.workspace import Workspace, synthetic_feeds, timing_feed
from onnxprune.pipeline import SAME_MODEL, SAME_REMOVAL, Context, Model, Pass, PassResult
from onnxprune.report.facts import Exactness, Fact, Latency, LayerTimes, Remark, Sizes
from onnxprune.runtime import fidelity, latency
from onnxprune.runtime.sessions import Feed
from onnxprune.settings import named_arguments

LAYERS = "layers"
"""Value of ``timed`` that asks for the times of single layers, too."""
# Default number of the user's samples to measure on.
ENOUGH = 256
# Seconds of timing for models whose runs take less than a few milliseconds.
_LEAST_SECONDS = 0.4


@named_arguments()
class Validate(Pass):
    """Check the structure; compare with the masked original and with the original; time both.

    Exactness is checked for the pruned model before any recovery, and only if no earlier pass has checked it; fidelity
    and latency are those of the current model. After a recovery, fidelity is measured on its hold-out.

    Args:
        exact: whether to check exactness.
        faithful: whether to measure fidelity.
        timed: whether to measure latency; ``"layers"`` also measures that of each layer. Without all three, nothing is
            run: sizes alone are checked.

    Raises:
        ValidationError: the removal is not exact, or the result is not a valid model.
    """

    ensures = (SAME_MODEL, SAME_REMOVAL)

    def __init__(self, *, exact: bool = True, faithful: bool = True, timed: bool | str = True) -> None:
        self.exact, self.faithful, self.timed = exact, faithful, timed

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Check exactness, measure fidelity and latency."""
        with context.stage("structure"):
            check_sizes(model.analysis.graph.proto, model.proto)
        if not (self.exact or self.faithful or self.timed):
            note = Exactness(note="models were not run")
            return PassResult(model, [note] if model.is_unproved else [], changed=False)
        with Workspace.of(context.analysis) as trial:
            with context.stage("write"):
                final, size = trial.write(*model.parts, "final")
                check_file(final, trial.original)
            facts: list[Fact] = [Sizes(bytes_after=size)]
            is_proved = self.exact and model.is_unproved
            if is_proved:
                proof = _proof(context, model, trial, final)
                model = proof.of(model)
                facts.append(proof.facts)
            facts += self._measured(context, model, trial, final)
        return PassResult(model, facts, changed=is_proved)

    def _measured(self, context: Context, model: Model, trial: Workspace, final: Path) -> Iterator[Fact]:
        with context.stage("inputs"):
            hold_out = _hold_out(context, model)
        if self.faithful:
            yield from doubted_ranges(context)
            with context.stage("fidelity"), trial.lend_original() as original:
                inputs, name = hold_out
                with trial.lend(*model.parts, "seeded") if trial.drawing else nullcontext(final) as result:
                    yield fidelity.fidelity(
                        original,
                        result,
                        inputs,
                        name,
                        hints=fidelity.hints_of(context.analysis),
                        outputs=context.outputs,
                        together=not trial.heavy,
                        known=None if trial.drawing else context.known,
                    )
        if self.timed and trial.large:
            yield Remark("Latency was not measured: original and result would be in memory at once.")
        elif self.timed:
            with context.stage("latency"):
                feed, device = timing_feed(context, trial), context.device
                model_latency = latency.latency(trial.original, final, [feed], device=device, least_s=_LEAST_SECONDS)
                yield model_latency
                if self.timed == LAYERS:
                    yield _layer_times(context, (trial.original, final), feed, model_latency)


def _layer_times(context: Context, files: tuple[Path, Path], feed: Feed, model_latency: Latency) -> LayerTimes:
    """Measure the milliseconds of the nodes of both models, by the names of the original's."""
    both = []
    for path, total in zip(files, (model_latency.before_ms, model_latency.after_ms), strict=True):
        times = latency.profile(path, [feed], device=context.device)
        nodes = spread(context.analysis, [(t.name, t.op, t.seconds) for t in times])
        scale = total / (sum(t.seconds for t in times) or 1.0)
        both.append({name: scale * seconds for name, seconds in nodes.items()})
    return LayerTimes(*both)


def _proof(context: Context, model: Model, trial: Workspace, final: Path) -> Proof:
    """Prove the removal of the model that was pruned, which need not be the one that came in."""
    if model.analysis.loaded is context.analysis.loaded:
        return prove(context, model, trial, final)
    with Workspace.of(model.analysis) as workspace:
        return prove(context, model, workspace, final)


def _hold_out(context: Context, model: Model) -> tuple[Iterable[Any], str]:
    """Return the hold-out inputs to measure on, and their name."""
    if model.hold_out is not None:
        return model.hold_out.inputs, model.hold_out.name
    return measured_inputs(context, model.analysis, model.refused)


def measured_inputs(context: Context, analysis: Analysis, refused: Collection[int] = ()) -> tuple[Iterable[Any], str]:
    """Return the inputs to measure a model on, and their name: the user's, else seeded synthetic ones.

    Args:
        context: context of the run.
        analysis: analysis of the model.
        refused: indices of the probes at whose sizes the model is known not to run.
    """
    if context.calibration is None:
        return synthetic_feeds(context, analysis, refused), "synthetic"
    return CalibrationBatches(context, analysis, ENOUGH), context.inputs().name


def doubted_ranges(context: Context) -> list[Fact]:
    """Return warnings about the range of the user's inputs."""
    if context.calibration is None:
        return []
    feed = next(iter(CalibrationBatches(context, context.analysis).batches()), None)
    return [] if feed is None else [Remark(text) for text in range_doubts(context.analysis, feed)]
