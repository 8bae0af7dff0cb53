"""Points of the curves: what a model measures after a cut to some share of its MACs, nothing repaired."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import files
from bench.labelled import evaluate, limit

CLOSE = 0.002  # of the MACs: near enough to stop looking for the ratio
OFF = 0.04  # of the MACs: too far away to stand under the share that was asked for
LAST = 0.98  # the largest ratio to try


class Combination(NamedTuple):
    """How units are scored and chosen."""

    criterion: str
    scope: str
    normalize: str
    cost: str

    def __str__(self) -> str:
        extra = [f"normalize={self.normalize}"] if self.normalize != "default" else []
        extra += [f"cost={self.cost}"] if self.cost != "none" else []
        return " ".join([self.criterion, self.scope, *extra])


class Task(NamedTuple):
    """The points of one model and combination that are missing; without a combination: the model as it is."""

    home: Path
    path: Path
    data: Path | None
    samples: int
    cache: Path
    combination: Combination | None
    shares: tuple[float, ...]


def run_task(task: Task) -> dict[str, Any]:
    """``{"points": [...]}`` as they go into the file of results; runs in a worker process."""
    own = {"model": files.name(task.path), "samples": task.samples}
    if task.combination is None:
        return {"points": [{**own, "baseline": evaluate(task.home, own["model"], None)}]}
    own |= task.combination._asdict()
    try:
        return {"points": [{**own, **point} for point in _points(task, task.combination)]}
    except Exception as error:  # a criterion may have nothing to say about a model: that is a result
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"points": [{**own, "share": share, "error": message} for share in task.shares]}


def _points(task: Task, combination: Combination) -> list[dict[str, Any]]:
    from onnxprune.channels.selection import make_plan
    from onnxprune.passes import Model, Prune, Result

    context = _context(task.path, task.data, task.samples, task.cache)
    start = time.perf_counter()
    cut, kept_by = choosing(context, combination)
    analysis = context.analysis
    cut(0.5)
    seconds = time.perf_counter() - start
    result = []
    for share in task.shares:
        ratio, kept, mask = nearest_cut(cut, kept_by, share)
        point = {"share": share, "macs_kept": round(kept, 4), "ratio": round(ratio, 4), "seconds": round(seconds, 2)}
        if abs(kept - share) > OFF:
            result.append({**point, "error": f"nearest share of the MACs: {kept:.3f}"})
            continue
        prune = Prune(plan=make_plan(analysis, mask, combination.criterion))
        pruned = prune(context, Model.of(analysis)).model
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            target = Path(folder) / "cut.onnx"
            Result(context, pruned).save(target)
            result.append({**point, "metrics": evaluate(task.home, files.name(task.path), target)})
    return result


def choosing(context: Any, combination: Combination) -> tuple[Callable[[float], Any], Callable[[Any], float]]:
    """What is cut at a ratio, and the share of the MACs that a cut keeps."""
    from onnxprune.allocation.selection import macs_after
    from onnxprune.passes import Prune

    options: dict[str, Any] = {"scope": combination.scope, "cost": combination.cost}
    if combination.normalize != "default":
        options["normalize"] = combination.normalize
    selector = Prune(combination.criterion, **options).selector(context, context.analysis)
    analysis = selector.analysis
    whole = macs_after(analysis, np.zeros(analysis.units.component.size, dtype=bool))
    return selector.at, lambda mask: macs_after(analysis, mask) / whole


def nearest_cut(cut: Any, kept: Any, share: float) -> tuple[float, float, Any]:
    """(ratio, share kept, what is cut) whose share is the nearest to the one asked for, by bisecting the ratio."""
    low, high = 0.0, LAST
    best: tuple[float, float, Any] = (0.0, 2.0, None)
    for _ in range(16):
        ratio = (low + high) / 2
        mask = cut(ratio)
        now = float(kept(mask))
        if abs(now - share) < abs(best[1] - share):
            best = ratio, now, mask
        if abs(now - share) <= CLOSE:
            break
        low, high = (ratio, high) if now > share else (low, ratio)
    return best


@lru_cache(maxsize=1)
def _context(path: Path, data: Path | None, samples: int, cache: Path) -> Any:
    """One analysis per model and worker; captured statistics are kept in ``cache``."""
    from onnxprune.passes import Context, RunSettings

    return Context.of(path, RunSettings(data=data, samples=limit(data, samples) if data else None, cache=cache))
