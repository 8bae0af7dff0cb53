"""Fine-tune: train a pruned model by gradients to answer as the original does, from inputs alone or with labels."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.survivors import Survivors
from onnxprune.errors import ModelError, Note, UsageError, argument, nearest
from onnxprune.gradients.backward import inference_graph, training_graph
from onnxprune.gradients.static import StaticGraph, static_graph
from onnxprune.gradients.tape import Tape
from onnxprune.graph.probes import SampleAxes, axes_of_samples, input_specs
from onnxprune.io.constants import set_constant
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.passes.calibration import CalibrationBatches, CalibrationSplit
from onnxprune.passes.comparable import can_follow
from onnxprune.passes.gradients import fitted_heads
from onnxprune.passes.labels import as_targets, labelled_head, read_labels
from onnxprune.passes.recover import HAS_INPUTS, compare_with_original, noise, split_for
from onnxprune.passes.workspace import Workspace
from onnxprune.pipeline import EFFORTS, Context, Model, ModelParts, Pass, PassResult
from onnxprune.report.facts import Fact, Fidelity, Finetuning, Remark
from onnxprune.runtime.capture import count, make_folder, read_arrays, write_arrays
from onnxprune.runtime.masks import Padding
from onnxprune.runtime.sessions import Array, Feed, open_session, run
from onnxprune.settings import checked, effort_of, named_arguments
from onnxprune.training.augment import Augmentation
from onnxprune.training.blocks import Block, blocks_of
from onnxprune.training.codes import CodedWeight, encoded, with_numbers
from onnxprune.training.curvature import CALLS, Curvature
from onnxprune.training.loop import Course, Effort, Keeper, interruptible, train
from onnxprune.training.losses import BALANCE, OFFSET, Losses, deviation
from onnxprune.training.parameters import Head, bottlenecks, trainable, value_to_fit
from onnxprune.training.step import PROBE, Adam, Parameters, Step, Vector, step_sizes

RATE = 4e-3
"""Largest step, in units of each weight's own size."""
BATCH = 32
"""Samples of a step."""
LEAST_SAMPLES, _LEAST_DENSE_SAMPLES = 64, 16
"""Fewer samples are refused unless their number was asked for; the second where a sample has many answers."""
_MOST_ANSWERS, _LEAST_BATCH = 32, 4
_FEATURES, _FEATURE_SHARE = 4, 0.3  # the share of the outputs' loss at the beginning
_CODED_PROBE = 0.05
_SETTLED = 1e-6  # a loss below it is none
_BOLDNESS = 1 / 16  # largest step, relative to the random one that would double the loss
_MEMORY = 512 << 20
_SHORT_SAMPLES, _MOST_STEPS, _LEAST_STEPS = 512, 2000, 50
_FEW_SAMPLES, _TRIAL = 512, 0.25  # samples below which both ways are tried, each for this share of the effort
_MOST_BLOCKS, _BLOCK_STEPS, _HELD_CALLS = 16, 8, 2
_CLOSE = 0.5  # points lost below which a training is not worth its time
_PASSES = 3  # multiply-accumulates of a step, in runs of the model
_LIVE = 2.5  # bytes alive during a step, relative to those of all activations


UserLoss = Callable[[Mapping[str, Array], Mapping[str, Array], Array | None], tuple[float, Mapping[str, Array]]]


@named_arguments()
class Finetune(Pass):
    """Train the weights of a pruned model so that it answers as the original does.

    The loss compares scores of classes by the Kullback-Leibler divergence at temperature 4, other outputs and a few
    tensors between blocks by their relative squared error. Every eighth batch of the data is a hold-out on which the
    model is compared with the original ten times on the way: the best weights are kept, and where none is better than
    those before, the training is undone. With a cache folder, an interrupted training goes on from where it was.

    Args:
        effort: steps (500), time (``"3m"``, ``"90s"``), both as an :class:`onnxprune.training.loop.Effort`, or None:
            1,000 steps or 3 minutes, whichever ends first, less or more where the run has another effort than
            ``normal``.
        labels: classes [samples] or values of the first output, or their file; half of the loss is then on them. None:
            those of the run; without any, distillation alone. The hold-out is then judged half by its labels.
        rate: largest step, in units of each weight's own size, above 0.
        batch_size: samples of a step, 1 or more; None: 32, and down to 4 where outputs have many positions.
        features: number of tensors between blocks to compare, 0 or more.
        augment: ``auto`` to shift and mirror images where the original answers them alike, at the same places or at
            moved ones; ``shift`` or ``flip`` for one of the two; ``none``; True and False for ``auto`` and ``none``.
        blocks: ``yes`` to train one residual block or stage after the other, each to make what the original's makes
            from the inputs that the pruned model gives it; ``no`` to train the whole model; ``auto``: with fewer than
            512 samples both are tried, each for a quarter of the effort, and the better on the hold-out goes on.
        loss: a loss of your own in place of the labels', half of the whole: ``f(outputs, targets, labels)`` gets the
            values of the model and of its original, {output: array}, in front of a softmax at the end, and the labels
            of the samples (None without); it returns its value and the gradients, {output: array}. None: none.

    Raises:
        UsageError: no data, fewer than 64 samples (16 where outputs have many positions), data without variety, labels
            that do not fit, or ``blocks="yes"`` with a loss of your own.
        ModelError: no weight can be trained, or the model cannot be run as a training graph.
    """

    requires = (HAS_INPUTS,)

    def __init__(
        self,
        effort: int | str | bool | Effort | None = None,
        *,
        labels: Any = None,
        rate: float = RATE,
        batch_size: int | None = None,
        features: int = _FEATURES,
        augment: bool | str = "auto",
        blocks: str = "no",
        loss: UserLoss | None = None,
    ) -> None:
        self.is_auto = effort is None or effort is True or effort == "auto"
        if not isinstance(effort, Effort):
            effort = Effort(*effort_of(True if effort is None else effort, argument("finetune")))
        self.effort = effort
        self.labels, self.rate, self.batch_size = labels, rate, batch_size
        self.features, self.loss = features, loss
        augment = {True: "auto", False: "none"}[augment] if isinstance(augment, bool) else augment
        self.augment = checked("augment", augment, "prune")
        self.blocks = checked("blocks", blocks, "prune")
        if self.blocks == "yes" and loss is not None:
            raise UsageError(
                f"{argument('loss')} is one of the whole model, and {argument('blocks', 'yes')} trains its blocks.",
                hint=f"Drop one of the two, or give {argument('blocks', 'no')}.",
            )

    def part(self, share: float) -> Finetune:
        """Return the same training with a share of its effort."""
        result = copy(self)
        result.effort = self.effort.part(share)
        return result

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Train, and keep the result where it is better."""
        if context.stages.interrupted:
            return PassResult(model, changed=False)
        if not (model.is_reduced or self.labels is not None or _has_other_weights(context, model)):
            return PassResult(model, [Remark("nothing was pruned, so there is nothing to fine-tune")], changed=False)
        split = split_for(context, model.analysis, "full")
        check_samples(context, model.analysis, split)
        with context.stage("finetune"):
            training = Training.prepare(self, context, model, split)
            course = training.run()
        facts = training.facts(course)
        remarks: list[Fact] = [facts, *map(Remark, training.remarks(facts))]
        tuned = replace(model, hold_out=split.validation)
        if not facts.undone:
            tuned = tuned.with_parts(training.parts(), as_pruned=model.as_pruned or model.parts)
        return PassResult(tuned, remarks)


class ShortFinetune(Pass):
    """Train for as many steps as the effort allows, where that can be expected to help; else change nothing.

    It needs 512 samples or more, 16 where outputs have many positions (detectors, segmentation), an effort whose work
    is 50 steps or more, and a model that answers otherwise than the original. An obstacle to the training is no error
    here.

    Args:
        augment, blocks: see :class:`Finetune`.
    """

    requires = (HAS_INPUTS,)

    def __init__(self, augment: str = "auto", blocks: str = "no") -> None:
        self._augment, self._blocks = augment, blocks

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Train, and keep the result where it is better."""
        untouched = PassResult(model, changed=False)
        steps = short_steps(context, model)
        if not (model.is_pruned or model.is_factorized) or context.stages.interrupted:
            return untouched
        if steps < _LEAST_STEPS:
            if (CalibrationBatches(context, model.analysis).samples or 0) >= _SHORT_SAMPLES:
                context.stages.leave_out("training towards the original")
            return untouched
        try:
            split = split_for(context, model.analysis, "full")
            samples = split.num_fit + split.num_held_out
            if samples * answers_of_sample(model.analysis, split.fit[0]) < _SHORT_SAMPLES or not split.num_held_out:
                return untouched
            (before,) = compare_with_original(context.analysis, [model.parts], split.validation, context.outputs)
            if distance(before) < _CLOSE:
                return untouched
            return Finetune(steps, augment=self._augment, blocks=self._blocks)(context, model)
        except OtherDataError as error:
            return PassResult(model, [Remark(f"not fine-tuned: {error.args[0]}")], changed=False)
        except (UsageError, ModelError):
            return untouched


