"""Points of the recovery tables: one cut, repaired in several ways, and the metric of each."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from bench import files
from bench.criteria_points import OFF, Combination, choosing, nearest_cut
from bench.labelled import evaluate, limit

SYMMETRIC = "symmetric"  # least squares from the original's inputs instead of the cut model's


class Job(NamedTuple):
    """One model cut to one share of its MACs, repaired in every mode from the first ``samples`` of the data."""

    home: Path
    path: Path
    data: Path
    combination: Combination
    share: float
    samples: int
    modes: tuple[str, ...]
    cache: Path


def run_job(job: Job) -> dict[str, Any]:
    """``{"points": [...]}``; runs in a worker process. The choice of channels sees as many samples as the repair."""
    own = {"model": files.name(job.path), "share": job.share, "samples": job.samples, **job.combination._asdict()}
    try:
        plan, kept, seconds = _choose(job)
    except Exception as error:  # a model without such cuts is a result
        return {"points": [{**own, "mode": m, "error": " ".join(str(error).split())[:200]} for m in job.modes]}
    if abs(kept - job.share) > OFF:
        return {"points": [{**own, "mode": m, "error": f"nearest share: {kept:.3f}"} for m in job.modes]}
    return {
        "points": [{**own, "macs": round(kept, 4), "choose_s": seconds, **_repaired(job, plan, m)} for m in job.modes]
    }


def _choose(job: Job) -> tuple[Any, float, float]:
    from onnxprune.channels.selection import make_plan
    from onnxprune.passes import Context, RunSettings

    start = time.perf_counter()
    context = Context.of(job.path, RunSettings(data=job.data, samples=limit(job.data, job.samples), cache=job.cache))
    cut, kept_by = choosing(context, job.combination)
    _, kept, mask = nearest_cut(cut, kept_by, job.share)
    seconds = time.perf_counter() - start
    return make_plan(context.analysis, mask, job.combination.criterion), kept, round(seconds, 1)


def _repaired(job: Job, plan: Any, mode: str) -> dict[str, Any]:
    from onnxprune.passes import Pipeline, Prune, Recover

    start, processor = time.perf_counter(), time.process_time()
    way = Recover("lstsq", symmetric=True) if mode == SYMMETRIC else Recover(mode)
    given = {} if mode == "datafree" else {"data": job.data, "samples": limit(job.data, job.samples)}
    result = Pipeline([Prune(plan=plan), way]).run(job.path, **given)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        target = Path(folder) / "repaired.onnx"
        result.save(target)
        metrics = evaluate(job.home, files.name(job.path), target)
    return {
        "mode": mode,
        "metrics": metrics,
        "recover_s": round(seconds, 1),
        "processor_s": round(processor, 1),
        "why": _shortfall(result.report),
    }


def _shortfall(report: Any) -> str:
    """What kept a repair from more: layers it left, what their reason was, and the warnings."""
    left = Counter(r.how.partition(": ")[2] for r in report.repairs if r.how.startswith("left"))
    said = [f"{n} layers left: {why}" for why, n in left.most_common(1)]
    return "; ".join([*said, *(w.partition(":")[0] for w in report.warnings)])
