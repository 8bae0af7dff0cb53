"""Completion as shells ask for it: the words of the line and the number of the one at the cursor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from click.testing import CliRunner

from onnxprune.cli import main

Complete = Callable[..., set[str]]


@pytest.fixture
def complete() -> Complete:
    """What fish is offered for a line, the last word of which is being typed: {kind,value}."""

    def ask(*words: str) -> set[str]:
        line = " ".join(["onnxprune", *words[:-1]])
        env = {"_ONNXPRUNE_COMPLETE": "fish_complete", "COMP_WORDS": line, "COMP_CWORD": words[-1]}
        result = CliRunner().invoke(main, env=env, prog_name="onnxprune")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert result.stderr == ""
        return {line.partition("\t")[0] for line in result.stdout.splitlines() if line}

    return ask


def test_options_complete_without_and_with_the_subcommand(complete: Complete) -> None:
    assert complete("model.onnx", "--cri") == {"plain,--criterion"}
    assert complete("prune", "model.onnx", "--cri") == {"plain,--criterion"}
    assert complete("--rat") == {"plain,--ratio"}
    assert {"plain,--help", "plain,--help-all"} <= complete("--help")
    assert complete("inspect", "model.onnx", "--cri") == set()
    assert complete("--ratio", "0.5", "--outp") == {"plain,--output", "plain,--output-kind"}


def test_the_first_word_is_a_command_or_a_file(complete: Complete) -> None:
    assert {"plain,inspect", "file,ins"} == complete("ins")
    assert "plain,sweep" in complete("")
    assert complete("prune", "mod") == {"file,mod"}
    assert complete("model.onnx", "--data", "d") == {"file,d"}
    assert complete("model.onnx", "--cache", "d") == {"dir,d"}


def test_values_complete(complete: Complete) -> None:
    assert complete("model.onnx", "--scope", "") == {
        f"plain,{w}" for w in ("auto", "local", "global", "isomorphic", "slamp")
    }
    assert complete("model.onnx", "--criterion", "wa") == {"plain,wanda"}
    assert {"plain,latency=", "plain,macs="} <= complete("model.onnx", "--target", "")
    assert {"plain,hexagon", "file,hex"} == complete("m.onnx", "--device", "hex")
    assert {"plain,measure", "file,"} == complete("m.onnx", "--sensitivity", "")


def test_a_mistyped_command_is_no_error(complete: Complete) -> None:
    assert "plain,inspect" in complete("inspekt", "model.onnx", "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])  # bash is asked for its version first
def test_shells_get_a_script(shell: str) -> None:
    result = CliRunner().invoke(main, env={"_ONNXPRUNE_COMPLETE": f"{shell}_source"}, prog_name="onnxprune")
    assert result.exit_code == 0 and "_ONNXPRUNE_COMPLETE" in result.stdout


def test_bash_completes_in_the_middle_of_a_line() -> None:
    env = {"_ONNXPRUNE_COMPLETE": "bash_complete", "COMP_WORDS": "onnxprune m.onnx --cri -o x", "COMP_CWORD": "2"}
    result = CliRunner().invoke(main, env=env, prog_name="onnxprune")
    assert result.stdout.splitlines() == ["plain,--criterion"]
