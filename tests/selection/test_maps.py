"""Captured statistics are those of onnxruntime's own tensors, and every channel meets its own ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from masks import all_values, masked
from numpy.typing import NDArray
from oracle import plan_slots

import onnxprune as op
from onnxprune import ModelError
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.groups import Group
from onnxprune.importance.criteria import Slot
from onnxprune.importance.slots import CapturedMaps, map_slots
from onnxprune.passes import Prune
from onnxprune.passes.calibrate import captured_maps
from onnxprune.pipeline import Context, Model, Result, RunSettings

Array = NDArray[Any]
NEEDS = ("moments", "similarity", "gram")


def plain(net: Net) -> str:
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8))
    return net.conv(y, 8, 5, strides=[2, 2])


def residual(net: Net) -> str:
    x = net.conv(net.input("x", ["N", 3, 5, 5]), 3, 6)
    y = net.conv(net.op("Relu", net.norm(net.conv(x, 6, 8), 8)), 8, 6)
    return net.conv(net.op("Relu", net.op("Add", x, y)), 6, 4)


def concatenated(net: Net) -> str:
    x = net.input("x", ["N", 3, 5, 5])
    y = net.op("Concat", *(net.op("Relu", net.conv(x, 3, n)) for n in (6, 4)), axis=1)
    return net.conv(y, 10, 4)


def grouped(net: Net) -> str:
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 5, 5]), 3, 12))
    return net.conv(net.op("Relu", net.conv(y, 12, 12, group=3)), 12, 4)


def depthwise(net: Net) -> str:
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 5, 5]), 3, 6))
    return net.conv(net.op("Relu", net.conv(y, 6, 12, group=6)), 12, 4, 1)


def flattened(net: Net) -> str:
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 3, 4]), 3, 6))
    return net.linear(net.op("Flatten", y), 72, 5, gemm=True)


def transposed(net: Net) -> str:
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 4, 4]), 3, 6))
    return net.op("ConvTranspose", y, net.weight(6, 4, 3, 3), strides=[2, 2])


def heads(net: Net) -> str:
    """Queries with keys, values, and what merges the heads."""
    x = net.linear(net.input("x", ["N", 5, 4]), 4, 12)
    x = net.op("Tanh", x)

    def split(y: str) -> str:
        return net.transpose(net.reshape(y, 0, 0, 3, 4), 0, 2, 1, 3)

    q, k, v = (split(net.linear(x, 12, 12)) for _ in range(3))
    scores = net.op("Softmax", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), axis=-1)
    y = net.reshape(net.transpose(net.op("MatMul", scores, v), 0, 2, 1, 3), 0, 0, 12)
    return net.linear(y, 12, 5)


def weight_first(net: Net) -> str:
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 9]), 3, 6, dims=1))
    return net.op("MatMul", net.weight(4, 6), y)


def einsum(net: Net) -> str:
    y = net.op("Tanh", net.linear(net.input("x", ["N", 5, 4]), 4, 8))
    return net.op("Einsum", y, net.weight(6, 8), equation="btc,dc->btd")


def quantised(net: Net) -> str:
    """QDQ: weights through DequantizeLinear, activations through codes and back."""

    def weight(*shape: int) -> str:
        codes = net.const(net.rng.integers(-60, 60, shape), np.int8)
        return net.op(
            "DequantizeLinear",
            codes,
            net.const(np.full(shape[0], 0.02)),
            net.const(np.zeros(shape[0]), np.int8),
            axis=0,
        )

    def through(y: str) -> str:
        scale, zero = net.const(np.float32(0.04)), net.const(np.uint8(10), np.uint8)
        return net.op("DequantizeLinear", net.op("QuantizeLinear", y, scale, zero), scale, zero)

    y = net.op("Conv", through(net.input("x", ["N", 3, 5, 5])), weight(8, 3, 3, 3))
    return net.op("Conv", through(net.op("Relu", y)), weight(4, 8, 1, 1))


BUILDS = {
    f.__name__: f
    for f in (
        plain, residual, concatenated, grouped, depthwise, flattened, transposed, heads, weight_first, einsum,
        quantised,
    )
}  # fmt: skip
EXPECTED = {
    "plain": 1, "residual": 3, "concatenated": 1, "grouped": 2, "depthwise": 2, "flattened": 1, "transposed": 1,
    "heads": 6, "weight_first": 1, "einsum": 1, "quantised": 1,
}  # fmt: skip
"""Places where a contraction sums over channels that may go; queries and keys are one each."""


def make(build: Callable[[Net], str], seed: int = 0) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model and eleven samples for it."""
    net = Net(17, seed=seed)
    model = net.model(build(net))
    shape = [d.dim_value or 11 for d in model.graph.input[0].type.tensor_type.shape.dim]
    return model, {"x": np.random.default_rng(seed + 1).standard_normal(shape).astype(np.float32)}


