"""An oracle of its own: is a cut exact? Built from the plan file, onnx and numpy alone, with nothing of onnxprune's.

The plan's slots are masks. They are pushed as plain arrays of 0 and 1 from each slot to the tensors behind it (a
movement operator runs itself on the mask, a product of masks says what is left of a MatMul), multiplied into whatever
an operator that sums reads, and the result is compared with the cut model at batch sizes that the tool never saw.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives numpy the arithmetic of bfloat16)
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, inliner, numpy_helper
from onnx.reference import ReferenceEvaluator

import onnxprune as op
from onnxprune import Result

Array = NDArray[Any]
BATCHES, SEQUENCES = (1, 5), (7, 10)
TOLERANCE = {"float32": 1e-5, "float64": 1e-9, "float16": 2e-2, "bfloat16": 1e-1}
SUMS = {
    "Conv": (0,), "ConvTranspose": (0,), "ConvInteger": (0,), "Gemm": (0, 1), "MatMul": (0, 1), "Einsum": (0, 1, 2, 3),
    "ReduceSum": (0,), "ReduceSumSquare": (0,), "ReduceL1": (0,), "ReduceL2": (0,), "LpNormalization": (0,),
}  # fmt: skip
"""Operators that sum over channels, and the inputs they sum."""
MOVES = {
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Expand", "Tile",
    "DepthToSpace", "SpaceToDepth", "Identity",
}  # fmt: skip
LISTS = {"Concat"}
"""Movement operators all of whose inputs are data; of the others only the first is."""
FILLED = ("Pad", "Resize", "ScatterND", "GatherND", "GatherElements")


def assert_exact_cut(
    model: onnx.ModelProto,
    *,
    ratio: float = 0.5,
    criterion: str = "random",
    seed: int = 0,
    expect_cut: bool | None = True,
    tolerance: float | None = None,
    validate: bool = True,
    **options: Any,
) -> Result | None:
    """Cut ``model`` and prove it exact.

    Args:
        model: with dynamic or fixed sizes. ratio, criterion, seed, validate, options: as for ``onnxprune.prune``.
        expect_cut: True: something must go; False: nothing may; None: either, but what goes must be exact.
        tolerance: allowed ``max|a - b| / max|a|`` per output; by element type unless given.

    Returns:
        the result; None where the model was refused because nothing can be removed.
    """
    before = model.SerializeToString(deterministic=True)
    try:
        result = op.prune(
            model, criterion=criterion, ratio=ratio, seed=seed, latency=False, validate=validate, **options
        )
    except op.BudgetError:
        assert not expect_cut, "nothing was cut"
        return None
    assert model.SerializeToString(deterministic=True) == before, "the input model was changed"
    shrunk = count_parameters(result.model) < count_parameters(model)
    if expect_cut is not None:
        assert shrunk == expect_cut, f"cut: {shrunk}, expected: {expect_cut}"
    assert_same_interface(model, result.model)
    assert_weights_follow(model, result)
    assert_exact(model, result.model, plan_slots(result), tolerance=tolerance)
    return result


def plan_slots(result: Result) -> list[dict[str, Any]]:
    """The slots of the plan, read back from the file that a user would get."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        result.plan.save(path)
        plan = json.loads(path.read_text())
    return [slot for group in plan["groups"] for slot in group["slots"]]


def count_parameters(model: onnx.ModelProto) -> int:
    """Elements of all initializers and constants."""
    graph = model.graph
    sizes = [int(np.prod(t.dims)) for t in graph.initializer]
    sizes += [int(np.prod(a.t.dims)) for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.HasField("t")]
    return sum(sizes)


