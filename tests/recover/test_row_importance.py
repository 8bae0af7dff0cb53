"""Rows that the outputs depend on count for more in a fit where outputs have many positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxprune as op
from onnxprune.operators.contractions import draw_rows
from onnxprune.passes import recover as recovery
from onnxprune.passes import row_importance
from onnxprune.passes.row_importance import row_importances
from onnxprune.pipeline import Context, RunSettings
from onnxprune.runtime.sessions import Feed

MODELS = Path(__file__).resolve().parents[2] / "models"
DETECTOR, CANVASES = MODELS / "detector.onnx", MODELS / "detector_calibration.npz"
AXES = {"/body/body.4/last/last.1/BatchNormalization_output_0": 1, "/scores/scores.1/Conv_output_0": 1}


def canvases(number: int) -> list[Feed]:
    with np.load(CANVASES) as file:
        return [{name: file[name][2 * k : 2 * k + 2] for name in file.files} for k in range(number)]


@given(st.integers(20, 400), st.integers(1, 500), st.integers(0, 9))
def test_rows_are_drawn_by_their_importance(rows: int, wanted: int, seed: int) -> None:
    importance = np.random.default_rng(seed).random(rows).astype(np.float32) ** 8
    picked = draw_rows(importance, wanted)
    assert picked is not None and picked.size == min(rows, wanted)
    assert picked.min() >= 0 and picked.max() < rows and (np.diff(picked) >= 0).all()
    expected = picked.size * (0.5 / rows + 0.5 * importance / importance.sum())
    assert (np.abs(np.bincount(picked, minlength=rows) - expected) <= 2).all()
    assert (draw_rows(importance, wanted) == picked).all()


def test_rows_that_are_alike_are_not_drawn() -> None:
    for alike in ([3.0] * 50, [0.0] * 5, [1.0, np.inf], [1.0, np.nan], list(np.linspace(1, 3, 9))):
        assert draw_rows(np.array(alike), 5) is None


def test_what_the_outputs_depend_on_is_found() -> None:
    """Cells of the grid with a digit in them decide the scores; most cells show nothing."""
    context = Context.of(DETECTOR)
    importances = row_importances(context, context.analysis.graph, AXES, canvases(3))
    assert len(importances) == 3
    for of_call in importances:
        assert of_call.keys() == AXES.keys()
        for values in of_call.values():
            assert values.shape == (2, 1, 8, 8) and (values >= 0).all()
            assert values.max() > 1.5 * np.median(values) > 0
    again = row_importances(Context.of(DETECTOR), context.analysis.graph, AXES, canvases(3))
    assert all((a[name] == b[name]).all() for a, b in zip(importances, again, strict=True) for name in AXES)


def test_candidates_of_a_run_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    context, opened = Context.of(DETECTOR), []
    static = row_importance.static_graph

    def counted(*args: Any) -> Any:
        opened.append(args)
        return static(*args)

    monkeypatch.setattr(row_importance, "static_graph", counted)
    first = row_importances(context, context.analysis.graph, AXES, canvases(2))
    once = len(opened)
    assert once > 0
    second = row_importances(context.for_trial(), context.analysis.graph, AXES, canvases(2))
    assert len(opened) == once
    assert all((a[name] == b[name]).all() for a, b in zip(first, second, strict=True) for name in AXES)


def test_calls_are_taken_in_parts_that_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(
        row_importance, "_Gradients", lambda graph, axes: sizes.append(graph.shapes[graph.inputs[0]][0])
    )
    graph = op.analyze(DETECTOR).graph
    found = []
    for bits in range(12, 30):
        sizes.clear()
        row_importance._Calls(graph, AXES, {}, 1 << bits)._open(canvases(1)[0])
        found.append(sum(sizes))
    assert found[0] == 0 and found[-1] == 2 and found == sorted(found) and 1 in found


def test_one_answer_per_sample_has_none() -> None:
    context = Context.of(MODELS / "residual.onnx")
    feeds = [{name: np.zeros(shape, np.float32) for name, shape in context.analysis.facts.probes[0].inputs.items()}]
    layer = context.analysis.graph.nodes[0].outputs[0]
    assert row_importances(context, context.analysis.graph, {layer: 1}, feeds) == [{}]


def test_a_detector_keeps_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row alike: farther from the original."""
    run = RunSettings(data=CANVASES)
    settings: Mapping[str, Any] = {"recover": "none", "latency": False, "data": CANVASES}
    cut = op.prune(DETECTOR, target="macs=0.6", trials=0, **settings)

    def distance() -> float:
        fidelity = op.recover(DETECTOR, cut.model, plan=cut.plan, data=run.data, finetune="none").report.fidelity
        assert fidelity is not None
        return float(np.mean([answer.distance for answer in fidelity.answers]))

    weighed = distance()
    none: Any = lambda context, graph, axes, feeds: [{} for _ in feeds]  # noqa: E731
    monkeypatch.setattr(recovery, "row_importances", none)
    assert weighed < 0.95 * distance()


def test_other_modes_count_all_rows_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Mapping[str, int]] = []

    def spy(context: Context, graph: Any, axes: Mapping[str, int], feeds: Sequence[Feed]) -> Any:
        asked.append(axes)
        return row_importances(context, graph, axes, feeds)

    monkeypatch.setattr(recovery, "row_importances", spy)
    for mode in ("lstsq", "datafree", "full"):
        op.prune(DETECTOR, ratio=0.2, recover=mode, data=CANVASES, samples=20, finetune="none", latency=False)
        assert bool(asked[-1]) == (mode == "full")
