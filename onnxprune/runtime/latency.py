"""Latency of two models, measured against each other on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from onnxprune.errors import ModelError
from onnxprune.report.facts import Latency
from onnxprune.runtime.sessions import Feed, Progress, open_session, prepare, run

_WARM_UP = 2
_FEWEST = 5


def latency(
    before: Path | bytes,
    after: Path | bytes,
    feeds: Sequence[Feed],
    *,
    runs: int = 20,
    threads: int | None = None,
    budget_s: float = 10.0,
    progress: Progress | None = None,
) -> Latency:
    """Median milliseconds per run of two models with all graph optimisations, and their interquartile range.

    The models run in turn, the first of each pair alternating, after a warm-up, on the first of ``feeds``; drift of the
    machine then meets both alike. Measuring stops after ``runs`` pairs, or once ``budget_s`` seconds are spent and five
    pairs are measured.

    Args:
        threads: threads inside an operator; None takes all processors this process may use.

    Raises:
        ModelError: a model does not load or run, or there is no input to run on.
    """
    if not feeds:
        raise ModelError("latency needs at least one input to run on")
    threads = threads or _processors()
    calls: list[Callable[[], object]] = []
    for model in (before, after):
        session = open_session(model, threads=threads)
        run(session, feeds[0])  # the first run allocates; it also turns a failing model into a typed error
        calls.append(prepare(session, feeds[0]))
    start = time.perf_counter()
    for _ in range(_WARM_UP - 1):
        for call in calls:
            call()
    times: tuple[list[float], list[float]] = ([], [])
    wanted = max(runs, _FEWEST)
    for index in range(wanted):
        if index >= _FEWEST and time.perf_counter() - start > budget_s:
            break
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            times[which].append(_timed(calls[which]))
        if progress:
            progress("latency", (index + 1) / wanted)
    (before_ms, before_spread), (after_ms, after_spread) = (_summary(t) for t in times)
    return Latency(before_ms, after_ms, before_spread, after_spread, len(times[0]), threads)


def _processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _summary(times: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, middle, high = np.percentile(times, [25, 50, 75])
    return float(middle), float(high - low)