def short_steps(context: Context, model: Model) -> int:
    """Return the number of steps that the effort of a run allows for this model, by its multiply-accumulates."""
    inputs = model.analysis.facts.probes[0].inputs
    axes = axes_of_samples(input_specs(model.analysis.graph))
    known = ((shape, axes.get(name, 0)) for name, shape in inputs.items() if shape)
    batch = max(min((shape[axis] for shape, axis in known if axis is not None), default=1), 1)
    macs = sum(layer.macs_before for layer in model.analysis.layers) / batch
    size = default_batch(answers_of_sample(model.analysis, inputs))
    return int(min(_MOST_STEPS, context.effort.training / (_PASSES * size * max(macs, 1.0))))


def answers_of_sample(analysis: Analysis, shapes: Mapping[str, Any]) -> int:
    """Return how many answers a sample counts for: one, up to 32 where an output has many positions.

    Args:
        analysis: analysis of the model.
        shapes: arrays or shapes of one call's inputs; the positions of a convolutional model grow with them.
    """
    probe = analysis.facts.probes[0]
    sizes = {name: list(getattr(value, "shape", value)) for name, value in shapes.items()}
    axes = axes_of_samples(input_specs(analysis.graph))

    def extent(name: str, shape: Sequence[int]) -> int:
        return math.prod(n for a, n in enumerate(shape) if a != axes.get(name, 0))

    known = {name: extent(name, shape) for name, shape in probe.inputs.items()}
    growth = [extent(name, sizes[name]) / size for name, size in known.items() if size and name in sizes]
    outputs = [list(probe.shapes.get(name) or ()) for name in analysis.graph.outputs]
    # Of a tensor of rank 3, [sample, position, value]; of a map, [sample, value, *positions].
    positions = [math.prod(shape[1:2] if len(shape) == 3 else shape[2:]) for shape in outputs if None not in shape]
    return int(min(_MOST_ANSWERS, max(1.0, max(positions, default=1) * max(growth, default=1.0))))


