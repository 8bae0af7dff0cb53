"""Number of samples that a training needs, draws at a step, and has; and of the steps that fit into an effort."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import UsageError, argument
from onnxprune.graph.probes import input_specs, sample_axes
from onnxprune.passes.calibration import CalibrationSplit
from onnxprune.pipeline import Context, Model
from onnxprune.runtime.sessions import Array
from onnxprune.training.samples import TrainingSamples, position_axes

BATCH = 32
"""Samples of a step."""
LEAST_SAMPLES, _LEAST_DENSE_SAMPLES = 64, 16
"""Fewer samples are refused unless their number was asked for; the second where a sample has many answers."""
_MOST_ANSWERS, _LEAST_BATCH = 32, 4
_MOST_STEPS = 2000
_PASSES = 3  # multiply-accumulates of a step, in runs of the model
_PER_ELEMENT = 12  # multiply-accumulates in whose time an element of a tensor is written and read


def short_steps(context: Context, model: Model) -> int:
    """Return the number of steps that the effort of a run allows for this model.

    They are counted in multiply-accumulates, or where a model has few of them for its tensors, in elements of these.
    """
    inputs, shapes = model.analysis.facts.probes[0].inputs, model.analysis.facts.probes[0].shapes
    axes = sample_axes(input_specs(model.analysis.graph))
    known = ((shape, axes.get(name, 0)) for name, shape in inputs.items() if shape)
    batch = max(min((shape[axis] for shape, axis in known if axis is not None), default=1), 1)
    macs = sum(layer.macs_before for layer in model.analysis.layers) / batch
    tensors = [shapes.get(name) or () for node in model.analysis.graph.nodes for name in node.outputs if name]
    elements = sum(math.prod(shape) for shape in tensors if None not in shape) / batch
    size = default_batch(answers_of_sample(model.analysis, inputs))
    work = max(macs, _PER_ELEMENT * elements, 1.0)
    return int(min(_MOST_STEPS, context.effort.training / (_PASSES * size * work)))


def answers_of_sample(analysis: Analysis, shapes: Mapping[str, Any]) -> int:
    """Return how many answers a sample counts for: one, up to 32 where an output has many positions.

    Args:
        analysis: analysis of the model.
        shapes: arrays or shapes of one call's inputs; the positions of a convolutional model grow with them.
    """
    probe = analysis.facts.probes[0]
    sizes = {name: list(getattr(value, "shape", value)) for name, value in shapes.items()}
    axes = sample_axes(input_specs(analysis.graph))

    def extent(name: str, shape: Sequence[int]) -> int:
        return math.prod(n for a, n in enumerate(shape) if a != axes.get(name, 0))

    known = {name: extent(name, shape) for name, shape in probe.inputs.items()}
    growth = [extent(name, sizes[name]) / size for name, size in known.items() if size and name in sizes]
    outputs = [list(probe.shapes.get(name) or ()) for name in analysis.graph.outputs]
    positions = [math.prod(shape[a] for a in position_axes(len(shape))) for shape in outputs if None not in shape]
    return int(min(_MOST_ANSWERS, max(1.0, max(positions, default=1) * max(growth, default=1.0))))


def default_batch(answers: int) -> int:
    """Return the number of samples of a step, by the number of answers that a sample has."""
    return max(_LEAST_BATCH, BATCH // answers)


def check_samples(context: Context, analysis: Analysis, split: CalibrationSplit) -> None:
    """Refuse data that a training would only overfit to; raises UsageError."""
    samples = split.num_fit + split.num_held_out
    least = least_samples(context, analysis, split)
    if samples < least:
        raise UsageError(
            f"{argument('finetune')} needs {least} samples or more, and there are {samples}",
            hint=f"Give more with {argument('data')}; 512 or more work well. {argument('samples')} trains on fewer.",
        )
    first = split.fit[0]
    if all(v.ndim == 0 or all((f[n] == v[:1]).all() for f in split.fit) for n, v in first.items()):
        raise UsageError(
            f"all samples of {argument('data')} are the same, so {argument('finetune')} can learn nothing from them",
            hint="Give varied samples, like those in use.",
        )


def least_samples(context: Context, analysis: Analysis, split: CalibrationSplit) -> int:
    """Return the number of samples below which a training is refused; 0 where their number was asked for."""
    if context.calibration is not None and context.calibration.limit is not None:
        return 0
    is_dense = answers_of_sample(analysis, split.fit[0]) * _LEAST_DENSE_SAMPLES >= LEAST_SAMPLES
    return _LEAST_DENSE_SAMPLES if is_dense else LEAST_SAMPLES


def training_samples(
    context: Context, analysis: Analysis, split: CalibrationSplit, size: int, labels: Array | None
) -> TrainingSamples:
    """Return the samples to fit to.

    Raises:
        UsageError: they have so many sizes that few have the commonest.
    """
    axes = sample_axes(input_specs(context.analysis.graph))
    samples = TrainingSamples(split.fit, size, labels, context.seed, axes)
    least = least_samples(context, analysis, split) * split.num_fit // (split.num_fit + split.num_held_out)
    if samples.count < min(least, split.num_fit):
        raise UsageError(
            f"{argument('finetune')} trains on inputs of one size, and only {samples.count} samples of "
            f"{argument('data')} have the commonest",
            hint="Give more of one size, such as sequences that are padded to one length, with a mask.",
        )
    return samples
