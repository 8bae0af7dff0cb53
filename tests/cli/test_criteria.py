"""The lists of criteria and devices as a user sees them."""

from __future__ import annotations

import json

import pytest

from onnxprune import criteria, devices


def test_every_criterion_has_a_line(run) -> None:
    result = run("criteria")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == criteria.names()
    assert all(line == line.rstrip() and len(line) <= 120 for line in lines)
    (wanda,) = (line for line in lines if line.startswith("wanda"))
    assert wanda.split()[1] == "data" and wanda.endswith("Sun 2024") and "activations" in wanda


def test_criteria_as_json(run) -> None:
    result = run("criteria", "--json")
    assert result.exit_code == 0
    listed = {one["name"]: one for one in json.loads(result.stdout)["criteria"]}
    assert sorted(listed) == criteria.names()
    assert listed["l2"]["needs"] == [] and listed["wanda"]["needs"] == ["square"]
    assert listed["hrank"]["paper"].startswith("Lin et al., HRank") and listed["hrank"]["paper"].endswith("2020")
    assert all(one["measures"] and "Return" not in one["measures"] for one in listed.values())


@pytest.mark.parametrize("arguments", [["model.onnx"], ["--ratio", "0.3"]])
def test_the_list_takes_no_model(run, arguments) -> None:
    result = run("criteria", *arguments)
    assert result.exit_code == 2 and result.stderr.startswith("error: ")


def test_a_criterion_of_the_callers_own_is_described(run) -> None:
    @criteria.register("longest")
    def longest(slot):
        """Return the longest row, as in Doe & Roe, Rows that are Long, ICLR 2019."""
        return slot.matrix.max(axis=1)

    try:
        assert criteria.describe("longest").paper == "Doe & Roe, Rows that are Long, ICLR 2019"
        assert "longest" in run("criteria").stdout
    finally:
        criteria.unregister("longest")


def test_every_device_has_a_line(run, monkeypatch) -> None:
    monkeypatch.setattr(devices, "this_machine", lambda: devices.get("avx2"))
    result = run("devices")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == devices.names()
    assert sum(line.endswith("this machine") for line in lines) == 1 and all(len(line) <= 80 for line in lines)
    assert "Qualcomm" in run("devices", "-v").stdout
    listed = json.loads(run("devices", "--json").stdout)
    assert {one["name"]: one["writes"] for one in listed["devices"]}["hexagon"] == 32
    assert listed["this_machine"] == "avx2"
