"""Candidates, groups and rows in worker processes, through joblib: here, or on the machines of a cluster."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from pickle import PicklingError
from typing import Any, TypeVar, cast

import joblib
import numpy as np
import onnx

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import UsageError, argument
from onnxprune.graph.resized import Resizing
from onnxprune.io.write import assemble
from onnxprune.passes.calibration import CalibrationBatches, TrialSplit
from onnxprune.pipeline import Context, RunSettings
from onnxprune.runtime import sessions
from onnxprune.runtime.capture import count
from onnxprune.runtime.fidelity import Outputs
from onnxprune.runtime.images import ImageOptions
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
        data: inputs to recover from and to evaluate on: calls, or the path of all; None for synthetic inputs.
        approximate: whether channels may be removed through normalisations.
        resizing: inputs and outputs that may lose channels.
        reshape_axis: see :meth:`onnxprune.channels.analysis.Analysis.with_reshape_axis`.
        seed: seed of all random numbers.
        libraries: libraries of custom operators.
        outputs: kinds of outputs that the user set.
        effort: name of the bounds on the work.
        memory_limit: bytes of activations to hold at a time; None: the default.
        samples: number of samples of a path to use; None for all.
        batch_size: samples per call where the model leaves that open; None: the default.
        images: conversion of images at a path to arrays; None: from the model's input.
        is_counted: whether the number of samples is known before they are read: splits depend on it.
    """

    model: str | bytes
    input_shapes: Mapping[str, Sequence[int]] | None
    data: tuple[Feed, ...] | str | None
    approximate: bool
    resizing: Resizing
    reshape_axis: str
    seed: int
    libraries: tuple[str, ...] = ()
    outputs: Outputs | None = None
    effort: str = "normal"
    memory_limit: int | None = None
    samples: int | None = None
    batch_size: int | None = None
    images: ImageOptions | None = None
    is_counted: bool = True

    @classmethod
    def of(cls, context: Context, analysis: Analysis, samples: int | None = None) -> WorkerRun:
        """Describe a run.

        Args:
            context: the run.
            analysis: analysis of the model.
            samples: number of samples that are enough for a worker, 1 or more; None: it needs all.
        """
        calibration = context.calibration
        data: tuple[Feed, ...] | str | None = None
        reading: dict[str, Any] = {}
        if calibration is not None:
            path = calibration.path if samples is None else None
            data = tuple(_first(context, analysis, samples)) if path is None else str(path)
            reading = {"batch_size": calibration.batch_size}
            if path is not None:
                reading |= {"samples": calibration.limit, "images": calibration.images}
            elif samples is None:
                reading |= {"is_counted": CalibrationBatches(context, analysis).samples is not None}
        return cls(
            _portable(context),
            context.input_shapes,
            data,
            analysis.approximate,
            analysis.resizing,
            analysis.reshape_axis,
            context.seed,
            sessions.libraries(),
            context.outputs,
            context.effort.name,
            context.memory_limit,
            **reading,
        )

    def __hash__(self) -> int:
        return hash(self._settings())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorkerRun) and self._settings() == other._settings() and _alike(self.data, other.data)

    def _settings(self) -> tuple[Any, ...]:
        known = (self.model, self.approximate, self.resizing, self.reshape_axis, self.seed)
        reading = self.samples, self.batch_size, repr(self.images), self.is_counted
        return (*known, self.effort, self.memory_limit, *reading, repr(self.input_shapes), repr(self.outputs))

    def open(self) -> tuple[Context, Analysis]:
        """Analyse the model, once per worker."""
        context = _opened(self)
        return context, context.analysis.with_reshape_axis(self.reshape_axis)


def _portable(context: Context) -> str | bytes:
    """Return the model as a path, absolute, or as bytes where it has none."""
    source = context.source
    if isinstance(source, (str, Path)):
        return str(Path(source).resolve())
    if isinstance(source, bytes):
        return source
    loaded = context.analysis.loaded
    model = source if isinstance(source, onnx.ModelProto) else assemble(loaded.as_read, loaded.weights)
    return bytes(model.SerializeToString())


def _first(context: Context, analysis: Analysis, samples: int | None) -> Iterator[Feed]:
    """Iterate over calls of the data with about so many samples; None for all."""
    num_samples = 0
    for feed in CalibrationBatches(context, analysis).batches():
        yield feed
        num_samples += count(feed)
        if samples is not None and num_samples >= samples:
            return


def _alike(calls: tuple[Feed, ...] | str | None, others: tuple[Feed, ...] | str | None) -> bool:
    if not isinstance(calls, tuple) or not isinstance(others, tuple):
        return calls == others
    pairs = zip(calls, others, strict=False)
    return len(calls) == len(others) and all(np.array_equal(a[n], b[n]) for a, b in pairs for n in a)


@lru_cache(maxsize=1)
def _opened(run: WorkerRun) -> Context:
    calls = run.data if isinstance(run.data, tuple) else ()
    settings = RunSettings(
        data=run.data if not calls else list(calls) if run.is_counted else iter(calls),
        samples=run.samples,
        batch_size=run.batch_size,
        images=run.images,
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


def in_workers(
    function: Callable[[T], R], arguments: Sequence[T], jobs: int | None, *, ordered: bool = True
) -> Iterator[R]:
    """Call a function in workers; return its results as they come where joblib's backend gives them so.

    Args:
        function: what workers run.
        arguments: of each call.
        jobs: workers at a time, None for that of ``joblib.parallel_config``, else one.
        ordered: whether results are in the order of the arguments; else a finished one does not wait for others.

    Raises:
        UsageError: arguments cannot be sent to another process, or a process ended, as one without memory does.
    """
    try:
        run = joblib.Parallel(n_jobs=jobs, return_as="generator" if ordered else "generator_unordered")
    except ValueError:  # the backend of Ray gives all results at the end
        run = joblib.Parallel(n_jobs=jobs)
    results: Iterator[R] = iter(())
    try:
        results = iter(run(joblib.delayed(function)(one) for one in arguments))
        for result in results:  # noqa: UP028  # delegating would close the results outside of this block
            yield result
    except PicklingError as error:
        raise UsageError(
            "the work cannot be sent to other processes: a part of it cannot be pickled",
            hint=f"Name the metric as script.py:function and give data by a path, or drop {argument('jobs')}.",
        ) from error
    except BrokenExecutor as error:
        raise UsageError(
            "a process that did part of the work ended before it was done; its memory may not have been enough",
            hint=f"Give {argument('jobs', 1)}: one process needs the least memory.",
        ) from error
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib counts what it cancels
            getattr(results, "close", lambda: None)()
