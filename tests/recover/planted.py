"""Models with channels that say nothing new, and plans that remove them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from build import Net
from numpy.typing import NDArray
from onnx import numpy_helper

import onnxprune as op
from onnxprune.channels.plan import Plan, PlanGroup, PlanSlot

Array = NDArray[Any]


def plan(*slots: tuple[str, int, int, Sequence[int]]) -> Plan:
    """Remove positions: (tensor, axis, its size, which)."""
    return Plan(groups=[PlanGroup(i, 0, None, [PlanSlot(t, a, n, list(r))]) for i, (t, a, n, r) in enumerate(slots)])


def weights(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def outputs(model: onnx.ModelProto, feed: dict[str, Array]) -> list[Array]:
    return [np.asarray(y) for y in session(model).run(None, feed)]


def error(model: onnx.ModelProto, other: onnx.ModelProto, feed: dict[str, Array]) -> float:
    """|a - b| / |a - its mean|, the largest of all outputs."""
    pairs = list(zip(outputs(model, feed), outputs(other, feed), strict=True))
    worst = 0.0
    for a, b in pairs:
        left, right = a.astype(np.float64), b.astype(np.float64)
        worst = max(worst, float(np.linalg.norm(left - right) / np.linalg.norm(left - left.mean())))
    return worst


def draw(model: onnx.ModelProto, samples: int, seed: int = 0) -> dict[str, Array]:
    """Samples for every input."""
    rng = np.random.default_rng([seed, 77])
    feed = {}
    for declared in model.graph.input:
        kind = declared.type.tensor_type
        shape = [d.dim_value or samples for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        value = rng.integers(0, 5, shape) if dtype.kind in "iu" else rng.standard_normal(shape)
        feed[declared.name] = value.astype(dtype)
    return feed


def repaired(
    model: onnx.ModelProto, removal: Plan, data: Any, mode: str = "full", memory: int | None = None, **settings: Any
) -> tuple[onnx.ModelProto, op.Result]:
    """The model after the cut, and the result after the cut and the repair."""
    before = op.Pipeline([op.passes.Prune(plan=removal)]).run(model).model
    stages = [op.passes.Prune(plan=removal), op.passes.Recover(mode, memory_limit=memory)]
    result = op.Pipeline(stages).run(model, data=data, **settings)
    return before, result


def how(result: op.Result) -> dict[str, str]:
    """{layer: what was done to it}."""
    return {r.layer: r.how for r in result.report.repairs}


class Planted(Net):
    """A net some of whose weights are made to depend on others."""

    def change(self, name: str, value: Array) -> None:
        """Another value for an initializer."""
        for tensor in self.initializers:
            if tensor.name == name:
                old = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value.astype(old.dtype)), name))

    def value(self, name: str) -> Array:
        return next(numpy_helper.to_array(t) for t in self.initializers if t.name == name).copy()

    def copy(self, names: Sequence[str], source: int, target: int, axis: int = 0) -> None:
        """Channel ``target`` of these weights becomes channel ``source``."""
        for name in names:
            value = self.value(name)
            np.moveaxis(value, axis, 0)[target] = np.moveaxis(value, axis, 0)[source]
            self.change(name, value)

    def operands(self, output: str) -> list[str]:
        """The initializers that the node of an output reads."""
        node = next(n for n in self.nodes if output in n.output)
        known = {t.name for t in self.initializers}
        return [n for n in node.input if n in known]