def started(model: onnx.ModelProto, data: Any, **settings: Any) -> tuple[Context, Analysis]:
    context = Context.of(model, RunSettings(data=data, **settings))
    return context, context.analysis


def as_maps(value: Array, axes: tuple[int, ...]) -> Array:
    """[samples and positions, channels], channels along the axes in their order."""
    order = [*(a for a in range(value.ndim) if a not in axes), *axes]
    moved = value.transpose(order).astype(np.float64)
    return moved.reshape(-1, int(np.prod([value.shape[a] for a in axes])))


def assert_moments(found: dict[str, Array], value: Array, axes: tuple[int, ...], channels: Any = slice(None)) -> None:
    flat = as_maps(value, axes)[:, channels]
    for name, wanted in (
        ("mean", flat.mean(0)), ("square", np.square(flat).mean(0)), ("magnitude", np.abs(flat).mean(0)),
        ("active", (flat != 0).mean(0)),
    ):  # fmt: skip
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-6, err_msg=name)


def assert_grams(analysis: Analysis, captured: CapturedMaps, values: dict[str, Array]) -> int:
    """Grams are those of what the contraction's weight multiplies; gives how many there are."""
    count = 0
    for site in captured.sites:
        if site.form is None:
            continue
        count += 1
        found = captured.columns[site.columns_key]
        columns = site.form.columns(values[site.tensor]).astype(np.float64)
        gram = np.matmul(columns.transpose(0, 2, 1), columns) / columns.shape[1]
        np.testing.assert_allclose(found["gram"], gram, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["column_mean"], columns.mean(axis=1), rtol=1e-4, atol=1e-5)
        # Of the columns themselves: their products with the weight are the contraction's own output.
        node = site.node
        product = np.matmul(columns, site.form.matrix(np.asarray(values[node.inputs[site.form.weight]], np.float64)))
        output = site.form.rows(values[node.outputs[0]]).astype(np.float64)
        offset = output - product
        assert np.abs(offset - offset.mean(axis=1, keepdims=True)).max() < 1e-4 * max(1.0, float(np.abs(output).max()))
    return count


@pytest.mark.parametrize("name", BUILDS)
def test_statistics_in_front_of_every_contraction(name: str) -> None:
    model, data = make(BUILDS[name])
    context, analysis = started(model, data)
    captured = captured_maps(context, analysis, competing(analysis), NEEDS)
    values = all_values(model, data)
    assert captured.samples == 11
    assert len(captured.sites) == EXPECTED[name], [(s.node.op, s.tensor) for s in captured.sites]
    for site in captured.sites:
        found = captured.maps[site.maps_key]
        assert_moments(found, values[site.tensor], site.axes)
        flat = as_maps(values[site.tensor], site.axes)
        np.testing.assert_allclose(found["similarity"], flat.T @ flat / len(flat), rtol=1e-4, atol=1e-5)
        if site.partner is not None:
            assert_moments(captured.maps[site.partner_key], values[site.partner[0]], site.partner[1])
    count = assert_grams(analysis, captured, values)
    assert count == len(captured.sites) - 2 * (name == "heads")


