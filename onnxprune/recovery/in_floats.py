"""Integer layers written with numbers, so that they are fitted like any other: decoders, the product, an encoder.

Constants keep their names: a fit is written back as their values, and the operators on codes do not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx

from onnxprune.graph.view import Graph, Node, connect
from onnxprune.io.constants import placeholder
from onnxprune.io.weights import ArrayWeight, Weight
from onnxprune.operators.registry import InFloats, NewNode, Surroundings, rule_of

MS = "com.microsoft"


@dataclass(frozen=True, slots=True)
class IntegerLayers:
    """A model in which integer layers are written with numbers.

    Attributes:
        proto: the model.
        weights: its constants by name.
        same: {new tensor: tensor of the model with the same channels}.
    """

    proto: onnx.ModelProto
    weights: dict[str, Weight]
    same: dict[str, str]
    _layers: list[InFloats]
    _imports: frozenset[str]

    @classmethod
    def of(cls, proto: onnx.ModelProto, weights: Mapping[str, Weight]) -> IntegerLayers | None:
        """Write the integer layers of a model, outside of bodies, with numbers; None where it has none."""
        graph = Graph.of(proto, weights)
        layers = list(_layers(graph))
        if not layers:
            return None
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        new_weights = dict(weights)
        last = {layer.replaced[-1].index: layer for layer in layers}
        dropped = {node.index for layer in layers for node in layer.replaced}
        nodes: list[onnx.NodeProto] = []
        for index, node in enumerate(proto.graph.node):
            if index in last:
                nodes.extend(map(_node_proto, last[index].nodes))
            elif index not in dropped:
                nodes.append(node)
        del copy.graph.node[:]
        copy.graph.node.extend(nodes)
        for layer in layers:
            for name, value in layer.constants.items():
                new_weights[name] = ArrayWeight(name, value)
                copy.graph.initializer.append(placeholder(new_weights[name]))
        if MS not in graph.opsets:
            copy.opset_import.append(onnx.helper.make_opsetid(MS, 1))
        same = {new: old for layer in layers for new, old in layer.same.items()}
        return cls(copy, new_weights, same, layers, frozenset(graph.opsets))

    def restored(self, proto: onnx.ModelProto) -> onnx.ModelProto:
        """Return a later state of the model with its layers in integers again; they may read other constants.

        Layers whose decoded weights are read no more have other layers in their place, and these stay.
        """
        read = {name for node in proto.graph.node for name in node.input}
        layers = [layer for layer in self._layers if all(n.outputs[0] in read for n in layer.nodes[:-1])]
        layer_by_output = {node.outputs[0]: layer for layer in layers for node in layer.nodes}
        present = {node.output[0]: node for node in proto.graph.node if node.output}
        nodes: list[onnx.NodeProto] = []
        for node in proto.graph.node:
            layer = layer_by_output.get(node.output[0]) if node.output else None
            if layer is None:
                nodes.append(node)
            elif node.output[0] == layer.nodes[-1].outputs[0]:
                nodes.extend(_integers(layer, present))
        result = onnx.ModelProto()
        result.CopyFrom(proto)
        del result.graph.node[:]
        result.graph.node.extend(nodes)
        unread = {name for layer in layers for name in layer.constants}
        for i in reversed(range(len(result.graph.initializer))):
            if result.graph.initializer[i].name in unread:
                del result.graph.initializer[i]
        domains = {node.domain for node in nodes}
        for i in reversed(range(len(result.opset_import))):
            if result.opset_import[i].domain == MS and MS not in domains and MS not in self._imports:
                del result.opset_import[i]
        return result


def in_floats(graph: Graph) -> Graph:
    """Return the graph with its integer layers written with numbers; the graph itself where it has none."""
    layers = IntegerLayers.of(graph.proto, graph.weights)
    return graph if layers is None else Graph.of(layers.proto, layers.weights)


def _layers(graph: Graph) -> Iterator[InFloats]:
    """Return the integer layers, none of whose nodes belongs to two of them."""

    def only_reader(name: str) -> Node | None:
        readers = graph.consumers.get(name, ())
        alone = len(readers) == 1 and name not in graph.outputs and name not in graph.captured
        return readers[0][0] if alone else None

    around = Surroundings(graph.weights, graph.producer, only_reader)
    replaced: set[int] = set()
    for node in graph.nodes:
        layer = None if node.outputs[0] in graph.inner else rule_of(node).in_floats(node, around)
        if layer is not None and not replaced & {n.index for n in layer.replaced}:
            replaced.update(n.index for n in layer.replaced)
            yield layer


def _node_proto(new: NewNode) -> onnx.NodeProto:
    return onnx.helper.make_node(
        new.op, list(new.inputs), list(new.outputs), new.name, domain=new.domain, **new.attributes
    )


def _integers(layer: InFloats, present: Mapping[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return the nodes on codes, reading the constants that the decoders read now."""
    result = []
    for node in layer.replaced:
        copy = onnx.NodeProto()
        copy.CopyFrom(node.proto)
        for output, position, decoder, at in layer.operands:
            if output == node.outputs[0] and at < len(present[decoder].input):
                connect(copy, position, present[decoder].input[at])
        result.append(copy)
    return result