def assert_same_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Inputs, outputs, opsets and metadata stay; the result is valid, its declared shapes included."""
    given = {t.name for t in before.graph.initializer}
    for side in ("input", "output"):
        left, right = ([v for v in getattr(m.graph, side) if v.name not in given] for m in (before, after))
        assert left == right, f"{side}s changed"
    assert list(before.opset_import) == list(after.opset_import)
    assert list(before.metadata_props) == list(after.metadata_props)
    assert before.ir_version == after.ir_version
    onnx.checker.check_model(after)
    onnx.shape_inference.infer_shapes(inliner.inline_local_functions(after), strict_mode=True)


def assert_weights_follow(model: onnx.ModelProto, result: Result) -> None:
    """Every weight whose new shape its slots explain is the old one without the removed positions."""
    old = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    new = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    expected: dict[str, Array] = {}
    for slot in plan_slots(result):
        name, axis = slot["tensor"], slot["axis"]
        if name in old:
            assert old[name].shape[axis] == slot["size"], slot
            expected[name] = np.delete(expected.get(name, old[name]), slot["removed"], axis)
    for name, array in expected.items():
        if name in new and new[name].shape == array.shape:
            assert np.array_equal(new[name], array), f"{name!r} lost other positions than the plan says"


# -- running models ----------------------------------------------------------------------------------------------------


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


def make_feed(model: onnx.ModelProto, number: int, seed: int = 0) -> dict[str, Array]:
    """Seeded inputs at the ``number``-th choice of dynamic sizes. Integers are 0 or 1, so that any table holds them."""
    given = {t.name for t in model.graph.initializer}
    rng = np.random.default_rng([seed, number])
    feed = {}
    for declared in model.graph.input:
        if declared.name in given:
            continue
        kind = declared.type.tensor_type
        shape = [d.dim_value or (BATCHES if a == 0 else SEQUENCES)[number] for a, d in enumerate(kind.shape.dim)]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        floats = dtype.kind not in "iub"
        array = rng.standard_normal(shape) if floats else rng.integers(0, 2, shape)
        feed[declared.name] = array.astype(dtype)
    return feed


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
            mask &= own.reshape([-1 if a == axis else 1 for a in range(len(shape))])
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
        missing = [o for o in node.output if o and o in self.values and self.get(o) is None]
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
            return self._moved(node, reduce=True)
        return [self._met(node, o) for o in node.output]

    def _moved(self, node: onnx.NodeProto, reduce: bool = False) -> list[Array | None]:
        """The operator itself, run on the mask."""
        feed, inputs = {}, []
        for i, name in enumerate(node.input):
            inputs.append(f"i{i}" if name else "")
            if not name:
                continue
            data = i == 0 or node.op_type in LISTS or (node.op_type == "ScatterND" and i == 2)
            feed[f"i{i}"] = self.full(name).astype(np.float32) if data else self.values[name]
        if node.op_type == "Pad" and len(node.input) > 2 and node.input[2]:
            feed["i2"] = np.ones_like(self.values[node.input[2]])
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = inputs
        if reduce:
            copy.op_type = "ReduceMax"
        evaluator = ReferenceEvaluator(copy, opsets={"": self.opset})
        return [np.asarray(x) > 0.5 for x in evaluator.run(None, feed)]

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
        for name in node.input:
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
    return {**values, **feed, **run(exposed, feed)}


def masked(model: onnx.ModelProto, slots: Iterable[dict[str, Any]], feed: dict[str, Array]) -> onnx.ModelProto:
    """``model`` with removed channels multiplied by 0 in front of every operator that sums, for this very feed."""
    by_tensor: dict[str, list[dict[str, Any]]] = {}
    for slot in slots:
        by_tensor.setdefault(slot["tensor"], []).append(slot)
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    masks = Masks(all_values(model, feed), by_tensor, opset)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
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


# -- the verdict -------------------------------------------------------------------------------------------------------


def assert_exact(
    model: onnx.ModelProto, cut: onnx.ModelProto, slots: Iterable[dict[str, Any]], *, tolerance: float | None = None
) -> None:
    """The cut model computes what the masked original does, at two batch sizes, in both runtimes."""
    slots = list(slots)
    plain = inliner.inline_local_functions(model) if model.functions else model
    feeds = [make_feed(model, 0)]
    other = make_feed(model, 1)
    if any(other[k].shape != feeds[0][k].shape for k in other):
        feeds.append(other)
    for feed in feeds:
        expected = run(masked(plain, slots, feed), feed)
        assert_close(expected, run(cut, feed), tolerance, "onnxruntime")
    try:
        trusted = _agree(reference(model, feeds[0]), run(model, feeds[0]), 1e-3)
    except Exception:  # the evaluator lacks an operator, or gets one wrong
        trusted = False
    if trusted:
        expected = run(masked(plain, slots, feeds[0]), feeds[0])
        assert_close(expected, reference(cut, feeds[0]), tolerance, "the reference evaluator")


def _agree(left: dict[str, Array], right: dict[str, Array], tolerance: float) -> bool:
    return all(_error(left[k], right[k]) <= tolerance for k in left)


def assert_close(expected: dict[str, Array], actual: dict[str, Array], tolerance: float | None, where: str) -> None:
    """Relative to each output's largest value; integers and booleans must be equal."""
    assert expected.keys() == actual.keys()
    for name, want in expected.items():
        have = actual[name]
        assert want.shape == have.shape, f"{name} in {where}: {have.shape}, expected {want.shape}"
        assert want.dtype == have.dtype
        allowed = tolerance if tolerance is not None else TOLERANCE.get(want.dtype.name, 0.0)
        error = _error(want, have)
        assert error <= allowed, f"{name} in {where} differs by {error:.3g} of its largest value"


def _error(want: Array, have: Array) -> float:
    if want.dtype.kind in "iub":
        return float((want != have).any())
    a, b = want.astype(np.float64), have.astype(np.float64)
    assert np.isfinite(a).all(), "the masked original is not finite: choose other weights"
    return float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-6)) if a.size else 0.0
