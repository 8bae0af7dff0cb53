"""Choices on whole models: what they ask for happens, the cut stays exact, and the report says what was used."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from oracle import assert_exact_cut

import onnxprune as op
from onnxprune.globs import last_match, reason_to_exclude
from onnxprune.importance.criteria import Slot
from onnxprune.importance.scores import columns
from onnxprune.pipeline import Context
from onnxprune.settings import words

MODELS = Path(__file__).parents[2] / "models"
NAMES = ["attention", "concat", "depthwise", "recurrent", "residual"]
CHOICES = {
    name: words(name)
    for name in ("policy", "normalize", "group_policy", "reshape_axis", "scope", "rounding", "cost", "schedule")
}
VALUES = [(name, value) for name, values in CHOICES.items() for value in values[1:] if value != "measured"]


def cut(name: str, ratio: float = 0.5, **options: Any) -> op.Result:
    return op.prune(MODELS / f"{name}.onnx", ratio=ratio, validate=False, **options)


def removed(result: op.Result) -> dict[int, list[int]]:
    return {g.id: list(g.removed or ()) for g in result.plan.groups}


def attention(width: int = 4, heads: int = 3, packed: bool = False) -> onnx.ModelProto:
    """One attention over [N, 6, 5], each of Q, K and V a projection of its own unless packed."""
    net, size = Net(17), width * heads
    embedded = net.linear(net.input("x", ["N", 6, 5]), 5, 8)
    x = net.op("LayerNormalization", embedded, net.weight(8, low=0.5), net.weight(8))
    if packed:
        parts = net.split(net.linear(x, 8, 3 * size), [size] * 3, 2)
    else:
        parts = [net.linear(x, 8, size) for _ in range(3)]
    q, k, v = (net.transpose(net.reshape(p, 0, 0, heads, width), 0, 2, 1, 3) for p in parts)
    scores = net.op("Mul", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), net.const(0.5))
    y = net.transpose(net.op("MatMul", net.op("Softmax", scores, axis=-1), v), 0, 2, 1, 3)
    return net.model(net.linear(net.reshape(y, 0, 0, -1), size, 5))


# -- scopes and limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", CHOICES["scope"])
def test_every_scope_takes_what_was_asked(name: str, scope: str) -> None:
    result = cut(name, 0.4, scope=scope)
    sizes = {g["id"]: g["size"] for g in result.report.groups if g["prunable"]}
    steps = {g["id"]: g["size"] // g["steps"] for g in result.report.groups}
    gone = removed(result)
    share = sum(len(v) for v in gone.values()) / sum(sizes.values())
    slack = max(steps.values()) * (len(sizes) if scope in ("auto", "local", "isomorphic") else 1) / 2
    assert abs(share - 0.4) <= slack / sum(sizes.values()) + 1e-9
    for number, units in gone.items():
        assert 0 < len(units) < sizes[number] and len(units) % steps[number] == 0
        assert scope in ("auto", "local") or len(units) <= 0.9 * sizes[number]


def test_global_is_the_sort_of_all_scores() -> None:
    """Two convolutions in a row, scored by hand: L2 over both weights that a channel lies in, each less its mean."""
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8))
    model = net.model(net.conv(net.op("Relu", net.conv(x, 8, 6)), 6, 2))
    weights = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) > 1]
    scores = []
    for before, after in pairwise(weights):
        own, read = (np.sqrt(np.square(w).sum(axis=a)) for w, a in ((before, (1, 2, 3)), (after, (0, 2, 3))))
        scores.append(own / own.mean() + read / read.mean())
    cheapest = sorted((s, g, u) for g, values in enumerate(scores) for u, s in enumerate(values))[:5]
    found = removed(op.prune(model, ratio=5 / 14, scope="global", validate=False))
    sizes = [op.analyze(model).units.groups[g].size for g in found]
    wanted = {len(values): sorted(u for _, k, u in cheapest if k == g) for g, values in enumerate(scores)}
    assert dict(zip(sizes, found.values(), strict=True)) == {size: units for size, units in wanted.items() if units}


def test_groups_of_the_same_structure_share_a_threshold() -> None:
    """The two inner layers of residual blocks are alike, whatever their sizes; the trunk is not like them."""
    from onnxprune.allocation.selection import ranking_scopes

    analysis = op.analyze(MODELS / "residual.onnx")
    keys = ranking_scopes(analysis, analysis.units.groups)
    inner = [g.id for g in analysis.units.groups if len(analysis.producers[g.id]) == 1]
    assert len(inner) == 5 and len({keys[g] for g in inner}) == 1
    trunk = {keys[g.id] for g in analysis.units.groups} - {keys[inner[0]]}
    assert trunk


@pytest.mark.parametrize("scope", ["local", "global"])
def test_limits_on_models(scope: str) -> None:
    units = op.analyze(MODELS / "residual.onnx").units
    for number, gone in removed(cut("residual", 0.7, scope=scope, max_ratio=0.5, step=4)).items():
        assert len(gone) % 4 == 0 and len(gone) <= 0.5 * units.groups[number].size
    kept = [x.channels_after for x in cut("residual", 0.4, scope=scope, round_to=8).report.layers]
    assert all(n % 8 == 0 or n == 10 for n in kept)
    up, down = (cut("attention", 0.311, scope=scope, rounding=r).report.totals.params_after for r in ("up", "down"))
    assert up < down


def test_patterns_hold_in_every_scope() -> None:
    for scope in CHOICES["scope"]:
        result = cut("residual", 0.4, scope=scope, layers={"*stages.4/body/body.0*": 0.25}, exclude=["*stages.1*"])
        layers = {x.name: x for x in result.report.layers}
        assert layers["/stages/stages.4/body/body.0/body.0.0/Conv"].channels_after == 48
        assert layers["/stages/stages.1/body/body.0/body.0.0/Conv"].channels_after == 24
        assert "excluded" in layers["/stages/stages.1/body/body.0/body.0.0/Conv"].reason


def test_a_threshold_that_cannot_be_reached_is_told() -> None:
    warned = cut("residual", 0.8, scope="global", max_ratio=0.5).report.warnings
    assert any("max_ratio" in text for text in warned)
    assert not cut("residual", 0.3, scope="isomorphic").report.warnings


# -- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["sum", "average"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_every_head_loses_the_same_indices(policy: str, scope: str) -> None:
    model = attention()
    result = assert_exact_cut(model, criterion="l2", group_policy=policy, scope=scope)
    assert result is not None
    units = op.analyze(model).units
    for number, gone in removed(result).items():
        group = units.groups[number]
        column = columns(group.classes, group.steps)
        by_row = [sorted(column[u] for u in gone if group.classes[u] == c) for c in np.unique(group.classes)]
        assert all(row == by_row[0] for row in by_row)
    assert op.prune(MODELS / "attention.onnx", group_policy=policy, latency=False).report.exactness.passed


def test_grids_are_left_whole_with_a_reason() -> None:
    result = cut("attention", group_policy="none")
    grids = [g for g in result.report.groups if g["prunable"] and g["size"] != g["steps"]]
    assert grids and all(g["removed"] == 0 and g["reason"].startswith("kept-whole") for g in grids)
    assert all(g["removed"] for g in result.report.groups if g["prunable"] and g["size"] == g["steps"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("axis", ["heads", "both"])
@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"steps": 2}], ids=str)
def test_whole_heads_are_exact(packed: bool, ratio: float, axis: str, options: dict[str, Any]) -> None:
    result = assert_exact_cut(
        attention(4, 4, packed), criterion="l2", ratio=ratio, reshape_axis=axis, validate=False, **options
    )
    assert result is not None
    heads = [g for g in result.report.groups if g["kind"] == "heads"]
    assert heads and all(g["prunable"] for g in heads)


@pytest.mark.parametrize("axis", ["heads", "both"])
def test_rows_of_another_grid_that_are_left_empty_go_along(axis: str) -> None:
    """Two groupings of one trunk: half of the 2 groups takes 3 of the 6, and the plan says so."""
    net = Net(17)
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 12)
    read = [net.conv(net.conv(x, 12, o, group=g), o, 2) for g, o in ((2, 4), (6, 6))]
    result = assert_exact_cut(net.model(*read), reshape_axis=axis)
    assert result is not None
    assert any(len(s.removed) == 3 and s.size == 6 for g in result.plan.groups for s in g.slots)


@pytest.mark.parametrize("axis", ["heads", "both"])
def test_plans_of_whole_heads_come_back(axis: str, tmp_path: Path) -> None:
    first = cut("attention", reshape_axis=axis)
    first.plan.save(tmp_path / "plan.json")
    again = op.prune(MODELS / "attention.onnx", plan=tmp_path / "plan.json", latency=False)
    assert again.report.exactness.passed
    assert again.model == first.model
    assert again.report.settings == {"criterion": "l2"}


def test_both_takes_its_share_from_heads_and_from_channels() -> None:
    """4 heads of 16 at 0.75: half of the heads, and half of the channels of the others."""
    result = cut("attention", 0.75, reshape_axis="both")
    for group in result.report.groups:
        if group["prunable"] and group["size"] in (4, 64):
            assert group["removed"] == {4: 2, 64: 32 + 16}[group["size"]]


# -- criteria, policies ----------------------------------------------------------------------------------------------


def test_backward_asks_the_last_producer() -> None:
    """Two convolutions that meet in an Add: the second one's weight decides, and nothing that reads them."""
    net = Net(17)
    x = net.input("x", ["N", 3, 6, 6])
    y = net.op("Add", net.conv(x, 3, 8, bias=False), net.conv(x, 3, 8, bias=False))
    model = net.model(net.conv(y, 8, 4))
    last = onnx.numpy_helper.to_array(model.graph.initializer[1])
    norms = np.sqrt(np.square(last).sum(axis=(1, 2, 3)))
    (gone,) = removed(op.prune(model, ratio=0.5, policy="backward", validate=False)).values()
    assert gone == sorted(np.argsort(norms)[:4].tolist())


