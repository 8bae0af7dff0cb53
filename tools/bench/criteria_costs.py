"""What criteria cost: capture beside plain forward passes, and scores of a wide layer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.labelled import limit

WIDE = 2048
SAMPLES, BATCH = 512, 16
REPEATS = 3


def capture_overhead(path: Path, data: Path, samples: int) -> dict[str, float]:
    """Capture with ``moments`` and plain passes over the same batches, in turn: processor and wall seconds, medians."""
    from onnxprune.model.save import save
    from onnxprune.passes import State
    from onnxprune.passes.calibrate import captured_maps
    from onnxprune.passes.calls import Calls
    from onnxprune.runtime.sessions import open_session, run

    state = State(path, data=data, samples=limit(data, samples))
    analysis = state.analyzed()
    groups = [g for g in analysis.units.groups if g.prunable]
    source = Calls(state, analysis)

    def capture() -> None:
        captured_maps(state, analysis, groups, ("moments",))

    def plain() -> None:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            target = Path(folder) / "plain.onnx"
            save(analysis.graph.proto, analysis.graph.weights, target)
            session = open_session(target, spin=False)
            for feed in source.batches(source.fixed or source.most):
                run(session, feed)

    plain()  # caches of files and of the processor
    times = [(timed(plain), timed(capture)) for _ in range(REPEATS)]
    names = ("plain_cpu", "plain_wall"), ("capture_cpu", "capture_wall")
    return {n: median(t[i][j] for t in times) for i, pair in enumerate(names) for j, n in enumerate(pair)}


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """(processor seconds, wall seconds) of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def wide_layer() -> dict[str, tuple[float, float]]:
    """Seconds of ``gm`` and ``nuclear`` on a layer of 2048 channels: processor, wall."""
    from onnxprune import criteria, statistics

    draw = np.random.default_rng(0)
    weight = draw.standard_normal((WIDE, 512 * 9), dtype=np.float32)
    everyone = np.arange(WIDE)
    slot = criteria.Slot("w", 0, weight[None], [("Conv", 1)], everyone, WIDE)
    maps = np.maximum(draw.standard_normal((BATCH, WIDE, 7, 7), dtype=np.float32), 0)

    def nuclear() -> None:
        statistic = statistics.get("nuclear")()
        for _ in range(SAMPLES // BATCH):
            statistic.update(maps)
        statistic.result()

    return {
        f"gm, weights [{WIDE}, {weight.shape[1]}]": timed(lambda: criteria.get("gm")(slot)),
        f"nuclear, {SAMPLES} samples of maps [{WIDE}, 7, 7] in batches of {BATCH}": timed(nuclear),
    }
