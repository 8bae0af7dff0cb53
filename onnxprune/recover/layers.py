"""Weights of one contraction as a matrix and biases, and back into the model."""

from __future__ import annotations

from collections.abc import MutableMapping

import numpy as np
import onnx

from onnxprune.contractions import Pairwise
from onnxprune.graph.view import Graph, Node
from onnxprune.model.weights import ArrayWeight, Weight
from onnxprune.recover.aims import Aim
from onnxprune.recover.scales import Scale
from onnxprune.recover.sums import Real


class Layer:
    """One contraction of a cut model whose weights are read and written.

    Args:
        graph: of the cut model. weights: of the cut model, changed by ``write``. aim: the contraction.
    """

    def __init__(self, graph: Graph, weights: MutableMapping[str, Weight], aim: Aim) -> None:
        self._graph, self._weights, self.aim = graph, weights, aim
        self.node, self.form = aim.node, aim.form
        self._name = self.node.inputs[self.form.weight]
        self._home = self._find_home()

    @property
    def fixed_bias(self) -> bool:
        """Whether the layer has no place for a bias."""
        return self._home is None

    def read(self) -> tuple[Real, Real]:
        """Matrix [parts, n, o] and bias [parts, o], as the layer multiplies and adds, float64."""
        weight = self._weights[self._name].read().astype(np.float64)
        if isinstance(self.form, Scale):
            gain, mean = self._statistics()
            shift = self._weights[self.node.inputs[2]].read().astype(np.float64)
            scaled = weight * gain
            return scaled.reshape(-1, 1, 1), (shift - mean * scaled).reshape(-1, 1)
        matrix = self.form.matrix(weight) * self.form.scale
        bias = np.zeros((matrix.shape[0], matrix.shape[2]))
        given = self._input(self.form.bias)
        if given:
            value = self._weights[given].read().astype(np.float64) * self.form.bias_scale
            bias = np.broadcast_to(value.reshape(-1), (bias.size,)).reshape(bias.shape).copy()
        return matrix, bias

    def write(self, matrix: Real, bias: Real) -> None:
        """Put them into the model, in the weights' own types."""
        old = self._weights[self._name]
        if isinstance(self.form, Scale):
            gain, mean = self._statistics()
            scaled = matrix.reshape(-1)
            gamma = np.divide(scaled, gain)
            self._set(self._name, gamma, old.dtype)
            name = self.node.inputs[2]
            self._set(name, bias.reshape(-1) + mean * scaled, self._weights[name].dtype)
            return
        self._set(self._name, self.form.restore(matrix / self.form.scale, old.read()), old.dtype)
        if self._home == "own":
            self._write_bias(bias.reshape(-1) / self.form.bias_scale, old.dtype)
        elif self._home is not None:
            # The bias of a product without one lies in the addition behind it: what is new comes on top.
            value = self._weights[self._home]
            extra = bias.reshape(-1)
            shape = value.shape if value.shape and value.shape[-1] == extra.size else (extra.size,)
            self._set(self._home, np.broadcast_to(value.read().astype(np.float64), shape) + extra, value.dtype)

    def _write_bias(self, bias: Real, dtype: np.dtype[np.generic]) -> None:
        given = self._input(self.form.bias)
        if given:
            old = self._weights[given]
            keeps = old.shape[-1:] == (bias.size,)
            self._set(given, bias.reshape(old.shape) if keeps else bias, old.dtype)
            return
        if not bias.any():
            return
        name = f"{self._name}.bias"
        while name in self._weights or name in self._graph.producer:
            name += "_"
        position = self.form.bias
        assert position is not None
        proto = self.node.proto
        proto.input.extend([""] * (position + 1 - len(proto.input)))
        proto.input[position] = name
        self.node.inputs[:] = proto.input
        self._weights[name] = ArrayWeight(name, bias.astype(dtype))
        self._graph.proto.graph.initializer.append(
            onnx.TensorProto(name=name, data_type=self._weights[name].onnx_type, dims=[bias.size])
        )

    def _set(self, name: str, value: Real, dtype: np.dtype[np.generic]) -> None:
        self._weights[name] = ArrayWeight(name, np.ascontiguousarray(value.astype(dtype)))
        for tensor in self._graph.proto.graph.initializer:
            if tensor.name == name:
                del tensor.dims[:]
                tensor.dims.extend(value.shape)

    def _input(self, position: int | None) -> str:
        """Name of an optional input, empty where it is absent."""
        return self.node.inputs[position] if position is not None and position < len(self.node.inputs) else ""

    def _statistics(self) -> tuple[Real, Real]:
        """1 / standard deviation and mean of a BatchNormalization."""
        mean, variance = (self._weights[n].read().astype(np.float64) for n in self.node.inputs[3:5])
        return 1.0 / np.sqrt(variance + float(self.node.attrs.get("epsilon", 1e-5))), mean

    def _find_home(self) -> str | None:
        """Where a bias goes: ``own``, the name of a constant that is added right behind, or None."""
        if self.form.bias is not None:
            return "own"
        if not isinstance(self.form, Pairwise):
            return None
        # A constant that is added lies along the last axis: outputs have to lie there too.
        rank = len(self.form.terms[2])
        return self._added_behind() if self.form.output_axis(rank) == rank - 1 else None

    def _added_behind(self) -> str | None:
        readers = self._graph.consumers.get(self.node.outputs[0], ())
        if len(readers) != 1 or readers[0][0].op != "Add" or self.node.outputs[0] in self._graph.outputs:
            return None
        reader: Node = readers[0][0]
        name = reader.inputs[1 - readers[0][1]]
        weight = self._weights.get(name)
        alone = len(self._graph.consumers.get(name, ())) == 1
        alone = alone and name not in self._graph.captured and name not in self._graph.outputs
        flat = weight is not None and alone and weight.dtype.kind == "f" and all(n == 1 for n in weight.shape[:-1])
        return name if flat else None
