"""A model with bodies inlined so that its weights can be changed, and its assembly in the original form."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.survivors import Mask
from onnxprune.factorization.codes import Coded, DecodedWeights
from onnxprune.garbage import paused
from onnxprune.graph.canonical import fold, join_copies, unshare
from onnxprune.graph.restore import restore
from onnxprune.graph.view import Graph
from onnxprune.io.constants import constant_node, has_bare_initializers, set_constant
from onnxprune.io.weights import Weight
from onnxprune.operators.registry import Code
from onnxprune.pruning.rewriting import cut
from onnxprune.recovery.in_floats import IntegerLayers

Parts = tuple[onnx.ModelProto, dict[str, Weight]]


def cut_model(analysis: Analysis, removed: Mask) -> Parts:
    """Return the model without ``removed`` (a mask over atoms), as it is saved.

    Raises:
        CannotRewrite: a node has no form with the new sizes.
    """
    with paused():
        proto, weights = cut(analysis.table, removed)
        restore(proto, weights, analysis.unshared, analysis.folds, analysis.hoists)
        join_copies(proto, weights, analysis.copies)
    return proto, weights


class Prepared:
    """A copy of a model in which shared constants are separate and computed weights are weights.

    Attributes:
        graph: the copy.
        weights: all of its constants by name, those of Constant nodes too; may be changed.
        same: {tensor of the copy alone: tensor of the model with the same channels}.
        codes: {constant of the copy alone: the code in which the model stores it}.

    Args:
        proto: the model.
        weights: its constants by name.
        in_floats: whether integer layers are written with numbers in the copy, between decoders and encoders.
        decoded: whether weights that are codes are numbers in the copy, those of integer layers too.
    """

    def __init__(
        self, proto: onnx.ModelProto, weights: Mapping[str, Weight], *, in_floats: bool = False, decoded: bool = False
    ) -> None:
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        self._unshared, self._copies = unshare(Graph.of(copy, weights))
        self.graph, self._folds = fold(self._unshared)
        floats = in_floats or decoded
        self._layers = IntegerLayers.of(self.graph.proto, self.graph.weights) if floats else None
        if self._layers is not None:
            self.graph = Graph.of(self._layers.proto, self._layers.weights)
        self._decoded = DecodedWeights.of(self.graph) if decoded else None
        if self._decoded is not None:
            self.graph = Graph.of(self._decoded.proto, self._decoded.weights)
        self.codes: Mapping[str, Code] = {} if self._decoded is None else self._decoded.codes
        self.same = {} if self._layers is None else self._layers.same
        self.weights = dict(self.graph.weights)
        self._before = dict(self.weights)
        self._stored = {t.name for t in self.graph.proto.graph.initializer}

    @property
    def has_new_tensors(self) -> bool:
        """Whether the copy has activations that the model does not have."""
        return self._layers is not None

    def model(self, coded: Mapping[str, Coded] | None = None) -> Parts:
        """Return the model with its current weights; unchanged nodes and weights are as they were written.

        Args:
            coded: {new constant: its codes} of constants to store as codes.
        """
        proto = self.graph.proto
        if self._decoded is not None:
            proto, self.weights = self._decoded.restored(proto, self.weights, coded or {})
        if self._layers is not None:
            proto = self._layers.restored(proto)
        for node in proto.graph.node:
            if node.op_type == "Constant" and self._changed(node.output[0]):
                set_constant(node, self.weights[node.output[0]])
        if not has_bare_initializers(proto):
            self._hide_new()
        weights = {t.name: self.weights[t.name] for t in proto.graph.initializer if t.name in self.weights}
        restore(proto, weights, self._unshared, self._folds)
        join_copies(proto, weights, self._copies)
        return proto, weights

    def _changed(self, name: str) -> bool:
        return name in self.weights and self.weights[name] is not self._before.get(name)

    def _hide_new(self) -> None:
        """Turn new initializers into Constant nodes: before IR 4 every initializer is an input of the model as well."""
        graph = self.graph.proto.graph
        added = [t.name for t in graph.initializer if t.name not in self._stored]
        present = [t for t in graph.initializer if t.name in self._stored]
        del graph.initializer[:]
        graph.initializer.extend(present)
        for name in added:
            graph.node.insert(0, constant_node(self.weights[name]))
