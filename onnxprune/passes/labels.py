"""Labels of the data: read from a file or an array, checked against the samples and the outputs of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import UsageError, argument
from onnxprune.gradients.static import StaticGraph
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.pipeline import Context
from onnxprune.runtime.sessions import Array
from onnxprune.training.parameters import Head


def read_labels(source: Any, context: Context, analysis: Analysis) -> Array:
    """Return the labels of the data, one per sample, in the order of the samples.

    Args:
        source: an array, or a .npy or .npz file.
        context: the run, with the data.
        analysis: analysis of the model.

    Raises:
        UsageError: the file cannot be read, its values are no labels, or there is not one per sample.
    """
    values = _loaded(source) if isinstance(source, (str, Path)) else _array(source)
    if values.dtype.kind == "b":
        values = values.astype(np.int64)
    if values.dtype.kind not in "iuf" or not values.ndim:
        raise UsageError(f"{argument('labels')}: type {values.dtype} is not allowed", hint="Give classes or values.")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UsageError(f"{argument('labels')}: there is NaN or infinity in them", hint="Give finite values.")
    batches = CalibrationBatches(context, analysis)
    samples = batches.samples
    if samples is None:
        return values
    assert context.calibration is not None
    # Samples beyond a limit, or that fill no call of a fixed size, have labels as well.
    limited = context.calibration.limit is not None or context.stages.is_trial
    max_samples = None if limited else samples + (batches.fixed or 1) - 1
    if len(values) < samples or (max_samples is not None and len(values) > max_samples):
        raise UsageError(
            f"{argument('labels')}: {len(values)} labels for {samples} samples", hint="Give one per sample, in order."
        )
    return values


def _array(source: Any) -> Array:
    """Return labels as an array."""
    try:
        return np.asarray(source)
    except ValueError as error:
        raise UsageError(
            f"{argument('labels')}: {type(source).__name__} whose rows have several lengths is not allowed",
            hint="Give classes or values, the same number for every sample.",
        ) from error


def _loaded(path: str | Path) -> Array:
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(
            f"{argument('labels')}: {str(path)!r} cannot be read: {error}", hint="Give a .npy or .npz file."
        ) from error
    if isinstance(values, np.ndarray):
        return values
    if not values.files:
        raise UsageError(f"{argument('labels')}: {str(path)!r} holds no array", hint="Give a .npy or .npz file.")
    return np.asarray(values["labels"] if "labels" in values.files else values[values.files[0]])


def labelled_head(fitted: Sequence[Head], student: StaticGraph, labels: Array) -> Head:
    """Return the head that labels belong to, the first that they fit.

    Args:
        fitted: the heads.
        student: the graph.
        labels: classes [samples], or values or probabilities of the shape of an output.

    Raises:
        UsageError: they fit none, or a class is out of range.
    """
    if labels.dtype.kind in "iu" and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    for head in fitted:
        shape = student.shapes[head.tensor]
        if head.axis in (None, 1) and labels.dtype.kind in "iu" and labels.ndim == 1 and len(shape) == 2:
            wrong = labels[(labels < 0) | (labels >= shape[1])]
            if wrong.size:
                raise UsageError(
                    f"{argument('labels')}: class {wrong.ravel()[0]} is out of range",
                    hint=f"The model has classes 0 to {shape[1] - 1}.",
                )
            return replace(head, axis=1)
        fits = labels.dtype.kind == "f" and labels.shape[1:] == shape[1:]
        if fits and (head.axis is None or _are_probabilities(labels, head.axis)):
            return head
    sizes = ", ".join(["samples", *map(str, labels.shape[1:])])
    raise UsageError(
        f"{argument('labels')}: {labels.dtype} of shape [{sizes}] fits no output of the model",
        hint="Give classes [samples] as integers for scores, or values of an output's shape.",
    )


def _are_probabilities(labels: Array, axis: int) -> bool:
    return bool((labels >= 0).all() and np.allclose(labels.sum(axis), 1, atol=1e-3))


def as_targets(labels: Array, shape: Sequence[int]) -> Array:
    """Return classes as rows of 0 and 1, values as they are, in float32."""
    if labels.dtype.kind == "f":
        return labels.astype(np.float32)
    return np.eye(shape[1], dtype=np.float32)[labels.ravel()]
