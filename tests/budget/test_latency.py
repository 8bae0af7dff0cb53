"""Predicted time: surfaces over channels, tables as files, and a small model measured on this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

import onnxprune as op
from onnxprune.allocation.costs import Sizes
from onnxprune.allocation.knapsack import Allocation
from onnxprune.allocation.latency_model import Latency, LatencyTable, NodeKinds, fit_model, samples_of
from onnxprune.errors import UsageError
from onnxprune.passes.prune import Prune
from onnxprune.passes.workspace import Workspace
from onnxprune.pipeline import Context, Model, RunSettings
from onnxprune.runtime.latency import device
from onnxprune.runtime.sessions import open_session
from onnxprune.search.evaluation import Evaluation, Quality
from onnxprune.search.latency import (
    Bench,
    block_levels,
    check_runs,
    fit_runs,
    latency_table,
    line,
    rewritable_sizes,
    steadied,
)
from onnxprune.search.problem import Candidate, SearchProblem
from onnxprune.targets import parse

MODELS = Path(__file__).parents[2] / "models"


def stepped(reads: np.ndarray, makes: np.ndarray) -> np.ndarray:
    """A kernel that works on blocks of 4 channels read and 16 made, and is slow where the last block is not full."""
    slow = np.where(reads % 4, 1.5, 1.0)
    return np.asarray(1e-6 * (3 + 0.02 * np.ceil(reads / 4) * 4 * np.ceil(makes / 16) * 16) * slow)


@given(st.integers(0, 100))
def test_a_surface_follows_steps(seed: int) -> None:
    draw = np.random.default_rng(seed)
    reads, makes = draw.integers(1, 65, 600), draw.integers(1, 65, 600)
    surface = fit_model(reads.astype(float), makes.astype(float), stepped(reads, makes) * draw.normal(1, 0.02, 600))
    r, m = draw.integers(8, 65, 200), draw.integers(8, 65, 200)
    error = np.abs(surface.at(r, m) / stepped(r, m) - 1)
    assert np.median(error) < 0.05
    assert np.quantile(error, 0.9) < 0.2


def test_a_surface_of_one_sample_is_flat() -> None:
    surface = fit_model(np.array([8.0]), np.array([16.0]), np.array([1e-4]))
    assert surface.at(np.array([8, 7]), np.array([16, 16])) == pytest.approx([1e-4, 1e-4], rel=0.5)


def test_overhead_and_slope() -> None:
    nodes = np.array([1.0, 2.0, 3.0])
    assert line(nodes, 0.5 + 1.1 * nodes) == pytest.approx((0.5, 1.1))
    assert line(nodes, 1.2 * nodes - 0.3) == pytest.approx((-0.3, 1.2))
    overhead, slope = line(nodes, 0.3 * nodes)
    assert slope == 0.5 and overhead < 0


def test_block_levels() -> None:
    assert block_levels(6).tolist() == [1, 2, 3, 4, 5, 6]
    assert block_levels(18).tolist() == [4, 8, 12, 16, 18]
    for steps in (64, 100, 1280):
        levels = block_levels(steps)
        assert levels[-1] == steps and levels.size <= 18 and (levels[:-1] % 4 == 0).all()


def sizes_of(name: str) -> Sizes:
    analysis = op.analyze(MODELS / f"{name}.onnx")
    return Sizes(analysis, [g for g in analysis.units.groups if g.prunable])


def table_of(sizes: Sizes, cuts: int = 40) -> LatencyTable:
    """A table whose times are known: what ``stepped`` says of every layer, 1 microsecond for anything else."""
    places, draw = NodeKinds(sizes), np.random.default_rng(0)
    table = LatencyTable(sizes.analysis.loaded.sha256, {"threads": 1}, {"x": [1]}, 1e-3, overhead=1e-5)
    for kept in [sizes.steps, *draw.integers(1, sizes.steps + 1, size=(cuts, sizes.steps.size))]:
        table.samples += samples_of(places, kept, truth(places, kept))
    return table


def truth(places: NodeKinds, kept: np.ndarray) -> dict[str, float]:
    shape, found = places.sizes.at(kept[None]), {}
    for node in places.nodes:
        reads, makes = (np.broadcast_to(n, 1) for n in places.channels(node, shape))
        found[node.label] = float(stepped(reads, makes)[0]) if node.op == "Conv" else 1e-6
    return found


def test_the_sum_over_nodes_is_predicted() -> None:
    sizes = sizes_of("residual")
    latency, places = Latency(NodeKinds(sizes), table_of(sizes, cuts=200)), NodeKinds(sizes)
    draw = np.random.default_rng(7)
    kept = draw.integers(4, sizes.steps + 1, size=(20, sizes.steps.size))
    want = np.array([1e-5 + sum(truth(places, k).values()) for k in kept])
    error = np.abs(latency.rows(kept)[:, 0] / want - 1)
    assert error.mean() < 0.05 and error.max() < 0.2
    assert latency.rows(kept).shape == (20, 1)


def test_whole_runs_are_fitted_by_their_shares() -> None:
    """A machine that gets busy takes longer for the original beside every cut: what is predicted stays as it was."""
    sizes = sizes_of("residual")
    places, table = NodeKinds(sizes), table_of(sizes, cuts=200)
    table.overhead = 0.0
    draw = np.random.default_rng(3)
    cuts = draw.integers(4, sizes.steps + 1, size=(24, sizes.steps.size))

    def seconds(kept: np.ndarray) -> float:
        return 4e-5 + 0.8 * sum(truth(places, kept).values())

    busy = np.where(np.arange(24) < 15, 1.0, 1.7)
    cuts[0] = sizes.steps
    runs = [(b * seconds(sizes.steps), b * seconds(k)) for b, k in zip(busy, cuts, strict=True)]
    fit_runs(table, places, cuts[:18], runs[:18])
    assert table.seconds == pytest.approx(seconds(sizes.steps))
    assert table.slope == pytest.approx(0.8, rel=0.1) and table.overhead == pytest.approx(4e-5, rel=0.3)
    check_runs(table, places, cuts[18:], runs[18:])
    assert [m for _, m in table.checks] == pytest.approx([*map(seconds, cuts[18:])])
    assert table.error < 0.1


def test_profiles_of_a_busy_machine_are_brought_to_whole_runs() -> None:
    draw = np.random.default_rng(0)
    true = draw.uniform(1e-4, 3e-4, (30, 5)) * draw.uniform(0.1, 1.0, (30, 1))
    busy = np.where(np.arange(30) % 6 == 5, 1.6, 1.0)
    nodes = [dict(zip("abcde", b * row, strict=True)) for b, row in zip(busy, true, strict=True)]
    whole = true.sum(axis=1) + 5e-5
    runs = [(2.0 * whole[0], 2.0 * w) if i % 4 == 0 else (whole[0], w) for i, w in enumerate(whole)]
    after = steadied(nodes, runs) * np.array([sum(n.values()) for n in nodes])
    spread = after / true.sum(axis=1)
    assert spread.std() / spread.mean() < 0.05 < 0.2 < busy.std() / busy.mean()
    assert (steadied([{}, {}], [(1.0, 1.0), (1.0, 0.5)]) == 1).all()


def test_nodes_of_one_kind_share_their_samples() -> None:
    places = NodeKinds(sizes_of("residual"))
    convolutions = [n for n in places.moving if n.op == "Conv"]
    assert len({places.kinds[n.label] for n in convolutions}) < len(convolutions)


def test_a_table_as_a_file(tmp_path: Path) -> None:
    table = table_of(sizes_of("residual"), cuts=2)
    table.checks = [(1e-3, 1.1e-3), (5e-4, 5e-4)]
    table.save(tmp_path / "device.json")
    again = LatencyTable.load(tmp_path / "device.json")
    assert (again.device, again.inputs, again.seconds, again.checks) == (
        table.device,
        table.inputs,
        table.seconds,
        table.checks,
    )
    assert again.error == pytest.approx(0.1 / 1.1)
    assert sorted(s[:3] for s in again.samples) == sorted(s[:3] for s in table.samples)
    again.check_model(table.model_sha256, "device.json")
    with pytest.raises(UsageError, match="another model") as caught:
        again.check_model("0" * 64, "device.json")
    assert "onnxprune profile" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a latency table"),
        ('{"version": 99, "nodes": {}}', "(?i)version 99"),
        ('{"version": 3, "nodes": {"a": [[1, 2]]}}', r"a\[0\] of 'nodes' of .* has 2 entries"),
    ],
)
def test_a_file_that_is_no_table(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        LatencyTable.load(tmp_path / "t.json")
    with pytest.raises(UsageError, match="No such latency table"):
        LatencyTable.load(tmp_path / "other.json")


def test_devices() -> None:
    assert device().threads >= 1 and device().providers == ("CPUExecutionProvider",)
    assert device(["cpu"], 3).facts()["threads"] == 3
    with pytest.raises(UsageError, match="no provider 'abacus'"):
        device(["abacus"])
    with pytest.raises(UsageError, match="threads: 0 is not allowed"):
        device(threads=0)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cuda", "pip install onnxruntime-gpu"), ("TensorrtExecutionProvider", "onnxruntime-gpu"),
     ("openvino", "onnxruntime-openvino"), ("cudda", "Did you mean 'cuda'?")],
)  # fmt: skip
def test_a_provider_that_is_not_here_names_its_package(name: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="no provider") as caught:
        device([name])
    assert hint in caught.value.hint


def test_a_provider_that_does_not_start_is_no_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime goes on with the CPU alone where the libraries of a provider are missing."""

    class OnCpu:
        def __init__(self, *_given: Any, **_named: Any) -> None: ...

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "InferenceSession", OnCpu)
    with pytest.raises(UsageError, match="cannot start the provider CUDAExecutionProvider"):
        open_session(b"", providers=["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_a_table_is_measured_once_per_device(tmp_path: Path) -> None:
    context = Context.of(MODELS / "recurrent.onnx", RunSettings(cache=tmp_path, threads=1))
    sizes = rewritable_sizes(context.analysis)
    table = latency_table(context, sizes, seconds=0.1)
    assert table.seconds > 0 and table.samples and len(table.checks) > 3
    (kept,) = tmp_path.glob("latency-*.json")
    before = kept.stat().st_mtime_ns
    again = latency_table(context, sizes, seconds=0.1)
    assert again.checks == table.checks and kept.stat().st_mtime_ns == before
    latency_table(replace(context, device=device(threads=2)), sizes, seconds=0.1)
    assert len(list(tmp_path.glob("latency-*.json"))) == 2
    given = latency_table(context, sizes, source=kept)
    assert given.device["threads"] == 1


def test_a_profile_in_python(tmp_path: Path) -> None:
    found = op.profile(MODELS / "recurrent.onnx", threads=1, seconds=0.1, cache=tmp_path / "kept")
    assert found.facts.nodes[0].ms >= found.facts.nodes[-1].ms > 0
    assert all(len(n.at_shares) == 3 for n in found.facts.nodes)
    assert found.facts.steps and all(len(s.channels) == len(s.ms) for s in found.facts.steps)
    found.save(tmp_path / "device.json")
    assert (
        json.loads((tmp_path / "device.json").read_text())["model_sha256"]
        == op.analyze(MODELS / "recurrent.onnx").loaded.sha256
    )


def test_a_measured_pair_keeps_its_residual() -> None:
    """One pair far from what its levels add up to: it is predicted there, and moves no other pair."""
    reads, makes = (a.ravel().astype(float) for a in np.meshgrid([8, 16, 32, 64], [8, 16, 32, 64], indexing="ij"))
    seconds = 1e-6 * reads * makes
    seconds[5] *= 4
    surface = fit_model(np.repeat(reads, 9), np.repeat(makes, 9), np.repeat(seconds, 9))
    predicted = surface.at(reads.astype(int), makes.astype(int))
    assert np.abs(np.log(predicted / seconds)).max() < 0.1
    between = surface.at(np.array([17]), np.array([16]))
    assert between < 0.7 * predicted[5]


def test_times_of_models_are_compared_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of the rounds are slow for one model after the other: medians say 1, pairs say a half."""
    before, after = [2.0, 2.0, 20.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0, 30.0]
    monkeypatch.setattr("onnxprune.search.latency.in_turn", lambda *_, **__: [before, after])
    sizes = sizes_of("residual")
    with Workspace.of(sizes.analysis) as trial:
        seconds = Bench(sizes.analysis, sizes, device(), {}, trial).time_models([Path("a"), Path("b")])
    assert seconds.tolist() == pytest.approx([0.02, 0.01])


@pytest.mark.parametrize(
    ("times", "expected", "asked"), [([0.6], 0.6, 1), ([0.8, 0.6, 0.5], 0.6, 2), ([0.9, 0.8, 0.85], 0.8, 3)]
)
def test_the_final_model_is_timed_again(times, expected, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement that was held up is repeated, and the shortest of three counts."""
    context = Context.of(MODELS / "residual.onnx")
    table = table_of(sizes_of("residual"))
    table.device = context.device.facts()
    selector = Prune("l2", 0.5).selector(context, context.analysis)
    problem = SearchProblem.of(context, selector, [parse("latency=0.6")], table)
    seconds = iter(times)
    measured = lambda *_: {"latency": next(seconds) * table.seconds}  # noqa: E731
    monkeypatch.setattr(SearchProblem, "measured_model", measured)
    removed = np.zeros(context.analysis.units.component.size, dtype=bool)
    candidate = Candidate("", Allocation(problem.sizes.steps, 0.0, 0.0), removed, {"latency": 0.5 * table.seconds})
    evaluation = Evaluation(Model.of(context.analysis), (), Quality(100.0, 0.0), 0, 0, 0)
    timed = problem.with_final_time(candidate, evaluation)
    assert timed.costs["latency"] == pytest.approx(expected * table.seconds)
    assert len(times) - len(list(seconds)) == asked


def test_channels_keep_the_multiples_of_this_device() -> None:
    """Kernels of convolutions work on blocks, which times of single nodes do not show; another device may differ."""
    context = Context.of(MODELS / "residual.onnx")
    table = table_of(sizes_of("residual"))
    selector = Prune("l2", 0.5).selector(context, context.analysis)
    assert selector.rounding is not None

    def levels() -> list[list[int]]:
        problem = SearchProblem.of(context, selector, [parse("latency=0.6")], table)
        return [options.tolist() for options in problem.choices["scores"].options]

    elsewhere = levels()
    table.device = context.device.facts()
    here = levels()
    counted = [
        options.tolist()
        for options in SearchProblem.of(context, selector, [parse("macs=0.6")]).choices["scores"].options
    ]
    assert here == counted != elsewhere
