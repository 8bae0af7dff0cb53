"""Calls that find out what a model can do without: :func:`profile`, :func:`sensitivity` and :func:`sweep`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import onnx

from onnxprune.budget.sensitivity import Sensitivity
from onnxprune.budget.target import parse
from onnxprune.criteria import Criterion
from onnxprune.passes import Prune
from onnxprune.passes.recover import settle_mode
from onnxprune.pipeline import Context, Model, Progress
from onnxprune.report.facts import SweepFacts
from onnxprune.runtime.images import ImageOptions
from onnxprune.search.budget import Budget, default_criterion
from onnxprune.search.evaluation import Metric, load_metric
from onnxprune.search.latency import Profiled, latency_table, profiled, rewritable_sizes
from onnxprune.search.sensitivity import SHARES, measure_sensitivity
from onnxprune.search.sweep import sweep as run_sweep
from onnxprune.search.wishes import Choosing, Wishes, split_running
from onnxprune.selection.request import WIDEST


def profile(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    seconds: float = 60.0,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Profiled:
    """Measure on this machine what every node takes at how many channels.

    The model is cut to random counts, again and again, and every node timed where it stands, so that fusions and
    layouts are those of the whole model. What is found is kept for later runs of ``onnxprune.prune`` on this machine.

    Args:
        providers, threads: of onnxruntime; the CPU, all processors. seconds: how long to measure; 12 cuts are in any
            case. input_shapes, data, samples, batch_size, images, seed: see ``onnxprune.prune``; one sample is run.
        cache: folder to keep the table in, else the user's cache folder.

    Returns:
        ``facts`` to read, ``table`` for ``prune(latency_table=...)``, ``save`` to take it to another machine.

    Raises:
        OnnxpruneError: bad input, a model that does not run, or nothing to cut.
    """
    reading: dict[str, Any] = {"data": data, "samples": samples, "batch_size": batch_size, "images": images}
    where: dict[str, Any] = {"providers": providers, "threads": threads, "cache": cache}
    context = Context.of(model, input_shapes=input_shapes, seed=seed, progress=progress, **reading, **where)
    sizes = rewritable_sizes(context.analysis)
    table = latency_table(context, sizes, seconds=seconds, anew=True)
    return Profiled(profiled(sizes, table, str(context.analysis.loaded.path or "the model")), table)


def sensitivity(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    ratios: Sequence[float] = SHARES,
    criterion: str | Criterion | None = None,
    metric: str | Metric | None = None,
    jobs: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    recover: str | None = None,
    seed: int = 0,
    approximate: bool = False,
    progress: Progress | None = None,
    **options: Unpack[Choosing],
) -> Sensitivity:
    """Cut each group alone at several ratios, repair the layers that read it, and measure the whole model.

    Every point is measured end to end: outputs (or the metric) of the whole model, judged on samples that the repair
    did not see. Only the layers that read the group are repaired, from 128 samples.

    Args:
        model: path, bytes or ModelProto. ratios: shares of each group's units. criterion: None: ``ziplm`` with data,
            else ``l2``. metric: function from the path of a model to a number, or ``"script.py:function"``.
        jobs: processes; None for what ``joblib.parallel_config`` says, else one. The work goes through joblib, so that
            its backends for Dask or Ray spread it over machines, where paths have to mean the same.
        data, recover, seed, approximate, input_shapes: see ``onnxprune.prune``. options: likewise.

    Returns:
        curves; ``save`` writes them, ``prune(sensitivity=...)`` allocates by them. They are kept for later runs.

    Raises:
        OnnxpruneError: bad input, or nothing to cut.
    """
    running, choosing = split_running(options)
    mode, _ = settle_mode(recover, data is not None, True)
    given: dict[str, Any] = {"data": data, "seed": seed, "approximate": approximate, "progress": progress}
    context = Context.of(model, input_shapes=input_shapes, **given, **running)
    name = criterion or default_criterion(context)
    choosing.setdefault("max_ratio", WIDEST)
    prune = Prune(name, 0.5, approximate=approximate, **choosing)
    sizes = rewritable_sizes(prune.prepared(context, Model.of(context.analysis)))
    function = load_metric(metric) if isinstance(metric, str) else metric
    selector = prune.selector(context, sizes.analysis)
    return measure_sensitivity(context, selector, mode=mode, metric=function, shares=ratios, jobs=jobs)


def sweep(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    targets: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
    kind: str = "macs",
    criterion: str | Criterion | None = None,
    metric: str | Metric | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    recover: str | None = None,
    seed: int = 0,
    approximate: bool = False,
    factorize: bool = False,
    trials: int | None = None,
    latency: bool = True,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    **options: Unpack[Choosing],
) -> SweepFacts:
    """Cut a model to a row of budgets: what it loses by what it costs.

    Args:
        model: path, bytes or ModelProto. targets: shares of the original's cost. kind: of which cost.
        folder: keep the models here. latency: measure times. factorize, trials, the
            rest, and options: see ``onnxprune.prune``.

    Returns:
        a point per model, the original first; those that no other beats are marked.

    Raises:
        OnnxpruneError: bad input, or none of the budgets can be met.
    """
    running, choosing = split_running(options)
    mode, why = settle_mode(recover, data is not None, True)
    wanted = [parse(f"{kind}={share}", "targets") for share in targets]
    wishes = Wishes.of([wanted[0]] if wanted else None, metric=metric, factorize=factorize, trials=trials)
    budget = Budget(wishes, criterion, recover=mode, why=why, approximate=approximate, **choosing)
    given: dict[str, Any] = {"data": data, "seed": seed, "approximate": approximate, "progress": progress}
    context = Context.of(model, input_shapes=input_shapes, **given, **running)
    home = Path(folder) if folder is not None else None
    return run_sweep(context, budget, [t.value for t in wanted], kind=kind, timed=latency, folder=home)