def test_queries_meet_keys_channel_by_channel() -> None:
    """The scores are what the channels of both sites say together, so they must be in one order."""
    model, data = make(heads)
    context, analysis = started(model, data)
    captured = captured_maps(context, analysis, competing(analysis), ("moments",))
    values = all_values(model, data)
    pairs = [s for s in captured.sites if s.partner is not None]
    assert len(pairs) == 2 and {s.node.index for s in pairs} == {pairs[0].node.index}
    for site in pairs:
        assert site.partner is not None
        mine = values[site.tensor].transpose([*(a for a in range(4) if a not in site.axes), *site.axes])
        theirs = values[site.partner[0]].transpose(
            [*(a for a in range(4) if a not in site.partner[1]), *site.partner[1]]
        )
        left, right = mine.reshape(11, 5, 3, 4), theirs.reshape(11, 5, 3, 4)
        scores = np.einsum("nqhw,nkhw->nhqk", left, right)
        wanted = values[site.node.outputs[0]]
        assert np.allclose(scores, wanted, atol=1e-4) or np.allclose(scores.swapaxes(2, 3), wanted, atol=1e-4)


def by_place(context: Context, removed: Array | None) -> tuple[Analysis, CapturedMaps, list[tuple[int, Slot]]]:
    analysis = context.analysis
    captured = captured_maps(context, analysis, competing(analysis), NEEDS, removed)
    return analysis, captured, list(map_slots(analysis, competing(analysis), captured, removed))


def competing(analysis: Analysis) -> list[Group]:
    """Groups that can be cut, each channel in one of them."""
    return [g for g in analysis.units.groups if g.prunable and not g.covered]


def survivors(analysis: Analysis, label_ids: Array, removed: Array, group: int) -> tuple[Array, Array]:
    """Positions of a site's channels that are left and count for a group, and the numbers of their units."""
    units = analysis.units.groups[group].units
    number = {int(u): i for i, u in enumerate(units)}
    rows = {}
    for row in analysis.units.atoms.rows:
        for above, cells in zip(analysis.units.component[row.rows], analysis.units.component[row.cells], strict=True):
            rows.update(dict.fromkeys(cells.tolist(), int(above)))
    positions, owners = [], []
    for position, atom in enumerate(label_ids):
        component = int(analysis.units.component[atom])
        owner = component if component in number else rows.get(component, -1)
        if not removed[atom] and owner in number:
            positions.append(position)
            owners.append(number[owner])
    return np.array(positions, int), np.array(owners, int)


def assert_aligned(
    analysis: Analysis, captured: CapturedMaps, slots: list[tuple[int, Slot]], values: dict[str, Array], removed: Array
) -> int:
    """Every slot has the statistics and weights of the channels that its units say; gives how many were looked at."""
    waiting = list(slots)
    for site in captured.sites:
        ids = site.channels(site.label.ids)
        for group in (g.id for g in competing(analysis)):
            positions, owners = survivors(analysis, ids, removed, group)
            if not len(positions):
                continue
            number, slot = waiting.pop(0)
            assert number == group and np.array_equal(slot.units, owners)
            assert slot.maps is not None and slot.blocks is not None
            assert_moments(dict(slot.maps.arrays), values[site.tensor], site.axes, positions)
            if site.form is None:
                assert slot.pairs
                continue
            weight = site.form.matrix(np.asarray(values[site.node.inputs[site.form.weight]]))
            rows = weight.reshape(ids.size, -1)[positions].reshape(len(positions), site.form.taps, -1)
            mine = slot.blocks.reshape(rows.shape)
            assert ((mine == rows) | (mine == 0)).all(), "the weights of other channels"
            assert (np.abs(mine).sum(axis=(1, 2)) > 0).all()
            # Grams are of the channels in the slot's order: diagonal entries are mean squares of columns.
            gram = slot.maps.get("gram")
            if gram is not None and site.form.parts == 1:
                columns = site.form.columns(values[site.tensor]).astype(np.float64)[0]
                chosen = (positions[:, None] * slot.taps + np.arange(slot.taps)).ravel()
                expected = columns[:, chosen].T @ columns[:, chosen] / len(columns)
                np.testing.assert_allclose(gram[0], expected, rtol=1e-4, atol=1e-5)
    return len(slots) - len(waiting)


