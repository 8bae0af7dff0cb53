"""Importance of rows of a regression: how much the outputs depend on each position of a tensor, from gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import ModelError
from onnxprune.gradients.backward import TrainingGraph, inference_graph, training_graph
from onnxprune.gradients.static import StaticGraph, static_graph
from onnxprune.gradients.tape import Tape
from onnxprune.graph.probes import SampleAxes, input_specs, sample_axes
from onnxprune.graph.view import Graph
from onnxprune.pipeline import Context
from onnxprune.runtime.masks import Padding
from onnxprune.runtime.sessions import Array, Feed, digest_of, open_session, run
from onnxprune.training.parameters import heads
from onnxprune.training.samples import position_axes

# Bytes of a model up to which its gradients are taken: the graph that computes them holds its weights once more.
_MODEL_BYTES = 1 << 28
# Bytes of tensors and their gradients that one call may take, where the run has no limit of its own.
_MEMORY = 1 << 29
# Sizes of calls that a graph is built for.
_SIZES = 2

Axes = Mapping[str, int]
"""Axis of the channels of every tensor whose positions are asked for."""
Importances = Mapping[str, Array]
"""Importances by tensor; empty for one that has none."""


def row_importances(context: Context, graph: Graph, axes: Axes, feeds: Sequence[Feed]) -> list[Importances]:
    """Return the importances of the positions of tensors, [samples, ..., 1, ...], for every call.

    Where an output has many positions, as in a detector, most of them show nothing, and a least-squares fit follows
    those. Rows are drawn by how much the outputs depend on them instead: the norm over channels of J^T z, with the
    Jacobian J of the outputs and a random z, whose square is an estimate of the trace of J^T J (Hutchinson, 1990). Each
    part of an output counts in units of its own spread; of scores of classes the logits count.

    Tensors without a gradient are left out, and all of them where outputs have one position per sample, where the model
    has no gradients, or where they would take too much memory.

    Args:
        context: the run of the original.
        graph: the original, in floats.
        axes: axis of the channels of every tensor.
        feeds: the calls.
    """
    analysis = context.analysis
    if not axes or analysis.loaded.size > _MODEL_BYTES or not _has_positions(analysis):
        return [{} for _ in feeds]
    calls = _Calls(graph, axes, sample_axes(input_specs(analysis.graph)), context.memory_limit or _MEMORY)

    def of_call(feed: Feed) -> Importances:
        key = analysis.loaded.sha256, digest_of(feed)
        known = context.importances.get(key)
        if axes.keys() <= known.keys():
            return known
        importances = dict.fromkeys(axes, np.zeros(0, np.float32)) | calls.importances(feed, context.seed)
        context.importances.hold(key, importances)
        return importances

    return [of_call(feed) for feed in feeds]


def _has_positions(analysis: Analysis) -> bool:
    """Return whether an output has several positions per sample."""
    shapes = [analysis.facts.probes[0].shapes.get(name) or () for name in analysis.graph.outputs]
    return any(shape[axis] != 1 for shape in shapes for axis in position_axes(len(shape)))


class _Calls:
    """Calls of one model, taken in parts whose gradients fit into memory.

    Args:
        graph: the model.
        axes: axis of the channels of every tensor.
        sample_axes: axis of the samples of every input.
        memory: bytes of tensors and their gradients.
    """

    def __init__(self, graph: Graph, axes: Axes, sample_axes: SampleAxes, memory: int) -> None:
        self._graph, self._axes, self._sample_axes, self._memory = graph, axes, sample_axes, memory
        self._opened: dict[object, tuple[_Gradients, int] | None] = {}

    def importances(self, feed: Feed, seed: int) -> dict[str, Array]:
        """Return the importances of one call; empty where there are none. Values of padding change nothing."""
        sizes = tuple((name, value.shape) for name, value in feed.items())
        if sizes not in self._opened:
            self._opened[sizes] = self._open(feed) if len(self._opened) < _SIZES else None
        opened = self._opened[sizes]
        if opened is None:
            return {}
        gradients, count = opened
        draw = np.random.default_rng(seed)
        try:
            parts = [gradients.importances(part, draw) for part in self._parts(feed, count)]
        except ModelError:  # a recovery does without
            return {}
        names = set(parts[0]).intersection(*parts)
        return {name: np.concatenate([part[name] for part in parts]) for name in sorted(names)}

    def _open(self, feed: Feed) -> tuple[_Gradients, int] | None:
        """Return the gradients for parts of calls of this size, and the number of parts; None where it has none."""
        samples = self._samples(feed)
        try:
            static = static_graph(self._graph.proto, self._graph.weights, self._parts(feed, samples)[0])
            tensors = [o for node in static.nodes for o in node.outputs if o and static.is_float(o)]
            size = 2 * sum(4 * math.prod(static.shapes[name]) for name in tensors if static.shapes.get(name))
            at_once = self._memory // max(size, 1)
            if not at_once:
                return None
            count = next(n for n in range(1, samples + 1) if samples % n == 0 and samples // n <= at_once)
            if count < samples:
                static = static_graph(self._graph.proto, self._graph.weights, self._parts(feed, count)[0])
            return _Gradients(static, self._axes), count
        except ModelError:
            return None

    def _samples(self, feed: Feed) -> int:
        """Return the number of samples that can be taken out of a call; 1 where none can."""
        counts = {v.shape[a] for n, v in feed.items() if v.ndim and (a := self._sample_axes.get(n, 0)) is not None}
        others = [n for n, v in feed.items() if v.ndim and self._sample_axes.get(n, 0) is None]
        return counts.pop() if len(counts) == 1 and not others else 1

    def _parts(self, feed: Feed, count: int) -> list[Feed]:
        """Return a call in so many parts of as many samples each."""
        parts: list[Feed] = [{} for _ in range(count)]
        for name, value in feed.items():
            axis = self._sample_axes.get(name, 0)
            pieces = [value] * count if not value.ndim or axis is None else np.split(value, count, axis)
            for part, piece in zip(parts, pieces, strict=True):
                part[name] = piece
        return parts


class _Gradients:
    """Gradients of random projections of the outputs, for calls of one size.

    Args:
        graph: the model.
        axes: axis of the channels of every tensor.

    Raises:
        ModelError: no output depends on any of the tensors through operators that have a gradient.
    """

    def __init__(self, graph: StaticGraph, axes: Axes) -> None:
        tensors = {name: axis for name, axis in axes.items() if name in graph.producer and graph.is_float(name)}
        self._heads = {f"target.{k}": head for k, head in enumerate(heads(graph, tensors, by_parts=True))}
        if not self._heads:
            raise ModelError("No output of the model depends on these tensors through operators that have a gradient.")
        self._shapes = {name: graph.shapes[head.tensor] for name, head in self._heads.items()}
        inputs = {name: (shape, np.dtype(np.float32)) for name, shape in self._shapes.items()}
        self._training: TrainingGraph = training_graph(graph, self._loss, (), inputs=inputs, squares=tensors)
        self._session = open_session(self._training.model.SerializeToString())
        tape = Tape(graph.shapes, graph.kinds, "answers")
        self._shown = {
            name: tape.emit("Identity", [head.tensor], tape.shape(head.tensor)) for name, head in self._heads.items()
        }
        self._answers = open_session(inference_graph(graph, tape, list(self._shown.values())).SerializeToString())

    def _loss(self, tape: Tape) -> str:
        """Emit the sum of all values times random coefficients."""
        parts = [tape.total(tape.mul(head.tensor, name)) for name, head in self._heads.items()]
        return reduce(tape.add, parts)

    def importances(self, feed: Feed, draw: np.random.Generator) -> dict[str, Array]:
        """Return the importances of one call; all are finite."""
        answers = run(self._answers, {i.name: feed[i.name] for i in self._answers.get_inputs()})
        padding = Padding(feed)
        targets = {name: _projection(answers[shown], padding, draw) for name, shown in self._shown.items()}
        inputs = {**feed, **targets}
        values = run(self._session, {i.name: inputs[i.name] for i in self._session.get_inputs()})
        squares = {name: values[output].astype(np.float32) for name, output in self._training.squares.items()}
        return {name: np.sqrt(value) for name, value in squares.items() if np.isfinite(value).all()}


def _projection(answers: Array, padding: Padding, draw: np.random.Generator) -> Array:
    """Return random coefficients of the values of an output, in units of their spread; 0 for padding."""
    counted = padding.counted(answers.shape)
    noise = draw.standard_normal(answers.shape) * (1.0 if counted is None else counted)
    values = answers if counted is None else answers[np.broadcast_to(counted, answers.shape)]
    spread = float(values.std(dtype=np.float64)) * math.sqrt(max(values.size, 1))
    return (noise / (spread or 1.0)).astype(np.float32)
