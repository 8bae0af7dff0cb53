"""Progress as a log, a terminal and a notebook show it."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from build import Net
from click.testing import CliRunner
from rich.console import Console

import onnxprune as op
from onnxprune.cli import main
from onnxprune.report import progress
from onnxprune.report.progress import Lines, duration, time_left


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def small(tmp_path: Path) -> Path:
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 16))
    path = tmp_path / "small.onnx"
    path.write_bytes(net.model(net.conv(x, 16, 8)).SerializeToString())
    return path


def test_a_log_has_a_line_per_stage_and_no_frames(small: Path) -> None:
    arguments = [sys.executable, "-m", "onnxprune", str(small), "--ratio", "0.5"]
    for forced in ({}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}):
        done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **forced}, check=True)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)
        stages = [line for line in plain.splitlines() if line.endswith(" ...")]
        assert stages[0] == "analyze ..." and len(stages) == len(set(stages)) >= 3
        assert "\r" not in plain and "\x1b" not in plain and "\u2501" not in plain
        assert "..." not in done.stdout


def test_quiet_says_nothing_and_json_keeps_stdout_clean(small: Path) -> None:
    quiet = CliRunner().invoke(main, [str(small), "-q"])
    assert (quiet.stdout, quiet.stderr) == ("", "")
    told = CliRunner().invoke(main, [str(small), "--json"])
    assert told.stdout.startswith("{") and "analyze ..." in told.stderr


def test_lines_say_share_and_time_left() -> None:
    clock, written = Clock(), list[str]()
    tell = Lines(written.append, clock)
    tell.tick()
    tell("budget", 0.0)
    clock.now = 10.0
    tell.tick()
    tell("budget", 0.25)
    tell("recover", 0.0)
    tell("recover", 0.5)
    tell.tick()
    tell("recover", 1.0)
    clock.now = 100.0
    tell("budget", 0.5)
    tell.tick()
    tell("budget", 1.0)
    tell.tick()
    assert written == [
        "budget ...",
        "budget: 0 %, 10 s so far",
        "recover ...",
        "budget: 25 %, 10 s so far, about 30 s left (recover 50 %)",
        "budget: 50 %, 1 min 40 s so far, about 1 min 40 s left",
    ]


def test_a_stage_that_begins_again_has_a_clock_of_its_own_and_no_second_line() -> None:
    clock, written = Clock(), list[str]()
    tell = Lines(written.append, clock)
    for begin in (0.0, 50.0):
        clock.now = begin
        tell("exact", 0.0)
        clock.now = begin + 10
        tell("exact", 0.5)
        tell.tick()
        tell("exact", 1.0)
    assert written == ["exact ...", *["exact: 50 %, 10 s so far, about 10 s left"] * 2]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("whole", [3.0, 600.0])
def test_the_time_left_is_right_where_the_share_is_linear(share: float, whole: float) -> None:
    left = time_left(whole * share, share)
    assert left is not None and left == pytest.approx(whole * (1 - share))
    assert time_left(5.0, 0.0) is None and time_left(0.5, 0.0006) is None  # the first steps are of any speed


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.4, 60, 3599, 3700)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "59 min 59 s",
        "1 h 01 min",
    ]


def test_silent_stages_are_told_of_all_the_same_and_the_thread_ends() -> None:
    written: list[str] = []
    with progress.lines(written.append, interval=0.02) as tell:
        tell("profile", 0.0)
        limit = time.monotonic() + 5
        while len(written) < 3 and time.monotonic() < limit:
            time.sleep(0.01)
    count = len(written)
    assert count >= 3 and written[1].startswith("profile: 0 %")
    time.sleep(0.1)
    assert len(written) == count


def test_bars_on_a_terminal_show_the_time_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress.bars(console) as tell:
        tell("recover", 0.0)
        time.sleep(0.02)
        tell("recover", 0.5)
        time.sleep(0.15)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "recover" in text and "50%" in text and " s left" in text


def test_a_notebook_shows_progress_unless_told_otherwise(small: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    op.prune(small, latency=False)
    shown = capsys.readouterr().err
    assert "analyze ..." in shown.splitlines()
    told: list[str] = []
    op.prune(small, latency=False, progress=lambda stage, fraction: told.append(stage))
    assert capsys.readouterr().err == "" and "analyze" in told
    op.analyze(small)
    monkeypatch.delitem(sys.modules, "ipykernel")
    op.prune(small, latency=False)
    assert capsys.readouterr().err == ""
