"""The masked original and its comparison with the pruned model: run every branch, compare inner tensors.

Random inputs take one branch of an If and may run a Loop zero times; a pruned model has to be exact on every branch. In
both models, the masked original and the pruned one, the same conditions are therefore fixed as constants.

A tensor of the masked original, gathered at its surviving positions, has to equal the tensor of the same name in the
pruned model. Both become outputs of the same new name, so that the usual comparison of models covers them.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.channels.survivors import Survivors
from onnxprune.graph.facts import Facts, Probe
from onnxprune.graph.values import Probe as ProbeValues
from onnxprune.graph.values import size_of
from onnxprune.graph.view import Graph, Node
from onnxprune.io import markers
from onnxprune.io.constants import add_constant
from onnxprune.io.weights import Weight
from onnxprune.labels.label import Ids, Label
from onnxprune.operators.context import Step, Table
from onnxprune.operators.registry import lookup

# Bytes of a weight from which a masked copy beside the weight itself takes too much memory.
_BULKY = 16 << 20
# Types that onnxruntime has a Where kernel for.
_CHOOSES = (np.dtype(np.float32), np.dtype(np.float64))


def masked_original(
    table: Table, removed: NDArray[np.bool_], probe: Probe | None = None
) -> tuple[onnx.ModelProto, dict[str, Weight]]:
    """Build the masked original for inputs of one probe's sizes (by default the first). Weights are shared, not copied.

    It is built from labels and ``Rule.contracted_axes`` alone and shares nothing with the rewriting of nodes and
    weights, so that a mistake in either shows as a difference.
    """
    graph: Graph = table.graph
    builder = _Masks(table, Survivors(table, removed), probe or table.facts.probes[0])
    model = onnx.ModelProto()
    model.CopyFrom(graph.proto)
    del model.graph.node[:]
    for node in graph.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node.proto)
        rule = lookup(node.domain, node.op, node.version)
        step = Step(node, table)
        if any(table.get(n) for n in node.inputs if n):
            read = rule.contracted_axes(step)
            for i, axes in read:
                name = node.inputs[i]
                others = [(node.inputs[j], position) for j, position in read if j != i]
                if builder.is_spared(name, axes, others):
                    continue
                neutral = rule.neutral(step, i)
                for extra in builder.mask(f"{name}__mask_{node.index}_{i}", name, axes, neutral):
                    model.graph.node.append(extra)
                    copy.input[i] = extra.output[0]
        model.graph.node.append(copy)
    weights = {t.name: graph.weights[t.name] for t in graph.proto.graph.initializer if t.name in graph.weights}
    for name, value in builder.constants.items():
        add_constant(model, weights, name, value)
    return model, weights


class _Masks:
    """Masks built so far, shared between the operators that read the same tensor along the same axes."""

    def __init__(self, table: Table, after: Survivors, probe: Probe) -> None:
        self.table, self.after, self.probe = table, after, probe
        self.constants: dict[str, NDArray[Any]] = {}

    def _masks(self, label: Label, axes: tuple[int, ...]) -> bool:
        """Return whether positions are removed along one of these axes."""
        return self.after.mask(label) is not None and bool(set(label.axes) & set(axes))

    def is_spared(self, name: str, axes: tuple[int, ...], others: Sequence[tuple[str, tuple[int, ...]]]) -> bool:
        """Return whether a weight needs no mask: a masked copy would be large, and the other factor is masked.

        The product of 0 and a finite weight is 0.

        Args:
            name: name of the weight.
            axes: axes of the weight that the operator sums over.
            others: the other factors of the product, each with the axes it is summed over.
        """
        weight = self.table.graph.weights.get(name)
        if weight is None or weight.nbytes < _BULKY:
            return False
        data = [(n, axes) for n, axes in others if n not in self.table.graph.weights]
        masked = [x for n, a in data for x in self.table.get(n) if self._masks(x, a)]
        if len(masked) != 1 or sum(self._masks(x, axes) for x in self.table.get(name)) > 1:
            return False
        return weight.dtype.kind in "iu" or bool(np.isfinite(weight.read().astype(np.float32, copy=False)).all())

    def mask(self, prefix: str, name: str, axes: tuple[int, ...], neutral: str | None) -> list[onnx.NodeProto]:
        """Return nodes that multiply a tensor by its masks along ``axes``; none where no position is removed there.

        ``prefix`` begins their names, and is of one operand of one operator: both factors may be the same tensor.
        """
        nodes: list[onnx.NodeProto] = []
        current = name
        for k, label in enumerate(self.table.get(name)):
            keep = self.after.mask(label)
            if keep is None or not set(label.axes) & set(axes):
                continue
            keep = self._at_probe(name, label, keep)
            stem = f"{prefix}_{k}"
            dtype = self._dtype(neutral or name)
            if dtype.kind in "iu":
                nodes += self._mask_codes(current, stem, keep, neutral, dtype)
            elif dtype in _CHOOSES and self.table.graph.opsets.get("", 1) >= 9:
                # A masked channel may have become infinite or NaN (0 / 0 in a normalisation): 0 times that is not 0.
                self.constants[stem], self.constants[f"{stem}_zero"] = keep, np.zeros((), dtype)
                inputs = [stem, current, f"{stem}_zero"]
                nodes.append(onnx.helper.make_node("Where", inputs, [f"{stem}_out"], name=stem))
            else:
                self.constants[stem] = keep.astype(dtype)
                nodes.append(onnx.helper.make_node("Mul", [current, stem], [f"{stem}_out"], name=stem))
            current = f"{stem}_out"
        return nodes

    def _mask_codes(
        self, current: str, stem: str, keep: NDArray[np.bool_], neutral: str | None, dtype: np.dtype[Any]
    ) -> list[onnx.NodeProto]:
        """Set removed codes to the zero point; by way of int32, since neither Mul nor Where takes every 8-bit type."""
        self.constants[stem] = keep
        decoded, back, zero = f"{stem}_wide", f"{stem}_masked", f"{stem}_zero"
        nodes = [onnx.helper.make_node("Cast", [current], [decoded], to=onnx.TensorProto.INT32)]
        if neutral is None:
            self.constants[zero] = np.zeros((), np.int32)
        else:
            nodes.append(onnx.helper.make_node("Cast", [neutral], [zero], to=onnx.TensorProto.INT32))
        nodes.append(onnx.helper.make_node("Where", [stem, decoded, zero], [back], name=stem))
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        nodes.append(onnx.helper.make_node("Cast", [back], [f"{stem}_out"], to=kind))
        return nodes

    def _at_probe(self, name: str, label: Label, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the mask at another probe's sizes: it repeats along axes that were merged with a dynamic axis."""
        shape = self.probe.shapes.get(name)
        for axis in label.axes:
            size = shape[axis] if shape is not None else keep.shape[axis]
            if size != keep.shape[axis]:
                period = int(np.gcd(size, keep.shape[axis]))
                keep = np.concatenate([keep.take(np.arange(period), axis=axis)] * (size // period), axis=axis)
        return keep

    def _dtype(self, name: str) -> np.dtype[Any]:
        weight = self.table.graph.weights.get(name)
        if weight is not None:
            return weight.dtype
        kind = self.table.facts.probes[0].dtypes.get(name) or onnx.TensorProto.FLOAT
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))


