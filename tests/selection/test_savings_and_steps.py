"""What a removal saves, measured times, and cuts in several steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op
from onnxprune.allocation.selection import macs_after, params_after, savings, spread
from onnxprune.importance.scores import columns
from onnxprune.pipeline import Context
from onnxprune.runtime.latency import profile
from onnxprune.settings import words

MODELS = Path(__file__).parents[2] / "models"
NAMES = ["attention", "concat", "depthwise", "recurrent", "residual"]


def cut(name: str, ratio: float = 0.5, **options: Any) -> op.Result:
    return op.prune(MODELS / f"{name}.onnx", ratio=ratio, validate=False, **options)


def removed(result: op.Result) -> dict[int, list[int]]:
    return {g.id: list(g.removed or ()) for g in result.plan.groups}


@pytest.mark.parametrize("name", NAMES)
def test_savings_are_what_cutting_one_step_saves(name: str) -> None:
    analysis = op.analyze(MODELS / f"{name}.onnx")
    groups = [g for g in analysis.units.groups if g.prunable]
    found = {what: savings(analysis, groups, what) for what in ("macs", "params")}
    original = floats(onnx.load(MODELS / f"{name}.onnx"))
    for group in groups:
        step = np.flatnonzero(columns(group.classes, group.steps) == group.steps - 1)
        plan = op.Plan.from_dict({"version": 1, "groups": [{"id": group.id, "removed": step.tolist()}]})
        result = op.prune(MODELS / f"{name}.onnx", plan=plan, validate=False)
        totals = result.report.totals
        saved = {"macs": totals.macs_before - totals.macs_after, "params": original - floats(result.model)}
        for what, number in saved.items():
            assert found[what][group.id][step].sum() == pytest.approx(number, abs=1e-6)


def floats(model: onnx.ModelProto) -> int:
    """Elements of the floating-point weights: a cut may add constants that are shapes."""
    return sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT)


@pytest.mark.parametrize("name", ["attention", "residual"])
def test_sizes_are_known_without_a_cut(name: str) -> None:
    """A selector finds what would go at any ratio; the sizes are those of the cut."""
    constants = floats(onnx.load(MODELS / f"{name}.onnx")) - op.analyze(MODELS / f"{name}.onnx").parameters
    for options in ({}, {"scope": "global"}, {"reshape_axis": "both"}, {"steps": 2}):
        context = Context.of(MODELS / f"{name}.onnx")
        selector = op.passes.Prune("l2", 0.1, **options).selector(context, context.analysis)  # type: ignore[arg-type]
        for ratio in (0.2, 0.5):
            gone, result = selector.at(ratio), cut(name, ratio, **options)
            assert macs_after(selector.analysis, gone) == result.report.totals.macs_after
            assert params_after(selector.analysis, gone) + constants == floats(result.model)


def test_macs_lead_to_fewer_macs() -> None:
    plain, weighed = (cut("residual", 0.3, scope="global", cost=c).report.totals.macs_after for c in ("none", "macs"))
    assert weighed < plain


def test_measured_times_reach_every_layer() -> None:
    path = MODELS / "depthwise.onnx"
    info = onnx.load(path).graph.input[0]
    shape = [d.dim_value or 1 for d in info.type.tensor_type.shape.dim]
    times = profile(path, [{info.name: np.zeros(shape, np.float32)}], runs=2)
    assert times and all(t.seconds >= 0 for t in times)
    analysis = op.analyze(path)
    seconds = spread(analysis, [(t.name, t.op, t.seconds) for t in times])
    assert sum(seconds.values()) == pytest.approx(sum(t.seconds for t in times))
    layers = {n.label for g in analysis.units.groups for n in analysis.producers.get(g.id, ())}
    assert len(layers & seconds.keys()) > len(layers) / 2
    found = savings(analysis, analysis.units.groups[:4], "latency", seconds)
    assert all((v > 0).all() for v in found.values())


def test_fused_times_find_their_node() -> None:
    analysis = op.analyze(MODELS / "depthwise.onnx")
    convolution = next(n for n in analysis.graph.nodes if n.op == "Conv")
    normalised = next(n for n in analysis.graph.nodes if convolution.outputs[0] in n.inputs)
    found = spread(analysis, [(f"{normalised.outputs[0]}_nchwc", "Conv", 2.0), ("ReorderInput_1", "ReorderInput", 1.0)])
    assert found[convolution.label] == 2.0
    assert sum(found.values()) == pytest.approx(3.0) and normalised.label not in found


@pytest.mark.parametrize("schedule", words("schedule"))
@pytest.mark.parametrize("scope", ["local", "global"])
def test_steps_end_where_one_step_would(schedule: str, scope: str) -> None:
    one = cut("attention", 0.5, scope=scope)
    assert removed(cut("attention", 0.5, scope=scope, steps=1, schedule=schedule)) == removed(one)
    three = cut("attention", 0.5, scope=scope, steps=3, schedule=schedule)
    # Heads go one channel of each of four at a time, so that a threshold rarely meets the number exactly.
    assert abs(sum(map(len, removed(three).values())) - sum(map(len, removed(one).values()))) <= 4


def test_later_steps_see_what_is_left() -> None:
    """Channels of the first layer that go no longer count for the second: the second's choice follows the first's."""
    net = Net(17)
    y = net.conv(net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 4, bias=False)), 4, 4, bias=False)
    model = net.model(net.conv(net.op("Relu", y), 4, 2, bias=False))
    seen: list[tuple[str, int, float]] = []

    def watch(slot: Any) -> Any:
        seen.append((slot.tensor, slot.units.size, float(np.abs(slot.blocks).sum())))
        return np.abs(slot.blocks).sum(axis=(0, 2))

    result = op.prune(model, criterion=watch, ratio=0.5, steps=2, latency=False)
    assert result.report.exactness.passed
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [name for name, *_ in first] == [name for name, *_ in second]
    assert all(before[1] == 4 and after[1] == 3 for before, after in zip(first, second, strict=True))
    assert all(after[2] < before[2] for before, after in zip(first, second, strict=True))
