"""Stages of a run: their times, the share of work that is done, interrupts."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from build import Net

import onnxprune as op
from onnxprune.pipeline import EFFORTS, Stages, WorkShare, uninterrupted
from onnxprune.search.budget import measuring_seconds, trials_of


def test_shares_follow_the_work_known_ahead_and_never_fall() -> None:
    told: list[float] = []
    share = WorkShare(told.append, {"a": 1.0, "b": 3.0, "c": 0.0})
    for name, fraction in (("a", 0.5), ("a", 1.0), ("b", 0.5), ("a", 1.0), ("b", 1.0), ("c", 1.0)):
        share.part(name, fraction)
    assert told == [0.125, 0.25, 0.625, 1.0]


def test_a_budget_tells_how_far_it_is() -> None:
    """The bar of a budget rises with its parts, within a recovery too, and times go into the report."""
    net = Net(17)
    h = net.op("Relu", net.conv(net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), 3, 16)), 16, 16))
    model = net.model(net.linear(net.op("Flatten", net.op("GlobalAveragePool", h)), 16, 5))
    data = np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32)
    told: list[float] = []
    result = op.prune(
        model,
        target="macs=0.6",
        round_to=1,
        trials=2,
        data=data,
        latency=False,
        progress=lambda stage, share: told.append(share) if stage == "budget" else None,
    )
    assert told == sorted(told) and told[0] == 0.0 and told[-1] == 1.0
    assert max(np.diff(told)) < 0.5 and len(told) > 8
    timings = result.report.timings
    assert timings["budget"].seconds >= timings["measure"].seconds > 0 and timings["budget"].processor_seconds > 0
    assert result.report.seconds == {name: time.seconds for name, time in timings.items()}
    assert result.report.to_dict()["timings"]["budget"].keys() == {"seconds", "processor_seconds"}
    assert not result.report.interrupted


def test_an_interrupt_ends_a_block_that_has_an_answer() -> None:
    stages, done = Stages(), []
    with stages.until_interrupted(lambda: "after one" if done else ""):
        done.append(1)
        raise KeyboardInterrupt
    assert stages.interrupted == "after one"


@pytest.mark.parametrize(("is_trial", "number", "answer"), [(True, 2, "x"), (False, 15, "x"), (False, 2, "")])
def test_other_interrupts_go_on(is_trial: bool, number: int, answer: str) -> None:
    """Those of a trial, those that end a program at once, and those without an answer."""
    stop = KeyboardInterrupt()
    stop.number = number  # type: ignore[attr-defined]
    stages = Stages(is_trial=is_trial)
    with pytest.raises(KeyboardInterrupt), stages.until_interrupted(lambda: answer):
        raise stop
    assert not stages.interrupted


def test_an_interrupt_waits_for_the_end_of_a_block() -> None:
    done = []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever another test has left
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("behind it")
    assert done == ["behind it"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_quick_budget_says_what_it_left_out() -> None:
    net = Net(17)
    h = net.op("Relu", net.conv(net.op("Relu", net.conv(net.input("x", ["N", 3, 8, 8]), 3, 16)), 16, 16))
    model = net.model(net.linear(net.op("Flatten", net.op("GlobalAveragePool", h)), 16, 5))
    data = np.random.default_rng(0).standard_normal((96, 3, 8, 8)).astype(np.float32)
    quick, normal = (
        op.prune(model, target="macs=0.6", round_to=1, trials=0, data=data, latency=False, effort=effort).report
        for effort in ("quick", "normal")
    )
    assert quick.settings["effort"] == "quick" and normal.settings["effort"] == "normal"
    assert "recovery from more than the first 64 of 96 samples" in quick.left_out and not normal.left_out
    assert any("other candidates" in text for text in quick.left_out)
    assert quick.budget is not None and normal.budget is not None
    assert len(quick.budget.answers) == 1 < len(normal.budget.answers)
    assert quick.recovery.samples + quick.recovery.aside == 64
    rows = [max(r.rows for r in report.repairs) for report in (quick, normal)]
    assert rows[0] <= rows[1]


def test_bounds_grow_with_the_effort() -> None:
    quick, normal, thorough = (EFFORTS[name] for name in ("quick", "normal", "thorough"))
    for macs in (1e7, 1e9, 1e10):
        assert trials_of(macs, normal) <= trials_of(macs, thorough)
        assert measuring_seconds(macs, quick) < measuring_seconds(macs, normal) < measuring_seconds(macs, thorough)
    with pytest.raises(op.UsageError, match="effort"):
        op.prune("m.onnx", effort="fast")
