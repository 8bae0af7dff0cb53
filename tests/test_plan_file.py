"""The plan file as people see it: one line per slot, and the same data when it is read back."""

from __future__ import annotations

import copy
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from build import Net

import onnxprune as op
from onnxprune.allocation.knapsack import GroupCurve, Sensitivity
from onnxprune.allocation.latency_model import LatencyTable, Sample
from onnxprune.channels.plan import Plan, PlanGroup, PlanSlot
from onnxprune.errors import UsageError

AWKWARD = 'a "quoted", [1,\n2] name \N{GREEK SMALL LETTER ALPHA}'


def test_a_plan_is_read_back_as_written(tmp_path: Path) -> None:
    slots = [PlanSlot(AWKWARD, 0, 4, [1, 3]), PlanSlot("w", 1, 4, [])]
    full = Plan(
        "abc", "l2", [PlanGroup(0, 4, [1, 3], slots), PlanGroup(1, 2, None, [])], [{"code": "no-rule", "op": AWKWARD}]
    )
    for plan in (full, Plan()):
        plan.save(tmp_path / "plan.json")
        assert json.loads((tmp_path / "plan.json").read_text(encoding="utf-8")) == plan.to_dict()
        assert Plan.load(tmp_path / "plan.json") == plan


def test_a_slot_is_one_line(tmp_path: Path) -> None:
    slots = [PlanSlot(f"w{i}", 0, 100, list(range(50))) for i in range(3)]
    Plan("abc", "l2", [PlanGroup(0, 100, list(range(50)), slots)]).save(tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert [line.split('"')[3] for line in lines if line.startswith('    {"tensor"')] == ["w0", "w1", "w2"]


@pytest.fixture(scope="module")
def cut() -> tuple[bytes, dict[str, Any]]:
    """A model of two convolutions, and a plan for it."""
    net = Net(17)
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)
    model = net.model(net.conv(net.op("Relu", x), 8, 4)).SerializeToString()
    return model, op.prune(model, ratio=0.5, validate=False).plan.to_dict()


ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    7,
    1 << 70,
    0.5,
    -math.inf,
    math.nan,
    "x",
    "\udcff",
    [],
    {},
    [[]],
    [{}],
    {"a": 1},
    {"-5": 0},
    {"0": 9},
]
PLACES = [
    ("groups",), ("groups", 0), ("groups", 0, "id"), ("groups", 0, "units"), ("groups", 0, "removed"),
    ("groups", 0, "removed", 0), ("groups", 0, "slots"), ("groups", 0, "slots", 0), ("groups", 0, "slots", 0, "tensor"),
    ("groups", 0, "slots", 0, "axis"), ("groups", 0, "slots", 0, "size"), ("groups", 0, "slots", 0, "removed"),
    ("groups", 0, "slots", 0, "removed", 0), ("model_sha256",), ("criterion",), ("barriers",), ("version",),
    ("factorized",), ("groups", 0, "slots", 0, "at"),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda p: ".".join(map(str, p)))
def test_whatever_stands_in_a_plan_is_an_error_of_the_plan_or_a_cut(
    place: tuple[Any, ...], cut: tuple[bytes, dict[str, Any]]
) -> None:
    model, plan = cut
    for value in ODD:
        hostile = copy.deepcopy(plan)
        target: Any = hostile
        for step in place[:-1]:
            target = target[step]
        target[place[-1]] = value
        with suppress(UsageError):
            op.prune(model, plan=Plan.from_dict(hostile), validate=False)


DAMAGED = {
    "deep": "[" * 1000 + "]" * 1000,
    "deeper": '{"groups": ' + "[" * 100_000,
    "deep inside": '{"groups": [], "barriers": [' + '{"a": ' * 40 + "1" + "}" * 40 + "]}",
    "digits": '{"groups": [{"id": ' + "9" * 5000 + "}]}",
    "many digits": '{"groups": [{"id": ' + "9" * 4000 + "}]}",
    "twice": '{"groups": [], "groups": []}',
    "NaN": '{"groups": [{"id": NaN}]}',
    "Infinity": '{"groups": [], "barriers": [{"channels": -Infinity}]}',
    "large": '{"groups": [{"id": 1e999}]}',
    "text": "no JSON",
    "list": "[]",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_plans_are_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UsageError) as caught:
        Plan.load(tmp_path / "plan.json")
    assert len(caught.value.message) < 300 and "\n" not in caught.value.message


def test_what_is_wrong_is_named_with_its_place(cut: tuple[bytes, dict[str, Any]]) -> None:
    model, plan = copy.deepcopy(cut)
    plan["groups"][0]["slots"][0]["axis"] = "1"
    with pytest.raises(UsageError, match=r"groups\[0\]\.slots\[0\]\.axis of the plan is '1', a whole number"):
        Plan.from_dict(plan)
    for axis, size in ((9, 8), (-1, 8), (0, 9)):
        plan["groups"][0]["slots"][0] |= {"axis": axis, "size": size}
        with pytest.raises(UsageError, match=rf"(from|expects) axis {axis} of"):
            op.prune(model, plan=Plan.from_dict(plan), validate=False)


@pytest.mark.parametrize("kind", [Sensitivity, LatencyTable])
def test_other_documents_have_a_form_too(kind: type, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    curve = GroupCurve(0, "g", 8, [0.5, 0.9], [0.1, 0.2], [99.0, 90.0])
    given = {
        Sensitivity: Sensitivity("abc", {}, "cosine in %", 100.0, curves=[curve]),
        LatencyTable: LatencyTable(
            "abc", {}, {"x": [1, 3]}, 0.1, samples=[Sample("n", 3, 8, 0.01)], checks=[(0.1, 0.1)]
        ),
    }[kind]
    given.save(path)
    assert kind.load(path) == given
    text = path.read_text()
    for old, new in (
        ("0.1", "Infinity"),
        ("0.1", "NaN"),
        ("0.1", "-1"),
        ("0.1", "null"),
        ("abc", "\\ud800"),
        ("[", ""),
    ):
        path.write_text(text.replace(old, new))
        with suppress(UsageError):
            kind.load(path)
            assert new == "\\ud800"
