"""Settings from pyproject.toml and onnxprune.toml, as a user of the command meets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def project(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a file of settings beside the model, in whose folder the command runs."""
    monkeypatch.chdir(model.parent)

    def write(text: str, name: str = "onnxprune.toml") -> Path:
        path = model.parent / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        return path

    return write


def test_a_file_sets_what_was_not_typed(api, run, model, project) -> None:
    (model.parent / "d.npz").write_bytes(b"")
    project(
        """
        ratio = 0.5
        round-to = 8
        device = "hexagon"
        scope = "global"
        include = ["a*", "b*"]
        exclude = "c*"
        layers = {"*/conv1/*" = 0.25}
        input_shapes = {x = [1, 3, 8, 8]}
        data = "d.npz"
        memory_limit = "2GB"
        approximate = true
        validate = false
        providers = ["cpu"]
        image_size = [8, 9]
        mean = [0.5, 0.5, 0.5]
        """
    )
    assert run(model).exit_code == 0 and api.calls.pop()["round_to"] == 8
    result = run(model, "--round-to", "4")
    assert result.exit_code == 0, result.stderr
    (call,) = api.calls
    assert (call["ratio"], call["round_to"], call["scope"]) == (0.5, 4, "global")
    assert (call["include"], call["exclude"], call["layers"]) == (("a*", "b*"), ("c*",), {"*/conv1/*": 0.25})
    assert (call["input_shapes"], call["memory_limit"]) == ({"x": (1, 3, 8, 8)}, 2 * 10**9)
    assert call["data"] == model.parent / "d.npz"
    assert call["device"] == "hexagon"
    assert (call["approximate"], call["validate"], call["providers"]) == (True, False, ["cpu"])
    assert (call["images"].size, call["images"].mean) == ((8, 9), (0.5, 0.5, 0.5))


def test_the_nearest_file_upwards_counts_and_a_table_of_the_command_beats_the_shared_one(
    api, run, model, project, monkeypatch
) -> None:
    project('[tool.other]\nx = 1\n[tool.onnxprune]\nratio = 0.1\nseed = 3\n[tool.onnxprune.prune]\nratio = 0.2\n'
            '[tool.onnxprune.factorize]\nmethod = "svd"\n', "pyproject.toml")  # fmt: skip
    inner = project("", "a/b/keep").parent
    project("[project]\nname = 'x'\n", "a/pyproject.toml")
    monkeypatch.chdir(inner)
    assert run(model).exit_code == 0
    assert (api.calls[-1]["ratio"], api.calls[-1]["seed"]) == (0.2, 3)
    project("ratio = 0.4\n", "a/onnxprune.toml")
    assert run(model).exit_code == 0
    assert (api.calls[-1]["ratio"], api.calls[-1]["seed"]) == (0.4, 0)
    assert run(model, "--no-config").exit_code == 0
    assert api.calls[-1]["ratio"] == 0.3
    assert run(model, "--config", model.parent / "pyproject.toml").exit_code == 0
    assert api.calls[-1]["ratio"] == 0.2


