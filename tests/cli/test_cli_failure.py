"""Every failure ends in one message and the right exit code, with nothing written and never a traceback unasked."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys

import click
import pytest

from onnxprune.cli import failure
from onnxprune.errors import BudgetError, ModelError, UsageError, ValidationError
from onnxprune.report.facts import Exactness, Fidelity, OutputFidelity

TYPED = [
    (UsageError("bad value", hint="do this"), 2),
    (ModelError("bad model", hint="do this"), 3),
    (ValidationError("not exact", hint="do this"), 4),
    (BudgetError("not met", hint="do this"), 5),
]


@pytest.mark.parametrize(("error", "code"), TYPED, ids=[type(error).__name__ for error, _ in TYPED])
@pytest.mark.parametrize("command", [[], ["inspect"], ["prune"]], ids=["default", "inspect", "prune"])
def test_typed_errors_keep_their_exit_code(api, run, model, command, error, code) -> None:
    api.error = error
    result = run(*command, model)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == f"error: {error.message}\nhint: do this\n"
    assert [path.name for path in model.parent.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(("error", "code"), TYPED, ids=[type(error).__name__ for error, _ in TYPED])
def test_json_gets_one_error_object_on_stdout(api, run, model, error, code) -> None:
    api.error = error
    result = run(model, "--json")
    record = json.loads(result.stdout)["error"]
    assert record == {"type": type(error).__name__, "message": error.message, "hint": "do this", "exit_code": code}
    assert result.exit_code == code
    assert f"error: {error.message}" in result.stderr


def test_json_holds_for_errors_of_parsing(api, run, model) -> None:
    result = run(model, "--json", "--ratoi", "1")
    assert json.loads(result.stdout)["error"]["exit_code"] == 2
    assert "no such option" in result.stderr


def test_unplanned_error_is_one_line_and_asks_for_a_report(api, run, model) -> None:
    api.error = KeyError("w\n  spread")
    plain, loud = run(model), run(model, "-vv")
    assert (plain.exit_code, loud.exit_code) == (3, 3)
    assert plain.stderr.startswith("internal error: KeyError: ")
    assert len(plain.stderr.splitlines()) == 2 and "report" in plain.stderr
    assert "Traceback" not in plain.stderr
    assert "Traceback" in loud.stderr


def test_interrupt_ends_with_130_and_writes_nothing(api, run, model) -> None:
    api.error = KeyboardInterrupt()
    result = run(model, "--plan", model.with_name("p.json"))
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted\n"
    assert [path.name for path in model.parent.iterdir()] == ["m.onnx"]


def test_interrupt_from_the_keyboard_in_a_process_of_its_own(model) -> None:
    code = (
        "import signal, sys, time, onnxprune\n"
        # a job in the background of a shell is started with interrupts ignored, as a user's command is not
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def prune(*args, **options):\n"
        "    print('ready', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
        "onnxprune.prune = prune\n"
        "from onnxprune.cli import main\n"
        "main(prog_name='onnxprune')\n"
    )
    command = [sys.executable, "-c", code, str(model), "--plan", str(model.with_name("p.json"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")
    assert [path.name for path in model.parent.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "m.pruned.onnx"), KeyboardInterrupt()])
def test_failed_write_leaves_no_plan_and_the_old_files(api, run, model, error) -> None:
    api.save_error = error
    plan, output = model.with_name("p.json"), model.with_name("m.pruned.onnx")
    plan.write_text("old plan")
    output.write_bytes(b"old model")
    result = run(model, "--plan", plan)
    assert result.exit_code == (2 if isinstance(error, OSError) else 130)
    assert (plan.read_text(), output.read_bytes()) == ("old plan", b"old model")
    assert sorted(path.name for path in model.parent.iterdir()) == ["m.onnx", "m.pruned.onnx", "p.json"]


def test_operating_system_errors_name_the_file() -> None:
    told = failure.describe(OSError(28, "No space left on device", "/d/x.onnx"))
    assert told.message == "no space left on device: /d/x.onnx"
    assert told.exit_code == 2


def test_memory_and_click_errors() -> None:
    assert failure.describe(MemoryError()).exit_code == 3
    assert failure.describe(click.Abort()).exit_code == 130
    assert failure.describe(click.UsageError("Wrong thing.")).message == "wrong thing"


def test_gate_stops_below_the_cosine_and_shows_the_figures(api, run, model) -> None:
    result = run(model, "--min-fidelity", "0.95")
    assert result.exit_code == 5
    assert "worst cosine 0.9312 is below --min-fidelity 0.95" in result.stderr
    assert "cosine 0.9312" in result.stdout and "wrote" not in result.stdout
    assert [path.name for path in model.parent.iterdir()] == ["m.onnx"]
    assert run(model, "--min-fidelity", "0.93").exit_code == 0


def test_a_gate_that_fails_keeps_the_report(api, run, model) -> None:
    done = run(model, "--min-fidelity", "0.95", "--json")
    record = json.loads(done.stdout)
    assert done.exit_code == record["error"]["exit_code"] == 5
    assert record["fidelity"]["outputs"][0]["cosine"] == 0.9312
    assert record["totals"]["params_after"] == 7_920 and record["output"] == ""
    api.report.exactness = Exactness(False, 0.2, 1e-5, [1], "logits")
    record = json.loads(run(model, "--json").stdout)
    assert record["error"]["exit_code"] == 4 and record["exactness"]["error"] == 0.2


def test_no_outputs_are_no_agreement() -> None:
    """A comparison of nothing passes no gate, and its cosine is no number."""
    assert math.isnan(Fidelity().worst_cosine)
    assert math.isnan(Fidelity([OutputFidelity("a", 1.0, 9.0), OutputFidelity("b", math.nan, 0.0)]).worst_cosine)
    assert Fidelity([OutputFidelity("a", 1.0, 9.0), OutputFidelity("b", 0.5, 0.0)]).worst_cosine == 0.5


@pytest.mark.parametrize("position", [0, 1])
def test_gate_fails_on_a_cosine_that_is_not_a_number(api, run, model, position) -> None:
    outputs = [OutputFidelity("a", 1.0, 99.0)]
    outputs.insert(position, OutputFidelity("b", float("nan"), float("nan")))
    api.report.fidelity = Fidelity(outputs, 4)
    assert run(model, "--min-fidelity", "0.5").exit_code == 5


def test_gate_fails_when_nothing_was_measured(api, run, model) -> None:
    api.report.fidelity = Fidelity(note="no kernel for Odd")
    result = run(model, "--min-fidelity", "0.5")
    assert result.exit_code == 5
    assert "no kernel for Odd" in result.stderr


def test_a_cut_that_is_not_exact_is_never_written(api, run, model) -> None:
    api.report.exactness = Exactness(False, 0.2, 1e-5, [1], "logits")
    result = run(model)
    assert result.exit_code == 4
    assert "'logits'" in result.stderr
    assert [path.name for path in model.parent.iterdir()] == ["m.onnx"]


def test_output_equal_to_input_or_plan_equal_to_output(api, run, model) -> None:
    same = run(model, "-o", model)
    both = run(model, "-o", model.with_name("x"), "--plan", model.with_name("x"))
    over = run(model, "--plan", model)
    assert (same.exit_code, both.exit_code, over.exit_code) == (2, 2, 2)
    assert model.read_bytes() == b"model bytes"
    assert api.calls == []


def test_plan_folder_that_is_missing_is_found_before_the_work(api, run, model) -> None:
    result = run(model, "--plan", model.parent / "nowhere" / "p.json")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr
    assert api.calls == []


def test_applied_plan_is_never_overwritten(api, run, model) -> None:
    plan = model.with_name("p.json")
    plan.write_text("mine")
    assert run(model, "--apply-plan", plan, "--plan", plan).exit_code == 2
    assert run(model, "--apply-plan", plan, "-o", plan).exit_code == 2
    assert plan.read_text() == "mine"
