"""How the command is called: the default subcommand, help, version, and where output goes."""

from __future__ import annotations

import io
import json
import os
import re
import stat
import subprocess
import sys

import pytest
from rich.console import Console

from onnxprune.report import summary, tables
from onnxprune.report.console import Line, Screen
from onnxprune.report.facts import (
    AnswerFidelity,
    BudgetFacts,
    Exactness,
    Fidelity,
    Latency,
    LayerFacts,
    OutputFidelity,
    Recovery,
    Report,
    SmallerRatio,
    TargetFacts,
    Totals,
)
from onnxprune.settings import COMMANDS, GROUPS, options_of, spell


def test_model_without_subcommand_prunes(api, run, model) -> None:
    first, second, third = run(model), run("prune", model), run("--ratio", "0.2", model)
    assert [first.exit_code, second.exit_code, third.exit_code] == [0, 0, 0]
    assert first.stdout == second.stdout
    assert [call["ratio"] for call in api.calls] == [0.3, 0.3, 0.2]


def test_a_model_may_have_the_name_of_a_subcommand(api, run, model, monkeypatch) -> None:
    monkeypatch.chdir(model.parent)
    model.rename("inspect")
    assert run("./inspect").exit_code == 0
    assert (model.parent / "inspect.pruned.onnx").exists()


def test_mistyped_subcommand_is_named(api, run, model) -> None:
    result = run("inspekt", model)
    assert result.exit_code == 2
    assert result.stderr == "error: no such command 'inspekt'\nhint: Did you mean inspect?\n"


def test_no_arguments_says_how_to_start(run) -> None:
    result = run()
    assert result.exit_code == 2
    assert "no model given" in result.stderr and "onnxprune --help" in result.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_both_ways_to_call(run, flag) -> None:
    result = run(flag)
    assert result.exit_code == 0
    for part in ("onnxprune MODEL.onnx", "onnxprune COMMAND", "--ratio R", "Examples:", "inspect", "--help-all"):
        assert part in result.stdout
    assert "--input-shape" in run("inspect", flag).stdout
    assert "--min-fidelity" in run("prune", flag).stdout


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda c: " ".join(c) or "none")
def test_help_is_one_screen_with_examples_that_parse(run, command) -> None:
    result = run(*command, "--help")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and result.stderr == ""
    assert len(lines) <= 36 and max(map(len, lines)) <= 80
    assert "--help-all" in result.stdout
    examples = [line.split()[1:] for line in lines if line.startswith("  onnxprune ")]
    assert examples or not any(setting.brief for setting in options_of((command or ["prune"])[0]))
    for words in examples:  # the files are missing, the options exist
        done = run(*words)
        assert done.exit_code in (0, 2) and "no such option" not in done.stderr, done.stderr
        assert done.exit_code == 0 or "not found" in done.stderr, done.stderr


