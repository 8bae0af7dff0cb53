"""Models run at a feed, and the same with removed channels multiplied by 0: the plan's slots pushed as plain arrays.

A movement operator runs itself on the mask, a product of masks says what is left of a MatMul, and what meets position
by position keeps what every operand keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the arithmetic of bfloat16)
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]
SUMS = {
    "Conv": (0,), "ConvTranspose": (0,), "ConvInteger": (0,), "DeformConv": (0,),
    "LinearAttention": (0, 1), "Gemm": (0, 1), "MatMul": (0, 1), "Einsum": (0, 1, 2, 3),
    "ReduceSum": (0,), "ReduceSumSquare": (0,), "ReduceL1": (0,), "ReduceL2": (0,), "LpNormalization": (0,),
    "ReduceMean": (0,), "GlobalAveragePool": (0,), "GlobalLpPool": (0,),
    "RMSNormalization": (0,), "SimplifiedLayerNormalization": (0,),
    "LayerNormalization": (0,), "SkipLayerNormalization": (0, 1, 4), "SkipSimplifiedLayerNormalization": (0, 1, 3),
}  # fmt: skip
"""Operators that sum over channels, and the inputs they sum."""
MOVES = {
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Expand", "Tile",
    "DepthToSpace", "SpaceToDepth", "Identity",
}  # fmt: skip
LISTS = {"Concat"}
"""Movement operators all of whose inputs are data; of the others only the first is."""
CONTROL = ("If", "Loop", "Scan")
FILLED = ("Pad", "Resize", "ScatterND", "ScatterElements", "GatherND", "GatherElements", "Compress")


def run(model: onnx.ModelProto, feed: dict[str, Array]) -> dict[str, Array]:
    """Outputs by name: in onnxruntime without optimisations, where it lacks a kernel in onnx's reference evaluator."""
    names = [o.name for o in model.graph.output]
    try:
        return dict(zip(names, session(model).run(names, feed), strict=True))
    except Exception:  # no kernel, or no numpy type: the reference decides
        return reference(model, feed)


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def reference(model: onnx.ModelProto, feed: dict[str, Array]) -> dict[str, Array]:
    """Outputs by name in onnx's reference evaluator."""
    names = [o.name for o in model.graph.output]
    with np.errstate(all="ignore"):
        return dict(zip(names, ReferenceEvaluator(model).run(names, feed), strict=True))


def element(array: Array) -> int:
    """onnx's number of an array's element type."""
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))


# -- masks -------------------------------------------------------------------------------------------------------------


