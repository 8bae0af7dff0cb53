"""Sums of squares for all axes of a weight at once are those of each axis by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op
from onnxprune.errors import ModelError
from onnxprune.importance import criteria, slots
from onnxprune.importance.slots import Marginals, weight_slots, weight_squares

MODELS = Path(__file__).parents[2] / "models"
NAMES = ["attention", "concat", "depthwise", "recurrent", "residual"]
SHAPES = [(7,), (5, 1), (1, 5), (300, 700), (2, 3000), (3000, 2), (1, 40, 60), (16, 8, 3, 3), (6, 1, 3, 3), (2, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("odd", [False, True])
def test_marginals_of_every_layout(
    shape: tuple[int, ...], kind: type, odd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_PIECE", 1 << 12)  # several pieces
    monkeypatch.setattr(slots, "_SMALL", 1 << 10)
    whole = np.random.default_rng(1).standard_normal(shape).astype(kind)
    store = np.zeros(whole.nbytes + odd, np.uint8)
    store[odd:] = whole.reshape(-1).view(np.uint8)
    array = store[odd:].view(kind).reshape(shape)
    assert array.flags.aligned != odd
    wanted = [(a,) for a, n in enumerate(shape) if n > 1]
    marginals = Marginals()
    for axes in (wanted, [tuple(range(len(shape))), *wanted]):
        for _ in range(2):  # the memory is used again
            found = marginals(array, axes)
            assert set(found) == set(axes)
            for left, sums in found.items():
                others = tuple(a for a in range(len(shape)) if a not in left)
                expected = (whole.astype(np.float64) ** 2).sum(axis=others)
                np.testing.assert_allclose(sums.reshape(expected.shape), expected, rtol=1e-5)
    np.testing.assert_array_equal(array, whole)


def packed() -> onnx.ModelProto:
    """Queries, keys and values of one weight: one unit owns several positions of it."""
    net = Net(17)
    both = net.linear(net.input("x", ["N", 6, 5]), 5, 36)
    parts = net.split(both, [12, 12, 12], -1)
    heads = [
        net.op("Transpose", net.op("Reshape", p, net.const(np.array([0, 6, 3, 4]))), perm=[0, 2, 1, 3]) for p in parts
    ]
    weights = net.op("Softmax", net.op("MatMul", heads[0], net.op("Transpose", heads[1], perm=[0, 1, 3, 2])), axis=-1)
    mixed = net.op("Transpose", net.op("MatMul", weights, heads[2]), perm=[0, 2, 1, 3])
    flat = net.op("Reshape", mixed, net.const(np.array([0, 6, 12])))
    return net.model(net.linear(flat, 12, 3))


@pytest.mark.parametrize("name", [*NAMES, "packed"])
@pytest.mark.parametrize("axis", ["head_dim", "heads"])
@pytest.mark.parametrize("gone", [False, True])
def test_they_are_what_slots_give(name: str, axis: str, gone: bool) -> None:
    analysis = op.analyze(packed() if name == "packed" else MODELS / f"{name}.onnx").with_reshape_axis(axis)
    groups = [g for g in analysis.units.groups if g.prunable]
    removed = np.random.default_rng(0).random(analysis.units.component.size) < 0.3 if gone else None
    l2 = criteria.get("l2")
    slots = list(weight_slots(analysis.table, analysis.units, groups, removed=removed, placed=True))
    sums = list(weight_squares(analysis.table, analysis.units, groups, removed, True))
    assert len(sums) == len(slots) > 0
    for one, other in zip(slots, sums, strict=True):
        assert one._replace(slot=None) == other._replace(slot=None)  # type: ignore[arg-type]
        assert one.slot.tensor == other.slot.tensor
        np.testing.assert_array_equal(one.slot.units, other.slot.units)
        np.testing.assert_allclose(l2(one.slot), l2.of_squares(other.slot.sums), rtol=1e-5)  # type: ignore[attr-defined]


def test_infinite_weights_are_refused() -> None:
    net = Net(17)
    x = net.linear(net.input("x", ["N", 7]), 7, 16)
    model = net.model(net.linear(net.op("Relu", x), 16, 3))
    values = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    values.flat[5] = np.inf
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(values, model.graph.initializer[0].name))
    with pytest.raises(ModelError, match="NaN or infinity"):
        op.prune(model, ratio=0.5, validate=False)


def test_own_criteria_of_squares_are_asked_about_nothing_else() -> None:
    def power(slot: criteria.Slot) -> np.ndarray:
        raise AssertionError(slot.tensor)

    criteria.register("power", of_squares=lambda sums: sums**0.5)(power)
    try:
        own, l2 = (
            op.prune(MODELS / "residual.onnx", criterion=c, ratio=0.4, validate=False).plan for c in ("power", "l2")
        )
    finally:
        criteria.unregister("power")
    assert [g.removed for g in own.groups] == [g.removed for g in l2.groups] != []
