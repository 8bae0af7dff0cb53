"""Witnesses: tensors inside a model that show whether a cut is exact where the model's outputs do not vary.

A tensor of the masked original, gathered at the positions that survive, has to equal the tensor of that name in the
cut model. Both become outputs of the same new name, so that models are compared as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.graph.values import Probe, size_of
from onnxprune.labels.label import Ids
from onnxprune.model.constants import add_constant
from onnxprune.model.weights import Weight
from onnxprune.operators.context import Table
from onnxprune.rewrite.after import After

Model = tuple[onnx.ModelProto, Mapping[str, Weight]]
Steps = list[tuple[int, Ids]]
"""Indices to pick along axes, one after the other."""
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
_ELEMENTS = 1 << 24
_MOST = 4


class Witnesses:
    """Tensors that the masked original and the cut model have in common, at the sizes of one probe.

    Args:
        table: the labels. removed: mask over atoms. probe: whose sizes the masked original has.
        reference, cut: the two models.
    """

    def __init__(self, table: Table, removed: NDArray[np.bool_], probe: Probe, reference: Model, cut: Model) -> None:
        self._table, self._probe, self._after = table, probe, After(table, removed)
        self._reference, self._cut = reference, cut
        self._producer = {o: node for node in reference[0].graph.node for o in node.output if o}

    def upstream(self, outputs: Iterable[str]) -> list[str]:
        """Tensors that could be compared in front of some outputs, nearest first, with a bounded number of elements."""
        both = {o for node in self._cut[0].graph.node for o in node.output if o}
        place = {name: k for k, name in enumerate(self._producer)}
        held = {o.name for o in self._reference[0].graph.output}
        found, left = [], _ELEMENTS
        for name in sorted(self._behind(outputs), key=lambda n: -place[n]):
            if name in both and name not in held and self._comparable(name):
                left -= size_of(self._probe.shapes[name])
                if left < 0:
                    break
                found.append(name)
        return found

    def last(self, outputs: Iterable[str], varying: set[str]) -> list[str]:
        """Of tensors that vary, the last ones on every way to the outputs (nearest first, a few)."""
        place = {name: k for k, name in enumerate(self._producer)}
        found = sorted(self._behind(outputs, varying) & varying, key=lambda n: -place[n])
        return found[:_MOST]

    def _behind(self, outputs: Iterable[str], stop: set[str] | frozenset[str] = frozenset()) -> set[str]:
        """What the outputs are computed from, no further than ``stop``."""
        seen = {o for o in outputs if o in self._producer}
        queue = list(seen)
        while queue:
            name = queue.pop()
            if name in stop:
                continue
            fresh = {n for n in self._producer[name].input if n in self._producer} - seen
            seen |= fresh
            queue.extend(fresh)
        return seen

    def survivors(self, name: str) -> Steps | None:
        """How to pick those of a tensor; None where that cannot be said."""
        if not self._table.get(name):
            return []
        return self._steps(name) if self._labelled_alike(name) else None

    def _steps(self, name: str) -> Steps:
        """Indices, each along an axis; those of grids as large as what they are applied to."""
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
        """Whether labels say where every survivor is: sizes are known, and those that the labels have."""
        shape = self._probe.shapes.get(name)
        if shape is None or None in shape:
            return False
        # Heads merged with a dynamic batch have labels of the first probe's size alone.
        labels = self._table.get(name)
        if any(x.ids.shape[a] != shape[a] for x in labels for a in x.axes):
            return False
        return self._table.graph.opsets.get("", 1) >= 11 or not any(x.is_grid for x in labels)

    def _comparable(self, name: str) -> bool:
        """Floats that are no known value (sizes used as data may differ), with a survivor for every position left."""
        shape = self._probe.shapes.get(name)
        if not shape or None in shape or 0 in shape or self._probe.dtypes.get(name) not in _FLOATS:
            return False
        if self._table.facts.value(name) is not None or name in self._table.graph.inner:
            return False
        return self._labelled_alike(name)

    def tapped(self, names: Sequence[str]) -> Model:
        """The masked original with tensors as outputs besides its own."""
        model = onnx.ModelProto()
        model.CopyFrom(self._reference[0])
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        return model, self._reference[1]

    def pair(self, names: Sequence[str]) -> tuple[Model, Model, dict[str, str]]:
        """Both models with the survivors of tensors as outputs besides their own, and {new output: tensor}."""
        (reference, known), (cut, _) = (self._copy(m) for m in (self._reference, self._cut))
        new = {f"{name}__survivors": name for name in names}
        for output, name in new.items():
            gather(reference, known, name, output, self._steps(name))
            cut.graph.node.append(onnx.helper.make_node("Identity", [name], [output], name=output))
            for model in (reference, cut):
                model.graph.output.append(onnx.ValueInfoProto(name=output))
        return (reference, known), (cut, self._cut[1]), new

    @staticmethod
    def _copy(model: Model) -> tuple[onnx.ModelProto, dict[str, Weight]]:
        copy = onnx.ModelProto()
        copy.CopyFrom(model[0])
        return copy, dict(model[1])


def gather(model: onnx.ModelProto, weights: dict[str, Weight], name: str, output: str, steps: Steps) -> None:
    """Append nodes that pick the survivors of a tensor, the same steps that cut a weight of its labels."""
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
