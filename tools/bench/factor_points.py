"""Points of the factorization tables: one model taken apart in one way, its metric, size and speed."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench import files
from bench.labelled import evaluate, limit

PRUNE = "prune"


class Job(NamedTuple):
    """One model, one way, one share of the MACs to keep.

    ``way`` is a method, or ``prune``, which cuts channels instead (ziplm, global, per MAC). ``kind``: ``plain`` uses no
    data, ``data`` counts errors at outputs, ``repair`` also repairs what is left.
    """

    home: Path
    path: Path
    data: Path
    way: str
    kind: str
    share: float
    samples: int
    timed: bool


def run_job(job: Job) -> dict[str, Any]:
    """One point; runs in a worker process."""
    own = {"model": files.name(job.path), "way": job.way, "kind": job.kind, "share": job.share, "samples": job.samples}
    start = time.perf_counter()
    try:
        result = _result(job)
    except Exception as error:  # a model that cannot be taken apart so far is a result
        return {**own, "error": " ".join(str(error).split())[:200]}
    seconds = time.perf_counter() - start
    totals, timed = result.report.totals, result.report.latency
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        target = Path(folder) / "factorized.onnx"
        result.save(target)
        metrics = evaluate(job.home, files.name(job.path), target)
    speed = {} if timed is None else {"speed": round(timed.speedup, 3), "before_ms": round(timed.before_ms, 4)}
    kept = round(totals.macs_after / totals.macs_before, 4)
    return {**own, "macs": kept, "metrics": metrics, "seconds": round(seconds, 1), **speed}


def _result(job: Job) -> Any:
    import onnxprune as op

    data = None if job.kind == "plain" else job.data
    recover = op.passes.Recover("full" if job.kind == "repair" else "none")
    if job.way == PRUNE:
        from bench.criteria_points import Combination, choosing, nearest_cut
        from onnxprune.channels.selection import make_plan
        from onnxprune.passes import Context, RunSettings

        context = Context.of(job.path, RunSettings(data=job.data, samples=limit(job.data, job.samples)))
        criterion = "l2" if data is None else "ziplm"
        cut, kept = choosing(context, Combination(criterion, "global", "default" if data is None else "none", "macs"))
        take: Any = op.passes.Prune(plan=make_plan(context.analysis, nearest_cut(cut, kept, job.share)[2], criterion))
    else:
        take = op.passes.Factorize(job.way, ratio=1 - job.share, timed=job.timed)
    check = op.passes.Validate(exact=False, faithful=False)
    samples = None if data is None else limit(job.data, job.samples)
    return op.Pipeline([take, recover, check]).run(job.path, data=data, samples=samples)
