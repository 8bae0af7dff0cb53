"""What criteria cost: capture beside plain forward passes, and scores of a wide layer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from bench.labelled import limit

WIDE = 2048
SAMPLES, BATCH = 512, 16
REPEATS = 5


class Seconds(NamedTuple):
    """Processor and wall seconds."""

    cpu: float
    wall: float


def capture_overhead(path: Path, data: Path, samples: int, needs: Sequence[str]) -> dict[str, Seconds]:
    """Seconds of capture with every statistic, and of ``plain`` passes over the same batches: medians, taken in turn.

    Both open the model, read the data and run it on every batch; capture then has the statistics of all tensors in
    front of contractions besides.
    """
    from onnxprune.io.write import save
    from onnxprune.passes import Context, RunSettings
    from onnxprune.passes.calibrate import captured_maps
    from onnxprune.passes.calibration import CalibrationBatches
    from onnxprune.runtime.sessions import open_session, run

    context = Context.of(path, RunSettings(data=data, samples=limit(data, samples)))
    analysis = context.analysis
    groups = [g for g in analysis.units.groups if g.prunable]
    source = CalibrationBatches(context, analysis)

    def plain() -> None:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            target = Path(folder) / "plain.onnx"
            save(analysis.graph.proto, analysis.graph.weights, target)
            session = open_session(target, spin=False)
            for feed in source.batches(source.fixed or source.max_size):
                run(session, feed)

    def capture(need: str) -> Callable[[], Any]:
        return lambda: captured_maps(context, analysis, groups, (need,))

    plain()  # caches of files and of the processor
    work = {"plain": plain} | {need: capture(need) for need in needs}
    times = [{name: timed(call) for name, call in work.items()} for _ in range(REPEATS)]
    return {n: Seconds(median(t[n].cpu for t in times), median(t[n].wall for t in times)) for n in work}


def timed(work: Callable[[], Any]) -> Seconds:
    """Seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def wide_layer() -> dict[str, Seconds]:
    """Seconds of ``gm`` and ``nuclear`` on a layer of 2048 channels."""
    from onnxprune.importance import criteria, statistics

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
