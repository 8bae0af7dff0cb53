"""One training step: loss and gradients by onnxruntime, in views of one vector, and the optimiser on that vector."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import ModelError
from onnxprune.gradients.backward import TrainingGraph
from onnxprune.graph.resized import fitted, resized_of
from onnxprune.runtime.sessions import CANNOT_RUN, Array, Feed, open_session, shorten

Vector = NDArray[np.float32]


class Parameters:
    """Weights as one vector, with a view for each.

    Args:
        values: the weights by name, float32.
        locked: names of the weights whose zeros stay 0.
    """

    def __init__(self, values: Mapping[str, Array], locked: Collection[str] = ()) -> None:
        self.shapes = {name: value.shape for name, value in values.items()}
        bounds = np.cumsum([0, *(value.size for value in values.values())])
        self.spans = {name: slice(a, b) for name, (a, b) in zip(values, pairwise(bounds.tolist()), strict=True)}
        self.vector: Vector = np.concatenate([v.ravel() for v in values.values()]).astype(np.float32)
        masks = [v.ravel() == 0 if name in locked else np.zeros(v.size, bool) for name, v in values.items()]
        self.zeros: NDArray[np.bool_] | None = np.concatenate(masks) if any(h.any() for h in masks) else None

    def views(self, vector: Array) -> dict[str, Array]:
        """Return the weights that a vector holds, without copying."""
        return {name: vector[span].reshape(self.shapes[name]) for name, span in self.spans.items()}

    def keep_zeros(self) -> None:
        """Set locked weights to 0 again."""
        if self.zeros is not None:
            self.vector[self.zeros] = 0

    def scales(self) -> Vector:
        """Return for every element the root mean square of its weight, at least a tenth of the median over weights.

        Elements that are locked at 0 have none.
        """
        sizes = {
            name: float(np.sqrt(np.mean(np.square(self.vector[s], dtype=np.float64)))) for name, s in self.spans.items()
        }
        least = 0.1 * float(np.median(list(sizes.values())))
        result = np.empty_like(self.vector)
        for name, span in self.spans.items():
            result[span] = max(sizes[name], least, 1e-8)
        if self.zeros is not None:
            result[self.zeros] = 0
        return result


class Step:
    """Loss and gradients of calls, with weights and gradients bound to vectors.

    Args:
        graph: the training graph.
        parameters: the weights; their vector is read at every call.
        threads: threads inside an operator; None: all processors.
    """

    def __init__(self, graph: TrainingGraph, parameters: Parameters, threads: int | None = None) -> None:
        self._graph, self._parameters = graph, parameters
        self._session = open_session(graph.model.SerializeToString(), threads=threads)
        self._inputs = {i.name for i in self._session.get_inputs()}
        self._resized = resized_of(graph.model)
        self.gradient: Vector = np.zeros_like(parameters.vector)
        self._sum: Vector | None = None

    def __call__(self, calls: Sequence[Feed]) -> float:
        """Set ``gradient`` to the mean over calls, and return the mean loss."""
        losses = [self._run(calls[0], self.gradient)]
        if len(calls) > 1:
            part = np.empty_like(self.gradient)
            for feed in calls[1:]:
                losses.append(self._run(feed, part))
                self.gradient += part
            self.gradient /= np.float32(len(calls))
        return float(np.mean(losses))

    def _run(self, feed: Feed, gradient: Vector) -> float:
        binding = self._session.io_binding()
        views = self._parameters.views(self._parameters.vector)
        for name, value in {**fitted(self._resized, feed), **views}.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(value).reshape(value.shape))
        binding.bind_output(self._graph.loss)
        for name, view in self._parameters.views(gradient).items():
            output = self._graph.gradients[name]
            binding.bind_output(output, "cpu", 0, np.float32, view.shape, view.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            raise ModelError(f"{CANNOT_RUN} with its gradients: {shorten(str(error))}") from error
        return float(binding.get_outputs()[0].numpy())


class Coordinates(Protocol):
    """Other coordinates for vectors of weights, see :class:`onnxprune.training.curvature.Curvature`."""

    def turned(self, gradient: Vector) -> Vector:
        """Return a gradient in the coordinates."""

    def back(self, move: Vector) -> Vector:
        """Return a step in the coordinates as a change of the weights."""


class Adam:
    """Adam with steps in units of given sizes, so that one rate fits layers of any scale.

    w -= rate * size(w) * m / (sqrt(v) + eps), with bias-corrected moments. Kingma and Ba, 2015; relative step sizes as
    in Adafactor, Shazeer and Stern, 2018.

    Args:
        parameters: the weights.
        sizes: size of each element's steps at a rate of 1, see :func:`step_sizes`.
        first, second: decay of the moments.
        coordinates: coordinates in which moments are taken; None: those of the weights themselves.
    """

    def __init__(
        self,
        parameters: Parameters,
        sizes: Vector,
        first: float = 0.9,
        second: float = 0.999,
        coordinates: Coordinates | None = None,
    ) -> None:
        self._parameters, self._sizes, self._first, self._second = parameters, sizes, first, second
        self._coordinates = coordinates
        self.reset()

    def reset(self) -> None:
        """Forget all gradients."""
        self.mean = np.zeros_like(self._parameters.vector)
        self.square = np.zeros_like(self._parameters.vector)
        self.count = 0

    def state(self) -> dict[str, Array]:
        """Return everything that later steps depend on."""
        return {"mean": self.mean, "square": self.square, "count": np.asarray(self.count)}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from a state."""
        self.mean[:], self.square[:], self.count = state["mean"], state["square"], int(state["count"])

    def update(self, gradient: Vector, rate: float, progress: float = 0.0) -> None:
        """Change the weights.

        Args:
            gradient: gradient of the loss.
            rate: size of the step.
            progress: share of the training that is done, 0 to 1, for optimisers that follow a schedule.
        """
        self.count += 1
        if self._coordinates is not None:
            gradient = self._coordinates.turned(gradient)
        one, two = np.float32(1 - self._first), np.float32(1 - self._second)
        change = gradient - self.mean
        change *= one
        self.mean += change
        np.square(gradient, out=change)
        change -= self.square
        change *= two
        self.square += change
        correction = math.sqrt(1 - self._second**self.count) / (1 - self._first**self.count)
        move: Vector = np.sqrt(self.square, out=change)
        move += np.float32(1e-12)
        np.divide(self.mean, move, out=move)
        if self._coordinates is not None:
            move = self._coordinates.back(move)
        move *= self._sizes
        move *= np.float32(rate * correction)
        self._parameters.vector -= move
        self._parameters.keep_zeros()