@dataclass
class Masks:
    """What is left of every tensor at one feed: boolean arrays of the tensors' own shapes, absent where all is left."""

    values: dict[str, Array]
    slots: dict[str, list[dict[str, Any]]]
    opset: int
    known: dict[str, Array] = field(default_factory=dict)

    def of_slots(self, name: str) -> Array | None:
        """The mask that the plan states for a tensor."""
        if name not in self.slots or name not in self.values:
            return None
        shape = self.values[name].shape
        mask = np.ones(shape, bool)
        for slot in self.slots[name]:
            axis, size = slot["axis"], slot["size"]
            own = np.ones(size, bool)
            own[slot["removed"]] = False
            # An axis that carries the batch too repeats its positions at another batch size.
            own = np.resize(own, shape[axis])
            stated = own.reshape([-1 if a == axis else 1 for a in range(len(shape))])
            for outer, position in slot.get("at", {}).items():
                elsewhere = np.arange(shape[int(outer)]) != position
                stated = stated | elsewhere.reshape([-1 if a == int(outer) else 1 for a in range(len(shape))])
            mask &= stated
        return mask

    def get(self, name: str) -> Array | None:
        """The mask of a tensor, None where nothing is removed."""
        if name not in self.known:
            stated = self.of_slots(name)
            if stated is not None:
                self.known[name] = stated
        return self.known.get(name)

    def full(self, name: str) -> Array:
        """The mask of a tensor, all True where nothing is removed."""
        mask = self.get(name)
        return np.ones(self.values[name].shape, bool) if mask is None else mask

    def push(self, node: onnx.NodeProto) -> None:
        """Masks of a node's outputs that the plan does not state, from those of its inputs."""
        if all(self.get(name) is None for name in node.input if name):
            return
        missing = [o for o in node.output if isinstance(self.values.get(o), np.ndarray) and self.get(o) is None]
        if not missing:
            return
        for name, mask in zip(node.output, self.derive(node), strict=False):
            if name in missing and mask is not None and mask.shape == self.values[name].shape:
                self.known[name] = mask

    def derive(self, node: onnx.NodeProto) -> list[Array | None]:
        """One mask per output, by the kind of operator."""
        if node.op_type in MOVES or node.op_type in FILLED:
            return self._moved(node)
        if node.op_type in ("MatMul", "Gemm", "Einsum"):
            return [self._product(node)]
        if node.op_type.startswith("Reduce"):
            return [self._reduced(node)]
        if node.op_type in SUMS or node.op_type in ("LSTM", "GRU", "RNN", *CONTROL):
            return [None for _ in node.output]
        return [self._met(node, o) if isinstance(self.values.get(o), np.ndarray) else None for o in node.output]

    def _reduced(self, node: onnx.NodeProto) -> Array:
        """A result is left where anything that went into it is."""
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        mask, axes = self.full(node.input[0]), attrs.get("axes")
        if len(node.input) > 1 and node.input[1]:
            axes = self.values[node.input[1]].tolist()
        if not axes and attrs.get("noop_with_empty_axes"):
            return mask
        return np.asarray(mask.any(axis=tuple(axes) if axes else None, keepdims=bool(attrs.get("keepdims", 1))))

    def _moved(self, node: onnx.NodeProto) -> list[Array | None]:
        """The operator itself, run on the mask."""
        feed, inputs = {}, []
        for i, name in enumerate(node.input):
            inputs.append(f"i{i}" if name else "")
            if not name:
                continue
            data = i == 0 or node.op_type in LISTS or (node.op_type.startswith("Scatter") and i == 2)
            feed[f"i{i}"] = self.full(name).astype(np.float32) if data else self.values[name]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = inputs
        if node.op_type == "Pad":
            self._fill_with_ones(copy, feed)
        # A model around the node: a lone one is taken for its newest form, whatever the opset.
        sides = ([onnx.ValueInfoProto(name=n) for n in names] for names in (feed, copy.output))
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(helper.make_graph([copy], "moved", *sides), opset_imports=[opset])
        try:
            moved = ReferenceEvaluator(model).run(None, feed)
        except ValueError:  # the evaluator knows no negative padding
            for info in model.graph.input:
                info.CopyFrom(helper.make_tensor_value_info(info.name, element(feed[info.name]), feed[info.name].shape))
            moved = session(model).run(None, feed)
        return [np.asarray(x) > 0.5 for x in moved]

    def _fill_with_ones(self, pad: onnx.NodeProto, feed: dict[str, Array]) -> None:
        """What a Pad adds is left; the fill is an attribute before opset 11."""
        kept = [a for a in pad.attribute if a.name != "value"]
        del pad.attribute[:]
        pad.attribute.extend(kept)
        if self.opset < 11:
            pad.attribute.append(helper.make_attribute("value", 1.0))
            return
        rest = list(pad.input[3:])
        pad.input[:] = [pad.input[0], pad.input[1], "fill", *rest]
        feed.pop("i2", None)
        feed["fill"] = np.ones((), np.float32)

    def _product(self, node: onnx.NodeProto) -> Array:
        """A result is left where some term of its sum is."""
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        operands = [self.full(n).astype(np.float32) for n in node.input]
        if node.op_type == "Einsum":
            return np.asarray(np.einsum(attrs["equation"].decode(), *operands) > 0)
        if node.op_type == "Gemm":
            a = operands[0].T if attrs.get("transA") else operands[0]
            b = operands[1].T if attrs.get("transB") else operands[1]
            return np.asarray(a @ b > 0)
        return np.asarray(operands[0] @ operands[1] > 0)

    def _met(self, node: onnx.NodeProto, output: str) -> Array | None:
        """Where tensors meet position by position, what is removed from one is removed from the result."""
        shape = self.values[output].shape
        result = np.ones(shape, bool)
        # Of what CastLike casts to only the type counts, and what a normalisation has per channel lies along axis 1.
        alone = node.op_type in ("CastLike", "InstanceNormalization", "GroupNormalization", "BatchNormalization")
        for name in node.input[:1] if alone else node.input:
            mask = self.get(name) if name else None
            if mask is not None and _broadcasts(mask.shape, shape):
                result &= mask
        return result


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def all_values(model: onnx.ModelProto, feed: dict[str, Array]) -> dict[str, Array]:
    """Every tensor of the main graph at a feed."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    del exposed.graph.output[:]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=o) for n in model.graph.node for o in n.output if o)
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for sparse in model.graph.sparse_initializer:
        dense = np.zeros(list(sparse.dims), np.float32)
        dense.flat[numpy_helper.to_array(sparse.indices)] = numpy_helper.to_array(sparse.values)
        values[sparse.values.name] = dense
    return {**values, **feed, **run(exposed, feed)}


def masked(model: onnx.ModelProto, slots: Iterable[dict[str, Any]], feed: dict[str, Array]) -> onnx.ModelProto:
    """``model`` with removed channels multiplied by 0 in front of every operator that sums, for this very feed."""
    by_tensor: dict[str, list[dict[str, Any]]] = {}
    for slot in slots:
        by_tensor.setdefault(slot["tensor"], []).append(slot)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    masks = Masks(all_values(model, feed), by_tensor, opset)
    stored = {t.name: masks.values[t.name] for t in model.graph.initializer}
    stored |= {n.output[0]: masks.values[n.output[0]] for n in model.graph.node if n.op_type == "Constant"}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for body in bodies(copy):
            _mask_body(body, by_tensor, stored)
        for i in SUMS.get(node.op_type, ()):
            mask = masks.get(node.input[i]) if i < len(node.input) and node.input[i] else None
            if mask is None or mask.all():
                continue
            stem = f"{copy.output[0]}__oracle{i}"
            array = mask.astype(masks.values[node.input[i]].dtype)
            constant = helper.make_node("Constant", [], [f"{stem}_mask"], value=numpy_helper.from_array(array))
            result.graph.node.extend([constant, helper.make_node("Mul", [node.input[i], f"{stem}_mask"], [stem])])
            copy.input[i] = stem
        result.graph.node.append(copy)
        masks.push(node)
    return result


# -- bodies ------------------------------------------------------------------------------------------------------------


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The bodies of an If, Loop or Scan."""
    return [a.g for a in node.attribute if a.HasField("g")]


