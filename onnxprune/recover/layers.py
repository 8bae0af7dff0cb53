"""Weights of one contraction as a matrix and biases, and back into the model."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import MutableMapping

import numpy as np
import onnx

from onnxprune.contractions import Pairwise, Scale
from onnxprune.graph.view import Graph, Node
from onnxprune.model.weights import ArrayWeight, Weight
from onnxprune.recover.aims import RecoveryTarget
from onnxprune.recover.sums import Real


class Layer:
    """One contraction of a cut model whose weights are read and written.

    Args:
        graph: of the cut model. weights: of the cut model, changed by ``write``. aim: the contraction.
    """

    def __init__(self, graph: Graph, weights: MutableMapping[str, Weight], aim: RecoveryTarget) -> None:
        self._graph, self._weights, self.aim = graph, weights, aim
        self.node, self.form = aim.node, aim.form
        self._home = self._find_home()

    @property
    def fixed_bias(self) -> bool:
        """Whether the layer has no place for a bias."""
        return self._home is None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight as the layer reads it."""
        return self.aim.weight.shape(self._weights)

    def read(self) -> tuple[Real, Real]:
        """Matrix [parts, n, o] and bias [parts, o], as the layer multiplies and adds, float64."""
        weight = self.aim.weight.read(self._weights)
        if isinstance(self.form, Scale):
            gain, mean = self._statistics()
            shift = self._weights[self.node.inputs[2]].read().astype(np.float64)
            scaled = weight * gain
            return scaled.reshape(-1, 1, 1), (shift - mean * scaled).reshape(-1, 1)
        matrix = self.form.matrix(weight) * self.form.scale
        bias = np.zeros((matrix.shape[0], matrix.shape[2]))
        if self.aim.bias is not None:
            value = self.aim.bias.read(self._weights) * self.form.bias_scale
            bias = np.broadcast_to(value.reshape(-1), (bias.size,)).reshape(bias.shape).copy()
        return matrix, bias

    def write(self, matrix: Real, bias: Real) -> None:
        """Put them into the model, in the weights' own types; codes get new scales."""
        stored = self.aim.weight
        for constant in (stored, self.aim.bias):
            if constant is not None:
                constant.detach(self._graph, self._weights)
        if isinstance(self.form, Scale):
            gain, mean = self._statistics()
            scaled = matrix.reshape(-1)
            stored.write(self._weights, np.divide(scaled, gain))
            name = self.node.inputs[2]
            self._set(name, bias.reshape(-1) + mean * scaled, self._weights[name].dtype)
            return
        restored = self.form.restore(matrix / self.form.scale, stored.read(self._weights))
        ratio = stored.write(self._weights, np.asarray(restored, np.float64))
        if self._home == "own":
            self._write_bias(bias.reshape(-1) / self.form.bias_scale, ratio)
        elif self._home is not None:
            # The bias of a product without one lies in the addition behind it: what is new comes on top.
            value = self._weights[self._home]
            extra = bias.reshape(-1)
            shape = value.shape if value.shape and value.shape[-1] == extra.size else (extra.size,)
            self._set(self._home, np.broadcast_to(value.read().astype(np.float64), shape) + extra, value.dtype)

    def as_stored(self, matrix: Real, bias: Real) -> tuple[Real, Real]:
        """What the layer would multiply and add, were these written: codes round them."""
        stored, own = self.aim.weight, self.aim.bias
        if stored.quantised is None:
            return matrix, bias
        apart = ChainMap[str, Weight]({}, self._weights)  # others write theirs meanwhile
        restored = self.form.restore(matrix / self.form.scale, stored.read(apart))
        ratio = stored.write(apart, np.asarray(restored, np.float64))
        rounded = self.form.matrix(stored.read(apart)) * self.form.scale
        if own is None or own.quantised is None:
            return rounded, bias
        own.write(apart, (bias / self.form.bias_scale).reshape(own.shape(apart)), ratio)
        return rounded, own.read(apart).reshape(bias.shape) * self.form.bias_scale

    def _write_bias(self, bias: Real, ratio: Real | None) -> None:
        stored = self.aim.bias
        if stored is not None and stored.chain:
            stored.write(self._weights, bias.reshape(stored.shape(self._weights)), ratio)
            return
        dtype = self._weights[self.aim.weight.root].dtype if stored is None else self._weights[stored.root].dtype
        if stored is not None:
            shape = self._weights[stored.root].shape
            self._set(stored.root, bias.reshape(shape) if shape[-1:] == (bias.size,) else bias, dtype)
            return
        if not bias.any():
            return
        name = f"{self.node.inputs[self.form.weight]}.bias"
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

    def _statistics(self) -> tuple[Real, Real]:
        """1 / standard deviation and mean of a BatchNormalization."""
        mean, variance = (self._weights[n].read().astype(np.float64) for n in self.node.inputs[3:5])
        return 1.0 / np.sqrt(variance + float(self.node.attrs.get("epsilon", 1e-5))), mean

    def _find_home(self) -> str | None:
        """Where a bias goes: ``own``, the name of a constant that is added right behind, or None."""
        if self.form.bias is not None:
            # A bias of floats behind codes would take the layer out of the integers that runtimes multiply.
            return None if self.aim.bias is None and self.aim.weight.quantised is not None else "own"
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
