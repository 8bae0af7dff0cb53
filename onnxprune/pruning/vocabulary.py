"""Tables of tokens: where ids from the inputs of a model look up rows, and the model with fewer of them.

The rows are labelled like channels: a graph in which a table may lose rows, and an output positions of its last axis,
has them as units, tied to the logits where both read one weight. New ids are looked up in front: ids go
to the tables as they come, and all other readers get the ids of the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.errors import BudgetError, UsageError, argument, nearest
from onnxprune.graph.facts import Facts
from onnxprune.graph.view import Graph, Node, underscored_name
from onnxprune.io import markers
from onnxprune.io.constants import add_constant
from onnxprune.io.weights import Weight
from onnxprune.operators.context import Opened
from onnxprune.operators.registry import Move, rule_of

Parts = tuple[onnx.ModelProto, dict[str, Weight]]
Kept = NDArray[np.int64]
"""The ids of the original that are left, rising: the new id of each is its place."""

_INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
_FEW = 16  # a table of so few rows, such as one of token types, may have the size of a classifier's output
_PASSING = (Move.SAME, Move.CAST, Move.SHAPE, Move.ORDER, Move.SELECT, Move.REPEAT)


@dataclass(frozen=True, slots=True)
class Lookup:
    """Rows of a table that a node picks.

    Attributes:
        output: first output of the node.
        index, table: positions of its inputs.
        name: the table.
        roots: weights that the table is computed from.
        size: number of rows.
        inputs: inputs of the model whose ids, moved at most, are the index; empty where it is computed otherwise.
    """

    output: str
    index: int
    table: int
    name: str
    roots: frozenset[str]
    size: int
    inputs: frozenset[str]


@dataclass(frozen=True, slots=True)
class TokenTables:
    """The tables of one vocabulary.

    Attributes:
        size: number of tokens.
        lookups: where rows of the tables are picked.
        inputs: inputs of the model that hold ids.
        outputs: outputs whose last axis has a position for every token.
    """

    size: int
    lookups: tuple[Lookup, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def opened(self) -> Opened:
        """The sizes that may change."""
        return Opened(frozenset((x.output, x.table) for x in self.lookups), frozenset(self.outputs))


def find_tables(graph: Graph, facts: Facts, input_name: str | None = None) -> TokenTables:
    """Return the tables of the vocabulary: those of the logits' size, else the largest.

    Args:
        graph: view of the model.
        facts: shapes of its tensors.
        input_name: input of ids; None: any.

    Raises:
        UsageError: there is no such input, it holds no ids, or several vocabularies are equally likely.
        BudgetError: no input looks up rows of a table.
    """
    kinds = kinds_of(graph.proto, facts)
    known = {name: kinds.get(name) for name in graph.inputs}
    if input_name is not None and input_name not in known:
        raise UsageError(
            f"{argument('vocabulary')}: the model has no input {input_name!r}", hint=nearest(input_name, list(known))
        )
    if input_name is not None and known[input_name] not in _INTEGERS:
        raise UsageError(
            f"{argument('vocabulary')}: input {input_name!r} does not hold ids, but numbers of another type",
            hint=f"Inputs of integers: {', '.join(n for n, kind in known.items() if kind in _INTEGERS) or 'none'}.",
        )
    lookups = list(_lookups(graph, facts))
    named = [x for x in lookups if x.inputs and (input_name is None or input_name in x.inputs)]
    if not named:
        raise BudgetError(f"No embedding was found: {_why_none(known, input_name)}.", hint=_HINT)
    widths = {name: _width(graph, facts, name) for name in graph.outputs}
    like_logits = [x for x in named if x.size in widths.values() and x.size >= _FEW]
    size = max(x.size for x in like_logits or named)
    candidates = [x for x in named if x.size == size]
    joined = _joined([candidates[0]], lookups)
    if any(x not in joined for x in candidates):
        inputs = ", ".join(sorted({name for x in candidates for name in x.inputs}))
        raise UsageError(
            f"{argument('vocabulary')}: several inputs look up tables of {size:,} rows each: {inputs}",
            hint=f"Name one, in the form {sorted(candidates[0].inputs)[0]}=TOKENS.txt.",
        )
    ids = {name for x in joined for name in x.inputs}
    outputs = tuple(name for name, width in widths.items() if width == size)
    return TokenTables(size, tuple(joined), tuple(n for n in graph.inputs if n in ids), outputs)


_HINT = "A vocabulary is a table of weights whose rows are picked by an input of the model that holds integers."


def _why_none(kinds: Mapping[str, int | None], input_name: str | None) -> str:
    if input_name is not None:
        return f"input {input_name!r} holds integers, but picks no rows of a table"
    integers = [name for name, kind in kinds.items() if kind in _INTEGERS]
    if integers:
        return f"{', '.join(map(repr, integers[:4]))} pick no rows of a table of weights"
    return f"no input holds ids, but {', '.join(map(repr, list(kinds)[:4]))} hold numbers of other types"


def kinds_of(proto: onnx.ModelProto, facts: Facts) -> dict[str, int]:
    """Return the element types of tensors, inputs of the model among them."""
    return {**facts.probes[0].dtypes, **{i.name: i.type.tensor_type.elem_type for i in proto.graph.input}}


def _joined(first: list[Lookup], lookups: Sequence[Lookup]) -> list[Lookup]:
    """Return the lookups that share inputs or weights with the first, directly or through others, and their size."""
    joined = list(first)
    while True:
        inputs = frozenset().union(*(x.inputs for x in joined))
        roots = frozenset().union(*(x.roots for x in joined))
        more = [x for x in lookups if x not in joined and (x.inputs & inputs or x.roots & roots)]
        more = [x for x in more if x.size == first[0].size]
        if not more:
            return [x for x in lookups if x in joined]
        joined += more


def _width(graph: Graph, facts: Facts, name: str) -> int | None:
    """Return the size of the last axis of an output of floats, where it is always the same."""
    shape, kind = facts.shape(name), facts.probes[0].dtypes.get(name)
    if not shape or len(shape) < 2 or kind in _INTEGERS or facts.varies(name, len(shape) - 1):
        return None
    return None if shape[-1] is None else int(shape[-1])


def _lookups(graph: Graph, facts: Facts) -> Iterator[Lookup]:
    ids = ids_of(graph, facts, graph.inputs)
    for node in graph.steps:
        for index, table in rule_of(node).lookups(node):
            if max(index, table) >= len(node.inputs) or not node.inputs[index] or not node.inputs[table]:
                continue
            name = node.inputs[table]
            roots, shape = _roots(graph, name), facts.shape(name)
            if roots and shape and shape[0] is not None and len(shape) == 2 and not facts.varies(name, 0):
                inputs = ids.get(node.inputs[index], frozenset())
                is_known = facts.value(node.inputs[index]) is not None
                if not is_known:
                    yield Lookup(node.outputs[0], index, table, name, roots, shape[0], inputs)


def _roots(graph: Graph, name: str) -> frozenset[str]:
    """Return the weights that a tensor is computed from; none where it depends on data."""
    queue, visited, roots = [name], {name}, set[str]()
    while queue:
        current = queue.pop()
        if current in graph.weights:
            roots.add(current)
            continue
        producer = graph.producer.get(current)
        if producer is None or producer.domain == markers.DOMAIN or len(visited) > 64:
            return frozenset()
        fresh = [n for n in producer.inputs if n and n not in visited]
        visited.update(fresh)
        queue += fresh
    large = {root for root in roots if len(graph.weights[root].shape) > 1}
    return frozenset(large)


def ids_of(graph: Graph, facts: Facts, inputs: Sequence[str]) -> dict[str, frozenset[str]]:
    """Return the tensors that hold the integers of some inputs, moved at most, with these inputs."""
    kinds = kinds_of(graph.proto, facts)
    holds = {name: frozenset((name,)) for name in inputs if kinds.get(name) in _INTEGERS}
    for node in graph.steps:
        if not _passes(node, holds) or not all(kinds.get(o) in _INTEGERS for o in node.outputs if o):
            continue
        sources = node.inputs if rule_of(node).moves is Move.JOIN else node.inputs[:1]
        joint = frozenset().union(*(holds[name] for name in sources if name))
        holds.update(dict.fromkeys(filter(None, node.outputs), joint))
    return holds


def _passes(node: Node, holds: Mapping[str, frozenset[str]]) -> bool:
    """Return whether a node only moves ids."""
    moves = None if node.domain == markers.DOMAIN else rule_of(node).moves
    if moves is Move.JOIN:
        return all(name in holds for name in node.inputs if name)
    return moves in _PASSING and bool(node.inputs) and node.inputs[0] in holds


# -- the model with other ids ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Front:
    """Nodes to insert in front of others, with the constants that they read."""

    model: onnx.ModelProto
    weights: dict[str, Weight]
    kinds: Mapping[str, int]
    names: set[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    _constants: dict[tuple[str, int], str] = field(default_factory=dict)

    def name(self, stem: str) -> str:
        """Return a name that nothing has."""
        return underscored_name(stem, self.names)

    def gather(self, what: str, values: NDArray[np.int64], ids: str) -> str:
        """Look up ids in a list; the result has their type. Returns its name."""
        kind = self.kinds.get(ids, onnx.TensorProto.INT64)
        if (what, kind) not in self._constants:
            constant = self._constants[what, kind] = self.name(what)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
            add_constant(self.model, self.weights, constant, values.astype(dtype))
        result = self.name(f"{ids}_{what}")
        operands = [self._constants[what, kind], ids]
        self.nodes.append(onnx.helper.make_node("Gather", operands, [result], name=result, axis=0))
        return result


def _front(proto: onnx.ModelProto, weights: Mapping[str, Weight], kinds: Mapping[str, int]) -> _Front:
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    del model.graph.node[:]
    used = {n for node in proto.graph.node for n in (*node.input, *node.output)}
    return _Front(model, dict(weights), kinds, used | weights.keys() | {i.name for i in proto.graph.input})


def renumbered(parts: Parts, tables: TokenTables, facts: Facts, kept_ids: Kept, cut_outputs: Sequence[str]) -> Parts:
    """Return a model whose tables have lost rows with inputs of new ids.

    Other readers of ids, which compare them or look up a table of another size, get those of the original.

    Args:
        parts: the model without the rows.
        tables: its tables.
        facts: types of the original's tensors.
        kept_ids: ids that are left.
        cut_outputs: outputs whose last axis has a position for each of them now.

    Raises:
        BudgetError: an output, or a body that cannot be seen into, reads the ids.
    """
    model, weights = renumbered_ids(parts, tables.lookups, tables.inputs, facts, kept_ids, tables.size)
    for output in model.graph.output:
        dims = output.type.tensor_type.shape.dim
        if output.name in cut_outputs and dims and dims[-1].HasField("dim_value"):
            dims[-1].dim_value = kept_ids.size
    return model, weights


def renumbered_ids(
    parts: Parts, lookups: Sequence[Lookup], names: Sequence[str], facts: Facts, kept_ids: Kept, size: int
) -> Parts:
    """Return a model in which some tensors hold new ids: lookups take them, other readers those of the original.

    Args:
        parts: the model; changed weights are added to it.
        lookups: where positions are picked by the new ids.
        names: tensors of ids.
        facts: types of the original's tensors.
        kept_ids: ids that are left.
        size: number of ids of the original.

    Raises:
        BudgetError: an output, or a body that cannot be seen into, reads the ids.
    """
    graph = Graph.of(*parts)
    holds = ids_of(graph, facts, names)
    outside = next((n for n in (*graph.outputs, *graph.captured) if n in holds), None)
    if outside is not None:
        raise BudgetError(
            f"{outside!r} holds numbers of tokens or experts, which would change.",
            hint="Remove that output of the model.",
        )
    positions = {(x.output, x.index) for x in lookups}
    front = _front(*parts, kinds_of(parts[0], facts))
    order = np.full(size, kept_ids.size, np.int64)
    order[kept_ids] = np.arange(kept_ids.size)
    for node in graph.nodes:
        proto = onnx.NodeProto()
        proto.CopyFrom(node.proto)
        for i, name in enumerate(node.inputs):
            is_lookup = bool(node.outputs) and (node.outputs[0], i) in positions
            if is_lookup and name not in holds:
                proto.input[i] = front.gather("new_ids", order, name)
            elif name in holds and not is_lookup and not _hands_on(node, holds):
                proto.input[i] = front.gather("original_ids", kept_ids, name)
        front.nodes.append(proto)
    front.model.graph.node.extend(front.nodes)
    return front.model, front.weights


def _hands_on(node: Node, holds: Mapping[str, frozenset[str]]) -> bool:
    """Return whether a node gives ids on, or reads nothing but their number."""
    return rule_of(node).reads_sizes or (bool(node.outputs) and all(o in holds for o in node.outputs if o))


def with_front(
    parts: tuple[onnx.ModelProto, Mapping[str, Weight]],
    inputs: Sequence[str],
    facts: Facts,
    values: NDArray[np.int64],
    outputs: Mapping[str, NDArray[np.int64]] | None = None,
) -> Parts:
    """Return a model that looks up the ids of some inputs in a list, and picks positions of some outputs' last axis.

    Args:
        parts: the model.
        inputs: its inputs of ids.
        facts: types of the original's tensors.
        values: replacement of each id.
        outputs: positions to pick, by name of the output.
    """
    front = _front(*parts, kinds_of(parts[0], facts))
    names = {name: front.gather("token_ids", values, name) for name in inputs}
    behind = {name: front.name(f"{name}_all") for name in outputs or {}}
    for node in parts[0].graph.node:
        proto = onnx.NodeProto()
        proto.CopyFrom(node)
        for group, renamed in ((proto.input, {**names, **behind}), (proto.output, behind)):
            for k, name in enumerate(group):
                group[k] = renamed.get(name, name)
        front.nodes.append(proto)
    for name, positions in (outputs or {}).items():
        index = front.name(f"{name}_positions")
        add_constant(front.model, front.weights, index, positions)
        front.nodes.append(onnx.helper.make_node("Gather", [behind[name], index], [name], name=name, axis=-1))
    front.model.graph.node.extend(front.nodes)
    for value in front.model.graph.output:
        dims = value.type.tensor_type.shape.dim
        if outputs and value.name in outputs and dims:
            dims[-1].Clear()
    return front.model, front.weights


Renumber = Callable[[str, NDArray[np.int64]], NDArray[np.int64]]
"""(input, ids of the original) -> new ids."""