Model = tuple[onnx.ModelProto, Mapping[str, Weight]]
BranchAssignment = Mapping[str, bool]
"""Conditions at every node that are open, by the mark that begins them: the branch, or that a Loop runs."""

# Limits on the trips of a Loop with an unknown trip count, and on the branch assignments of a model.
_TRIPS, _MAX_ASSIGNMENTS = 3, 16


@dataclass(frozen=True, slots=True)
class OpenCondition:
    """A node whose condition depends on the inputs. ``within``: the branches around it, {mark: branch taken}."""

    node: Node
    within: BranchAssignment

    @property
    def mark(self) -> str:
        """The marker at which the node begins."""
        return self.node.outputs[0]


def branch_assignments(nodes: Sequence[OpenCondition]) -> list[dict[str, bool]]:
    """Return branch assignments that together run every branch of these nodes, and every Loop."""
    uncovered = {(o.mark, side) for o in nodes for side in ((True, False) if o.node.kind == "If" else (True,))}
    result: list[dict[str, bool]] = []
    while uncovered and len(result) < _MAX_ASSIGNMENTS:
        assignment: dict[str, bool] = {}
        for item in sorted(nodes, key=lambda o: -len(o.within)):  # innermost first: they fix the outer branches
            mark = item.mark
            sides = [
                s
                for s in (assignment.get(mark), True, False)
                if s is not None and (s is True or item.node.kind == "If")
            ]
            open_sides = [s for s in sides if (mark, s) in uncovered and assignment.get(mark, s) == s]
            reachable = all(assignment.get(m, side) == side for m, side in item.within.items())
            if open_sides and reachable:
                assignment.update(item.within)
                assignment[mark] = open_sides[0]
            else:
                assignment.setdefault(mark, True)
        covered = {(m, s) for m, s in assignment.items() if (m, s) in uncovered and _is_reached(nodes, m, assignment)}
        if not covered:
            break
        uncovered -= covered
        result.append(assignment)
    return result


