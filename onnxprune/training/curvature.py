"""Coordinates of weights in which steps are taken: eigenvectors of what the layers read, scaled by its energy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxprune.gradients.backward import inference_graph
from onnxprune.gradients.static import StaticGraph
from onnxprune.gradients.tape import Tape
from onnxprune.operators.contractions import Form, pick
from onnxprune.operators.registry import rule_of
from onnxprune.runtime.masks import counted_rows
from onnxprune.runtime.sessions import Array, Feed, open_session, run
from onnxprune.training.step import Parameters, Vector

CALLS = 8
"""Calls that Gram matrices are taken from."""
_MOST_COLUMNS, _SMALL = 1536, 1e6  # layers whose weights are turned: columns, and multiply-accumulates of any layer
_SHARE = 0.75  # columns of a layer relative to its rows: its weights are turned for a quarter of the cost of its step
_ROWS = 10  # rows per column that a Gram matrix is estimated from, over all calls
_DAMPING = 1e-2  # added to every energy, relative to their mean: directions with less are no more than noise


@dataclass(frozen=True, slots=True)
class Axes:
    """The coordinates of one weight.

    Attributes:
        form: the layer as a matrix product.
        vectors: eigenvectors of the Gram matrix of its columns, [parts, columns, columns].
        scales: size of a step along each, [parts, columns, 1].
    """

    form: Form
    vectors: Array
    scales: Array


class Curvature:
    """Turns vectors of gradients into these coordinates, and steps back.

    In the coordinates of the eigenvectors of E[x x^T], a step along one changes the outputs by as much as its input
    has energy there; steps divided by the root of that energy change them alike. That is the input side of K-FAC
    (Martens and Grosse, 2015), with Adam in the coordinates as in SOAP (Vyas et al., 2024).

    Args:
        parameters: the weights.
        axes: coordinates by weight; others stay as they are.
    """

    def __init__(self, parameters: Parameters, axes: Mapping[str, Axes]) -> None:
        self._parameters, self.axes = parameters, axes

    @classmethod
    def measured(cls, graph: StaticGraph, parameters: Parameters, feeds: Iterable[Feed]) -> Curvature:
        """Return the coordinates for layers of a graph from their data on some calls."""
        sites = _sites(graph, parameters)
        if not sites:
            return cls(parameters, {})
        tape = Tape(graph.shapes, graph.kinds, "read")
        shown = {name: tape.emit("Identity", [name], tape.shape(name)) for name in {d for _, d in sites.values()}}
        session = open_session(inference_graph(graph, tape, list(shown.values())).SerializeToString(), spin=False)
        accepted = {i.name for i in session.get_inputs()}
        grams: dict[str, Array] = {}
        for feed in feeds:
            values = run(session, {n: v for n, v in feed.items() if n in accepted})
            with np.errstate(over="ignore", invalid="ignore"):
                for weight, (form, data) in sites.items():
                    gram = _gram(form, values[shown[data]], counted_rows(feed, graph.shapes[data][:-1]))
                    grams[weight] = grams.get(weight, 0.0) + gram
        usable = {weight: gram for weight, gram in grams.items() if np.isfinite(gram).all()}  # inputs may overflow
        return cls(parameters, {weight: _axes(sites[weight][0], gram) for weight, gram in usable.items()})

    def turned(self, gradient: Vector) -> Vector:
        """Return a gradient in the coordinates."""
        return self._each(gradient, lambda axes, m: axes.vectors.swapaxes(1, 2) @ m)

    def back(self, move: Vector) -> Vector:
        """Return a step in the coordinates as a change of the weights."""
        return self._each(move, lambda axes, m: axes.vectors @ (axes.scales * m))

    def _each(self, vector: Vector, change: Callable[[Axes, Array], Array]) -> Vector:
        result = vector.copy()
        views, turned = self._parameters.views(vector), self._parameters.views(result)
        for name, axes in self.axes.items():
            turned[name][...] = axes.form.restore(change(axes, axes.form.matrix(views[name])), views[name])
        return result


def _sites(graph: StaticGraph, parameters: Parameters) -> dict[str, tuple[Form, str]]:
    """Return the layer of every weight that one layer alone reads, and the data that it is multiplied with."""
    result: dict[str, tuple[Form, str]] = {}
    for node in graph.nodes:
        rule = rule_of(node)
        for w in rule.weights:
            name = node.inputs[w] if w < len(node.inputs) else ""
            data = next((k for k, n in enumerate(node.inputs) if n and k != w), None)
            if name not in parameters.spans or data is None or len(graph.readers[name]) > 1:
                continue
            shapes: list[tuple[int | None, ...] | None] = [graph.shapes.get(n) for n in node.inputs]
            form = rule.form(node, shapes, data)
            if form is None or form.weight != w:
                continue
            if _pays(form, graph.constants[name], graph.shapes[node.inputs[data]]) and not _is_locked(
                parameters, name, form
            ):
                result[name] = form, node.inputs[data]
    return result


def _pays(form: Form, weight: Array, data: Sequence[int]) -> bool:
    """Return whether turning a weight at every step costs little beside the step."""
    parts, columns, outputs = form.matrix(weight).shape
    if not 1 < columns <= _MOST_COLUMNS:
        return False
    return bool(2 * columns <= _SHARE * form.count(data) or parts * columns * columns * outputs <= _SMALL)


def _is_locked(parameters: Parameters, name: str, form: Form) -> bool:
    """Return whether single elements of a weight stay 0: steps along other axes than its own would move them.

    Whole outputs are apart from the others in these coordinates, and so are inputs that are 0 themselves.
    """
    if parameters.zeros is None:
        return False
    zeros = form.matrix(parameters.zeros[parameters.spans[name]].reshape(parameters.shapes[name]))
    return bool((zeros & ~zeros.all(axis=1, keepdims=True) & ~zeros.all(axis=2, keepdims=True)).any())


def _gram(form: Form, data: Array, counted: NDArray[np.bool_] | None) -> Array:
    """Return the mean product of every two columns, [parts, columns, columns].

    Args:
        form: the layer as a matrix product.
        data: what it reads.
        counted: which rows are no padding; None: all.
    """
    width = form.taps * int(np.prod([data.shape[a] for a in form.axes])) // form.parts
    columns = form.columns(data, pick(form, data, max(4, -(-_ROWS * width // (CALLS * len(data)))), counted))
    columns = columns.astype(np.float32)
    return np.asarray(columns.swapaxes(1, 2) @ columns / columns.shape[1], np.float64)


def _axes(form: Form, gram: Array) -> Axes:
    """Return coordinates from the sum of Gram matrices of several calls."""
    energy, vectors = np.linalg.eigh(gram)
    energy = np.maximum(energy, 0)
    mean = np.maximum(energy.mean(axis=1, keepdims=True), 1e-30)
    scales = 1 / np.sqrt(energy / mean + _DAMPING)
    # Together, steps change the outputs as much as steps along the weights themselves would.
    scales *= np.sqrt(energy.sum(1, keepdims=True) / np.maximum((energy * scales**2).sum(1, keepdims=True), 1e-30))
    return Axes(form, vectors.astype(np.float32), scales.astype(np.float32)[:, :, None])
