"""Where the time goes: seconds per node of one model, from onnxruntime's profiler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxprune.errors import ModelError
from onnxprune.files import workspace
from onnxprune.runtime.device import Device
from onnxprune.runtime.sessions import Feed, open_session, prepare, run

_SUFFIX = "_kernel_time"
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
        model: path, or the serialised model. feeds: the first one is run. runs: how often.
        device: None for one thread of the CPU. share: the mean of so many of the runs, the shortest ones, is given in
            place of the median; what disturbs a run only makes it longer, and a mean is finer than the clock.

    Raises:
        ModelError: the model does not load or run.
    """
    if not feeds:
        raise ModelError("a profile needs at least one input to run on")
    device = device or Device()
    with workspace() as folder:
        prefix = str(folder / "profile")
        session = open_session(model, threads=device.threads, providers=device.providers, profile=prefix)
        try:
            run(session, feeds[0])
            call = prepare(session, feeds[0])
            for _ in range(runs):
                call()
        finally:
            written = Path(session.end_profiling())
        events = json.loads(written.read_text())
    return _per_node(events, runs, share)


def _own(events: Sequence[tuple[float, float, tuple[str, str]]]) -> list[tuple[tuple[str, str], float]]:
    """Seconds of every event (start, microseconds, key), in order; of what holds others without theirs."""
    result = [(key, duration) for _, duration, key in events]
    if any(op in _HOLDING for _, _, (_, op) in events):
        around: list[tuple[float, int]] = []
        for number in sorted(range(len(events)), key=lambda k: (events[k][0], -events[k][1])):
            start, duration, (_, op) = events[number]
            while around and around[-1][0] < start + duration:
                around.pop()
            if around:
                key, own = result[around[-1][1]]
                result[around[-1][1]] = key, own - duration
            if op in _HOLDING:
                around.append((start + duration, number))
    return [(key, max(own, 0.0) * 1e-6) for key, own in result]


def _per_node(events: Sequence[dict[str, object]], runs: int, share: float | None) -> list[NodeTime]:
    times: dict[tuple[str, str], list[float]] = {}
    nodes = []
    for event in events:
        name, arguments = str(event.get("name", "")), event.get("args")
        if event.get("cat") == "Node" and name.endswith(_SUFFIX) and isinstance(arguments, dict):
            key = name.removesuffix(_SUFFIX), str(arguments.get("op_name", ""))
            nodes.append((float(str(event["ts"])), float(str(event["dur"])), key))
    for key, seconds in _own(nodes):
        times.setdefault(key, []).append(seconds)
    result = []
    for (name, op), found in times.items():
        # A node in a loop runs several times per run; names may repeat, too.
        each = max(1, len(found) // (runs + 1))
        usable = len(found) // each * each
        sums = np.asarray(found[:usable]).reshape(-1, each).sum(axis=1)
        counted = sums[1:] if sums.size > 1 else sums
        shortest = np.sort(counted)[: max(1, round((share or 1.0) * counted.size))]
        result.append(NodeTime(name, op, float(np.median(counted) if share is None else shortest.mean())))
    return result