def test_the_whole_help_has_every_group_and_the_exit_codes(run) -> None:
    result = run("--help-all")
    assert result.exit_code == 0
    groups = {setting.on["prune"] for setting in options_of("prune")}
    listed = [line[:-1] for line in result.stdout.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert listed == ["Examples", *(group for group in GROUPS if group in groups), "Help", "Commands"]
    assert "Exit codes: 0 done" in result.stdout


def test_version(run) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("onnxprune ")


def test_report_of_a_cut(api, run, model) -> None:
    result = run(model)
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines == [
        "params 10.7 K → 7.92 K 25.7 % less",
        "MACs 682 K → 507 K 25.7 % less",
        "file size 43.0 kB → 32.1 kB 25.3 % less",
        "speed 1.67\N{MULTIPLICATION SIGN} as fast, 1.52 → 0.910 ms, 1 thread",
        "fidelity cosine 0.9312, signal-to-noise 8.4 dB, top-1 agreement 91.2 % (64 samples, seeded synthetic data)",
        "exact yes: largest relative difference 3.1e-07 (allowed 1e-05, batch 1 and 3)",
        "unpruned 1 of 2 layers: is a model output (1)",
        f"wrote {model.with_name('m.pruned.onnx')}",
    ]
    assert result.stderr == ""


def test_layers_are_listed_with_v(api, run, model) -> None:
    lines = [" ".join(line.split()) for line in run(model, "-v").stdout.splitlines()]
    assert lines[:3] == [
        "layer op channels params MACs removed",
        "/conv1/Conv Conv 64 → 45 9.22 K → 6.48 K 590 K → 415 K 29.7 %",
        "/head/Conv Conv 10 1.44 K 92.2 K is a model output",
    ]
    assert "latency: median ± interquartile range, 50 runs in turn, onnxruntime, 1 thread" in lines


def test_tables_in_a_pipe_fit_an_editor_and_text_is_not_wrapped(api, run, model) -> None:
    """Long names lose their front, or where they would become the same, their middle."""
    scope = "/" + "/".join(f"block{index}" for index in range(60))
    reason = "graph-output: " + "because " * 20
    api.report.layers += [
        LayerFacts(f"{scope}/conv8/Conv", "Conv", 8, 4, 64, 32, 64, 32, ""),
        LayerFacts(f"/first{scope}/conv2/Conv", "Conv", 8, 4, 64, 32, 64, 32, reason),
        LayerFacts(f"/other{scope}/conv2/Conv", "Conv", 8, 4, 64, 32, 64, 32, ""),
    ]
    api.report.warnings.append("many words " * 40)
    done = run(model, "-v")
    assert max(len(line) for line in done.stdout.splitlines() if "latency" not in line) <= 120
    rows = [line.split()[0] for line in done.stdout.splitlines() if "conv8/Conv" in line or "conv2/Conv" in line]
    assert rows[0].startswith("\N{HORIZONTAL ELLIPSIS}") and rows[0].endswith("/conv8/Conv")
    assert rows[1].startswith("/first/block0") and rows[2].startswith("/other/block0")
    assert ("many words " * 40).strip() in done.stderr


@pytest.mark.parametrize("count", [2, 5])
def test_layers_of_the_same_name_are_told_apart(api, run, model, count) -> None:
    api.report.layers = [LayerFacts("/Conv_16", "Conv", 8, 4, 64, 32, 64, 32, "") for _ in range(count)]
    shown = run(model, "-v").stdout
    assert all(f"/Conv_16 ({number}) " in shown for number in range(1, count + 1))


def test_a_table_at_eighty_columns_breaks_no_word_and_no_figure() -> None:
    names = [f"/stages/stages.{i}/body/body.{i % 2}/body.{i % 2}.0/Conv" for i in range(6)]
    facts = [LayerFacts(name, "Conv", 48, 32, 20700, 4610, 664_000, 147_000, "") for name in names]
    text = io.StringIO()
    Console(file=text, width=80).print(tables.layers(facts, name_width=1000))
    lines = text.getvalue().splitlines()
    assert len(lines) == 7 and max(map(len, lines)) <= 80
    assert all(re.search(r" Conv +48 .*77\.. %$", line.rstrip()) for line in lines[1:])
    assert len({line.split()[0] for line in lines}) == 7


def test_arguments_in_a_summary_are_spelled_as_the_reader_writes_them() -> None:
    report = Report(recovery=Recovery("none", "no data was given"))
    assert "give data to recover accuracy, or recover='datafree'" in summary.text(report)
    spelled = Screen.open(spell=spell("prune")).spelled
    shown = [line.text.plain for line in summary.summary(report, name_width=80, spelled=spelled)]
    assert any("give --data to recover accuracy, or --recover datafree" in line for line in shown)


def test_the_next_step_is_one_that_helps() -> None:
    lost = Fidelity([], source="d.npz", points=20.0, answers=[AnswerFidelity(["y"], "classes", 20.0, "lost", 0.8)])
    report = Report(fidelity=lost, recovery=Recovery("full", "data was given", samples=18, aside=2))
    report.settings, report.smaller = {"scope": "global"}, SmallerRatio(0.07, 1.2)
    step = report.verdict.next_step
    assert "more data than 20 samples" in step and "0.07" not in step
    report.recovery.samples = 400
    assert "max_drop=2" in report.verdict.next_step
    report.smaller.points = 98.0
    assert "0.07 keeps 98.0" in report.verdict.next_step
    target = TargetFacts("macs", "macs=0.5", 1.0, 2.0, 1.0)
    report = Report(fidelity=lost, recovery=report.recovery, budget=BudgetFacts([target]))
    assert report.verdict.next_step == "a larger target"
    report.budget.can_factorize = True
    assert report.verdict.next_step.startswith("factorize layers as well (factorize)")


def test_json_takes_no_file(run, model) -> None:
    result = run(model, "--json", "out.json")
    assert result.exit_code == 2 and "write '--json > FILE'" in result.stderr


@pytest.mark.newest_runtime  # older releases of rich keep styles in other spans
def test_what_grows_or_slows_down_is_not_green() -> None:
    """Between 0.96 and 1.05 times as fast, without pairs of runs, nothing is said."""
    for speed, colour in ((0.58, "yellow"), (0.99, None), (1.7, "bold green")):
        report = Report(totals=Totals(100, 120, 100, 50), latency=Latency(speed, 1.0, 0.0, 0.0, 20, 1))
        params, macs, fast = (
            line.text for line in summary.summary(report, name_width=80)[:3] if isinstance(line, Line)
        )
        assert [params.spans[-1].style, macs.spans[-1].style] == ["yellow", "bold green"]
        assert (colour in [span.style for span in fast.spans]) if colour else len(fast.spans) == 1


def test_a_line_wraps_below_its_text() -> None:
    report = Report(totals=Totals(9, 8), exactness=Exactness(True, 1e-7, 1e-5, [1, 3], "y"))
    lines = summary.text(report, width=50).splitlines()
    assert max(map(len, lines)) <= 50 and lines[-1].startswith(" " * 10) and lines[-1][10] != " "


def test_the_summary_counts_layers_that_verbose_lists(api, run, model) -> None:
    api.report.layers += [LayerFacts(f"/n{i}", "MatMul", 8, 8, 64, 64, 64, 64, "normalised: /ln") for i in range(40)]
    short, full = run(model).stdout, run(model, "-v").stdout
    assert "/n7" not in short and len(short.splitlines()) <= 12
    assert "unpruned  41 of 42 layers: normalised over these channels (40), is a model output (1)" in short
    assert "/n7 " in full and "untouched" not in full


def test_a_layer_of_one_channel_says_so(api, run, model) -> None:
    api.report.layers.append(LayerFacts("/one/Conv", "Conv", 1, 1, 9, 9, 9, 9))
    assert "has one channel" in run(model).stdout


def test_layer_names_are_not_markup(api, run, model) -> None:
    api.report.layers[0].name = "/a[bold]/:smile:/b[/red]"
    assert "/a[bold]/:smile:/b[/red]" in run(model, "-v").stdout


def test_quiet_says_nothing(api, run, model) -> None:
    api.report.warnings = ["odd"]
    result = run(model, "-q")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert api.calls[0]["latency"] is False
    assert model.with_name("m.pruned.onnx").exists()


def test_warnings_go_to_stderr(api, run, model) -> None:
    api.report.warnings = ["NaN in weight 'w'"]
    result = run(model)
    assert result.stderr == "warning: NaN in weight 'w'\n"
    assert "NaN" not in result.stdout


def test_json_is_one_object_and_holds_no_number_that_json_has_not(api, run, model) -> None:
    api.report.fidelity.outputs.append(OutputFidelity("same", 1.0, float("inf")))
    result = run(model, "--json", "--plan", model.with_name("p.json"))
    record = json.loads(result.stdout, parse_constant=pytest.fail)
    assert record["output"] == str(model.with_name("m.pruned.onnx"))
    assert record["plan"] == str(model.with_name("p.json"))
    assert record["totals"]["params_after"] == 7920
    assert record["layers"][0]["channels_after"] == 45
    assert record["fidelity"]["outputs"][1]["snr_db"] is None
    assert record["exactness"]["passed"] is True
    assert result.stderr == ""


def test_json_with_verbose_keeps_stdout_clean(api, run, model) -> None:
    result = run(model, "--json", "-v")
    assert json.loads(result.stdout)["totals"]["params_before"] == 10656
    assert "params" in result.stderr and "analyse ..." in result.stderr


def test_several_outputs_make_a_line_and_with_v_a_table_with_the_worst_first(api, run, model) -> None:
    api.report.fidelity.outputs += [OutputFidelity(f"o{i}", 0.99 + i / 1000, float("inf")) for i in range(9)]
    short, full = run(model).stdout, run(model, "-v").stdout
    assert "worst cosine 0.9312 over 10 outputs" in short and "o0" not in short
    assert full.index("logits") < full.index("  o0") < full.index("  o8")


def test_unasked_checks_are_said_to_be_unasked(api, run, model) -> None:
    api.report.exactness.passed, api.report.exactness.note = None, "--no-validate"
    api.report.fidelity = api.report.latency = None
    text = run(model, "--no-validate").stdout
    assert "not checked: --no-validate" in text and "not measured" in text
    assert "speed" not in text


def test_plan_is_written_with_the_rights_of_a_new_file(api, run, model) -> None:
    plan, other = model.with_name("p.json"), model.with_name("other")
    other.write_text("")
    result = run(model, "--plan", plan)
    assert json.loads(plan.read_text()) == {"version": 1}
    assert stat.S_IMODE(plan.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    assert f"plan      {plan}" in result.stdout


def test_explain_tells_why_in_plain_words(api, run, model) -> None:
    text = run(model, "--explain", "--layer", "/conv1/*=0.5").stdout
    assert "These channels are a model output, and programs that run the model depend on its shape." in text
    assert "/head/Conv: 0 of 10 channels removed, 3 asked" in text
    assert "/conv1/Conv: 19 of 64 channels removed, 32 asked" in text
    assert "vendor.Odd" in text and "no-rule: " in text
    assert "64 → 45" in text.split("Layers pruned less than asked")[0]


def test_explain_says_so_when_every_layer_lost_what_was_asked(api, run, model) -> None:
    del api.report.layers[1]
    assert "every layer was pruned as asked" in run(model, "--explain").stdout


def test_explain_names_steps_and_rounding(api, run, model) -> None:
    api.report.groups[0]["steps"] = 4
    assert "4 equal steps only" in run(model, "--explain", "--ratio", "0.4").stdout
    assert "allows multiples of 16 only" in run(model, "--explain", "--ratio", "0.4", "--round-to", "16").stdout


def test_inspect_shows_groups_barriers_and_unlocks(api, run, model) -> None:
    result = run("inspect", model)
    assert result.exit_code == 0
    for part in (
        "Prunable groups (1)",
        "1 group cannot be pruned: is a model output (1)",
        "Barriers (138 channels cannot be removed)",
    ):
        assert part in result.stdout
    unlock = result.stdout.split("Operators that block most channels")[1]
    assert unlock.split() == ["channels", "operator", "128", "vendor.Odd"]
    assert "logits" in run("inspect", model, "-v").stdout


def test_kernels_are_not_counted_as_channels(api, run, model) -> None:
    kernel = {
        "code": "spatial",
        "node": "/conv1/Conv",
        "op": "Conv",
        "detail": "the kernel keeps its size",
        "channels": 6,
    }
    api.report.barriers += [kernel, {**kernel, "node": "/reduce", "detail": "mean over time", "channels": 5}]
    text = run("inspect", model).stdout
    assert "Barriers (143 channels cannot be removed)" in text
    assert "1 kernel keeps its size" in text and "/reduce" in text


def test_inspect_json(api, run, model) -> None:
    record = json.loads(run("inspect", model, "--json").stdout)
    assert record["unlocks"] == [["vendor.Odd", 128]]
    assert [barrier["code"] for barrier in record["barriers"]] == ["graph-output", "no-rule"]
    assert record["groups"][0]["size"] == 64 and record["layers"][0]["macs_before"] == 589824


def test_inspect_passes_its_options_on(api, run, model) -> None:
    run("inspect", model, "--approximate", "--input-shape", "x=1,2")
    (call,) = api.calls
    assert (call["model"], call["input_shapes"], call["approximate"]) == (model, {"x": (1, 2)}, True)


def test_a_closed_pipe_ends_quietly() -> None:
    code = (
        "import sys; from onnxprune.report.console import Screen; sys.stdin.readline(); screen = Screen.open(); "
        "screen.show('x' * 100_000); screen.emit({'a': 1}); screen.show('more'); screen.warn('still here')"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stderr.read() == "warning: still here\n"
    assert process.returncode == 0


def test_a_stream_that_knows_only_ascii_gets_ascii(tmp_path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code = (
        "from onnxprune.report.console import Screen; from onnxprune.report import numbers; "
        "Screen.open().show(numbers.change('1', '2'), 'a \\u00b1 b \\u00d7 c \\u2026 \\u4e2d')"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "1 -> 2\na +/- b x c ... ?\n"


def test_a_speedup_is_said_with_its_interval(api, run, model) -> None:
    api.report.latency.paired, api.report.latency.speedup_interval = 1.6, (1.52, 1.68)
    shown = run(model)
    assert "1.60\N{MULTIPLICATION SIGN} as fast (95 % interval 1.52 to 1.68)" in shown.stdout
    told = json.loads(run(model, "--json").stdout)["latency"]
    assert (told["speedup"], told["speedup_interval"], told["speed_verdict"]) == (1.6, [1.52, 1.68], "faster")
    api.report.latency.speedup_interval = (0.4, 2.1)
    assert "no difference measured: 1.60\N{MULTIPLICATION SIGN} (95 % interval 0.40 to 2.10)" in run(model).stdout


def test_a_cut_that_removes_nothing_is_no_silent_success(api, run, model) -> None:
    sums = api.report.totals
    sums.params_after = sums.params_before
    assert "no channel was removed" not in run(model, "--ratio", "0").stderr
    result = run(model, "--json", "--ratio", "0.001")
    assert result.exit_code == 0
    assert "warning: no channel was removed" in result.stderr
    assert "no channel was removed" in json.loads(result.stdout)["warnings"][0]


@pytest.mark.parametrize("flags", [("-q", "-v"), ("-qv",), ("--quiet", "-vv"), ("--verbose", "-q")])
def test_quiet_and_verbose_contradict_each_other(api, run, model, flags) -> None:
    done = run(model, *flags)
    assert done.exit_code == 2 and "--quiet and --verbose" in done.stderr and not api.calls