def test_a_criterion_without_a_word_leaves_groups_whole() -> None:
    result = cut("depthwise", criterion="bn")
    silent = [g for g in result.report.groups if g["prunable"] and not g["removed"]]
    assert silent and all("criterion bn has no score" in g["reason"] for g in silent)
    assert any(x.reason.startswith("no-score") for x in result.report.layers)
    with pytest.raises(op.UsageError, match=r"'bn' has scores for no layer[^\n]*\n'bn' needs BatchNormalization"):
        cut("attention", criterion="bn")


def test_constant_scores_are_fine() -> None:
    path = MODELS / "residual.onnx"
    result = op.prune(path, criterion=lambda slot: np.ones(slot.units.size), scope="slamp", latency=False)
    assert result.report.exactness.passed


def test_maps_are_captured_for_criteria_that_need_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A criterion of two arguments gets slots with maps, and constant ones are told."""
    from onnxprune.importance.criteria import Slot
    from onnxprune.importance.slots import CapturedMaps

    asked: list[tuple[Any, ...]] = []
    maps_of_all = CapturedMaps()

    def captured(context: Context, analysis: Any, groups: Any, needs: Any, gone: Any) -> CapturedMaps:
        asked.append((len(groups), tuple(needs), gone is None))
        return maps_of_all

    def slots(analysis: Any, groups: Any, maps: Any, gone: Any, seed: int) -> Any:
        assert maps is maps_of_all
        for group in groups:
            units = np.arange(group.size)
            yield group.id, Slot("w", 0, np.ones((1, group.size, 1)), [], units, group.size, maps=maps)

    def mine(slot: Any, maps: Any) -> Any:
        assert maps is maps_of_all
        return np.zeros(slot.units.size)

    monkeypatch.setattr("onnxprune.passes.select.captured_maps", captured)
    monkeypatch.setattr("onnxprune.passes.select.map_slots", slots)
    data = {"x": np.zeros((4, 1, 8, 8), np.float32)}
    report = cut("residual", criterion=mine, steps=2, data=data).report
    assert asked == [(8, ("moments",), True), (8, ("moments",), False)]
    assert any("same score" in text for text in report.warnings)
    with pytest.raises(op.UsageError, match="criterion mine needs data"):
        cut("residual", criterion=mine)


def test_the_report_says_what_was_used() -> None:
    said = cut("residual", criterion="gm", scope="global", policy="max", normalize="softmax").report.settings
    assert said["criterion"] == "gm"
    assert [said[n] for n in ("scope", "policy", "normalize", "group_policy")] == ["global", "max", "softmax", "count"]


@pytest.mark.parametrize(("options", "message"), [
    ({"scope": "globl"}, "scope: unknown value 'globl'\nDid you mean 'global'? Allowed: auto, local, global"),
    ({"normalize": 3}, "normalize: unknown value '3'\nAllowed: auto, mean, none"),
    ({"steps": 0}, "steps: 0 is not allowed"),
    ({"step": 1.5}, "step: 1.5 is not allowed"),
    ({"max_ratio": 0}, "max_ratio: 0 is out of range"),
    ({"ratio": 1}, "ratio: 1 is out of range"),
])  # fmt: skip
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(op.UsageError) as error:
        op.passes.Prune(**options)
    assert str(error.value).startswith(message)
    with pytest.raises(TypeError, match="Did you mean 'scope'"):
        op.passes.Prune(scop="global")  # type: ignore[call-arg]


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Any]:
    from click.testing import CliRunner

    from onnxprune.cli import main

    def run(name: str, *args: str) -> Any:
        target = str(tmp_path / "out.onnx")
        return CliRunner().invoke(main, [str(MODELS / f"{name}.onnx"), "-o", target, "--no-validate", *args])

    return run


@pytest.mark.parametrize(("option", "value"), VALUES)
def test_every_value_runs(command: Callable[..., Any], option: str, value: str) -> None:
    flag = f"--{option.replace('_', '-')}"
    more = ["--steps", "2"] if option == "schedule" else []
    for name in NAMES:
        result = command(name, flag, value, *more, "--explain", "-v")
        assert result.exit_code == 0, result.stderr
        assert f"scope {value if option == 'scope' else 'local'}" in result.stdout


def test_scores_that_compare_are_not_divided_unless_asked() -> None:
    """ziplm's scores are shares of an output's energy already."""
    data = {"data": MODELS / "digits_calibration.npz", "samples": 64}
    assert cut("residual", criterion="ziplm", **data).report.settings["normalize"] == "none"
    assert cut("residual", criterion="ziplm", normalize="mean", **data).report.settings["normalize"] == "mean"
    assert cut("residual", criterion="l2").report.settings["normalize"] == "mean"


def test_units_of_a_packed_projection_are_seen_whole() -> None:
    """Queries with keys lie side by side in one weight: every unit has the entries of both, and no other's."""
    model = attention(packed=True)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    packed = next(n for n, w in weights.items() if w.shape == (8, 36))
    seen: list[tuple[int, np.ndarray]] = []

    def watch(slot: Slot) -> np.ndarray:
        if slot.tensor == packed and slot.size == 12:  # its rows are another group's
            seen.append((slot.size, np.stack([np.sort(row) for row in slot.matrix])[np.argsort(slot.units)]))
        return np.abs(slot.matrix).sum(axis=1)

    op.prune(model, criterion=watch, ratio=0.5, validate=False)
    columns = weights[packed].T
    both = np.concatenate([columns[:12], columns[12:24]], axis=1)
    assert {size for size, _ in seen} == {12} and len(seen) == 2
    found = sorted((rows for _, rows in seen), key=lambda rows: rows.shape[1])
    np.testing.assert_array_equal(found[0], np.sort(columns[24:], axis=1))
    np.testing.assert_array_equal(found[1], np.sort(both, axis=1))