def _mask_body(body: onnx.GraphProto, slots: dict[str, list[dict[str, Any]]], outer: dict[str, Array]) -> None:
    """Multiply removed positions of every weight that a contraction of a body sums with by 0.

    A channel times 0 in front of a contraction is the channel times rows of 0 of its weight; what the weight makes of
    its own removed outputs is read by nobody else.
    """
    known = {**outer, **{t.name: numpy_helper.to_array(t) for t in body.initializer}}
    nodes = list(body.node)
    del body.node[:]
    for node in nodes:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            known[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        for inner in bodies(node):
            _mask_body(inner, slots, known)
        for i, name in enumerate(node.input):
            if node.op_type not in (*SUMS, "LSTM", "GRU", "RNN") or name not in slots or name not in known:
                continue
            array = np.array(known[name])
            if array.ndim < 2:
                continue
            for slot in slots[name]:
                where: list[Any] = [slice(None)] * array.ndim
                where[slot["axis"]] = slot["removed"]
                for outer, position in slot.get("at", {}).items():
                    where[int(outer)] = position
                array[tuple(where)] = 0
            node.input[i] = f"{node.output[0]}__oracle{i}"
            body.node.append(helper.make_node("Constant", [], [node.input[i]], value=numpy_helper.from_array(array)))
        body.node.append(node)
