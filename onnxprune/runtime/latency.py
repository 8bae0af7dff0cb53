"""Latency of models, measured against each other on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from onnxprune.errors import ModelError
from onnxprune.report.facts import Latency
from onnxprune.runtime.device import CPU, Device, processors
from onnxprune.runtime.sessions import Feed, Progress, open_session, prepare, run

_WARM_UP = 2
_FEWEST = 5
# Seconds that a clock may be coarse by.
_FINE = 1e-6


def latency(
    before: Path | bytes,
    after: Path | bytes,
    feeds: Sequence[Feed],
    *,
    runs: int = 20,
    threads: int | None = None,
    providers: Sequence[str] = (CPU,),
    budget_s: float = 10.0,
    steady: bool = False,
    progress: Progress | None = None,
) -> Latency:
    """Median milliseconds per run of two models with all graph optimisations, and their interquartile range.

    The models run in turn, see :func:`in_turn`.

    Args:
        threads: threads inside an operator; None takes all processors this process may use.
        steady: see :func:`in_turn`.

    Raises:
        ModelError: a model does not load or run, or there is no input to run on.
    """
    device = Device(tuple(providers), threads or processors())
    times = in_turn([before, after], feeds, device, runs=runs, budget_s=budget_s, steady=steady, progress=progress)
    (before_ms, before_spread), (after_ms, after_spread) = (_summary(t) for t in times)
    return Latency(before_ms, after_ms, before_spread, after_spread, len(times[0]), device.threads)


def in_turn(
    models: Sequence[Path | bytes],
    feeds: Sequence[Feed],
    device: Device,
    *,
    runs: int = 20,
    budget_s: float = 10.0,
    steady: bool = False,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Milliseconds of every run of several models on the first of ``feeds``.

    They run in turn, in one order and then the other, after a warm-up; drift of the machine then meets all alike.
    Measuring stops after ``runs`` rounds, or once ``budget_s`` seconds are spent and five rounds are done.

    Args:
        steady: where one thread of the CPU runs the model, take the time that it works: waiting for other programs on
            the machine is left out. With more threads there is no such clock.

    Raises:
        ModelError: a model does not load or run, or there is no input to run on.
    """
    if not feeds:
        raise ModelError("latency needs at least one input to run on")
    clock = _own_time() if steady and device == Device() else time.perf_counter
    calls: list[Callable[[], object]] = []
    for model in models:
        session = open_session(model, threads=device.threads, providers=device.providers)
        run(session, feeds[0])  # the first run allocates; it also turns a failing model into a typed error
        calls.append(prepare(session, feeds[0]))
    start = time.perf_counter()
    for _ in range(_WARM_UP - 1):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    wanted = max(runs, _FEWEST)
    for index in range(wanted):
        if index >= _FEWEST and time.perf_counter() - start > budget_s:
            break
        for which in range(len(calls)) if index % 2 == 0 else reversed(range(len(calls))):
            times[which].append(_timed(calls[which], clock))
        if progress:
            progress("latency", (index + 1) / wanted)
    return times


def _timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Milliseconds of one call."""
    start = clock()
    call()
    return (clock() - start) * 1e3


def _own_time() -> Callable[[], float]:
    """A clock of this thread's work where the system has a fine one, else the wall's."""
    fine = time.get_clock_info("thread_time").resolution <= _FINE
    return time.thread_time if fine else time.perf_counter


def _summary(times: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, middle, high = np.percentile(times, [25, 50, 75])
    return float(middle), float(high - low)
