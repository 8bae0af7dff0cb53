"""Sensitivity: prune each group alone at several shares, recover its consumers, and measure the whole model."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.allocation.knapsack import VERSION, GroupCurve, Sensitivity
from onnxprune.allocation.selection import close_selection, nearest_count
from onnxprune.channels.selection import removed_atoms
from onnxprune.errors import BudgetError, UsageError, argument
from onnxprune.io.files import user_cache
from onnxprune.passes.calibration import MAX_TRIAL, CalibrationBatches, TrialSplit
from onnxprune.passes.recover import noise
from onnxprune.passes.select import Selector
from onnxprune.pipeline import Context
from onnxprune.runtime import sessions
from onnxprune.search.evaluation import Metric, evaluate, points_name, points_of_original, pruned_model
from onnxprune.search.workers import WorkerRun, in_workers, unpacked

SHARES = (0.25, 0.5, 0.75, 0.9)
"""Default shares of a group's units to prune."""
_MAX_VALIDATION = 64


@dataclass(frozen=True, slots=True)
class Job:
    """The input of a worker that prunes one group alone at several shares and measures.

    Attributes:
        run: the run that the worker opens.
        mode: mode of the recovery.
        metric: the user's metric, None for fidelity.
        atoms: number of atoms.
        removed: {share: packed mask over atoms}.
    """

    run: WorkerRun
    mode: str
    metric: Metric | None
    atoms: int
    removed: dict[float, bytes]


def run_job(job: Job) -> list[tuple[float, float, str]]:
    """Return (noise, points, name of the points) for every share; runs in a worker."""
    with sessions.custom_ops(job.run.libraries):
        return _measured(job)


def _measured(job: Job) -> list[tuple[float, float, str]]:
    context, analysis = job.run.open()
    points = []
    for packed in job.removed.values():
        quality = evaluate(
            context,
            pruned_model(analysis, unpacked(packed, job.atoms)),
            mode=job.mode,
            metric=job.metric,
            split=TrialSplit(max_validation=_MAX_VALIDATION),
            near=True,
        ).quality
        assert quality.fidelity is not None
        points.append((noise(quality.fidelity), quality.points, points_name(job.metric)))
    return points


def measure_sensitivity(
    context: Context,
    selector: Selector,
    *,
    mode: str,
    metric: Metric | None = None,
    shares: Sequence[float] = SHARES,
    jobs: int | None = None,
    anew: bool = False,
) -> Sensitivity:
    """Measure curves of all groups, or read them from the cache; see :class:`Sensitivity`.

    Args:
        context: the run.
        selector: the scored units.
        mode: mode of the recovery.
        metric: the user's metric, None for fidelity.
        shares: shares of each group's units to prune, each between 0 and 1.
        jobs: workers at a time, None for that of ``joblib.parallel_config``, else one. The work goes through joblib, so
            that a backend of Dask or Ray spreads it over machines.
        anew: measure even if the cache holds curves.

    Raises:
        CannotRewrite: a node has no form with the new sizes. UsageError: the metric fails, data does not fit.
    """
    analysis = selector.analysis
    settings = _settings(context, selector, mode, metric, shares)
    functions: list[Callable[..., Any]] = [selector.criterion, *([] if metric is None else [metric])]
    cache_file = _cache_file(context, analysis.loaded.sha256, settings, functions)
    if cache_file is not None and not anew and cache_file.is_file():
        with suppress(UsageError):  # measure damaged curves again
            cached = Sensitivity.load(cache_file)
            cached.check_model(analysis.loaded.sha256, "")
            if cached.settings == json.loads(json.dumps(settings)):
                return cached
    ranked = selector.pool()
    worker_run = WorkerRun.of(context, analysis, MAX_TRIAL + _MAX_VALIDATION)
    work: list[tuple[GroupCurve, Job]] = []
    for number, ranked_group in ranked.items():
        group = analysis.units.groups[number]
        counts = dict.fromkeys(nearest_count(ranked_group.counts, s * ranked_group.steps, "nearest") for s in shares)
        masks = {c / ranked_group.steps: _mask(selector, number, c) for c in counts if c}
        if masks:
            view = next(g for g in analysis.groups if g.id == number)
            curve = GroupCurve(number, view.name, group.size, list(masks))
            packed = {share: np.packbits(mask).tobytes() for share, mask in masks.items()}
            work.append((curve, Job(worker_run, mode, metric, next(iter(masks.values())).size, packed)))
    if not work:
        raise BudgetError(
            "No channel of the selected layers can be removed.",
            hint=f"Check {argument('include')} and {argument('exclude')}.",
        )
    with context.stage("sensitivity"):
        original = points_of_original(analysis, metric)
        metric_name = points_name(metric)
        results = in_workers(run_job, [job for _, job in work], jobs)
        for num_done, ((curve, _), points) in enumerate(zip(work, results, strict=True)):
            curve.noise, curve.points = [x[0] for x in points], [x[1] for x in points]
            metric_name = points[0][2]
            context.tell("sensitivity", (num_done + 1) / len(work))
    curves = [curve for curve, _ in work]
    result = Sensitivity(analysis.loaded.sha256, settings, metric_name, original, metric is not None, curves)
    if cache_file is not None:
        with suppress(OSError, UsageError):
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            result.save(cache_file)
    return result


def _mask(selector: Selector, number: int, count: int) -> NDArray[np.bool_]:
    """Return the mask over atoms when one group alone loses this number of steps."""
    removed = close_selection(selector.analysis, {number: selector.pool_of[number]}, [count])
    return removed_atoms(selector.analysis.units, removed)


def _settings(
    context: Context, selector: Selector, mode: str, metric: Metric | None, shares: Sequence[float]
) -> dict[str, Any]:
    data = "synthetic" if context.calibration is None else context.inputs().name
    label = None if metric is None else points_name(metric)
    request = selector.request.settings
    kinds = {} if context.outputs is None else {"outputs": dict(context.outputs)}
    return {
        "criterion": selector.name,
        "recover": mode,
        "data": data,
        "metric": label,
        "shares": list(shares),
        **kinds,
        **{name: request[name] for name in ("policy", "normalize", "group_policy", "reshape_axis", "round_to", "step")},
    }


def _cache_file(
    context: Context, sha256: str, settings: dict[str, Any], functions: Sequence[Callable[..., Any]]
) -> Path | None:
    """Return the file of these curves; None where data, criterion or metric have no digest."""
    data = "" if context.calibration is None else CalibrationBatches(context, context.analysis).fingerprint()
    code = [_source_of(function) for function in functions]
    if data is None or None in code:
        return None
    run = context.seed, context.effort.name, repr(context.input_shapes)
    key = json.dumps([VERSION, sha256, settings, data, code, *run], sort_keys=True)
    folder = context.cache or user_cache()
    return folder / f"sensitivity-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _source_of(function: Callable[..., Any]) -> str | None:
    """Return the text of the file that a function is in, so that curves of a changed function are measured again."""
    function = getattr(function, "function", function)
    with suppress(OSError, TypeError):
        return Path(inspect.getfile(function)).read_text(encoding="utf-8", errors="replace")
    return None