def _is_reached(nodes: Sequence[OpenCondition], mark: str, assignment: BranchAssignment) -> bool:
    within = next(o.within for o in nodes if o.mark == mark)
    return all(assignment.get(m) == side for m, side in within.items())


def open_conditions(graph: Graph, facts: Facts) -> list[OpenCondition]:
    """Return the If and Loop nodes whose conditions (trip counts) differ between the probes or are unknown."""
    nodes: dict[int, OpenCondition] = {}
    for node in graph.nodes:
        if node.marker == markers.OPEN and not all(not n or facts.static_value(n) is not None for n in node.inputs):
            within = {nodes[b.start].mark: b.side for b in graph.around[node.index] if b.start in nodes}
            nodes[node.index] = OpenCondition(node, within)
    return list(nodes.values())


def force(model: Model, assignment: BranchAssignment) -> Model:
    """Return a model in which the conditions of a branch assignment are constants."""
    proto, weights = onnx.ModelProto(), dict(model[1])
    proto.CopyFrom(model[0])
    constants: dict[str, np.ndarray] = {}
    marks: dict[str, str] = {}  # by name: of two nodes of one name, the second begins when the first has ended
    for node in proto.graph.node:
        marker = markers.marker_of(node)[0]
        if marker == markers.OPEN:
            marks[node.name] = node.output[0]
        if marker in (markers.OPEN, markers.ELSE, markers.JOIN) and (mark := marks[node.name]) in assignment:
            condition = len(node.input) - 1
            constants[f"{mark}__holds"] = np.asarray(assignment[mark])
            if condition == 1:
                constants[f"{mark}__trips"] = np.asarray(_TRIPS)
                node.input[0] = f"{mark}__trips"
            node.input[condition] = f"{mark}__holds"
    for name, value in constants.items():
        add_constant(proto, weights, name, value)
    return proto, weights


