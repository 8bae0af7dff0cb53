"""Residual branches: addends of sums that can go as a whole, found on the data flow, and the model without them.

An addend t of a sum is a branch where another addend, of the shape of the sum, depends on a tensor that t is computed
from as well: ``y = x + f(x)``, ``y = g(x) + f(x)``. Nodes whose every path to an output runs through t belong to it,
and are removed with it.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx

from onnxprune.errors import UsageError
from onnxprune.graph import cost
from onnxprune.graph.caches import Cache, find_caches
from onnxprune.graph.facts import Facts
from onnxprune.graph.view import Graph, Node, reads
from onnxprune.io import markers
from onnxprune.io.constants import add_constant
from onnxprune.io.weights import Weight
from onnxprune.operators.registry import NewNode, WithoutAddends, rule_of

Model = tuple[onnx.ModelProto, dict[str, Weight]]


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch.

    Attributes:
        tensor: the addend that it ends in, its name in plans.
        sum: label of the node that adds it.
        source: tensor beside it in the sum; where a node adds it to a product of its own, an input of that.
        result: the sum.
        nodes: indices of the nodes that go with it.
        layers: labels of the layers among them.
        weights: constants that only these nodes read.
        macs, params: multiply-accumulates at the first probe, and elements of the weights.
        caches: inputs and outputs of the model that go with it, in pairs.
    """

    tensor: str
    sum: str
    source: str
    result: str
    nodes: frozenset[int]
    layers: tuple[str, ...]
    weights: tuple[str, ...]
    macs: int
    params: int
    caches: tuple[Cache, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names that patterns match: of the addend, the sum, the layers and their weights."""
        return (self.tensor, self.sum, *self.layers, *self.weights)


class Branches:
    """The branches of a model.

    Args:
        graph: view of the model.
        facts: shapes and small values of its tensors.

    Attributes:
        reasons: why addends with layers of their own are no branches, by tensor.
        fixed: these addends, with their layers.
    """

    def __init__(self, graph: Graph, facts: Facts) -> None:
        self.graph, self._facts = graph, facts
        self.reasons: dict[str, str] = {}
        self.fixed: dict[str, Branch] = {}
        self._sums: set[int] = set()
        self.caches = find_caches(graph)
        self._presents = {cache.present for cache in self.caches}
        self._aside = self._only_to_caches()
        self._opset = graph.opsets.get("", 1)
        names = [*graph.inputs, *(o for node in graph.nodes for o in node.outputs if o)]
        self._bits = {name: 1 << k for k, name in enumerate(dict.fromkeys(names))}
        layers = (node for node in graph.nodes if cost.is_layer(node, graph))
        self._of_layers = sum(self._bits[o] for node in layers for o in node.outputs if o)
        self._before: dict[str, int] = {}
        """The tensors that each one is computed from, itself and other results of its node included, as bits."""
        for node in graph.nodes:
            outputs = [o for o in node.outputs if o]
            bits = sum(self._bits[o] for o in outputs)
            for name in node.inputs:
                bits |= 0 if self._is_known(name) else self._bits_before(name)
            self._before.update(dict.fromkeys(outputs, bits))

    def find(self) -> list[Branch]:
        """Return every branch in the order of the graph."""
        return [branch for node in self.graph.steps for branch in self._of_sum(node)]

    def _of_sum(self, node: Node) -> Iterator[Branch]:
        positions = [i for i in rule_of(node).addends(node) if i < len(node.inputs) and node.inputs[i]]
        positions = [i for i in positions if not self._is_known(node.inputs[i])]
        factors = [node.inputs[i] for i in rule_of(node).factors(node) if not self._is_known(node.inputs[i])]
        for i in positions if len(positions) > 1 or factors else ():
            branch = self._branch(node, i, [*(node.inputs[k] for k in positions if k != i), *factors])
            if branch is not None:
                yield branch
            if branch is not None or node.inputs[i] in self.fixed:
                self._sums.add(node.index)

    def _branch(self, node: Node, i: int, others: Sequence[str]) -> Branch | None:
        """Return the branch that ends in input ``i`` of a node; None where that is none."""
        graph, tensor = self.graph, node.inputs[i]
        nodes = self._exclusive(node, i)
        branch = self._described(node, i, others, nodes)
        if not branch.macs or not self._have_common_source(nodes, others):
            self._explain_shared(node, i, others, nodes)
            return None
        caches = tuple(cache for cache in self.caches if self._comes_from(cache.present, nodes))
        without = rule_of(node).without(node, {i}, self._opset)
        is_product = bool(rule_of(node).factors(node))  # which has the shape of the sum
        source = next((name for name in others if is_product or self._has_shape_of_sum(node, name)), None)
        if any(graph.nodes[n].domain == markers.DOMAIN for n in nodes):
            self.reasons[tensor] = "it holds a body of If, Loop or Scan"
        elif source is None:
            self.reasons[tensor] = "nothing beside it has the shape of the sum"
        elif without is None:
            self.reasons[tensor] = f"{node.op} has no form without it"
        elif (why := self._why_cache_stays(caches, nodes)) is not None:
            self.reasons[tensor] = why
        else:
            return replace(branch, source=source, caches=caches)
        self.fixed[tensor] = branch
        return None

    def _described(self, node: Node, i: int, others: Sequence[str], nodes: Collection[int]) -> Branch:
        """Return nodes in front of input ``i`` of a node as a branch, with their layers and what these cost."""
        graph = self.graph
        layers = [graph.nodes[n] for n in sorted(nodes) if cost.is_layer(graph.nodes[n], graph)]
        macs = sum(int(cost.macs(layer, self._facts.shape)) for layer in layers)
        weights = tuple(_own_weights(graph, nodes))
        params = sum(prod(graph.weights[w].shape) for w in weights)
        labels, result = tuple(layer.label for layer in layers), rule_of(node).total(node)
        return Branch(node.inputs[i], node.label, others[0], result, frozenset(nodes), labels, weights, macs, params)

    def _explain_shared(self, node: Node, i: int, others: Sequence[str], exclusive: Collection[int]) -> None:
        """Record the reason why an addend with layers cannot go alone: f(x) of x + f(x), and of g(x) + f(x)."""
        tensor = node.inputs[i]
        before, beside = self._bits_before(tensor), 0
        for name in others:
            beside |= self._bits_before(name)
        is_beside = any(self._bits.get(name, 0) & before for name in others)
        if not before & ~beside & self._of_layers or not before & beside:
            return
        nodes = self._nodes_of(before & ~beside)
        branch = self._described(node, i, others, nodes)
        if not branch.macs or not self._sums.isdisjoint(nodes.difference(exclusive)):
            return  # no layer, or scores of attention and a mask, whose last common tensor lies far in front
        if not is_beside and not beside & ~before & self._of_layers:
            return
        why = self._reader_beside(nodes, exclusive, (node.index, i))
        if why is not None:
            self.reasons[tensor], self.fixed[tensor] = why, branch

    def _reader_beside(self, nodes: Collection[int], exclusive: Collection[int], edge: tuple[int, int]) -> str | None:
        """Return the further reader of a result of some nodes, of the last node that has one; None without any."""
        graph, around = self.graph, self.graph.around
        for index in sorted(set(nodes) - set(exclusive), reverse=True):
            for name in filter(None, graph.nodes[index].outputs):
                if around[index] != around[edge[0]] or graph.nodes[index].domain == markers.DOMAIN:
                    return "it holds a body of If, Loop or Scan"
                if name in graph.captured:
                    return f"a body of If, Loop or Scan reads {name!r} in it"
                if name in graph.outputs and name not in self._presents:
                    return f"{name!r} in it is an output of the model"
                for reader, k in graph.consumers.get(name, ()):
                    if not self._goes(reader.index, k, nodes, edge):
                        return f"{reader.op} {reader.label!r} reads {name!r} in it too"
        return None

    def _nodes_of(self, bits: int) -> set[int]:
        """Return the nodes that compute some tensors."""
        return {n.index for n in self.graph.nodes if any(o and self._bits[o] & bits for o in n.outputs)}

    def _bits_before(self, name: str) -> int:
        """Return a tensor and those that it is computed from, as bits."""
        return self._before.get(name, self._bits.get(name, 0))

    def _why_cache_stays(self, caches: Sequence[Cache], nodes: Collection[int]) -> str | None:
        """Return the reason why a cache cannot go with some nodes; None where all can."""
        for cache in caches:
            within = {*nodes, *self._aside}
            others = [n for n, _ in self.graph.consumers.get(cache.past, ()) if n.index not in within]
            if not all(rule_of(n).reads_sizes for n in others):
                return f"{others[0].op} {others[0].label!r} reads its cache {cache.past!r} too"
            if others and not self.alike(cache.past, {c.past for c in caches}):
                return f"the model takes sizes from its cache {cache.past!r}, and has no other of these sizes"
        return None

    def alike(self, past: str, removed: Collection[str]) -> str | None:
        """Return the input of another cache that has the same sizes; None where there is none."""
        for cache in self.caches:
            shapes = [(p.shapes.get(past), p.shapes.get(cache.past)) for p in self._facts.probes]
            if cache.past not in removed and all(a is not None and a == b for a, b in shapes):
                return cache.past
        return None

    def _is_known(self, name: str) -> bool:
        """Return whether a tensor does not depend on data: a constant, or computed from sizes."""
        return name in self.graph.weights or all(probe.values.get(name) is not None for probe in self._facts.probes)

    def _has_shape_of_sum(self, node: Node, name: str) -> bool:
        """Return whether a tensor has the shape of the sum at every probe: without the rest, nothing widens it."""
        shapes = [(probe.shapes.get(name), probe.shapes.get(node.outputs[0])) for probe in self._facts.probes]
        return all(a is not None and None not in a and a == b for a, b in shapes)

    def _exclusive(self, node: Node, i: int) -> frozenset[int]:
        """Return the nodes whose every path to an output runs through input ``i`` of a node."""
        graph, around = self.graph, self.graph.around
        result: set[int] = set()
        queue: list[int] = []

        def enter(name: str) -> None:
            producer = graph.producer.get(name)
            if producer is not None and around[producer.index] == around[node.index]:
                heapq.heappush(queue, -producer.index)

        enter(node.inputs[i])
        last = -1
        while queue:  # a node comes after all of its readers
            index = -heapq.heappop(queue)
            if index != last and self._goes_with(graph.nodes[index], result, (node.index, i)):
                result.add(index)
                for name in graph.nodes[index].inputs:
                    enter(name)
            last = index
        return frozenset(result)

    def _goes_with(self, node: Node, nodes: Collection[int], edge: tuple[int, int]) -> bool:
        """Return whether only some nodes and one input of another read the results of a node."""
        for name in filter(None, node.outputs):
            is_output = name in self.graph.outputs and name not in self._presents
            if is_output or name in self.graph.captured:
                return False
            readers = self.graph.consumers.get(name, ())
            if not all(self._goes(reader.index, k, nodes, edge) for reader, k in readers):
                return False
        return True

    def _goes(self, reader: int, position: int, nodes: Collection[int], edge: tuple[int, int]) -> bool:
        return reader in nodes or reader in self._aside or (reader, position) == edge

    def _only_to_caches(self) -> set[int]:
        """Return the nodes whose results only outputs of caches need."""
        graph, result = self.graph, set[int]()
        others = {*graph.outputs, *graph.captured} - self._presents
        for node in reversed(graph.nodes) if self.caches else ():
            outputs = [o for o in node.outputs if o]
            readers = [reader.index for o in outputs for reader, _ in graph.consumers.get(o, ())]
            if others.isdisjoint(outputs) and node.domain != markers.DOMAIN and result.issuperset(readers):
                result.add(node.index)
        return result

    def _comes_from(self, name: str, nodes: Collection[int]) -> bool:
        """Return whether an output of a cache is computed from some nodes, by none or by nodes that serve it alone."""
        queue = [name]
        while queue:
            node = self.graph.producer.get(queue.pop())
            if node is not None and node.index in nodes:
                return True
            if node is not None and node.index in self._aside:
                queue.extend(n for n in node.inputs if n)
        return False

    def _have_common_source(self, nodes: Collection[int], others: Sequence[str]) -> bool:
        """Return whether the nodes read data that another addend is computed from."""
        entries = 0
        for name in {name for n in nodes for name in self.graph.nodes[n].inputs if name}:
            producer = self.graph.producer.get(name)
            if (producer is None or producer.index not in nodes) and not self._is_known(name):
                entries |= self._bits.get(name, 0)
        return any(self._bits_before(name) & entries for name in others)


def _own_weights(graph: Graph, nodes: Collection[int]) -> Iterator[str]:
    """Yield the constants that no other node reads."""
    for name in dict.fromkeys(name for n in sorted(nodes) for name in graph.nodes[n].inputs):
        is_inner = name in graph.weights and name not in graph.outputs and name not in graph.captured
        if is_inner and all(reader.index in nodes for reader, _ in graph.consumers[name]):
            yield name


# -- the model without branches ----------------------------------------------------------------------------------------


def without_branches(
    scan: Branches, weights: Mapping[str, Weight], removed: Sequence[Branch], *, keep_cache: bool = False
) -> Model:
    """Return the model without branches: sums lose these addends, and nodes that nothing reads any more are removed.

    A sum without its branch equals the tensor beside it. Both then have the name of the sum, where that is possible, so
    that a recovery fits what is left to the sum of the original. Of two activations that follow each other then, and
    are the same as one, one is left. Caches of the branches go as well; sizes that others take from them are then those
    of another cache.

    Args:
        scan: the branches of the model.
        weights: its initializers.
        removed: branches to remove.
        keep_cache: whether caches stay as inputs and outputs of the model, each output being the input.

    Raises:
        UsageError: the branches are all addends of one sum, or nothing else gives the sizes of a cache.
    """
    return _Removal(scan, removed).written(weights, keep_cache)


class _Removal:
    """Reduced sums, the nodes that are still needed, and tensors that are equal now, by their first name."""

    def __init__(self, scan: Branches, removed: Sequence[Branch]) -> None:
        graph = self._graph = scan.graph
        tensors = {branch.tensor for branch in removed}
        self._caches = dict.fromkeys(cache for branch in removed for cache in branch.caches)
        presents = {cache.present for cache in self._caches}
        self._exposed = {*(name for name in graph.outputs if name not in presents), *graph.captured}
        self._reduced: dict[int, WithoutAddends | None] = {}
        self._root: dict[str, str] = {}
        self._members: dict[str, list[str]] = {}
        opset = graph.opsets.get("", 1)
        for node in graph.steps:
            addends = [i for i in rule_of(node).addends(node) if i < len(node.inputs) and node.inputs[i]]
            positions = {i for i in addends if node.inputs[i] in tensors}
            if positions:
                removes_all = len(positions) == len(addends) and not rule_of(node).factors(node)
                self._reduced[node.index] = None if removes_all else rule_of(node).without(node, positions, opset)
        for reduced in self._reduced.values():
            for output, source in () if reduced is None else reduced.same.items():
                self._equate(output, source)
        self._live = self._live_nodes()
        for index, reduced in self._reduced.items():
            if index in self._live and reduced is None:
                names = [n for n in graph.nodes[index].inputs if n in tensors]
                raise UsageError(
                    f"Nothing would be left of the sum {graph.nodes[index].label!r}: {', '.join(names)} are all of it.",
                    hint="Leave one of them in.",
                )
        self._skip_repeated()
        self._sizes = self._sizes_elsewhere(scan)

    def _sizes_elsewhere(self, scan: Branches) -> dict[str, str]:
        """Return the input that gives the sizes of every cache that goes, where something still asks for them."""
        pasts, others = {cache.past for cache in self._caches}, {}
        for past in pasts:
            if any(True for _ in self._readers(past)):
                other = scan.alike(past, pasts)
                if other is None:
                    raise UsageError(
                        f"The model takes sizes from the cache {past!r}, and no other of these sizes would be left.",
                        hint="Leave one branch with a cache in.",
                    )
                others[past] = other
        return others

    def _equate(self, output: str, source: str) -> None:
        """Record that an output equals an earlier tensor."""
        root = self._root.get(source, source)
        members = self._members.setdefault(root, [root])
        for name in self._members.pop(output, [output]):
            self._root[name] = root
            members.append(name)

    def _live_nodes(self) -> set[int]:
        """Return the nodes that outputs or bodies still need, and those that nothing needed before."""
        graph = self._graph
        exposed, live = {self._root.get(name, name) for name in self._exposed}, set[int]()
        for node in reversed(graph.nodes):
            outputs = [o for o in node.outputs if o]
            unread = not any(o in graph.consumers or o in graph.captured or o in graph.outputs for o in outputs)
            if unread or node.domain == markers.DOMAIN or any(self._root.get(o, o) in exposed for o in outputs):
                live.add(node.index)
                reduced = self._reduced.get(node.index)
                names = reads(node) if reduced is None else [n for new in reduced.nodes for n in new.inputs]
                exposed.update(self._root.get(n, n) for n in names)
        return live

    def _skip_repeated(self) -> None:
        """Leave out a Relu in front of a removed sum that only Relus read now: the second does the work of both."""
        for root in list(self._members):
            first = self._graph.producer.get(root)
            if first is None or not _is_relu(first) or not self._exposed.isdisjoint(self._members[root]):
                continue
            readers = [reader for name in self._members[root] for reader in self._readers(name)]
            if readers and all(map(_is_relu, readers)):
                self._live.discard(first.index)
                self._equate(root, first.inputs[0])

    def _readers(self, name: str) -> Iterator[Node]:
        """Yield the nodes that still read a tensor under this name."""
        for node, _ in self._graph.consumers.get(name, ()):
            reduced = self._reduced.get(node.index)
            if node.index in self._live and (reduced is None or any(name in new.inputs for new in reduced.nodes)):
                yield node

    def _names(self) -> dict[str, str]:
        """Return the new names of tensors that are equal now: the first that something reads, where it can be given."""
        names = {}
        for root, members in self._members.items():
            producer = self._graph.producer.get(root)
            fixed = producer is None or producer.index not in self._live or producer.domain == markers.DOMAIN
            candidates = (m for m in members if m in self._exposed or any(True for _ in self._readers(m)))
            final = root if fixed else next(candidates, root)
            names.update(dict.fromkeys(members, final))
        return names

    def written(self, weights: Mapping[str, Weight], keep_cache: bool) -> Model:
        """Return the model."""
        graph, names = self._graph, {**self._names(), **self._sizes}
        model = onnx.ModelProto()
        model.CopyFrom(graph.proto)
        del model.graph.node[:]
        for node in graph.nodes:
            reduced = self._reduced.get(node.index)
            if node.index in self._live:
                protos = [node.proto] if reduced is None else map(_node_proto, reduced.nodes)
                model.graph.node.extend(_renamed(proto, names) for proto in protos)
            for output in () if reduced is None else reduced.same:
                if output in self._exposed and names[output] != output:
                    copy = onnx.helper.make_node("Identity", [names[output]], [output], name=output)
                    model.graph.node.append(copy)
        if keep_cache:
            _pass_on(model, self._caches)
        else:
            _drop_values(model, self._caches)
        return _without_unread(model, graph, dict(weights))


def _pass_on(model: onnx.ModelProto, caches: Iterable[Cache]) -> None:
    """Give back every cache as it came in."""
    types = {value.name: value.type for value in model.graph.input}
    for cache in caches:
        model.graph.node.append(onnx.helper.make_node("Identity", [cache.past], [cache.present], name=cache.present))
        next(o for o in model.graph.output if o.name == cache.present).type.CopyFrom(types[cache.past])


def _drop_values(model: onnx.ModelProto, caches: Iterable[Cache]) -> None:
    """Remove caches from the inputs and outputs of the model."""
    names = {name for cache in caches for name in cache.names}
    for field in (model.graph.input, model.graph.output):
        for k in reversed(range(len(field))):
            if field[k].name in names:
                del field[k]


def _node_proto(new: NewNode) -> onnx.NodeProto:
    inputs, outputs = list(new.inputs), list(new.outputs)
    return onnx.helper.make_node(new.op, inputs, outputs, new.name, domain=new.domain, **new.attributes)


def _is_relu(node: Node) -> bool:
    return node.op == "Relu" and not node.domain


def _renamed(proto: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """Return a node with other names of its tensors; the node itself where none changes."""
    if names.keys().isdisjoint([*proto.input, *proto.output]):
        return proto
    node = onnx.NodeProto()
    node.CopyFrom(proto)
    if not node.name:  # patterns and reports know it by its first output
        node.name = next((o for o in node.output if o), "")
    for group in (node.input, node.output):
        for k, name in enumerate(group):
            group[k] = names.get(name, name)
    return node


def _without_unread(model: onnx.ModelProto, graph: Graph, weights: dict[str, Weight]) -> Model:
    """Remove nodes that only removed nodes read, and the declared types of tensors that are no longer there."""
    read = {name for node in Graph.of(model, {}).nodes for name in reads(node)} | {o.name for o in model.graph.output}
    available = {o for node in model.graph.node for o in node.output} | read
    lost = {name for name in weights if name not in read and (name in graph.consumers or name in graph.captured)}
    for field in (model.graph.initializer, model.graph.input, model.graph.value_info):
        for k in reversed(range(len(field))):
            if field[k].name in lost or (field is model.graph.value_info and field[k].name not in available):
                del field[k]
    return model, {name: weight for name, weight in weights.items() if name not in lost}


# -- the reference of the proof ----------------------------------------------------------------------------------------


def masked_branches(
    graph: Graph, weights: Mapping[str, Weight], tensors: Collection[str], kinds: Mapping[str, int]
) -> Model:
    """Return the original with branches multiplied with 0 in front of their sums; NaN and infinity are 0 as well.

    Args:
        graph: view of the model.
        weights: its initializers.
        tensors: addends that the branches end in.
        kinds: element types of tensors, by name.
    """
    model, new_weights = onnx.ModelProto(), dict(weights)
    model.CopyFrom(graph.proto)
    del model.graph.node[:]
    for node in graph.nodes:
        positions = [i for i in rule_of(node).addends(node) if i < len(node.inputs) and node.inputs[i] in tensors]
        proto = onnx.NodeProto()
        proto.CopyFrom(node.proto)
        for i in positions:
            name = node.inputs[i]
            masked, zero = f"{name}__mask_out", rule_of(node).addend_zero(node, i)
            if not zero:
                zero = f"{name}__mask_zero"
                dtype = onnx.helper.tensor_dtype_to_np_dtype(kinds.get(name, onnx.TensorProto.FLOAT))
                add_constant(model, new_weights, zero, np.zeros((), dtype))
            inputs, operator = [name, zero], "Mul"
            if graph.opsets.get("", 1) >= 9:
                add_constant(model, new_weights, f"{name}__mask_keep", np.zeros((), np.bool_))
                inputs, operator = [f"{name}__mask_keep", name, zero], "Where"
            model.graph.node.append(onnx.helper.make_node(operator, inputs, [masked], name=masked))
            proto.input[i] = masked
        model.graph.node.append(proto if positions else node.proto)
    return model, new_weights