_PROBES, _ROUNDS = 3, 2
PROBE = 1e-3
"""Distance of the points between which gradients are compared; of weights that are rounded, more than a code."""
_SPREAD = 4.0  # largest curvature of one weight, relative to the median


def step_sizes(
    step: Step, calls: Sequence[Feed], parameters: Parameters, seed: int, least: float = 0.0, probe: float = PROBE
) -> tuple[Vector, float]:
    """Return sizes of steps for every element, and the rate at which a random step would double the loss.

    A size is the root mean square of a weight, and less for weights on which the loss depends far more steeply than on
    others, as on those of a layer that adds up large numbers of opposite signs: the curvature of the loss along every
    weight, times the square of its size, is limited to a few times the median over weights. It is estimated from
    differences of gradients at random points nearby (Hutchinson's estimator, 1990).

    Args:
        step: the step.
        calls: its calls.
        parameters: the weights, which stay as they are.
        seed: seed of the random points.
        least: smallest loss to double, for models that are their own teachers: their loss is 0 in the beginning.
        probe: distance of the points, in units of each weight's own size.
    """
    rng = np.random.default_rng(seed)
    sizes, start = parameters.scales(), parameters.vector.copy()
    loss, total = max(step(calls), least), 0.0
    for _ in range(_ROUNDS):
        bends = dict.fromkeys(parameters.spans, 0.0)
        for _ in range(_PROBES):
            direction = sizes * rng.choice(np.asarray([-1, 1], np.float32), len(sizes))
            ends = []
            for side in (1, -1):
                parameters.vector[:] = start + np.float32(side * probe) * direction
                step(calls)
                ends.append(step.gradient.copy())
            bend = direction.astype(np.float64) * (ends[0] - ends[1]) / (2 * probe * _PROBES)
            bends = {name: value + float(bend[parameters.spans[name]].sum()) for name, value in bends.items()}
        usual = float(np.median([max(b, 0.0) for b in bends.values()]))
        for name, bend in bends.items():
            if bend > _SPREAD * usual > 0:
                sizes[parameters.spans[name]] *= math.sqrt(_SPREAD * usual / bend)
        total = sum(min(max(b, 0.0), _SPREAD * usual) for b in bends.values())
    parameters.vector[:] = start
    return sizes, math.sqrt(2 * loss / total) if total > 0 and loss > 0 and math.isfinite(total) else math.inf


def rate_at(progress: float, peak: float, warm_up: float = 0.15) -> float:
    """Return the step size: linear warm-up, then half a cosine down to 0.

    Args:
        progress: share of the training that is done, 0 to 1.
        peak: largest step size.
        warm_up: share of the training for the warm-up.
    """
    if progress < warm_up:
        return peak * max(progress, 1e-3) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))
