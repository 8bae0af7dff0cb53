"""An oracle of its own: is a cut exact? Built from the plan file, onnx and numpy alone, with nothing of onnxprune's.

The plan's slots are masks (see ``masks``), multiplied into whatever an operator that sums reads; the result is compared
with the cut model at batch sizes that the tool never saw.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from masks import Array, bodies, masked, reference, run, session
from onnx import helper, inliner, numpy_helper

import onnxprune as op
from onnxprune import Result

BATCHES, SEQUENCES = (1, 5), (7, 10)
TOLERANCE = {"float32": 1e-5, "float64": 1e-9, "float16": 2e-2, "bfloat16": 1e-1}


def assert_exact_cut(
    model: onnx.ModelProto,
    *,
    ratio: float = 0.5,
    criterion: str = "random",
    seed: int = 0,
    expect_cut: bool | None = True,
    tolerance: float | None = None,
    validate: bool | None = None,
    **options: Any,
) -> Result | None:
    """Cut ``model`` and prove it exact.

    Args:
        model: with dynamic or fixed sizes. ratio, criterion, seed, options: as for ``onnxprune.passes.Prune``.
        validate: the tool's own check; None: where onnxruntime has the kernels.
        expect_cut: True: something must go; False: nothing may; None: either, but what goes must be exact.
        tolerance: allowed ``max|a - b| / max|a|`` per output; by element type unless given.

    Returns:
        the result; None where the model was refused because nothing can be removed.
    """
    if validate is None:
        validate = runnable(model)
    before = model.SerializeToString(deterministic=True)
    try:
        stages = [op.passes.Prune(criterion, ratio, **options)]
        if validate:
            stages.append(op.passes.Validate(faithful=False, timed=False))
        result = op.Pipeline(stages).run(model, seed=seed)
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


def runnable(model: onnx.ModelProto) -> bool:
    """Whether onnxruntime has the kernels."""
    try:
        session(model)
    except Exception:
        return False
    return True


def is_valid(model: onnx.ModelProto) -> bool:
    """Whether onnx's checker accepts a model; it does not know every operator, nor one it calls deprecated."""
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return False
    return True


def shapes_agree(model: onnx.ModelProto) -> bool:
    """Whether inference finds no contradiction in a model, its declared shapes included."""
    try:
        onnx.shape_inference.infer_shapes(inliner.inline_local_functions(model), strict_mode=True)
    except onnx.shape_inference.InferenceError:
        return False
    return True


def plan_slots(result: Result) -> list[dict[str, Any]]:
    """The slots of the plan, read back from the file that a user would get; one per tensor and axis.

    An axis that holds units of several groups has a slot in each of them, with all of the axis' removed positions.
    Slots with ``at`` hold for one position of another axis: a direction of a recurrent layer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        result.plan.save(path)
        plan = json.loads(path.read_text())
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for slot in (slot for group in plan["groups"] for slot in group["slots"]):
        key = slot["tensor"], slot["axis"], *slot.get("at", {}).items()
        known = merged.setdefault(key, {**slot, "removed": []})
        assert known["size"] == slot["size"], f"{slot['tensor']!r} has two sizes along axis {slot['axis']}"
        known["removed"] = sorted({*known["removed"], *slot["removed"]})
    return list(merged.values())


def count_parameters(model: onnx.ModelProto) -> int:
    """Elements of all initializers and constants, those of bodies too."""
    return sum(array.size for array in constants(model.graph).values())


def constants(graph: onnx.GraphProto) -> dict[str, Array]:
    """Every initializer and Constant by name, those of bodies too: their names are taken to be unique."""
    found = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found.update((node.output[0], numpy_helper.to_array(a.t)) for a in node.attribute if a.HasField("t"))
        for body in bodies(node):
            found.update(constants(body))
    return found


def assert_same_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Inputs, outputs, opsets and metadata stay; the result is valid, its declared shapes included."""
    given = {t.name for t in before.graph.initializer}
    for side in ("input", "output"):
        left, right = ([v for v in getattr(m.graph, side) if v.name not in given] for m in (before, after))
        assert left == right, f"{side}s changed"
    assert list(before.opset_import) == list(after.opset_import)
    assert list(before.metadata_props) == list(after.metadata_props)
    assert before.ir_version == after.ir_version
    if is_valid(before):
        onnx.checker.check_model(after)
    if shapes_agree(before):
        assert shapes_agree(after), "declared shapes contradict inferred ones"


