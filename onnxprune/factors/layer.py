"""A layer that can be taken apart: nodes that read one weight, the weight as a kernel, and where they run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxprune.contractions import Form
from onnxprune.decompose import Factor, Shape
from onnxprune.decompose.cost import Geometry
from onnxprune.decompose.factor import Array, Real
from onnxprune.graph.view import Node

ShapeOf = Callable[[str], Any]
Constant = Callable[[str, Array], str]
"""(stem, values) -> name of a new constant."""


@dataclass(frozen=True, slots=True)
class Use:
    """One node that reads the weight, and the sizes it runs at."""

    node: Node
    geometry: Geometry


class Operator(ABC):
    """How one operator lays its weight open, and which nodes can stand in its place."""

    @abstractmethod
    def describe(self, node: Node, position: int, form: Form | None, shapes: Sequence[Any]) -> Described | str:
        """The kernel's shape and where it runs, or why it stays.

        Args:
            position: of the weight among the inputs. form: the node as a product, None where it is none.
            shapes: of inputs and then outputs.
        """

    def kernel(self, weight: Array, described: Described) -> Real:
        """The weight as [parts, inputs, *kernel, outputs] in float64."""
        shape, form = described.shape, described.form
        matrix = np.asarray(weight, np.float64) if form is None else form.matrix(np.asarray(weight, np.float64))
        return np.ascontiguousarray(matrix).reshape(shape.parts, shape.inputs, *shape.kernel, shape.outputs)

    def weight(self, kernel: Real, described: Described, like: Array) -> Array:
        """The inverse of ``kernel``: a weight of the shape of ``like``."""
        shape, form = described.shape, described.form
        matrix = kernel.reshape(shape.parts, shape.columns, shape.outputs)
        return matrix.reshape(like.shape) if form is None else form.restore(matrix, like)

    @abstractmethod
    def constants(self, factors: Sequence[Factor], described: Described, like: Sequence[int]) -> list[Array]:
        """Weights of the new nodes, one per factor; ``like``: shape of the weight there was."""

    @abstractmethod
    def nodes(self, node: Node, factors: Sequence[Factor], weights: Sequence[str], made: Made) -> list[onnx.NodeProto]:
        """Nodes in the place of ``node`` that read these weights, one per factor; the last one makes its outputs."""

    def bias(self, node: Node) -> int | None:
        """Position of an input that is added per output channel, of this node and of the last one in its place."""
        return None


@dataclass(frozen=True, slots=True)
class Described:
    """What an operator says of one node: the kernel's shape, where it runs, and its form."""

    shape: Shape
    geometry: Geometry
    form: Form | None


@dataclass(frozen=True, slots=True)
class Made:
    """Names for what is new: ``tensor`` and ``node`` give one for a role, ``constant`` takes in a value."""

    tensor: Callable[[str], str]
    node: Callable[[str], str]
    constant: Constant
    described: Described
    opset: int


@dataclass(slots=True)
class Layer:
    """A weight that can be taken apart.

    Attributes:
        name: of the first node that reads it. weight: its name. position: of the weight among the nodes' inputs.
        operator, described: of the first node. uses: every node that reads it.
    """

    name: str
    weight: str
    position: int
    operator: Operator
    described: Described
    uses: list[Use] = field(default_factory=list)

    @property
    def shape(self) -> Shape:
        """Sizes of the kernel."""
        return self.described.shape

    def macs(self, stages: Sequence[Any]) -> int:
        """Multiply-accumulates of stages in the place of every node that reads the weight."""
        return sum(use.node.repeats * use.geometry.macs(stages) for use in self.uses)

    @property
    def names(self) -> Iterator[str]:
        """What patterns are matched against."""
        yield from (use.node.label for use in self.uses)
        yield self.weight