def test_where_settings_come_from_is_shown(api, run, model, project) -> None:
    path = project("ratio = 0.5\nsamples = 8\nverbose = false\n")
    loud = run(model, "-v", "--seed", "7")
    assert f"--ratio: set in {path}" in loud.stderr
    assert f"--samples in {path} is ignored: it describes how to read data, but --data is not given" in loud.stderr
    facts = json.loads(run(model, "--json", "--seed", "7").stdout)
    assert facts["settings_from"] == {"seed": "command line", "json": "command line"} | {
        "ratio": str(path),
        "verbose": str(path),
    }
    project("json = true\n")
    result = run(model)
    assert json.loads(result.stdout)["exit_status"] == 0
    project("quiet = true\n")
    assert (run(model).stdout, run(model).stderr) == ("", "")
    assert run(model, "-v").stdout != ""


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("ratoi = 0.5", "there is no setting 'ratoi'", "Did you mean 'ratio'?"),
        ("[prune]\nraito = 1", "prune has no setting 'raito'", "Did you mean 'ratio'?"),
        ("[sweep]\nsteps = 2", "sweep has no setting 'steps'", ""),
        ("ratio = 30", "ratio: 30 is out of range", "For 30 percent give 0.3"),
        ('ratio = "much"', "ratio: 'much' is not a number", "0 <= R < 1"),
        ("ratio = [0.1]", "ratio: [0.1] is not a number", "0 <= R < 1"),
        ('scope = "globl"', "scope: unknown value 'globl'", "Did you mean 'global'?"),
        ("include = 3", "include: 3 is not allowed", "list of patterns"),
        ("data = 3", "data: 3 is not allowed", "as a text"),
        ("validate = 1", "validate: 1 is not allowed", "True or False"),
        ("input_shapes = {x = [0]}", "'0' is not a size", "images=2,3"),
        ("layers = 2020-01-01", "layers: '2020-01-01' is not PATTERN=R", ""),
        ("exclude = 2020-01-01", "exclude: datetime.date(2020, 1, 1) is not allowed", ""),
        ("seed = 1.5", "seed: 1.5 is not allowed", ""),
        ("criterion = 5", "criterion: 5 is no function", ""),
        ('target = "macs=30"', "macs", ""),
        ("ratio = ", "is not valid TOML", "--no-config"),
        ("config = 'x.toml'", "there is no setting 'config'", ""),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(api, run, model, project, text, message, hint) -> None:
    path = project(text)
    result = run(model)
    assert result.exit_code == 2 and api.calls == []
    assert result.stderr.startswith(f"error: {path}") and message in result.stderr
    assert hint in result.stderr
    assert run(model, "--no-config").exit_code == 0


def test_damage_in_a_project_that_does_not_use_the_tool_is_not_our_concern(api, run, model, project) -> None:
    project("[broken", "pyproject.toml")
    assert run(model).exit_code == 0
    project("[tool.onnxprune\nratio = 1", "pyproject.toml")
    assert run(model).exit_code == 2


@pytest.mark.parametrize(
    ("text", "typed", "wanted"),
    [
        ("ratio = 0.5", ["--target", "macs=0.5"], {"ratio": None}),
        ('target = "macs=0.5"', ["--ratio", "0.2"], {"target": None, "ratio": 0.2}),
        ('target = {macs = 0.5, size = "3MB"}\ntrials = 3', ["--scope", "global"], {"target": None, "trials": None}),
        ('criterion = "gm"\nratio = 0.2', ["--apply-plan", "p.json"], {"criterion": None, "ratio": None}),
        ('plan = "p.json"', ["--ratio", "0.2"], {"plan": None, "ratio": 0.2}),
    ],
)
def test_what_is_typed_wins_over_what_contradicts_it(
    api, run, model, project, text: str, typed: list[str], wanted: dict[str, Any]
) -> None:
    (model.parent / "p.json").write_text("{}")
    project(text)
    result = run(model, *typed)
    assert result.exit_code == 0, result.stderr
    assert {name: api.calls[-1][name] for name in wanted} == wanted


def test_contradictions_within_a_file_are_errors(api, run, model, project) -> None:
    project('target = "macs=0.5"\nratio = 0.5\n')
    result = run(model)
    assert result.exit_code == 2 and "--ratio and --target were both given" in result.stderr
    project("min_fidelity = 0.9\n")
    result = run(model, "--no-validate")
    assert result.exit_code == 2 and "needs the models to run" in result.stderr


def test_a_named_file_has_to_be_there(api, run, model) -> None:
    result = run(model, "--config", model.parent / "none.toml")
    assert result.exit_code == 2 and "none.toml' not found" in result.stderr
    result = run(model, "--config", model, "--no-config")
    assert result.exit_code == 2 and "contradict each other" in result.stderr
