"""What is predicted of a cut from counts alone is what is measured on the cut model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generate import generate
from hypothesis import given
from hypothesis import strategies as st

import onnxprune as op
from onnxprune.allocation.costs import Sizes, costs_of, total
from onnxprune.allocation.ranked import RankedGroup
from onnxprune.allocation.selection import close_selection, macs_after, params_after
from onnxprune.channels.selection import removed_atoms
from onnxprune.channels.survivors import Survivors
from onnxprune.io.write import assemble, save
from onnxprune.passes.prepared import cut_model
from onnxprune.targets import COUNTABLE

MODELS = Path(__file__).parents[2] / "models"
NAMES = ["attention", "concat", "depthwise", "recurrent", "residual"]


def drawn(source: Any, seed: int, axis: str = "head_dim") -> tuple[op.Analysis, Sizes, np.ndarray, np.ndarray]:
    """An analysis, random counts of what every group keeps, and a removal of so many units, drawn at random."""
    analysis = op.analyze(source).with_reshape_axis(axis)
    groups = [g for g in analysis.units.groups if g.prunable]
    draw = np.random.default_rng(seed)
    kept = np.array([draw.integers(1, g.steps + 1) for g in groups], dtype=np.int64)
    ranked = {g.id: RankedGroup(draw.random(g.size), g.classes, g.steps, np.arange(g.steps), 0.5) for g in groups}
    chosen = close_selection(analysis, ranked, [g.steps - k for g, k in zip(groups, kept, strict=True)])
    return analysis, Sizes(analysis, groups), kept, removed_atoms(analysis.units, chosen)


@pytest.mark.parametrize("axis", ["head_dim", "heads", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_those_of_the_cut(name: str, axis: str) -> None:
    for seed in range(3):
        analysis, sizes, kept, removed = drawn(MODELS / f"{name}.onnx", seed, axis)
        after, shape = Survivors(analysis.table, removed), sizes.at(kept[None])
        for tensor in analysis.table.items():
            want = after.shape(tensor)
            assert want is None or tuple(int(np.squeeze(n)) for n in shape(tensor)) == want, tensor


@pytest.mark.parametrize("seed", [*range(40)])
def test_costs_of_random_graphs(seed: int) -> None:
    analysis, sizes, kept, removed = drawn(generate(seed, rare=seed % 2 == 1), seed)
    if not sizes.groups:
        pytest.skip("nothing to cut")
    assert total(costs_of(analysis, sizes, "macs"), kept[None])[0] == macs_after(analysis, removed)
    assert total(costs_of(analysis, sizes, "params"), kept[None])[0] == params_after(analysis, removed)


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_those_of_the_cut_model(name: str, tmp_path: Path) -> None:
    analysis, sizes, kept, removed = drawn(MODELS / f"{name}.onnx", 5)
    found = {kind: float(total(costs_of(analysis, sizes, kind), kept[None])[0]) for kind in COUNTABLE}
    proto, weights = cut_model(analysis, removed)
    cut = op.analyze(assemble(proto, weights))
    assert found["macs"] == sum(layer.macs_before for layer in cut.layers)
    # Shapes that a cut writes as constants, or no longer needs, names, and what pads and crops are no part of the
    # prediction.
    assert found["params"] == pytest.approx(cut.parameters, rel=4e-3)
    assert found["size"] == pytest.approx(save(proto, weights, tmp_path / "cut.onnx"), rel=0.04)
    again = Sizes(cut, [g for g in cut.units.groups if g.prunable])
    assert found["peak-memory"] == pytest.approx(
        total(costs_of(cut, again, "peak-memory"), again.full_counts)[0], rel=0.02
    )


@given(st.integers(0, 10_000))
def test_many_cuts_at_once_are_the_cuts_one_by_one(seed: int) -> None:
    analysis = op.analyze(MODELS / "attention.onnx")
    sizes = Sizes(analysis, [g for g in analysis.units.groups if g.prunable])
    kept = np.random.default_rng(seed).integers(1, sizes.steps + 1, size=(7, sizes.steps.size))
    for kind in COUNTABLE:
        cost = costs_of(analysis, sizes, kind)
        assert np.array_equal(cost.rows(kept), np.concatenate([cost.rows(k[None]) for k in kept]))


def test_the_whole_model_costs_what_it_costs() -> None:
    analysis = op.analyze(MODELS / "residual.onnx")
    sizes = Sizes(analysis, [g for g in analysis.units.groups if g.prunable])
    whole = {kind: total(costs_of(analysis, sizes, kind), sizes.full_counts)[0] for kind in COUNTABLE}
    assert whole["macs"] == sum(layer.macs_before for layer in analysis.layers)
    assert whole["params"] == analysis.parameters
    assert whole["size"] == (MODELS / "residual.onnx").stat().st_size


def test_memory_at_its_peak_by_hand() -> None:
    """x [1, 2, 4, 4] -> a (8 channels) -> relu -> y (2): a and its Relu are alive at once, and y with the Relu."""
    from build import Net

    net = Net(17)
    a = net.conv(net.input("x", [1, 2, 4, 4]), 2, 8, bias=False)
    model = net.model(net.conv(net.op("Relu", a), 8, 2, bias=False))
    analysis = op.analyze(model)
    sizes = Sizes(analysis, [g for g in analysis.units.groups if g.prunable])
    cost = costs_of(analysis, sizes, "peak-memory")
    for keeps in (8, 3, 1):
        weights = 4 * (2 * 9 * keeps * 2)
        moments = (2 + keeps, 2 * keeps, keeps + 2)
        assert total(cost, np.array([[keeps]]))[0] == weights + 4 * 16 * max(moments)


def test_a_view_shares_its_inputs_memory() -> None:
    from build import Net

    net = Net(17)
    a = net.conv(net.input("x", [1, 2, 4, 4]), 2, 8, bias=False)
    model = net.model(net.linear(net.reshape(a, 1, -1), 128, 3, bias=False))
    analysis = op.analyze(model)
    sizes = Sizes(analysis, [g for g in analysis.units.groups if g.prunable])
    weights = sum(w.nbytes for w in analysis.graph.weights.values())
    assert total(costs_of(analysis, sizes, "peak-memory"), sizes.full_counts)[0] == weights + 4 * 16 * (2 + 8)