def test_criteria_read_large_weights_where_arithmetic_is_quick() -> None:
    net = Net(17)
    x = net.linear(net.input("x", ["N", 700]), 700, 1600)
    model = net.model(net.linear(net.op("Relu", x), 1600, 3))
    seen: list[bool] = []

    def watch(slot: Slot) -> np.ndarray:
        seen.append(bool(slot.blocks.flags.aligned))
        return np.abs(slot.matrix).sum(axis=1)

    for pad in range(1, 5):  # somewhere among four addresses is one that does not suit four bytes
        model.doc_string = "x" * pad
        op.prune(model.SerializeToString(), criterion=watch, ratio=0.5, validate=False)
    assert seen and all(seen)


@pytest.mark.parametrize(
    ("include", "exclude", "reason"),
    [
        ((), (), ""),
        ((), ("*head*",), "excluded"),
        (("*body*",), (), "not included"),
        (("*head*",), ("block[0]/head",), "excluded"),  # a name with brackets matches itself
        (("*Head*",), (), "not included"),
    ],
)
def test_globs_exclude(include: tuple[str, ...], exclude: tuple[str, ...], reason: str) -> None:
    """Every stage decides by the same two lists of globs."""
    assert reason_to_exclude(["", "block[0]/head"], include, exclude) == reason


def test_the_last_glob_that_matches_decides() -> None:
    assert last_match(["a/conv"], {"*": 1, "a/*": 2, "b/*": 3}) == ("a/*", 2)
    assert last_match(["c"], {"a/*": 2}) is None
