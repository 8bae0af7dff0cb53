"""Every bad option value gets its own message: which value, what was allowed, what to give; nothing is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onnxprune.settings import COMMANDS, options_of, reference

BAD = [
    (["--ratio", "1"], "--ratio: 1 is out of range", "0 <= R < 1"),
    (["--ratio", "-0.1"], "--ratio: -0.1 is out of range", "0 <= R < 1"),
    (["--ratio", "nan"], "--ratio: nan is out of range", "0 <= R < 1"),
    (["--ratio", "30"], "--ratio: 30 is out of range", "For 30 percent give 0.3"),
    (["--ratio", "30%"], "--ratio: '30%' is not a number", "For 30 percent give 0.3"),
    (["--ratio", "much"], "--ratio: 'much' is not a number", "0 <= R < 1"),
    (["--layer", "conv1"], "--layer: 'conv1' is not PATTERN=R", "for example"),
    (["--layer", "=0.5"], "--layer: '=0.5' is not PATTERN=R", "for example"),
    (["--layer", "conv1=1.5"], "--layer conv1: 1.5 is out of range", "For 1.5 percent give 0.015"),
    (["--layer", "a=0.1", "--layer", "a=0.2"], "--layer a is given twice", "give it once"),
    (["--input-shape", "x"], "--input-shape: 'x' is not NAME=SIZES", "images=2,3,224,224"),
    (["--input-shape", "x=1,,2"], "--input-shape x: '' is not a size", "every size"),
    (["--input-shape", "x=1,-1"], "--input-shape x: '-1' is not a size", "every size"),
    (["--input-shape", "x=1,0"], "--input-shape x: '0' is not a size", "every size"),
    (["--input-shape", "x=1", "--input-shape", "x=2"], "--input-shape x is given twice", "give it once"),
    (["--round-to", "0"], "--round-to: 0 is not allowed", "whole number from 1"),
    (["--round-to", "8.5"], "--round-to: 8.5 is not allowed", "whole number from 1"),
    (["--seed", "-1"], "--seed: -1 is not allowed", "whole number from 0"),
    (["--min-fidelity", "200"], "--min-fidelity: 200 is not allowed", "0 < X <= 100"),
    (["--min-fidelity", "high"], "--min-fidelity: high is not allowed", "0 < X <= 100"),
    (["--min-fidelity", "0.9", "--no-validate"], "--no-validate forbids that", "drop one of the two"),
    (["--scope", "globl"], "--scope: unknown value 'globl'", "did you mean 'global'? allowed: auto, local, global"),
    (["--policy", "mean"], "--policy: unknown value 'mean'", "allowed: sum, average, max, backward"),
    (["--normalize", "lineal"], "--normalize: unknown value 'lineal'", "did you mean 'linear'?"),
    (["--group-policy", "counts"], "--group-policy: unknown value 'counts'", "did you mean 'count'?"),
    (["--reshape-axis", "head"], "--reshape-axis: unknown value 'head'", "did you mean 'heads'?"),
    (["--rounding", "downwards"], "--rounding: unknown value 'downwards'", "did you mean 'down'?"),
    (["--cost", "flops"], "--cost: unknown value 'flops'", "allowed: auto, none, macs, params, latency"),
    (["--schedule", "cosine"], "--schedule: unknown value 'cosine'", "did you mean 'cos'?"),
    (["--max-ratio", "0"], "--max-ratio: 0 is out of range", "0 < R <= 1"),
    (["--step", "0"], "--step: 0 is not allowed", "whole number from 1"),
    (["--steps", "two"], "--steps: two is not allowed", "whole number from 1"),
    (["--criterion", "wanda"], "--criterion wanda needs data", "--data"),
    (["--criterion", "l3"], "unknown criterion 'l3'", "did you mean 'l"),
    (["--criterion", "none.py:f"], "--criterion: no file 'none.py'", "to one score per channel"),
    (["--apply-plan", "none.json"], "plan 'none.json' not found", "check the path"),
    (["--data", "none.npz"], "data 'none.npz' not found", "check the path"),
    (["--ratoi", "0.3"], "no such option '--ratoi'", "did you mean --ratio?"),
    (["--ratio"], "'--ratio' requires an argument", "--help"),
    (["second.onnx"], "unexpected extra argument (second.onnx)", "--help"),
]


@pytest.mark.parametrize(("args", "message", "hint"), BAD, ids=[" ".join(case[0]) for case in BAD])
def test_bad_value_is_named_with_what_was_allowed(api, run, model, args, message, hint) -> None:
    result = run(model, *args)
    assert result.exit_code == 2
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("error: ") and message.lower() in first.lower()
    assert second.startswith("hint: ") and hint.lower() in second.lower()
    assert [path.name for path in model.parent.iterdir()] == ["m.onnx"]
    assert api.calls == []


def test_missing_model_names_the_nearest_file(api, run, model) -> None:
    result = run(model.with_name("n.onnx"))
    assert result.exit_code == 2
    assert "n.onnx' not found" in result.stderr
    assert f"Did you mean {str(model)!r}?" in result.stderr


def test_missing_folder_and_folder_instead_of_model(api, run, model) -> None:
    absent = run(model.parent / "nowhere" / "m.onnx")
    folder = run(model.parent)
    assert (absent.exit_code, folder.exit_code) == (2, 2)
    assert "does not exist" in absent.stderr
    assert "is a folder" in folder.stderr


@pytest.mark.parametrize("flag", [["--ratio", "0.3"], ["--criterion", "l2"], ["--layer", "a=0"], ["--exclude", "a"]])
def test_options_that_a_plan_decides_are_refused_beside_it(api, run, model, flag) -> None:
    plan = model.with_name("plan.json")
    plan.write_text("{}")
    result = run(model, "--apply-plan", plan, *flag)
    assert result.exit_code == 2
    assert f"{flag[0]} has no meaning with --apply-plan" in result.stderr
    assert run(model, "--apply-plan", plan).exit_code == 0


def test_every_option_reaches_the_api(api, run, model) -> None:
    data = model.with_name("d.npz")
    data.write_bytes(b"")
    args = ["--criterion", "gm", "--ratio", "0.25", "--layer", "*conv=0.5", "--layer", "a=b=0", "--include", "i*"]
    args += ["--scope", "slamp", "--policy", "max", "--normalize", "tss", "--group-policy", "sum", "--step", "4"]
    args += ["--reshape-axis", "both", "--max-ratio", "0.8", "--rounding", "down", "--cost", "macs"]
    args += ["--steps", "3", "--schedule", "cube"]
    args += [
        "--exclude",
        "e1",
        "--exclude",
        "e2",
        "--round-to",
        "8",
        "--device",
        "avx2",
        "--input-shape",
        "x=2,3",
        "--seed",
        "7",
    ]
    args += ["--data", data, "--samples", "9", "--batch-size", "4"]
    args += ["--recover", "bn", "--memory-limit", "2GB", "--cache", model.parent / "kept"]
    args += ["--providers", "cpu,CPUExecutionProvider", "--threads", "3", "--custom-op-library", data]
    args += ["--resize-io", "past*", "--resize-io", "present*", "--cache-heads"]
    args += ["--experts", "2", "--vocabulary", "auto", "--keep-ids", "--tokenizer", data, "--quantize", "dynamic"]
    args += ["--blocks", "auto"]
    assert run(model, *args, "--approximate").exit_code == 0
    (call,) = api.calls
    call.pop("progress")
    assert call == {
        "model": model,
        "criterion": "gm",
        "ratio": 0.25,
        "layers": {"*conv": 0.5, "a=b": 0.0},
        "include": ("i*",),
        "exclude": ("e1", "e2"),
        "scope": "slamp",
        "policy": "max",
        "normalize": "tss",
        "group_policy": "sum",
        "reshape_axis": "both",
        "max_ratio": 0.8,
        "round_to": 8,
        "device": "avx2",
        "step": 4,
        "rounding": "down",
        "cost": "macs",
        "steps": 3,
        "schedule": "cube",
        "plan": None,
        "input_shapes": {"x": (2, 3)},
        "data": data,
        "samples": 9,
        "batch_size": 4,
        "images": None,
        "recover": "bn",
        "memory_limit": 2_000_000_000,
        "cache": model.parent / "kept",
        "target": None,
        "max_drop": None,
        "metric": None,
        "latency_table": None,
        "sensitivity": None,
        "jobs": None,
        "factorize": None,
        "trials": None,
        "min_fidelity": None,
        "effort": "normal",
        "finetune": None,
        "labels": None,
        "pattern_lock": None,
        "augment": "auto",
        "blocks": "auto",
        "depth": None,
        "rotate": "auto",
        "keep_cache": False,
        "resize_io": ("past*", "present*"),
        "cache_heads": True,
        "experts": 2,
        "vocabulary": "auto",
        "keep_ids": True,
        "tokenizer": data,
        "quantize": "dynamic",
        "model_config": None,
        "remove_dead": False,
        "outputs": None,
        "providers": ["cpu", "CPUExecutionProvider"],
        "threads": 3,
        "seed": 7,
        "custom_op_libraries": (data,),
        "approximate": True,
        "validate": True,
        "latency": True,
    }


def test_defaults(api, run, model) -> None:
    assert run(model).exit_code == 0
    (call,) = api.calls
    assert (call["criterion"], call["ratio"], call["round_to"], call["seed"]) == (None, 0.3, "auto", 0)
    assert (call["layers"], call["input_shapes"], call["plan"], call["data"]) == (None, None, None, None)
    assert (call["recover"], call["memory_limit"], call["cache"]) == (None, None, None)
    assert model.with_name("m.pruned.onnx").read_bytes() == b"cut model"


def test_no_validate_measures_nothing(api, run, model) -> None:
    assert run(model, "--no-validate").exit_code == 0
    assert (api.calls[0]["validate"], api.calls[0]["latency"]) == (False, False)


def test_every_option_of_a_budget_reaches_the_api(api, run, model) -> None:
    table, script = model.with_name("device.json"), model.with_name("score.py")
    table.write_text("{}")
    script.write_text("def top1(path):\n    return 1.0\n")
    args = ["--target", "macs=0.5", "--target", "latency=12ms", "--max-drop", "1.5", "--metric", f"{script}:top1"]
    assert run(model, *args, "--latency-table", table, "--min-fidelity", "0.9").exit_code == 0
    (call,) = api.calls
    assert [str(target) for target in call["target"]] == ["macs=0.5", "latency=12ms"]
    assert (call["max_drop"], call["metric"], call["latency_table"]) == (1.5, f"{script}:top1", table)
    assert (call["min_fidelity"], call["ratio"], call["plan"]) == (0.9, None, None)


def test_the_page_of_settings_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == reference(), "write it again: python -m onnxprune.settings > docs/settings.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_whole_help_lists_every_option_once(run, name) -> None:
    text = run(name, "--help-all").stdout
    listed = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, flags=re.MULTILINE)
    assert sorted(listed) == sorted(["--help", "--help-all", *(setting.flag for setting in options_of(name))])
    assert "\ue000" not in text