def default_batch(answers: int) -> int:
    """Return the number of samples of a step, by the number of answers that a sample has."""
    return max(_LEAST_BATCH, BATCH // answers)


def _has_other_weights(context: Context, model: Model) -> bool:
    """Return whether a model of the original's graph has weights of its own: zeros, codes, or those of a training."""
    for name, weight in context.analysis.loaded.weights.items():
        other = model.weights.get(name)
        if other is None or other is weight or other.shape != weight.shape:
            continue
        one, two = weight.read(), other.read()
        if one.dtype.kind == "f" and not np.allclose(one, two, rtol=0, atol=float(np.finfo(one.dtype).tiny)):
            return True
    return False


def check_samples(context: Context, analysis: Analysis, split: CalibrationSplit) -> None:
    """Refuse data that a training would only overfit to; raises UsageError."""
    samples = split.num_fit + split.num_held_out
    least = _least_samples(context, analysis, split)
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


def _least_samples(context: Context, analysis: Analysis, split: CalibrationSplit) -> int:
    """Return the number of samples below which a training is refused; 0 where their number was asked for."""
    if context.calibration is not None and context.calibration.limit is not None:
        return 0
    is_dense = answers_of_sample(analysis, split.fit[0]) * _LEAST_DENSE_SAMPLES >= LEAST_SAMPLES
    return _LEAST_DENSE_SAMPLES if is_dense else LEAST_SAMPLES


_Sizes = frozenset[tuple[str, tuple[int, ...]]]
"""Sizes of the inputs of a call."""


class _Samples:
    """The samples of a split, drawn in random order, each once before any again.

    Where samples cannot be taken out of their calls, whole calls are drawn. A training graph has one size: of inputs of
    several, those of the commonest are drawn.

    Args:
        feeds: the calls.
        size: samples of a call that is drawn.
        labels: of all samples, in their order; None: without.
        seed: seed of the order.
        axes: see :data:`SampleAxes`.
        like: a call of the size to draw; None: the commonest.

    Attributes:
        size: samples of a call that is drawn.
        count: number of samples, without those of other sizes.
    """

    def __init__(
        self,
        feeds: Sequence[Feed],
        size: int,
        labels: Array | None,
        seed: int,
        axes: SampleAxes | None = None,
        like: Feed | None = None,
    ) -> None:
        self._feeds, self._labels, self._seed, self._all_axes = feeds, labels, seed, axes
        self._axes = _axes_in(feeds, axes or {})
        calls = [(self._sizes(feed), self._count(feed)) for feed in feeds]
        totals = Counter[_Sizes]()
        for sizes, number in calls:
            totals[sizes] += number
        drawn = totals.most_common(1)[0][0] if like is None else self._sizes(like)
        self.count = totals[drawn]
        self._used = [k for k, (sizes, _) in enumerate(calls) if sizes == drawn]
        counts = [number for _, number in calls]
        self._starts = np.cumsum([0, *counts])  # of calls, among all samples
        self._ends = np.cumsum([counts[k] if self._axes else 1 for k in self._used])  # among those to draw
        self.size = size if self._axes or not self._used else counts[self._used[0]]

    @classmethod
    def of(
        cls, context: Context, analysis: Analysis, split: CalibrationSplit, size: int, labels: Array | None
    ) -> _Samples:
        """Return the samples to fit to.

        Raises:
            UsageError: they have so many sizes that few have the commonest.
        """
        axes = axes_of_samples(input_specs(context.analysis.graph))
        samples = cls(split.fit, size, labels, context.seed, axes)
        least = _least_samples(context, analysis, split) * split.num_fit // (split.num_fit + split.num_held_out)
        if samples.count < min(least, split.num_fit):
            raise UsageError(
                f"{argument('finetune')} trains on inputs of one size, and only {samples.count} samples of "
                f"{argument('data')} have the commonest",
                hint="Give more of one size, such as sequences that are padded to one length, with a mask.",
            )
        return samples

    @property
    def num(self) -> int:
        """The number of samples, or of whole calls where samples cannot be taken out of them."""
        return int(self._ends[-1]) if self._used else 0

    def draw(self, number: int) -> tuple[Feed, Array | None]:
        """Return one call and its labels; the same ones for the same number."""
        need = self.size if self._axes else 1
        first, last = number * need // self.num, ((number + 1) * need - 1) // self.num
        rounds = [np.random.default_rng([self._seed, k]).permutation(self.num) for k in range(first, last + 1)]
        start = number * need - first * self.num
        index = np.concatenate(rounds)[start : start + need]
        batches = np.searchsorted(self._ends, index, side="right")
        if not self._axes:
            call = self._used[batches[0]]
            labels = None if self._labels is None else self._labels[self._starts[call] : self._starts[call + 1]]
            return dict(self._feeds[call]), labels
        return self._gathered(index, batches)

    def _gathered(self, index: Array, batches: Array) -> tuple[Feed, Array | None]:
        """Return samples of several batches as one call; only the batches that they lie in are opened."""
        result: Feed = {}
        rows = np.empty(len(index), np.int64)
        for batch in np.unique(batches):
            call, places = self._used[batch], np.flatnonzero(batches == batch)
            inside = index[places] - (self._ends[batch - 1] if batch else 0)
            rows[places] = self._starts[call] + inside
            for name, value in self._feeds[call].items():
                if name not in self._axes:
                    result[name] = value
                    continue
                axis = self._axes[name]
                if name not in result:
                    result[name] = np.empty((*value.shape[:axis], len(index), *value.shape[axis + 1 :]), value.dtype)
                np.moveaxis(result[name], axis, 0)[places] = np.moveaxis(value, axis, 0)[inside]
        return result, None if self._labels is None else self._labels[rows]

    def _count(self, feed: Feed) -> int:
        """Return the number of samples of a call."""
        return next((feed[name].shape[axis] for name, axis in self._axes.items()), 0) or count(feed)

    def _sizes(self, feed: Feed) -> _Sizes:
        """Return the sizes of the inputs of a call, without the number of samples where they can be taken out."""
        axes = self._axes
        return frozenset((n, tuple(m for a, m in enumerate(v.shape) if a != axes.get(n))) for n, v in feed.items())

    def beside(self, feeds: Sequence[Feed], labels: Array | None) -> _Samples:
        """Return the samples of other calls, drawn in the size of these; these themselves where none has it."""
        samples = _Samples(feeds, self.size, labels, self._seed, self._all_axes, self.draw(0)[0])
        return samples if samples.num else self


def _axes_in(feeds: Sequence[Feed], axes: SampleAxes) -> dict[str, int]:
    """Return the axes of the inputs that have samples; none where samples cannot be taken out of their calls.

    They can be where all other inputs have the same values in every call.
    """
    first = feeds[0]
    known = {name: axes.get(name, 0) for name, value in first.items() if value.ndim}
    result = {name: axis for name, axis in known.items() if axis is not None}
    for feed in feeds:
        sizes = {feed[name].shape[axis] for name, axis in result.items() if name in feed}
        others = all(np.array_equal(feed[name], first[name]) for name in first if name in feed and name not in result)
        if feed.keys() != first.keys() or len(sizes) != 1 or not others:
            return {}
    return result


class _OwnLoss:
    """A loss of the user's own: its gradients are inputs of the training graph.

    Args:
        function: see :class:`Finetune`.
        student: the model.
        weights: the weights to train.
        fitted: the tensors that it gets.
        names: names of the original's values of these tensors.
    """

    def __init__(
        self,
        function: UserLoss,
        student: StaticGraph,
        weights: Sequence[str],
        fitted: Sequence[Head],
        names: Mapping[str, str],
    ) -> None:
        self._function, self._names = function, names
        self.gradient_names = {head: f"given.{k}" for k, head in enumerate(fitted)}
        self.inputs = {
            name: (student.shapes[h.tensor], np.dtype(np.float32)) for h, name in self.gradient_names.items()
        }
        tape = Tape(student.shapes, student.kinds, "own")
        self._shown = {h: tape.emit("Identity", [h.tensor], tape.shape(h.tensor)) for h in fitted}
        graph = inference_graph(student, tape, list(self._shown.values()), weights)
        self._session = open_session(graph.SerializeToString(), spin=False)
        self._accepted = {i.name for i in self._session.get_inputs()}

    def __call__(self, feed: Feed, parameters: Parameters, labels: Array | None) -> Feed:
        """Return the gradients and the offset for one call.

        Raises:
            UsageError: the loss is no number, or a gradient does not fit.
        """
        inputs = {**feed, **parameters.views(parameters.vector)}
        values = run(self._session, {n: v for n, v in inputs.items() if n in self._accepted})
        outputs = {head.output: values[shown] for head, shown in self._shown.items()}
        targets = {head.output: feed[self._names[head.tensor]] for head in self._shown}
        value, gradients = self._checked(self._function(outputs, targets, labels), outputs)
        result: Feed = {}
        linear = 0.0
        for head, name in self.gradient_names.items():
            user_output = outputs[head.output]
            gradient = np.asarray(gradients.get(head.output, np.zeros_like(user_output)))
            is_real = gradient.dtype.kind in "iuf" and bool(np.isfinite(gradient).all())
            if gradient.shape != user_output.shape or not is_real:
                raise UsageError(
                    f"{argument('loss')} returned a gradient of shape {list(gradient.shape)} for output "
                    f"{head.output!r} of {list(user_output.shape)}, or NaN in it",
                    hint="Return finite gradients of the shape of each output.",
                )
            result[name] = gradient.astype(np.float32)
            linear += float(np.vdot(gradient, user_output))
        return {**result, OFFSET: np.asarray(value - linear, np.float32)}

    def _checked(self, returned: Any, outputs: Feed) -> tuple[float, Mapping[str, Array]]:
        """Return the value and gradients that a function returned; raises UsageError where it is anything else."""
        name = argument("loss")
        is_pair = isinstance(returned, tuple | list) and len(returned) == 2
        if not is_pair or np.ndim(returned[0]) or not isinstance(returned[1], Mapping):
            raise UsageError(
                f"{name} returned {type(returned).__name__}, not its value and its gradients",
                hint="Return a number and {output: gradient}.",
            )
        value, gradients = returned
        if not np.issubdtype(np.asarray(value).dtype, np.number) or not np.isfinite(value):
            raise UsageError(
                f"{name} returned {value}", hint="Return a finite number for every batch: divide by its size."
            )
        unknown = next((n for n in gradients if n not in outputs), None)
        if unknown is not None:
            raise UsageError(
                f"{name} returned a gradient for {unknown!r}, which is none of its outputs",
                hint=nearest(str(unknown), outputs),
            )
        return float(value), gradients


@dataclass(slots=True)
class Training:
    """A training of one model: its teacher, samples, step and judge."""

    context: Context
    model: Model
    split: CalibrationSplit
    settings: Finetune
    samples: _Samples
    student: StaticGraph
    teacher: Teacher
    parameters: Parameters
    step: Step
    frozen: Mapping[str, str]
    calls: int
    labels: Mapping[Head, tuple[str, tuple[int, ...]]]
    held_labels: Array | None
    before: Fidelity
    own_loss: _OwnLoss | None = None
    augmentation: Augmentation | None = None
    after: Fidelity | None = None
    by_labels: list[float] = field(default_factory=list)
    coded: Sequence[CodedWeight] = ()
    batch: int = BATCH
    judged: dict[float, Judgement] = field(default_factory=dict)
    balance: Array = field(default_factory=lambda: np.zeros((), np.float32))
    reconstruction: Reconstruction | None = None
    blocks: int = 0

    @classmethod
    def prepare(cls, settings: Finetune, context: Context, model: Model, split: CalibrationSplit) -> Self:
        """Build the graphs of both models at the batch size that memory allows.

        Raises:
            ModelError: no weight can be trained.
        """
        (before,) = compare_with_original(context.analysis, [model.parts], split.validation, context.outputs)
        fixed = CalibrationBatches(context, model.analysis).fixed
        batch = settings.batch_size or default_batch(answers_of_sample(model.analysis, split.fit[0]))
        size = fixed or min(batch, split.num_fit)
        user_labels = settings.labels if settings.labels is not None else context.labels
        labels, hold_out = (
            (None, None)
            if user_labels is None
            else split_labels(read_labels(user_labels, context, model.analysis), split)
        )
        samples = _Samples.of(context, model.analysis, split, size, labels)
        size, (feed, _) = samples.size, samples.draw(0)
        parts, coded = with_numbers(*model.parts)
        student = static_graph(*parts, feed)
        limit = (context.memory_limit or _MEMORY) / _LIVE
        if fixed is None and (room := int(limit // max(1, _bytes(student) // size))) < size:
            size = max(1, room)
            samples = _Samples.of(context, model.analysis, split, size, labels)
            feed, _ = samples.draw(0)
            student = static_graph(*parts, feed)
        loaded = context.analysis.loaded
        original = static_graph(loaded.proto, loaded.weights, feed)
        weights, reasons = trainable(student)
        if not weights:
            raise _untrainable(reasons)
        by_parts = settings.loss is None and labels is None
        fitted = fitted_heads(student, weights, original, before, f"Drop {argument('finetune')}.", by_parts=by_parts)
        steps = _features(student, original, model, [h.tensor for h in fitted], settings.features)
        teacher = Teacher(original, student, fitted, steps, feed)
        names = teacher.names
        known = {} if labels is None else _labelled(fitted, student, labels)
        user_loss = None if settings.loss is None else _OwnLoss(settings.loss, student, weights, fitted, names)
        losses = Losses(
            {h: names[h.tensor] for h in fitted},
            {n: names[n] for n in steps},
            {} if user_loss is not None else {h: n for h, (n, _) in known.items()},
            teacher.counted,
            user_gradients={} if user_loss is None else user_loss.gradient_names,
        )
        inputs = {**teacher.inputs, **{name: (shape, np.dtype(np.float32)) for name, shape in known.values()}}
        inputs |= {name: ((), np.dtype(np.float32)) for name in (BALANCE, OFFSET)}
        inputs |= {} if user_loss is None else user_loss.inputs
        graph = training_graph(student, losses.loss, weights, inputs=inputs)
        frozen = {**{n: r for n, r in reasons.items() if "parameter" not in r}, **graph.frozen}
        frozen = {n: r for n, r in frozen.items() if not any(n in c.settings for c in coded)}
        if not graph.gradients:
            raise _untrainable(frozen)
        parameters = Parameters({n: student.constants[n] for n in graph.gradients}, _locked(model, coded))
        step = Step(graph, parameters, context.device.threads)
        calls = max(1, -(-batch // samples.size))
        graphs, labelled = (student, teacher, parameters, step), (known, hold_out)
        training = cls(context, model, split, settings, samples, *graphs, frozen, calls, *labelled, before, user_loss)
        training.coded, training.batch = coded, batch
        training.reconstruction = Reconstruction.suited(training, original, fitted)
        if settings.augment != "none":
            answers = lambda f: [teacher(f)[names[h.tensor]] for h in fitted]  # noqa: E731
            training.augmentation = Augmentation.suited([samples.draw(0)[0]], answers, settings.augment)
        return training

    def run(self) -> Course:
        """Train as a whole or block by block, or in the way that is better on the hold-out."""
        start = None if self.held_labels is None else self.judgement()
        effort, keeper = self.effort(), self.keeper()
        if self.reconstruction is None:
            course = self._train_all(effort, keeper)
        elif self.settings.blocks == "yes":
            course = self._by_blocks(effort, keeper)
        else:
            course = self._better(effort, keeper)
        if keeper is not None and course.stopped != "interrupted":
            keeper.clear()
        end = self.judged.get(dict(course.curve)[course.best]) or self.judgement()
        self.after = end.fidelity
        self.by_labels = [x.by_labels for x in (start, end) if x is not None and x.by_labels is not None]
        return course

    def draw(self, number: int, teacher: Teacher | None = None) -> list[Feed]:
        """Return the calls of a step, with what a teacher answers; None: that of the whole model."""
        calls = []
        for k in range(self.calls):
            feed, labels = self.samples.draw(number * self.calls + k)
            if self.augmentation is not None:
                feed = self.augmentation(feed, np.random.default_rng([self.context.seed, number, k]))
            calls.append(self.call(feed, labels, teacher or self.teacher))
        return calls

    def call(self, feed: Feed, labels: Array | None, teacher: Teacher) -> Feed:
        """Return one call with everything that the loss reads."""
        batch = {} if labels is None else {name: as_targets(labels, shape) for name, shape in self.labels.values()}
        feed = {**feed, **teacher(feed)}
        if self.own_loss is not None:
            batch = self.own_loss(feed, self.parameters, labels)
        return {**feed, **batch, BALANCE: self.balance}

    def judge(self) -> float:
        """Return the distance of the present weights on the hold-out."""
        judgement = self.judgement()
        self.judged[judgement.distance] = judgement
        return judgement.distance

    def _train_all(self, effort: Effort, keeper: Keeper | None = None) -> Course:
        """Train all weights together."""
        first, balance = self.draw(0), self.balance
        balance[...] = 0
        outputs = self.step(first)
        balance[...] = 1
        features = self.step(first) - outputs
        # Tensors between are compared on the way to the outputs, and never in their place.
        # A model that is its own teacher has no loss to compare them with.
        is_far = outputs > _SETTLED and features > 1e-6 * outputs
        balance[...] = _FEATURE_SHARE * outputs / features if is_far else 0
        sizes, doubling = step_sizes(self.step, first, self.parameters, self.context.seed, self.least_loss, self.probe)
        rate = min(self.settings.rate, _BOLDNESS * doubling)
        optimizer, error = self.optimizer(sizes), partial(standard_error, samples=self.split.num_held_out)
        tell = partial(self.context.tell, self.stage)
        return train(self.step, optimizer, self.parameters, self.draw, self.judge, effort, rate, error, tell, keeper)

    def _by_blocks(self, effort: Effort, keeper: Keeper | None = None) -> Course:
        """Train one block after the other."""
        assert self.reconstruction is not None
        self.blocks = len(self.reconstruction.blocks)
        return self.reconstruction.run(effort, keeper)

    def _better(self, effort: Effort, keeper: Keeper | None = None) -> Course:
        """Try both ways for a share of the effort, and go on in the better one from the weights that it has made."""
        vector, start = self.parameters.vector, self.parameters.vector.copy()
        state = {n: v for n, v in _stored(keeper).items() if n.startswith("trial")}
        trials = []
        for k, way in enumerate((self._train_all, self._by_blocks)):
            trial = {name.removeprefix(f"trial{k}."): value for name, value in state.items()}
            if "weights" in trial:
                course, vector[:] = _course_of(trial), trial["weights"]
            else:
                vector[:] = start
                course = way(effort.part(_TRIAL), _part_of(keeper, state))
            trials.append((dict(course.curve)[course.best], course, vector.copy(), way))
            if course.stopped == "interrupted":
                break
            state |= {f"trial{k}.{n}": v for n, v in {**_arrays_of(course), "weights": vector.copy()}.items()}
            if keeper is not None and "weights" not in trial:
                keeper.save(state)
        _, best, weights, way = min(trials, key=lambda one: one[0])
        vector[:] = weights
        assert self.reconstruction is not None
        self.blocks = 0 if way == self._train_all else len(self.reconstruction.blocks)
        spent = sum(course.steps for _, course, _, _ in trials)
        seconds = sum(course.seconds for _, course, _, _ in trials)
        if any(course.stopped == "interrupted" for _, course, _, _ in trials):
            return replace(best, steps=spent, seconds=seconds, stopped="interrupted")
        last = way(effort.part(1 - _TRIAL * len(trials)), _part_of(keeper, state))
        return Course(
            steps=spent + last.steps,
            seconds=seconds + last.seconds,
            losses=[*best.losses, *last.losses],
            curve=[*best.curve, *((spent + step, value) for step, value in last.curve[1:])],
            best=spent + last.best if last.best else best.best,
            stopped=last.stopped,
        )

    @property
    def stage(self) -> str:
        """The name of the stage of the progress bar."""
        return "finetune"

    @property
    def probe(self) -> float:
        """The distance at which the curvature of the loss is measured: codes hide small changes."""
        return _CODED_PROBE if self.coded else PROBE

    @property
    def least_loss(self) -> float:
        """The smallest loss that the first steps may double."""
        return 0.0

    def optimizer(self, sizes: Vector) -> Adam:
        """Return the optimiser, with the sizes of its steps."""
        return Adam(self.parameters, sizes, coordinates=self.curvature())

    def curvature(self) -> Curvature:
        """Return the curvature of the layers' inputs on a few calls."""
        feeds = (self.samples.draw(k)[0] for k in range(CALLS))
        return Curvature.measured(self.student, self.parameters, feeds)

    def effort(self) -> Effort:
        """Return the length of the training: as requested, else as much as the effort of the run allows."""
        requested, usual = self.settings.effort, EFFORTS["normal"]
        if not self.settings.is_auto or self.context.effort.name == usual.name:
            return requested
        scale = self.context.effort.seconds / usual.seconds
        if scale < 1:
            self.context.stages.leave_out(f"fine-tuning for more than {scale:.0%} of the usual steps")
        return Effort(round((requested.steps or 0) * scale) or None, (requested.seconds or 0) * scale or None)

    def keeper(self) -> _Checkpoint | None:
        """Return where the state of the training is kept; None without a folder, or for data that are read once."""
        context, settings = self.context, self.settings
        data = CalibrationBatches(context, self.model.analysis).fingerprint() if context.cache is not None else None
        if context.cache is None or data is None:
            return None
        words = [*self.key(), context.seed, settings.rate, self.batch, settings.features]
        words += [settings.augment, self.effort(), self.held_labels is not None, self.parameters.shapes, FORMAT]
        words += [] if self.reconstruction is None else [settings.blocks, self.reconstruction.blocks]
        name = hashlib.sha256(repr(words).encode()).hexdigest()[:32]
        return _Checkpoint(context.cache / f"{self.stage}-{name}.npz", data, self.parameters.vector)

    def key(self) -> list[Any]:
        """Return the key of the training's state, beside its settings."""
        return [self.context.analysis.loaded.sha256]

    def judgement(self) -> Judgement:
        """Judge the present weights on the hold-out, by the original's answers and by labels."""
        parts, split = self.parts(), self.split
        (facts,) = compare_with_original(self.context.analysis, [parts], split.validation, self.context.outputs)
        if self.held_labels is None:
            return Judgement(facts)
        (head,) = self.labels
        return Judgement(facts, label_points(self.context.analysis, parts, split, head, self.held_labels))

    def parts(self) -> ModelParts:
        """Return the model with the present weights."""
        views = self.parameters.views(self.parameters.vector)
        proto, weights = self.model.parts
        numbers = {c.numbers for c in self.coded}
        inside = {n: v.copy() for n, v in views.items() if n not in weights and n not in numbers}
        changed: dict[str, Weight] = {n: ArrayWeight(n, v.copy()) for n, v in views.items() if n in weights}
        changed |= encoded(views, self.coded)
        if inside:  # Constant nodes
            proto = onnx.ModelProto()
            proto.CopyFrom(self.model.proto)
            for node in proto.graph.node:
                if node.op_type == "Constant" and node.output[0] in inside:
                    set_constant(node, ArrayWeight(node.output[0], inside[node.output[0]]))
        return proto, {**weights, **changed}

    def facts(self, course: Course) -> Finetuning:
        """Return the facts of the training."""
        return Finetuning(
            trained=len(self.parameters.spans),
            frozen=dict(self.frozen),
            augmentation="" if self.augmentation is None else self.augmentation.name,
            blocks=self.blocks,
            **self.course_facts(course),
        )

    def course_facts(self, course: Course) -> dict[str, Any]:
        """Return the fields of :class:`TrainingCourse`."""
        return {
            "steps": course.steps,
            "seconds": course.seconds,
            "batch": self.batch,
            "samples": self.samples.count,
            "aside": self.split.num_held_out,
            "losses": course.ends,
            "curve": course.curve,
            "before": self.before,
            "after": self.after or self.before,
            "undone": course.best == 0,
            "stopped": course.stopped,
            "by_labels": self.by_labels,
        }

    def remarks(self, facts: Finetuning) -> list[str]:
        """Return warnings."""
        remarks = []
        if facts.undone:
            remarks.append(
                f"{argument('finetune')} brought the outputs no closer to the original's on held-out samples and was "
                f"undone: more samples ({argument('data')}) or more time may help"
            )
        if facts.stopped:
            remarks.append(f"fine-tuning ended after {facts.steps} steps: {facts.stopped}")
        if self.samples.count < self.split.num_fit:
            num_others = self.split.num_fit - self.samples.count
            remarks.append(f"{num_others} samples have other sizes than most, and were not trained on")
        reasons = sorted(set(facts.frozen.values()))
        if reasons:
            what = "1 weight was" if len(facts.frozen) == 1 else f"{len(facts.frozen)} weights were"
            remarks.append(f"{what} not trained: {reasons[0]}")
        return [Note(text) for text in remarks]


@dataclass(slots=True)
class Reconstruction:
    """A training of one block after the other: what each makes of its present inputs, against the original's.

    Attributes:
        training: the training of the whole model.
        blocks: the blocks, in order.
        teacher: the original, from inputs to what blocks and outputs are compared with.
        fitted: the outputs.
    """

    training: Training
    blocks: Sequence[Block]
    teacher: Teacher
    fitted: Sequence[Head]

    @classmethod
    def suited(cls, training: Training, original: StaticGraph, fitted: Sequence[Head]) -> Reconstruction | None:
        """Return the training by blocks; None where it is not asked for, or there are no two blocks."""
        settings, split = training.settings, training.split
        is_auto = settings.blocks == "auto" and settings.loss is None
        if settings.blocks != "yes" and not (is_auto and split.num_fit + split.num_held_out < _FEW_SAMPLES):
            return None
        student, steps = training.student, settings.effort.steps
        limit = _MOST_BLOCKS if steps is None else max(1, min(_MOST_BLOCKS, steps // _BLOCK_STEPS))
        targets = _features(student, original, training.model, [h.tensor for h in fitted], limit)
        blocks = blocks_of(student, targets, training.parameters.spans)
        if len(blocks) < 2:
            return None
        teacher = Teacher(original, student, fitted, targets, training.samples.draw(0)[0])
        return cls(training, blocks, teacher, fitted)

    def run(self, effort: Effort, keeper: Keeper | None = None) -> Course:
        """Train every block for the same share of an effort, and leave the best weights behind any of them.

        Args:
            effort: effort of all blocks together.
            keeper: where the state is kept, so that an interrupted training goes on within its block.
        """
        training = self.training
        vector = training.parameters.vector
        stored = _stored(keeper)
        if stored:
            course, first, best = _course_of(stored), int(stored["blocks"]), stored["best"]
            vector[:] = stored["present"]
        else:
            course, first, best = Course(curve=[(0, training.judge())]), 0, vector.copy()
        samples = training.samples.beside(training.split.validation.inputs, training.held_labels)
        held_calls = [training.call(*samples.draw(k), self.teacher) for k in range(_HELD_CALLS)]
        share = effort.part(1 / len(self.blocks))
        with interruptible() as interrupted:
            for k in range(first, len(self.blocks)):
                state = {**_arrays_of(course), "blocks": np.asarray(k), "present": vector.copy(), "best": best}
                if not interrupted.is_set():
                    train_block = self._prepared(self.blocks[k], share, course.steps, held_calls)
                if interrupted.is_set():
                    course.stopped = "interrupted"
                    break
                part = train_block(_part_of(keeper, state))
                course.steps, course.seconds = course.steps + part.steps, course.seconds + part.seconds
                course.losses += part.losses
                if part.steps:
                    course.curve.append((course.steps, training.judge()))
                    if course.curve[-1][1] < dict(course.curve)[course.best]:
                        course.best = course.steps
                        best = vector.copy()
                if part.stopped == "interrupted":
                    course.stopped = part.stopped
                    break
                if keeper is not None:
                    state |= {**_arrays_of(course), "blocks": np.asarray(k + 1), "present": vector, "best": best}
                    keeper.save(state)
                training.context.tell(training.stage, (k + 1) / len(self.blocks))
        vector[:] = best
        return course

    def _prepared(
        self, block: Block, effort: Effort, number: int, held_calls: Sequence[Feed]
    ) -> Callable[[Keeper | None], Course]:
        """Return the training of the weights of one block, with all others as they are now.

        Args:
            block: the block.
            effort: its effort.
            number: number of the first step.
            held_calls: calls of the hold-out, on which its best weights are chosen.
        """
        training = self.training
        present = training.parameters.views(training.parameters.vector)
        constants = {**training.student.constants, **{name: value.copy() for name, value in present.items()}}
        student = replace(training.student, constants=constants, producer={}, readers={})
        graph = training_graph(student, partial(self._loss, block), block.weights, inputs=self._inputs())
        if not graph.gradients:
            return lambda keeper: Course()
        parameters = Parameters({n: constants[n] for n in graph.gradients}, _locked(training.model, training.coded))
        step = Step(graph, parameters, training.context.device.threads)

        def draw(k: int) -> list[Feed]:
            return training.draw(number + k, self.teacher)

        sizes, doubling = step_sizes(step, draw(0), parameters, training.context.seed, 0.0, training.probe)
        feeds = (training.samples.draw(k)[0] for k in range(CALLS))
        optimizer = Adam(parameters, sizes, coordinates=Curvature.measured(student, parameters, feeds))
        rate = min(training.settings.rate, _BOLDNESS * doubling)

        def train_block(keeper: Keeper | None) -> Course:
            judge = lambda: 100 * step(held_calls)  # noqa: E731
            course = train(step, optimizer, parameters, draw, judge, effort, rate, keeper=keeper)
            for name, value in parameters.views(parameters.vector).items():
                present[name][...] = value
            return course

        return train_block

    def _loss(self, block: Block, tape: Tape) -> str:
        """Emit the error of what a block makes; of the head, the loss of the outputs."""
        names, counted = self.teacher.names, self.teacher.counted
        if block.target:
            return deviation(tape, block.target, names[block.target], counted.get(block.target, ""))
        labels = {head: name for head, (name, _) in self.training.labels.items()}
        heads = {h: names[h.tensor] for h in self.fitted}
        return Losses(heads, {}, labels, counted).emit(tape)

    def _inputs(self) -> Mapping[str, tuple[Sequence[int], Any]]:
        """Return the inputs that losses read: shape and type by name."""
        labels = {name: (shape, np.dtype(np.float32)) for name, shape in self.training.labels.values()}
        return {**self.teacher.inputs, **labels}


def _untrainable(reasons: Mapping[str, str]) -> ModelError:
    """Return the error of a model whose weights all stay as they are.

    Args:
        reasons: the reason for each weight.
    """
    parameters = {name: why for name, why in reasons.items() if "parameter" not in why}
    name, why = next(iter(parameters.items()), ("", ""))
    text = f"weight {name!r}: {why}" if name else "it has no weights in float32"
    return ModelError(f"No weight of the model can be trained: {text}.", hint=f"Drop {argument('finetune')}.")


def _locked(model: Model, coded: Sequence[CodedWeight]) -> frozenset[str]:
    """Return the names of the weights whose zeros stay 0, as a training knows them."""
    return model.locked | {c.numbers for c in coded if c.codes in model.locked}


@dataclass(frozen=True, slots=True)
class Judgement:
    """The judgement of the hold-out.

    Attributes:
        fidelity: to the original.
        by_labels: points by the labels, 0 to 100; None without labels.
        penalty: points that the present weights are penalised with.
    """

    fidelity: Fidelity
    by_labels: float | None = None
    penalty: float = 0.0

    @property
    def distance(self) -> float:
        """The distance from the expected answers: half by the original, half by the labels; and a penalty."""
        mine = distance(self.fidelity)
        return self.penalty + (mine if self.by_labels is None else (mine + 100 - self.by_labels) / 2)


FORMAT = 3
"""Raised whenever the state of a training has another meaning."""


class OtherDataError(UsageError):
    """A training that was interrupted on other data (exit code 2)."""


class _Checkpoint:
    """The state of one training in a file.

    Args:
        path: the file.
        data: fingerprint of the data.
        weights: the weights before any step.
    """

    def __init__(self, path: Path, data: str, weights: Array) -> None:
        make_folder(path.parent)
        self._path, self._data = path, data
        self._weights = hashlib.sha256(weights.tobytes()).hexdigest()

    def load(self) -> Mapping[str, Any] | None:
        """Return the state of a training that was broken off; None where there is none.

        Raises:
            UsageError: it was one on other data.
        """
        arrays = read_arrays(self._path)
        if not arrays or "data" not in arrays:
            return None
        if str(arrays["data"]) != self._data:
            raise OtherDataError(
                f"{argument('finetune')} was interrupted on other data, and cannot go on with these",
                hint=f"Give the same {argument('data')}, or delete {str(self._path)!r} to begin anew.",
            )
        return arrays if str(arrays["start"]) == self._weights else None

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep the state in place of the one before."""
        write_arrays(self._path, {**state, "data": np.asarray(self._data), "start": np.asarray(self._weights)})

    def clear(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a training: its state is kept beside that of the parts in front of it.

    Attributes:
        keeper: where the state of all parts is kept.
        state: the state of the parts in front of it.
    """

    keeper: Keeper
    state: Mapping[str, Any]

    def load(self) -> Mapping[str, Any] | None:
        """Return the state that this part had when the training was broken off; None where it had not begun."""
        arrays = self.keeper.load() or {}
        part = {name.removeprefix(_PART): value for name, value in arrays.items() if name.startswith(_PART)}
        return part or None

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep the state, beside that of the parts in front."""
        self.keeper.save({**self.state, **{f"{_PART}{name}": value for name, value in state.items()}})

    def clear(self) -> None:
        """Leave the state to the part behind this one, or to the end of the training."""


_PART = "part."


def _part_of(keeper: Keeper | None, state: Mapping[str, Any]) -> _Part | None:
    """Return where the state of a part of a training is kept; None where none is."""
    return None if keeper is None else _Part(keeper, dict(state))


def _stored(keeper: Keeper | None) -> Mapping[str, Any]:
    """Return the state of a training that was broken off; empty where there is none."""
    return (None if keeper is None else keeper.load()) or {}


def _arrays_of(course: Course) -> dict[str, Array]:
    """Return the course of a training that goes on, as arrays."""
    return {
        "counts": np.asarray([course.steps, course.best], np.int64),
        "seconds": np.asarray(course.seconds),
        "losses": np.asarray(course.losses, np.float64),
        "curve": np.asarray(course.curve, np.float64).reshape(-1, 2),
        "stopped": np.asarray(course.stopped),
    }


def _course_of(arrays: Mapping[str, Any]) -> Course:
    """Return the course of a training from its arrays."""
    steps, best = (int(n) for n in arrays["counts"])
    curve = [(int(a), float(b)) for a, b in arrays["curve"]]
    losses = [float(x) for x in arrays["losses"]]
    return Course(steps, float(arrays["seconds"]), losses, curve, best, str(arrays["stopped"]))


def distance(facts: Fidelity) -> float:
    """Return how far a model is from the original: the points it lacks; the share of noise where there are none."""
    return 100 * noise(facts) if facts.points is None else 100 - facts.points


def standard_error(distance: float, samples: int) -> float:
    """Return the standard error of a distance in points that was measured on so many samples."""
    share = min(max(distance / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / samples) if samples else 0.0


def _bytes(graph: StaticGraph) -> int:
    """Return the bytes of all activations of one call."""
    tensors = [o for node in graph.nodes for o in node.outputs if o in graph.shapes]
    return sum(int(np.prod(graph.shapes[o], dtype=np.int64)) * graph.kinds[o].itemsize for o in tensors)


# -- what is compared --------------------------------------------------------------------------------------------------


def _features(
    student: StaticGraph, original: StaticGraph, model: Model, fitted: Sequence[str], number: int
) -> dict[str, list[tuple[int, Array]]]:
    """Return tensors between blocks, with the channels of the original that each still has: (axis, indices)."""
    after = Survivors(model.analysis.table, model.removal)
    result: dict[str, list[tuple[int, Array]]] = {}
    for name in bottlenecks(student):
        if name in fitted or name not in original.shapes or not original.is_float(name):
            continue
        if name not in model.analysis.graph.producer or not can_follow(model.analysis, after, name):
            continue
        steps = after.steps(name)
        shape = list(original.shapes[name])
        for axis, index in steps:
            shape[axis] = index.shape[axis if index.ndim > 1 else 0]
        if all(i.ndim == 1 for _, i in steps) and tuple(shape) == student.shapes[name]:
            result[name] = steps
    names = list(result)
    if len(names) > number:
        indices = np.unique(np.linspace(0, len(names) - 1, number + 1).round().astype(int)[1:])
        names = [names[k] for k in indices]
    return {name: result[name] for name in names} if number else {}


class Teacher:
    """The original: from the inputs of a call to everything that a step compares with.

    Args:
        original: the original.
        student: the model.
        fitted: its outputs.
        steps: tensors between blocks, with the channels of the original that each still has: (axis, indices).
        feed: one call, whose masks show which tensors have positions that may be padding.

    Attributes:
        names: tensor -> input of the training graph with the original's value.
        counted: tensor -> input with 1 at its positions and 0 at those that are padding; only where a mask fits.
        inputs: these inputs, shape and type by name.
    """

    def __init__(
        self,
        original: StaticGraph,
        student: StaticGraph,
        fitted: Sequence[Head],
        steps: Mapping[str, Sequence[tuple[int, Array]]],
        feed: Feed,
    ) -> None:
        tape = Tape(original.shapes, original.kinds, "teacher")
        self.names: dict[str, str] = {}
        sources = {head.tensor: value_to_fit(tape, head) for head in fitted} | {name: name for name in steps}
        for name, value in sources.items():
            for axis, index in steps.get(name, ()):
                shape = list(tape.shape(value))
                shape[axis] = index.size
                value = tape.emit("Gather", [value, tape.constant(index.astype(np.int64))], shape, axis=axis)
            self.names[name] = tape.emit("Identity", [value], tape.shape(value))
        shown = list(self.names.values())
        self._session = open_session(inference_graph(original, tape, shown).SerializeToString())
        self._accepted = {i.name for i in self._session.get_inputs()}
        self.inputs = {shown: (student.shapes[name], student.kinds[name]) for name, shown in self.names.items()}
        self.counted: dict[str, str] = {}
        self._layouts: dict[str, tuple[Sequence[int], Sequence[int]]] = {}
        padding = Padding(feed)
        channels = {head.tensor: [a for a in (head.axis,) if a is not None] for head in fitted}
        for name in self.names:
            axes = channels[name] if name in channels else [axis for axis, _ in steps[name]]
            size, kind = student.shapes[name], student.kinds[name]
            mask = padding.counted(size, axes)
            if mask is not None:
                # Masks of one size are one mask, see Padding.
                self.counted[name] = f"counted.{kind.name}.{'x'.join(map(str, mask.shape))}"
                self.inputs[self.counted[name]] = mask.shape, kind
                self._layouts[self.counted[name]] = size, axes

    def __call__(self, feed: Feed) -> Feed:
        """Return everything that a call is compared with."""
        result = run(self._session, {name: value for name, value in feed.items() if name in self._accepted})
        padding = Padding(feed)
        for name, (shape, axes) in self._layouts.items():
            size, kind = self.inputs[name]
            mask = padding.counted(shape, axes)
            result[name] = np.ones(size, kind) if mask is None or mask.shape != size else mask.astype(kind)
        return result


# -- labels ------------------------------------------------------------------------------------------------------------


def split_labels(values: Array, split: CalibrationSplit) -> tuple[Array, Array | None]:
    """Return the labels of the samples to fit, and those of the hold-out; both come in the order of the batches.

    Args:
        values: labels of all samples.
        split: the samples.
    """
    if not split.num_held_out:
        return values[: split.num_fit], values[: split.num_fit]
    queues = {True: list(split.validation.inputs), False: list(split.fit)}
    parts: dict[bool, list[Array]] = {True: [], False: []}
    start, number = 0, 0
    while queues[True] or queues[False]:
        is_held = bool(queues[True]) and (number % 8 == 7 or not queues[False])
        size = count(queues[is_held].pop(0))
        parts[is_held].append(values[start : start + size])
        start, number = start + size, number + 1
    return np.concatenate(parts[False]), np.concatenate(parts[True])


def label_points(
    analysis: Analysis, parts: ModelParts, split: CalibrationSplit, head: Head, labels: Array
) -> float | None:
    """Return how well an output agrees with the labels of the hold-out: accuracy in percent, or 100 R^2, 0 or more.

    Args:
        analysis: of the original.
        parts: the model.
        split: the samples.
        head: output that the labels belong to.
        labels: of the hold-out.
    """
    with Workspace.of(analysis) as trial:
        session = open_session(trial.write(*parts, "labelled")[0], spin=False)
        feeds = split.validation.inputs
        outputs = [run(session, feed)[head.output] for feed in feeds]
    if len({x.shape[1:] for x in outputs}) > 1:
        return None
    values = np.concatenate(outputs)
    if labels.dtype.kind != "f":
        if values.ndim < 2 or len(values) != len(labels):
            return None
        return 100 * float(np.mean(values.reshape(len(values), -1).argmax(1) == labels.ravel()))
    if values.shape != labels.shape:
        return None
    masks = [Padding(feed).counted(x.shape) for feed, x in zip(feeds, outputs, strict=True)]
    each_counted = [np.True_ if mask is None else mask for mask in masks]
    counted = np.concatenate([np.broadcast_to(m, x.shape) for m, x in zip(each_counted, outputs, strict=True)])
    mean = (labels * counted).sum(axis=0, dtype=np.float64) / np.maximum(counted.sum(axis=0), 1)
    error = float(np.square((values.astype(np.float64) - labels) * counted).sum())
    spread = float(np.square((labels - mean) * counted).sum())
    return 100 * max(0.0, 1 - error / spread) if spread > 0 else None


def _labelled(fitted: Sequence[Head], student: StaticGraph, labels: Array) -> dict[Head, tuple[str, tuple[int, ...]]]:
    """Return the head that labels belong to, with the name and shape of their input."""
    head = labelled_head(fitted, student, labels)
    return {head: ("labels", student.shapes[head.tensor])}
