"""Latency: models measured against each other, and seconds per node."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from onnxprune.errors import ModelError, UsageError, argument, nearest
from onnxprune.io.files import workspace
from onnxprune.report.facts import Latency
from onnxprune.runtime.sessions import Feed, open_session, prepare, run
from onnxprune.settings import checked

CPU = "CPUExecutionProvider"
_SUFFIX = "ExecutionProvider"
_PACKAGES = {
    "cuda": "onnxruntime-gpu",
    "tensorrt": "onnxruntime-gpu",
    "nvtensorrtrtx": "onnxruntime-trt-rtx",
    "openvino": "onnxruntime-openvino",
    "dml": "onnxruntime-directml",
    "qnn": "onnxruntime-qnn",
    "rocm": "onnxruntime-rocm",
    "migraphx": "onnxruntime-migraphx",
    "cann": "onnxruntime-cann",
    "webgpu": "onnxruntime-webgpu",
    "coreml": "onnxruntime",
}
"""The package that brings a provider."""
_PLATFORMS = {"coreml": "macOS"}
_INSTEAD = "pip uninstall onnxruntime && pip install {}"


@dataclass(frozen=True, slots=True)
class Device:
    """Device on which time is measured.

    Attributes:
        providers: of onnxruntime, in order of preference.
        threads: inside an operator.
    """

    providers: tuple[str, ...] = (CPU,)
    threads: int = 1

    def facts(self) -> dict[str, str | int]:
        """Return the conditions, besides the model, on which a measured time depends."""
        return {
            "machine": platform.machine(),
            "processor": _processor(),
            "onnxruntime": ort.__version__,
            "providers": ",".join(self.providers),
            "threads": self.threads,
        }


def device(providers: Sequence[str] | None = None, threads: int | None = None) -> Device:
    """Make a device from the user's words: ``cuda`` stands for ``CUDAExecutionProvider``; the CPU is appended.

    Args:
        providers: None for the CPU.
        threads: None for all processors that this process may use.

    Raises:
        UsageError: this onnxruntime has no such provider, or threads is no whole number from 1.
    """
    checked("threads", threads)
    checked("providers", providers)
    known = {name.removesuffix(_SUFFIX).lower(): name for name in ort.get_available_providers()}
    names = []
    for requested in providers or ():
        name = known.get(requested.strip().removesuffix(_SUFFIX).lower())
        if name is None:
            raise _no_provider(requested, known)
        names.append(name)
    return Device(tuple(dict.fromkeys([*names, CPU])), threads or processors())


def _no_provider(requested: str, known: Mapping[str, str]) -> UsageError:
    """Return the error for a missing provider: the package that brings it, else the nearest name."""
    message = f"{argument('providers')}: this onnxruntime has no provider {requested!r}"
    name = requested.strip().removesuffix(_SUFFIX).lower()
    all_names = {other.removesuffix(_SUFFIX).lower() for other in ort.get_all_providers()} | _PACKAGES.keys()
    if name not in all_names:
        return UsageError(message, hint=nearest(name, all_names))
    here = f"This one has {', '.join(sorted(known))}."
    package = _PACKAGES.get(name)
    if package is None:
        return UsageError(message, hint=f"{here} It needs a build of onnxruntime with this provider.")
    if package == "onnxruntime":
        return UsageError(message, hint=f"{here} The provider comes with onnxruntime on {_PLATFORMS[name]} only.")
    return UsageError(message, hint=f"{here} Install {package} in place of onnxruntime: {_INSTEAD.format(package)}.")


def processors() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """Return the processor's name as the system gives it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.node()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware", "cpu model"):
            return value.strip()
    return platform.processor() or platform.node()


_PROFILE_SUFFIX = "_kernel_time"
# Operators whose time holds that of the nodes in their bodies.
_HOLDING = {"If", "Loop", "Scan"}


@dataclass(frozen=True, slots=True)
class NodeTime:
    """Seconds per run of one node as onnxruntime ran it: ``name`` and ``op`` after its own fusions."""

    name: str
    op: str
    seconds: float