@pytest.mark.parametrize("name", BUILDS)
def test_slots_of_the_whole_model_have_their_own_channels(name: str) -> None:
    model, data = make(BUILDS[name])
    context, _ = started(model, data)
    analysis, captured, slots = by_place(context, None)
    none = np.zeros(analysis.units.component.size, bool)
    looked = assert_aligned(analysis, captured, slots, all_values(model, data), none)
    assert looked == len(slots) >= EXPECTED[name]


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_survivors_of_a_cut_model_line_up(name: str, seed: int) -> None:
    """What is captured of a cut model is what the masked original has in the channels that are left."""
    model, data = make(BUILDS[name], seed)
    context, _ = started(model, data, seed=seed)
    pruned = Prune("random", 0.4)(context, Model.of(context.analysis)).model
    assert pruned.removed is not None and pruned.removed.any()
    analysis, captured, slots = by_place(context, pruned.removed)
    values = all_values(masked(model, plan_slots(Result(context, pruned)), data), data)
    values = {**all_values(model, data), **{n: v for n, v in values.items() if v.ndim}}
    assert assert_aligned(analysis, captured, slots, values, pruned.removed) == len(slots) > 0


# -- what stands in the way --------------------------------------------------------------------------------------------


def test_nan_in_a_feature_map_is_told_with_its_tensor() -> None:
    net = Net(17)
    y = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)
    broken = net.op("Log", net.op("Sub", net.op("Relu", y), net.const(0.1)))
    model = net.model(net.conv(broken, 8, 4))
    context, analysis = started(model, {"x": np.random.default_rng(0).standard_normal((4, 3, 6, 6)).astype(np.float32)})
    with pytest.raises(ModelError, match=f"{broken}.* NaN") as caught:
        captured_maps(context, analysis, competing(analysis), ("moments",))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_that_works_for_one_batch_size_only(batch: int) -> None:
    """It declares a free batch and then reshapes to a fixed one; samples that fill no call are left out."""
    net = Net(17)
    y = net.op("Relu", net.conv(net.input("x", ["N", 3, 4, 4]), 3, 6))
    y = net.reshape(y, batch, 6, 16)
    model = net.model(net.op("MatMul", net.weight(4, 6), y), shapes={}, check=False)
    data = {"x": np.random.default_rng(0).standard_normal((5, 3, 4, 4)).astype(np.float32)}
    context, analysis = started(model, data)
    captured = captured_maps(context, analysis, competing(analysis), ("moments",))
    used = 5 // batch * batch
    assert captured.samples == used
    calls = [all_values(model, {"x": data["x"][i : i + batch]}) for i in range(0, used, batch)]
    for site in captured.sites:
        whole = np.concatenate([c[site.tensor] for c in calls])
        assert_moments(captured.maps[site.maps_key], whole, site.axes)


def test_the_users_batch_size_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make(plain)
    for size, wanted in ((None, {11}), (4, {4, 3})):
        context, analysis = started(model, data, batch_size=size)
        seen = set()
        run = __import__("onnxprune.runtime.capture", fromlist=["run"]).run

        def spy(session: Any, feed: dict[str, Array], run: Any = run, seen: set[int] = seen) -> Any:
            seen.add(len(feed["x"]))
            return run(session, feed)

        with monkeypatch.context() as patch:
            patch.setattr("onnxprune.runtime.capture.run", spy)
            captured = captured_maps(context, analysis, competing(analysis), ("moments",))
        assert seen == wanted and captured.samples == 11


def test_too_few_samples_are_said_with_how_many_would_do() -> None:
    """A dense layer of 64 inputs sees one row per sample."""
    net = Net(17)
    hidden = net.linear(net.input("x", ["N", 8]), 8, 64)
    model = net.model(net.linear(net.op("Relu", hidden), 64, 4))
    data = {"x": np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)}
    few = op.prune(model, criterion="ziplm", ratio=0.3, data=data, recover="none", latency=False)
    assert any("has 20 samples" in w and "at least 64" in w for w in few.report.warnings)
    many = {"x": np.random.default_rng(0).normal(size=(80, 8)).astype(np.float32)}
    enough = op.prune(model, criterion="ziplm", ratio=0.3, data=many, recover="none", latency=False)
    assert not any("dependent channels" in w for w in enough.report.warnings)