def force_closed(model: Model, side: bool) -> Model:
    """Return a model (bodies inside their nodes) in which every If takes the same side, and every Loop runs."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model[0])
    _force_nodes(proto.graph.node, side)
    for name, value in (("__holds", True), ("__fails", False), ("__trips", _TRIPS)):
        tensor = onnx.numpy_helper.from_array(np.asarray(value), name)
        proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], [name], value=tensor))
    return proto, model[1]


def _force_nodes(nodes: Iterable[onnx.NodeProto], side: bool) -> None:
    for node in nodes:
        if node.op_type == "If" and node.domain in ("", "ai.onnx"):
            node.input[0] = "__holds" if side else "__fails"
        elif node.op_type == "Loop" and node.domain in ("", "ai.onnx"):
            node.input[0], node.input[1] = "__trips", "__holds"
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                _force_nodes(body.node, side)


def branch_names(nodes: Sequence[OpenCondition], branches: Collection[tuple[str, bool]]) -> list[str]:
    """Return readable names of branches, without those that lie within others of them."""
    names = []
    for item in nodes:
        for side in (True, False):
            if (item.mark, side) in branches and not any(branch in branches for branch in item.within.items()):
                branch_name = ("then-branch" if side else "else-branch") if item.node.kind == "If" else "body"
                names.append(f"the {branch_name} of {item.node.kind} {item.node.label!r}")
    return names


Steps = list[tuple[int, Ids]]
"""Indices to pick along axes, one after the other."""
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
_ELEMENTS = 1 << 24
_MAX_WITNESSES = 4


class Witnesses:
    """Tensors that the masked original and the pruned model have in common, at the sizes of one probe.

    Args:
        table: the labels.
        removed: bool mask over atoms, True where removed.
        probe: the probe whose sizes the masked original has.
        reference: the masked original.
        cut: the pruned model.
    """

    def __init__(
        self, table: Table, removed: NDArray[np.bool_], probe: ProbeValues, reference: Model, cut: Model
    ) -> None:
        self._table, self._probe, self._after = table, probe, Survivors(table, removed)
        self._reference, self._cut = reference, cut
        self._producer = {o: node for node in reference[0].graph.node for o in node.output if o}

    def upstream(self, outputs: Iterable[str]) -> list[str]:
        """Return comparable tensors in front of some outputs, nearest first, with a bounded number of elements."""
        common = {o for node in self._cut[0].graph.node for o in node.output if o}
        place = {name: k for k, name in enumerate(self._producer)}
        output_names = {o.name for o in self._reference[0].graph.output}
        names, num_elements = [], _ELEMENTS
        for name in sorted(self._behind(outputs), key=lambda n: -place[n]):
            if name in common and name not in output_names and self._comparable(name):
                num_elements -= size_of(self._probe.shapes[name])
                if num_elements < 0:
                    break
                names.append(name)
        return names

    def last(self, outputs: Iterable[str], varying: set[str]) -> list[str]:
        """Return, of tensors whose values vary, the last ones on every path to the outputs (nearest first, a few)."""
        place = {name: k for k, name in enumerate(self._producer)}
        names = sorted(self._behind(outputs, varying) & varying, key=lambda n: -place[n])
        return names[:_MAX_WITNESSES]

    def _behind(self, outputs: Iterable[str], stop: set[str] | frozenset[str] = frozenset()) -> set[str]:
        """Return the tensors that the outputs are computed from, no further than ``stop``."""
        names = {o for o in outputs if o in self._producer}
        queue = list(names)
        while queue:
            name = queue.pop()
            if name in stop:
                continue
            fresh = {n for n in self._producer[name].input if n in self._producer} - names
            names |= fresh
            queue.extend(fresh)
        return names

    def survivors(self, name: str) -> Steps | None:
        """Return gather steps that select the survivors of a tensor; None where labels do not determine them."""
        if not self._table.get(name):
            return []
        return self._steps(name) if self._labelled_alike(name) else None

    def _steps(self, name: str) -> Steps:
        """Return gather steps (axis, index); indices of grids are as large as the tensor they are applied to."""
        shape, result = list(self._probe.shapes[name]), []
        for axis, index in self._after.steps(name):
            if index.ndim == 1:
                shape[axis] = index.size
            else:
                shape[axis] = index.shape[axis]
                index = np.broadcast_to(index, shape)
            result.append((axis, index))
        return result

    def _labelled_alike(self, name: str) -> bool:
        """Return whether labels determine every surviving position: sizes are known and equal those of the labels."""
        shape = self._probe.shapes.get(name)
        if shape is None or None in shape:
            return False
        # Heads merged with a dynamic batch have labels of the first probe's size alone.
        labels = self._table.get(name)
        if any(x.ids.shape[a] != shape[a] for x in labels for a in x.axes):
            return False
        return self._table.graph.opsets.get("", 1) >= 11 or not any(x.is_grid for x in labels)

    def _comparable(self, name: str) -> bool:
        """Return whether a tensor has floats without known value (sizes may differ) and survivors at every position."""
        shape = self._probe.shapes.get(name)
        if not shape or None in shape or 0 in shape or self._probe.dtypes.get(name) not in _FLOATS:
            return False
        if self._table.facts.value(name) is not None or name in self._table.graph.inner:
            return False
        return self._labelled_alike(name)

    def tapped(self, names: Sequence[str]) -> Model:
        """Return the masked original with tensors as additional outputs."""
        model = onnx.ModelProto()
        model.CopyFrom(self._reference[0])
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        return model, self._reference[1]

    def pair(self, names: Sequence[str], without: Container[str] = ()) -> tuple[Model, Model, dict[str, str]]:
        """Return both models with the survivors of tensors as additional outputs, and {new output: tensor}.

        The outputs ``without`` are not outputs of them.
        """
        (reference, known), (cut, _) = (self._copy(m) for m in (self._reference, self._cut))
        new = {f"{name}__survivors": name for name in names}
        for output, name in new.items():
            gather(reference, known, name, output, self._steps(name))
            cut.graph.node.append(onnx.helper.make_node("Identity", [name], [output], name=output))
            for model in (reference, cut):
                model.graph.output.append(onnx.ValueInfoProto(name=output))
        for graph in (reference.graph, cut.graph):
            for output in [x for x in graph.output if x.name in without]:
                graph.output.remove(output)
        return (reference, known), (cut, self._cut[1]), new

    @staticmethod
    def _copy(model: Model) -> tuple[onnx.ModelProto, dict[str, Weight]]:
        copy = onnx.ModelProto()
        copy.CopyFrom(model[0])
        return copy, dict(model[1])


def gather(model: onnx.ModelProto, weights: dict[str, Weight], name: str, output: str, steps: Steps) -> None:
    """Append nodes that gather the survivors of a tensor by the steps that prune a weight of the same labels."""
    current = name
    for k, (axis, index) in enumerate(steps):
        operand, result = f"{output}_index{k}", f"{output}_step{k}"
        _constant(model, weights, operand, index)
        op = "Gather" if index.ndim == 1 else "GatherElements"
        model.graph.node.append(onnx.helper.make_node(op, [current, operand], [result], name=result, axis=axis))
        current = result
    model.graph.node.append(onnx.helper.make_node("Identity", [current], [output], name=output))


def _constant(model: onnx.ModelProto, weights: dict[str, Weight], name: str, value: Ids) -> None:
    add_constant(model, weights, name, np.ascontiguousarray(value, dtype=np.int64), behind=True)
