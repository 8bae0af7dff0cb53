"""Gradients of a model's loss on the data, for criteria that score weights by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import ModelError, UsageError, argument
from onnxprune.gradients.backward import inference_graph, training_graph
from onnxprune.gradients.static import StaticGraph, static_graph
from onnxprune.gradients.tape import Tape
from onnxprune.importance.slots import Claim, Gradients, Mask, channel_sums, weight_values
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.operators.registry import rule_of
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.labels import as_targets, labelled_head, read_labels
from onnxprune.passes.recover import compare_with_original
from onnxprune.pipeline import Context, HoldOut, ModelParts
from onnxprune.report.facts import Fidelity
from onnxprune.runtime.capture import count
from onnxprune.runtime.masks import Padding
from onnxprune.runtime.sessions import Array, Feed, open_session, run
from onnxprune.training.parameters import Head, heads, trainable
from onnxprune.training.step import Parameters, Step, Vector

SAMPLES = 256
"""Samples whose gradients are taken where the user sets no number."""
_SINGLE = {"gradient_square", "gate_magnitude", "gate_square"}  # of single samples, others of calls
_DRAWN = {"gradient_square", "gate_square"}  # for answers that are drawn, others for the likeliest one
_GATES = {"gate_magnitude", "gate_square"}


def score_gradients(
    context: Context,
    analysis: Analysis,
    needs: Sequence[str],
    every_claim: Sequence[tuple[str, Claim]] = (),
    removed: Mask | None = None,
) -> Gradients:
    """Return statistics of the gradients of a model's loss on the data.

    Args:
        context: the run, with the data and its labels, if any.
        analysis: analysis of the model.
        needs: statistics, see :data:`onnxprune.importance.statistics.GRADIENTS`.
        every_claim: weights and the channels that gates are wanted of.
        removed: mask over the atoms that are already removed: weights are 0 there.

    Raises:
        UsageError: there is no data, or labels do not fit.
        ModelError: the model does not run, or no weight has a gradient.
    """
    labels = None if context.labels is None else read_labels(context.labels, context, analysis)
    result = Gradients(0, {n: {} for n in needs if n not in _GATES}, {n: {} for n in needs if n in _GATES})
    with context.stage("gradients"):
        parts = (analysis.graph.proto, _without(analysis, removed))
        for drawn in (False, True):
            for single in (False, True):
                now = [n for n in needs if (n in _DRAWN) == drawn and (n in _SINGLE) == single]
                if now:
                    source = _Source(context, analysis, parts, labels, single=single, drawn=drawn)
                    result = _Sums(now, every_claim, result).add(source)
    return result


def weight_scores(context: Context, analysis: Analysis) -> dict[str, Array]:
    """Return |w g| of every weight that has a gradient, with the gradient g of the mean loss, by name.

    The loss is that of the labels of the run where there are some, else of the model's own answers. Lee et al., SNIP,
    ICLR 2019.

    Raises:
        UsageError: there is no data, or labels do not fit. ModelError: no weight has a gradient.
    """
    gradients = score_gradients(context, analysis, ["gradient"]).weights["gradient"]
    return {
        name: np.abs(analysis.graph.weights[name].read() * values)
        for name, values in gradients.items()
        if name in analysis.graph.weights
    }


def _without(analysis: Analysis, removed: Mask | None) -> Mapping[str, Weight]:
    """Return the weights, 0 where channels are removed already."""
    weights = analysis.graph.weights
    if removed is None or not removed.any():
        return weights
    changed = {}
    for name in weights:
        if analysis.table.get(name) and weights[name].dtype in (np.float32, np.float64):
            changed[name] = ArrayWeight(name, weight_values(analysis.table, name, removed))
    return {**weights, **changed}


def fitted_heads(
    student: StaticGraph,
    weights: Sequence[str],
    original: StaticGraph,
    before: Fidelity,
    drop: str,
    *,
    by_parts: bool = False,
) -> list[Head]:
    """Return the tensors to fit, of one shape in both models, with the axis of classes where outputs are scores.

    Args:
        student: the model.
        weights: its weights to train.
        original: the original.
        before: a comparison of both, which knows the kinds of outputs.
        drop: alternative for the hint of the error.
        by_parts: whether outputs that are joined come back as their parts; see :func:`heads`.

    Raises:
        ModelError: there is none.
    """
    kinds = {o.output: o for o in before.outputs}
    result = []
    for head in heads(student, weights, by_parts):
        tensors = [t for t in (head.tensor, head.logits) if t]
        if any(original.shapes.get(t) != student.shapes[t] or not student.shapes[t] for t in tensors):
            continue
        known = kinds.get(head.output)
        bounded = head.tensor in student.producer and rule_of(student.producer[head.tensor]).bounded
        if head.axis is None and known is not None and known.kind == "classes" and not bounded and not head.logits:
            axis = known.axis if known.axis is not None else -1
            shape = student.shapes[head.tensor]
            if head.tensor == head.output and -len(shape) <= axis < len(shape) and shape[axis] > 1:
                head = replace(head, axis=axis % len(shape))
        result.append(head)
    if not result:
        raise ModelError("No output of the model depends on weights through operators that have a gradient.", hint=drop)
    return result


class _Source:
    """Calls of a model, each with the gradients of its loss.

    Args:
        context: the run.
        analysis: analysis of the model.
        parts: the model.
        labels: of the samples; None: the model's own answers.
        single: whether every call is one sample.
        drawn: whether classes are drawn from the model's probabilities, in place of the likeliest.
    """

    def __init__(
        self,
        context: Context,
        analysis: Analysis,
        parts: ModelParts,
        labels: Array | None,
        *,
        single: bool,
        drawn: bool,
    ) -> None:
        self._batches = CalibrationBatches(context, analysis, min(SAMPLES, context.effort.samples or SAMPLES))
        self._size = self._batches.fixed or (1 if single else self._batches.max_size)
        self._labels, self._drawn, self._context = labels, drawn, context
        self._rng = np.random.default_rng(context.seed)
        feed = next(iter(self._batches.batches(self._size)), None)
        if feed is None:
            raise UsageError(f"{argument('data')} has too few samples for one call of the model")
        self._size = count(feed)
        graph = static_graph(*parts, feed)
        weights, reasons = trainable(graph)
        sample = HoldOut(list(islice(self._batches.batches(), 4)), "data")
        loaded = analysis.loaded
        (kinds,) = compare_with_original(analysis, [(loaded.proto, loaded.weights)], sample, context.outputs)
        hint = f"Choose another {argument('criterion')}, such as ziplm."
        self._heads = fitted_heads(graph, weights, graph, kinds, hint)
        if labels is not None:
            self._heads = [labelled_head(self._heads, graph, labels)]
        self._inputs = {f"target.{k}": head for k, head in enumerate(self._heads)}
        self._shapes = [graph.shapes[h.tensor] for h in self._heads]
        inputs = {n: (graph.shapes[h.tensor], np.dtype(np.float32)) for n, h in self._inputs.items()}
        training = training_graph(graph, self._loss, weights, inputs=inputs)
        if not training.gradients:
            why = next(iter({**reasons, **training.frozen}.values()), "it has no weights in float32")
            raise ModelError(f"No weight of the model has a gradient: {why}.", hint=hint)
        self.parameters = Parameters({n: graph.constants[n] for n in training.gradients})
        self._step = Step(training, self.parameters, context.device.threads)
        names = [h.tensor for h in self._heads]
        tape = Tape(graph.shapes, graph.kinds, "answers")
        shown = [tape.emit("Identity", [n], tape.shape(n)) for n in names]
        self._answers = open_session(inference_graph(graph, tape, shown).SerializeToString(), spin=False)
        self._shown, self._accepted = shown, {i.name for i in self._answers.get_inputs()}

    def _loss(self, tape: Tape) -> str:
        """Emit minus the sum of targets times values: log-probabilities of classes, other values as they are."""
        total = ""
        for name, head in self._inputs.items():
            values = head.tensor
            if head.axis is not None:
                values = tape.emit("LogSoftmax", [values], tape.shape(values), axis=head.axis)
            part = tape.total(tape.mul(values, name))
            total = tape.add(total, part) if total else part
        return tape.scale(total, -1)

    def each(self, take: Callable[[Vector, int], None]) -> int:
        """Hand the gradient of every call and the number of its samples on; return the number of all samples."""
        start, total = 0, self._batches.samples or 0
        for feed in self._batches.batches(self._size):
            size = count(feed)
            if size < self._size:
                break  # the graph has one size
            labels = None if self._labels is None else self._labels[start : start + size]
            start += size
            self._step([{**feed, **self._targets(feed, labels)}])
            if not np.isfinite(self._step.gradient).all():
                raise ModelError(
                    "A gradient of the model is NaN or infinite.",
                    hint=f"Check the scale of the data, or choose another {argument('criterion')}.",
                )
            take(self._step.gradient, size)
            self._context.tell("gradients", start / total if total else 0.0)
        return start

    def _targets(self, feed: Feed, labels: Array | None) -> Feed:
        """Return the targets of the loss for one call; those of padding are 0."""
        outputs = run(self._answers, {n: v for n, v in feed.items() if n in self._accepted})
        targets: Feed = {}
        padding = Padding(feed)
        for shown, (name, head) in zip(self._shown, self._inputs.items(), strict=True):
            values = outputs[shown]
            shares = padding.shares(values.shape, () if head.axis is None else (head.axis % values.ndim,))
            if labels is not None:
                target = as_targets(labels, values.shape)
                rows = values.size // values.shape[head.axis] if head.axis is not None else values.size / 2
                targets[name] = (target if head.axis is not None else target - values) / np.float32(rows)
            elif head.axis is not None:
                targets[name] = self._classes(values, head.axis)
            else:
                squares = np.square(values, dtype=np.float64) * (1 if shares is None else shares)
                scale = float(np.sqrt(np.mean(squares))) or 1.0
                noise = self._rng.standard_normal(values.shape)
                targets[name] = (noise / (scale * np.sqrt(values.size / count(feed)) * count(feed))).astype(np.float32)
            targets[name] = targets[name] / np.float32(len(self._heads)) * (np.float32(1) if shares is None else shares)
        return targets

    def _classes(self, scores: Array, axis: int) -> Array:
        """Return one class per row of scores as 1 over the number of rows, and 0 elsewhere."""
        values = scores.astype(np.float64)
        if self._drawn:  # the largest of scores with Gumbel noise is a class drawn by their softmax
            values = values + self._rng.gumbel(size=values.shape)
        best = np.expand_dims(values.argmax(axis), axis)
        result = np.zeros(scores.shape, np.float32)
        np.put_along_axis(result, best, np.float32(scores.shape[axis] / scores.size), axis)
        return result


@dataclass
class _Sums:
    """Sums over the calls of a source.

    Attributes:
        needs: statistics.
        every_claim: weights and channels of gates.
        into: statistics so far.
    """

    needs: Sequence[str]
    every_claim: Sequence[tuple[str, Claim]]
    into: Gradients
    _sums: dict[str, Array] = field(default_factory=dict)

    def add(self, source: _Source) -> Gradients:
        """Return the statistics with those of all calls of a source."""
        parameters, calls = source.parameters, 0
        trained = [(k, name, claim) for k, (name, claim) in enumerate(self.every_claim) if name in parameters.spans]
        for need in self.needs:
            if need not in _GATES:
                self._sums[need] = np.zeros(parameters.vector.size)

        def take(gradient: Vector, samples: int) -> None:
            nonlocal calls
            calls += 1
            for need, total in self._sums.items():
                wide = gradient.astype(np.float64)
                if need == "gradient":
                    total += samples * wide
                else:
                    total += np.abs(wide) if need == "gradient_total" else np.square(wide)
            if any(n in _GATES for n in self.needs):
                products = parameters.views(parameters.vector.astype(np.float64) * gradient)
                for k, name, claim in trained:
                    self._add_gate(k, channel_sums(claim, products[name]))

        samples = source.each(take)
        for need, total in self._sums.items():
            mean = total if need == "gradient_total" else total / (samples if need == "gradient" else calls)
            self.into.weights[need].update(parameters.views(mean))
        for need in self.needs:
            for k, sums in self.into.gates.get(need, {}).items():
                self.into.gates[need][k] = sums / calls
        return replace(self.into, samples=samples)

    def _add_gate(self, k: int, gate: Array) -> None:
        for need in self.needs:
            if need in _GATES:
                value = np.abs(gate) if need == "gate_magnitude" else np.square(gate)
                self.into.gates[need][k] = self.into.gates[need].get(k, 0.0) + value
