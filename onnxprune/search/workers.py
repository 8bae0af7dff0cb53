"""Candidates and groups in worker processes, through joblib: here, or on the machines of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import joblib
import numpy as np
import onnx

from onnxprune.channels.analysis import Analysis
from onnxprune.graph.resized import Resizing
from onnxprune.passes.calibration import CalibrationBatches, TrialSplit
from onnxprune.pipeline import Context, RunSettings
from onnxprune.runtime import sessions
from onnxprune.runtime.capture import count
from onnxprune.runtime.fidelity import Outputs
from onnxprune.runtime.sessions import Feed
from onnxprune.search.evaluation import Evaluation, Mask, Metric, evaluate, pruned_model

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class WorkerRun:
    """A run as workers open it: it can be pickled, and equal ones are opened once per worker.

    Attributes:
        model: path or bytes.
        input_shapes: {input: shape} for dynamic inputs.
        feeds: inputs to recover from and to evaluate on; None for synthetic inputs.
        approximate: whether channels may be removed through normalisations.
        resizing: inputs and outputs that may lose channels.
        reshape_axis: see :meth:`onnxprune.channels.analysis.Analysis.with_reshape_axis`.
        seed: seed of all random numbers.
        libraries: libraries of custom operators.
        outputs: kinds of outputs that the user set.
        effort: name of the bounds on the work.
        memory_limit: bytes of activations to hold at a time; None: the default.
    """

    model: str | bytes
    input_shapes: Mapping[str, Sequence[int]] | None
    feeds: tuple[Feed, ...] | None
    approximate: bool
    resizing: Resizing
    reshape_axis: str
    seed: int
    libraries: tuple[str, ...] = ()
    outputs: Outputs | None = None
    effort: str = "normal"
    memory_limit: int | None = None

    @classmethod
    def of(cls, context: Context, analysis: Analysis, samples: int) -> WorkerRun:
        """Describe a run.

        Args:
            context: the run.
            analysis: analysis of the model.
            samples: number of samples that are enough for a worker, 1 or more.
        """
        source = context.source
        model = source.SerializeToString() if isinstance(source, onnx.ModelProto) else source
        return cls(
            model if isinstance(model, bytes) else str(Path(model).resolve()),
            context.input_shapes,
            None if context.calibration is None else tuple(_first(context, analysis, samples)),
            analysis.approximate,
            analysis.resizing,
            analysis.reshape_axis,
            context.seed,
            sessions.libraries(),
            context.outputs,
            context.effort.name,
            context.memory_limit,
        )

    def __hash__(self) -> int:
        return hash(self._settings())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, WorkerRun) and self._settings() == other._settings() and _alike(self.feeds, other.feeds)
        )

    def _settings(self) -> tuple[Any, ...]:
        flat = repr(self.input_shapes), repr(self.outputs)
        known = (self.model, self.approximate, self.resizing, self.reshape_axis, self.seed)
        return (*known, self.effort, self.memory_limit, *flat)

    def open(self) -> tuple[Context, Analysis]:
        """Analyse the model, once per worker."""
        context = _opened(self)
        return context, context.analysis.with_reshape_axis(self.reshape_axis)


def _first(context: Context, analysis: Analysis, samples: int) -> Iterator[Feed]:
    """Iterate over calls of the data with about so many samples."""
    num_samples = 0
    for feed in CalibrationBatches(context, analysis).batches():
        yield feed
        num_samples += count(feed)
        if num_samples >= samples:
            return


def _alike(left_feeds: tuple[Feed, ...] | None, right_feeds: tuple[Feed, ...] | None) -> bool:
    if left_feeds is None or right_feeds is None:
        return left_feeds is right_feeds
    pairs = zip(left_feeds, right_feeds, strict=False)
    return len(left_feeds) == len(right_feeds) and all(np.array_equal(a[n], b[n]) for a, b in pairs for n in a)


@lru_cache(maxsize=1)
def _opened(run: WorkerRun) -> Context:
    settings = RunSettings(
        data=None if run.feeds is None else list(run.feeds),
        seed=run.seed,
        input_shapes=run.input_shapes,
        outputs=run.outputs,
        effort=run.effort,
        memory_limit=run.memory_limit,
    )
    return Context.of(run.model, settings, approximate=run.approximate, resizing=run.resizing)


def unpacked(packed: bytes, atoms: int) -> Mask:
    """Return the mask over atoms [atoms], bool, of its packed bits."""
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=atoms).astype(bool)


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate to evaluate in a worker; ``removed``: packed mask over ``atoms`` atoms."""

    run: WorkerRun
    mode: str
    metric: Metric | None
    atoms: int
    removed: bytes


def _evaluated(trial: Trial) -> Evaluation:
    """Evaluate a candidate; runs in a worker. The analysis stays there, and so does the data."""
    with sessions.custom_ops(trial.run.libraries):
        context, analysis = trial.run.open()
        removed = unpacked(trial.removed, trial.atoms)
        split = TrialSplit(context.effort.trial_samples)
        mode = trial.mode if removed.any() else "none"
        evaluation = evaluate(context, pruned_model(analysis, removed), mode=mode, metric=trial.metric, split=split)
        model = replace(evaluation.model, analysis=cast(Analysis, None), hold_out=None)
        return replace(evaluation, model=model)


def evaluate_together(
    context: Context,
    analysis: Analysis,
    removals: Sequence[Mask],
    *,
    mode: str,
    metric: Metric | None = None,
    jobs: int | None = None,
) -> Iterator[Evaluation] | None:
    """Evaluate candidates of a trial in workers, in their order; None where joblib has one worker only.

    Args:
        context: the run.
        analysis: analysis of the model.
        removals: masks over atoms [atoms], bool, one per candidate.
        mode: mode of the recovery.
        metric: the user's metric, None for fidelity.
        jobs: workers at a time, None for that of ``joblib.parallel_config``, else one.

    Raises:
        CannotRewrite: a node has no form with the new sizes. UsageError: the metric fails.
    """
    if len(removals) < 2 or joblib.effective_n_jobs(jobs) < 2:
        return None
    split = TrialSplit(context.effort.trial_samples)
    run = WorkerRun.of(context, analysis, max(2 * split.max_fit, split.max_fit + split.max_validation))
    trials = [Trial(run, mode, metric, mask.size, np.packbits(mask).tobytes()) for mask in removals]
    return (replace(e, model=replace(e.model, analysis=analysis)) for e in in_workers(_evaluated, trials, jobs))


def in_workers(function: Callable[[T], R], arguments: Sequence[T], jobs: int | None) -> Iterator[R]:
    """Call a function in workers; return its results in order, as they come where joblib's backend gives them so.

    Args:
        function: what workers run.
        arguments: of each call.
        jobs: workers at a time, None for that of ``joblib.parallel_config``, else one.
    """
    try:
        run = joblib.Parallel(n_jobs=jobs, return_as="generator")
    except ValueError:  # the backend of Ray gives all results at the end
        run = joblib.Parallel(n_jobs=jobs)
    return iter(run(joblib.delayed(function)(argument) for argument in arguments))