def profile(
    model: Path | bytes,
    feeds: Sequence[Feed],
    *,
    runs: int = 7,
    device: Device | None = None,
    share: float | None = None,
) -> list[NodeTime]:
    """Seconds of every node, with all graph optimisations; the first run is not counted.

    Args:
        model: path, or the serialised model.
        feeds: the first one is run.
        runs: number of runs.
        device: None for one thread of the CPU.
        share: the mean of so many of the runs, the shortest ones, is given in place of the median; a disturbance
            only makes a run longer, and a mean is finer than the clock.

    Raises:
        ModelError: the model does not load or run.
    """
    if not feeds:
        raise ModelError("a profile needs at least one input to run on")
    device = device or Device()
    with workspace() as folder:
        prefix = str(folder / "profile")
        session = open_session(model, threads=device.threads, spin=True, providers=device.providers, profile=prefix)
        try:
            run(session, feeds[0])
            call = prepare(session, feeds[0])
            for _ in range(runs):
                call()
        finally:
            written = Path(session.end_profiling())
        events = json.loads(written.read_text())
    return _per_node(events, runs, share)


def _own_seconds(events: Sequence[tuple[float, float, tuple[str, str]]]) -> list[tuple[tuple[str, str], float]]:
    """Seconds of every event (start, microseconds, key), in order; of what holds others without theirs."""
    result = [(key, duration) for _, duration, key in events]
    if any(op in _HOLDING for _, _, (_, op) in events):
        around: list[tuple[float, int]] = []
        for number in sorted(range(len(events)), key=lambda k: (events[k][0], -events[k][1])):
            start, duration, (_, op) = events[number]
            while around and around[-1][0] < start + duration:
                around.pop()
            if around:
                key, rest_of_outer = result[around[-1][1]]
                result[around[-1][1]] = key, rest_of_outer - duration
            if op in _HOLDING:
                around.append((start + duration, number))
    return [(key, max(rest_of_outer, 0.0) * 1e-6) for key, rest_of_outer in result]


