"""Run a model piece by piece over a whole data set: every node once, activations carried forward."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnxprune.graph.resized import fitted, resized_of
from onnxprune.graph.view import Graph, Node, reads
from onnxprune.io import markers
from onnxprune.io.subgraphs import ExposedTensor, Inner, expose_tensors, outline_bodies
from onnxprune.io.weights import Weight
from onnxprune.io.write import assemble, save
from onnxprune.runtime.capture import BranchAssignment, runs_node
from onnxprune.runtime.sessions import Array, Feed, frugal, is_heavy, open_session, run


class Store:
    """Values of tensors for every batch, in memory up to a limit, beyond it in temporary files.

    Args:
        limit: bytes to hold in memory.
        folder: folder of the temporary files.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self._limit, self.folder, self._held_bytes = limit, folder, 0
        self._values: dict[str, dict[int, Array | _File | Callable[[], Array]]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def add(self, name: str, value: Array, batch: int) -> None:
        """Add the value of ``name`` for a batch."""
        stored: Array | _File = value
        if self._held_bytes + value.nbytes > self._limit and value.nbytes > 1 << 16 and value.dtype != object:
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                np.ascontiguousarray(value).tofile(file)
            stored = _File(Path(file.name), value.dtype, value.shape)
        else:
            self._held_bytes += value.nbytes
        self._values.setdefault(name, {})[batch] = stored

    def lend(self, name: str, read: Callable[[], Array], batch: int) -> None:
        """Add a value that its owner has anyway: it takes no room, and is read whenever it is asked for."""
        self._values.setdefault(name, {})[batch] = read

    def get(self, name: str, batch: int) -> Array:
        """Return the value for one batch."""
        stored = self._values[name][batch]
        if isinstance(stored, _File):
            return stored.read()
        return stored() if callable(stored) else stored

    def batches(self, names: Sequence[str]) -> list[int]:
        """List the batches for which all these tensors have values: none of a branch that a batch does not run."""
        return sorted(set.intersection(*(set(self._values.get(name, ())) for name in names)))

    def drop(self, names: Iterable[str]) -> None:
        """Delete tensors and their files."""
        for name in names:
            for stored in self._values.pop(name, {}).values():
                if isinstance(stored, _File):
                    stored.path.unlink(missing_ok=True)
                elif not callable(stored):
                    self._held_bytes -= stored.nbytes


@dataclass(frozen=True, slots=True)
class _File:
    """A value in a file. It is read, not mapped: pages of a mapped file count as memory of the program."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def read(self) -> Array:
        """Read the value."""
        return np.fromfile(self.path, self.dtype).reshape(self.shape)


class Segments:
    """A graph in pieces: after piece ``k`` the tensors ``wanted[k]`` are known, and no node has run twice.

    Every call of a piece costs time beside that of its nodes. Where weights stay as they are, pieces can run ahead:
    several as one, when the first of them is asked for.

    Args:
        graph: the whole graph.
        wanted: names of activations, piece by piece.
        weights: read anew for every piece.
        inside: wanted tensors inside of Loops and Scans, and their types. Their values are those of all iterations,
            joined along the first axis; the node around them runs once more, when the first is wanted.
        ways: branch assignment of every batch. Branches then run like other nodes, and their tensors can be wanted;
            None: every If runs as one, wherever it goes.
        starts: the piece with which each one runs, [pieces], rising; None: every piece runs by itself.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, Weight],
        requests: Sequence[Iterable[str]],
        store: Store,
        inside: Mapping[str, Inner] | None = None,
        ways: Sequence[BranchAssignment] | None = None,
        starts: Sequence[int] | None = None,
    ) -> None:
        self._flat, self._weights, self._store, self._ways = graph, weights, store, ways
        self._inside = {n: kind for names in requests for n in names if (kind := (inside or {}).get(n)) is not None}
        self._graph, shown = self._closed()
        self._enclosed = graph.weights.keys() - self._graph.weights.keys()
        self._shown = {place.output: (name, place.stacked) for name, place in shown.items()}
        outputs = {name: output for output, (name, _) in self._shown.items()}
        self._stacked = outputs.keys()
        self._requested = [{outputs.get(n, n) for n in names} for names in requests]
        self._starts = starts or range(len(self._requested))
        self._nodes = self._assign()
        self._last = self._lifetimes()
        self.batches = 0

    def _closed(self) -> tuple[Graph, dict[str, ExposedTensor]]:
        """Return the graph with bodies outlined, which can be run in pieces, and with the current weights.

        Where something inside is wanted, a second node stands beside the first, for that alone.
        """
        graph = self._flat
        if not graph.has_bodies:
            return graph, {}
        weights = {**graph.weights, **self._weights}
        branches = self._ways is None
        proto, remaining = outline_bodies(graph.proto, weights, branches=branches)
        exposed_proto, places = expose_tensors(graph.proto, self._inside, branches=branches)
        if places:
            closed_proto = outline_bodies(exposed_proto, weights, branches=branches)[0]
            twins = {node.output[0]: node for node in closed_proto.graph.node if node.output}
            nodes = list(proto.graph.node)
            del proto.graph.node[:]
            for node in nodes:
                proto.graph.node.append(node)
                twin = twins.get(node.output[0]) if node.output else None
                if twin is not None and len(twin.output) > len(node.output):
                    for k in range(len(node.output)):
                        twin.output[k] = f"{twin.output[k]}__again"
                    proto.graph.node.append(twin)
        stored = {t.name for t in proto.graph.initializer}
        return Graph.of(proto, {n: w for n, w in remaining.items() if n in stored}), places

    def feed(self, feeds: Sequence[Feed]) -> None:
        """Lend the inputs of every batch to the store."""
        resized = resized_of(self._flat.proto)

        def read(name: str, batch: int) -> Array:
            value = {name: feeds[batch][name]}
            return (fitted(resized, value) if resized else value)[name]

        for batch, values in enumerate(feeds):
            for name in self._graph.inputs:
                if name in values:
                    self._store.lend(name, partial(read, name, batch), batch)
        self.batches = len(feeds)

    def run(self, piece: int) -> Iterator[int]:
        """Compute a piece and those that run with it, batch by batch; gives the number of every finished batch."""
        graph = self._closed()[0]
        nodes = [graph.nodes[node.index] for node in self._nodes[piece]]
        if not any(self._last.get(o, -1) >= piece for node in nodes for o in node.outputs):
            return
        parts: dict[tuple[tuple[int, str], ...], _Part | None] = {}
        for batch in range(self.batches):
            batch_nodes = (
                nodes
                if self._ways is None
                else [m for n in nodes if (m := _under_assignment(graph, n, self._ways[batch]))]
            )
            key = tuple((node.index, node.inputs[0] if node.inputs else "") for node in batch_nodes)
            if key not in parts:
                parts[key] = self._part(graph, batch_nodes, piece, batch)
            part = parts[key]
            if part is not None:
                results = run(part.session, {n: np.asarray(self._store.get(n, batch)) for n in part.inputs})
                for name in part.keep:
                    self._keep(name, results[name], batch)
            yield batch

    def _part(self, graph: Graph, nodes: Sequence[Node], piece: int, batch: int) -> _Part | None:
        """Return the nodes of a piece that run under the branch assignment of a batch; None where none is needed."""
        outputs = {o for node in nodes for o in node.outputs if o}
        kept_outputs = [n for n in sorted(outputs) if self._last.get(n, -1) >= piece]
        read = {n for node in nodes for n in reads(node)} - outputs
        # Bodies also read tensors of their own.
        inputs = sorted(n for n in read if n not in self._weights and self._is_outer(n))
        if not kept_outputs:
            return None
        values = {n: self._store.get(n, batch) for n in inputs}
        weights = {n: w for n, w in self._weights.items() if self._is_known(n)}
        names = {n for node in nodes for n in reads(node)}
        if is_heavy({n: w for n, w in weights.items() if n in names}):
            session = self._mapped(*part_skeleton(graph, weights, nodes, values, kept_outputs))
        else:
            session = open_session(part_model(graph, weights, nodes, values, kept_outputs))
        return _Part(session, inputs, kept_outputs)

    def _mapped(self, skeleton: onnx.ModelProto, weights: Mapping[str, Weight]) -> ort.InferenceSession:
        """Open a part with its weights mapped from a file: as bytes of a model they would be in memory three times."""
        with tempfile.TemporaryDirectory(dir=self._store.folder, ignore_cleanup_errors=True) as folder, frugal():
            path = Path(folder) / "part.onnx"
            save(skeleton, weights, path, external=True)
            return open_session(path)

    def _keep(self, name: str, value: Array, batch: int) -> None:
        output, stacked = self._shown.get(name, (name, 0))
        rows = value.shape[: stacked + 1]
        merged = value.reshape(math.prod(rows), *value.shape[stacked + 1 :]) if stacked else value
        self._store.add(output, merged, batch)

    def drop(self, piece: int) -> None:
        """Delete the tensors that no later piece needs."""
        self._store.drop([self._shown.get(n, (n, 0))[0] for n, last in self._last.items() if last <= piece])

    def _is_known(self, name: str) -> bool:
        """Return whether a weight is one of the graph, or was added since; a body may have others of the same names."""
        return name in self._graph.weights or name not in self._enclosed

    def _is_outer(self, name: str) -> bool:
        return name in self._graph.producer or name in self._graph.inputs

    def _assign(self) -> list[list[Node]]:
        """Nodes of every piece: those that its tensors need and no earlier piece has computed."""
        assigned: set[int] = set()
        pieces: list[set[int]] = [set() for _ in self._requested]
        for start, names in zip(self._starts, self._requested, strict=True):
            queue = list(names)
            while queue:
                node = self._graph.producer.get(queue.pop())
                if node is not None and node.index not in assigned and node.outputs[0] not in self._weights:
                    assigned.add(node.index)
                    pieces[start].add(node.index)
                    queue.extend(n for n in _needs(node) if n)
        return [[self._graph.nodes[i] for i in sorted(piece)] for piece in pieces]

    def _lifetimes(self) -> dict[str, int]:
        """Return the last reader piece of every tensor that outlives its own piece."""
        last: dict[str, int] = {}
        for piece, (nodes, names) in enumerate(zip(self._nodes, self._requested, strict=True)):
            outputs = {o for node in nodes for o in node.outputs}
            for name in {n for node in nodes for n in _needs(node)} - outputs:
                last[name] = piece
            for name in names:
                last[name] = piece
        # Nodes with bodies read the tensors in these, too, whose values are stored under the same names.
        return {name: piece for name, piece in last.items() if name not in self._stacked}


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece under one branch assignment, with its inputs and the outputs to store."""

    session: ort.InferenceSession
    inputs: Sequence[str]
    keep: Sequence[str]


def _needs(node: Node) -> Sequence[str]:
    """Return the names that a node reads: of what joins two branches not the condition, which is known."""
    return node.inputs[:2] if node.marker == markers.JOIN else reads(node)


def _under_assignment(graph: Graph, node: Node, assignment: BranchAssignment) -> Node | None:
    """Return a node as it runs under a branch assignment, where it does: a join passes on the branch that runs."""
    if not runs_node(graph, node.index, assignment):
        return None
    if node.marker != markers.JOIN:
        return node
    source = node.inputs[0 if assignment[node.inputs[2]] else 1]
    proto = onnx.helper.make_node("Identity", [source], node.outputs, name=node.outputs[0])
    return Node(node.index, "Identity", "", node.version, proto.name, [source], node.outputs, proto)


def part_model(
    graph: Graph,
    weights: Mapping[str, Weight],
    nodes: Sequence[Node],
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
) -> bytes:
    """Build a model of some nodes of a graph: ``inputs`` by name (types and ranks are taken from them), ``outputs``."""
    return bytes(assemble(*part_skeleton(graph, weights, nodes, inputs, outputs)).SerializeToString())


def part_skeleton(
    graph: Graph,
    weights: Mapping[str, Weight],
    nodes: Sequence[Node],
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    """Build the model of :func:`part_model` without its weights; returns it and them."""
    model = onnx.ModelProto()
    model.ir_version = max(graph.proto.ir_version, 4)
    model.opset_import.extend(o for o in graph.proto.opset_import if o.domain != markers.DOMAIN)
    names = {n for node in nodes for n in reads(node)}
    for node in nodes:
        model.graph.node.add().CopyFrom(node.proto)
    model.graph.name = "part"
    for name, value in inputs.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * value.ndim))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    part_weights = {n: w for n, w in weights.items() if n in names}
    for name, weight in part_weights.items():
        model.graph.initializer.append(onnx.TensorProto(name=name, data_type=weight.onnx_type, dims=weight.shape))
    return model, part_weights
