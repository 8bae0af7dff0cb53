"""The plan file as people see it: one line per slot, and the same data when it is read back."""

from __future__ import annotations

import json
from pathlib import Path

from onnxprune.plan import Plan, PlanGroup, PlanSlot

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