def assert_weights_follow(model: onnx.ModelProto, result: Result) -> None:
    """Every weight whose new shape its slots explain is the old one without the removed positions."""
    old, new = constants(model.graph), constants(result.model.graph)
    expected: dict[str, Array] = {}
    directed: dict[tuple[str, int], dict[tuple[int, int], list[int]]] = {}
    for slot in plan_slots(result):
        name, axis = slot["tensor"], slot["axis"]
        if name in old:
            assert old[name].shape[axis] == slot["size"], slot
            for outer, position in slot.get("at", {}).items():
                directed.setdefault((name, axis), {})[int(outer), position] = slot["removed"]
            if not slot.get("at"):
                expected[name] = np.delete(expected.get(name, old[name]), slot["removed"], axis)
    for (name, axis), removed in directed.items():
        expected[name] = delete_per_direction(expected.get(name, old[name]), axis, removed)
    for name, array in expected.items():
        if name in new and new[name].shape == array.shape:
            assert np.array_equal(new[name], array) or is_rescaled(old[name], array, new[name]), (
                f"{name!r} lost other positions than the plan says"
            )


def is_rescaled(before: Array, wanted: Array, array: Array) -> bool:
    """Whether one value per channel took up the factor of a mean over fewer channels, or of its square root."""
    if wanted.dtype.kind != "f" or sum(n > 1 for n in wanted.shape) > 2:
        return False
    share = wanted.size / before.size
    rounding = 4 * float(np.finfo(wanted.dtype).eps)
    return any(np.allclose(array, wanted * share**power, rtol=rounding, atol=0) for power in (-1, -0.5, 0.5, 1))


def delete_per_direction(array: Array, axis: int, removed: dict[tuple[int, int], list[int]]) -> Array:
    """An array without other positions in each direction, {(axis of directions, direction): positions}."""
    parts = [np.delete(array.take([place], outer), removed[outer, place], axis) for outer, place in sorted(removed)]
    return np.concatenate(parts, next(outer for outer, _ in removed))


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
        trusted = _agree(reference(model, feeds[0]), run(model, feeds[0]), tolerance)
    except Exception:  # the evaluator lacks an operator, or gets one wrong
        trusted = False
    if trusted:
        expected = run(masked(plain, slots, feeds[0]), feeds[0])
        assert_close(expected, reference(cut, feeds[0]), tolerance, "the reference evaluator")


def _allowed(array: Array, tolerance: float | None) -> float:
    return tolerance if tolerance is not None else TOLERANCE.get(array.dtype.name, 0.0)


def _agree(left: dict[str, Array], right: dict[str, Array], tolerance: float | None) -> bool:
    """Whether the evaluator is much nearer to onnxruntime than what is tested for: it approximates some operators."""
    return all(_error(left[k], right[k]) <= _allowed(left[k], tolerance) / 4 for k in left)


def assert_close(expected: dict[str, Array], actual: dict[str, Array], tolerance: float | None, where: str) -> None:
    """Relative to each output's largest value; integers and booleans must be equal."""
    assert expected.keys() == actual.keys()
    for name, want in expected.items():
        have = actual[name]
        assert want.shape == have.shape, f"{name} in {where}: {have.shape}, expected {want.shape}"
        assert want.dtype == have.dtype
        error = _error(want, have)
        assert error <= _allowed(want, tolerance), f"{name} in {where} differs by {error:.3g} of its largest value"


def _error(want: Array, have: Array) -> float:
    if want.dtype.kind in "iub":
        return float((want != have).any())
    a, b = want.astype(np.float64), have.astype(np.float64)
    assert np.isfinite(a).all(), "the masked original is not finite: choose other weights"
    return float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-6)) if a.size else 0.0