def _per_node(events: Sequence[dict[str, object]], runs: int, share: float | None) -> list[NodeTime]:
    times: dict[tuple[str, str], list[float]] = {}
    nodes = []
    for event in events:
        name, arguments = str(event.get("name", "")), event.get("args")
        if event.get("cat") == "Node" and name.endswith(_PROFILE_SUFFIX) and isinstance(arguments, dict):
            key = name.removesuffix(_PROFILE_SUFFIX), str(arguments.get("op_name", ""))
            nodes.append((float(str(event["ts"])), float(str(event["dur"])), key))
    for key, seconds in _own_seconds(nodes):
        times.setdefault(key, []).append(seconds)
    result = []
    for (name, op), seconds_of_runs in times.items():
        # A node in a loop runs several times per run; names may repeat, too.
        each = max(1, len(seconds_of_runs) // (runs + 1))
        usable = len(seconds_of_runs) // each * each
        sums = np.asarray(seconds_of_runs[:usable]).reshape(-1, each).sum(axis=1)
        counted = sums[1:] if sums.size > 1 else sums
        shortest = np.sort(counted)[: max(1, round((share or 1.0) * counted.size))]
        result.append(NodeTime(name, op, float(np.median(counted) if share is None else shortest.mean())))
    return result


_WARM_UP = 2
_MIN_ROUNDS, _MAX_ROUNDS = 5, 400
# Seconds that a clock may be coarse by.
_FINE = 1e-6


def latency(
    before: Path | bytes,
    after: Path | bytes,
    feeds: Sequence[Feed],
    *,
    runs: int = 20,
    device: Device | None = None,
    budget_s: float = 10.0,
    steady: bool = False,
    least_s: float = 0.0,
) -> Latency:
    """Measure the median milliseconds per run of two models with all graph optimisations, and how they compare.

    The models run in turn, see :func:`in_turn`. Every round is a pair: a disturbance that outlasts a run
    disturbs both, so that the ratio of a pair says more than both medians.

    Args:
        before: the first model, a path or bytes.
        after: the second model, a path or bytes.
        feeds: calls of both models, of which the first is run.
        runs: largest number of rounds, 1 or more.
        device: providers and number of threads; None: the CPU with all processors that this process may use.
        budget_s: seconds after which measuring stops once five rounds are done.
        steady: see :func:`in_turn`.
        least_s: see :func:`in_turn`.

    Raises:
        ModelError: a model does not load or run, or there is no input to run on.
    """
    device = Device(threads=processors()) if device is None else device
    times = in_turn(
        [before, after],
        feeds,
        device,
        runs=runs,
        budget_s=budget_s,
        steady=steady,
        least_s=least_s,
    )
    (before_ms, before_spread), (after_ms, after_spread) = (_summary(t) for t in times)
    paired, interval = paired_speedup(*times)
    return Latency(before_ms, after_ms, before_spread, after_spread, len(times[0]), device.threads, paired, interval)


def paired_speedup(before: Sequence[float], after: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Return the median of the ratios of paired times, and its 95 % confidence interval.

    The interval lies between two of the sorted ratios, by the sign test: it assumes nothing of their distribution. Of 5
    pairs it is the least and the largest (94 %).

    Args:
        before: times of the first model [pairs], 1 or more.
        after: times of the second model in the same rounds [pairs], same unit.
    """
    ratios = np.sort(np.asarray(before) / np.maximum(np.asarray(after), _FINE))
    low = max(0, int(0.5 * ratios.size - 0.98 * np.sqrt(ratios.size)))
    return float(np.median(ratios)), (float(ratios[low]), float(ratios[ratios.size - 1 - low]))


def in_turn(
    models: Sequence[Path | bytes],
    feeds: Sequence[Feed],
    device: Device,
    *,
    runs: int = 20,
    budget_s: float = 10.0,
    steady: bool = False,
    least_s: float = 0.0,
) -> list[list[float]]:
    """Measure the milliseconds of every run of several models on the first of ``feeds``.

    The models run in turn, in alternating order, after a warm-up, so that changes of the machine's speed affect all.
    Measuring stops after ``runs`` rounds, later where ``least_s`` seconds are not over by then (at 400 rounds at the
    latest), or once ``budget_s`` seconds are spent and five rounds are done.

    Args:
        models: the models, paths or bytes.
        feeds: calls of the models, of which the first is run.
        device: providers and number of threads.
        runs: largest number of rounds, 1 or more.
        budget_s: seconds after which measuring stops once five rounds are done.
        steady: whether to measure the CPU time of the thread where one CPU thread runs the model, which leaves out
            waiting for other programs; with more threads there is no such clock.
        least_s: seconds to go on for where the rounds are short, 0 or more.

    Raises:
        ModelError: a model does not load or run, or there is no input to run on.
    """
    if not feeds:
        raise ModelError("latency needs at least one input to run on")
    clock = _own_time() if steady and device == Device() else time.perf_counter
    calls: list[Callable[[], object]] = []
    for model in models:
        session = open_session(model, threads=device.threads, spin=True, providers=device.providers)
        run(session, feeds[0])  # the first run allocates; it also turns a failing model into a typed error
        calls.append(prepare(session, feeds[0]))
    start = time.perf_counter()
    for _ in range(_WARM_UP - 1):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    num_runs = max(runs, _MIN_ROUNDS)
    for index in range(max(num_runs, _MAX_ROUNDS if least_s else 0)):
        spent = time.perf_counter() - start
        if index >= _MIN_ROUNDS and (spent > budget_s or (index >= num_runs and spent > least_s)):
            break
        for which in range(len(calls)) if index % 2 == 0 else reversed(range(len(calls))):
            times[which].append(_timed(calls[which], clock))
    return times


def _timed(call: Callable[[], object], clock: Callable[[], float]) -> float:
    """Milliseconds of one call."""
    start = clock()
    call()
    return (clock() - start) * 1e3


def _own_time() -> Callable[[], float]:
    """Return a clock of the work of this thread where the system has a fine one, else the wall clock."""
    fine = time.get_clock_info("thread_time").resolution <= _FINE
    return time.thread_time if fine else time.perf_counter


def _summary(times: list[float]) -> tuple[float, float]:
    """Median and interquartile range."""
    low, middle, high = np.percentile(times, [25, 50, 75])
    return float(middle), float(high - low)
