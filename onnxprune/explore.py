"""Calls that find out what a model can do without: :func:`profile`, :func:`sensitivity` and :func:`sweep`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxprune.budget.sensitivity import Sensitivity
from onnxprune.budget.target import parse
from onnxprune.criteria import Criterion
from onnxprune.passes import Prune
from onnxprune.passes.recover import settle_mode
from onnxprune.pipeline import Context, Model, ModelSource, Progress
from onnxprune.report.facts import SweepFacts
from onnxprune.runtime.images import ImageOptions
from onnxprune.search.budget import Budget, default_criterion
from onnxprune.search.evaluation import Metric, load_metric
from onnxprune.search.latency import Profiled, latency_table, profiled, rewritable_sizes
from onnxprune.search.sensitivity import SHARES, measure_sensitivity
from onnxprune.search.sweep import sweep as run_sweep
from onnxprune.search.wishes import Wishes
from onnxprune.selection.request import WIDEST, Options
from onnxprune.settings import called


@called("profile")
def profile(
    model: ModelSource,
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
        model: path, bytes or ModelProto.
        providers: of onnxruntime; None: the CPU.
        threads: inside an operator; None: all processors.
        seconds: how long to measure, more than 0; 12 cuts are in any case.
        input_shapes: {input: shape} for dynamic inputs.
        data: inputs of which one sample is run; None: seeded synthetic ones.
        samples: see ``onnxprune.prune``.
        batch_size: see ``onnxprune.prune``.
        images: how images become arrays.
        cache: folder to keep the table in, else the user's cache folder.
        seed: of everything random, 0 or more.
        progress: called with (stage, fraction).

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


@called("sensitivity")
def sensitivity(
    model: ModelSource,
    *,
    ratios: Sequence[float] = SHARES,
    criterion: str | Criterion | None = None,
    metric: str | Metric | None = None,
    jobs: int | None = None,
    layers: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scope: str = "local",
    policy: str = "sum",
    normalize: str = "auto",
    group_policy: str = "count",
    reshape_axis: str = "head_dim",
    max_ratio: float | None = None,
    cost: str = "none",
    round_to: int = 1,
    step: int = 1,
    rounding: str = "nearest",
    steps: int = 1,
    schedule: str = "linear",
    approximate: bool = False,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    recover: str | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Cut each group alone at several ratios, repair the layers that read it, and measure the whole model.

    Every point is measured end to end: outputs (or the metric) of the whole model, judged on samples that the repair
    did not see. Only the layers that read the group are repaired, from 128 samples.

    Args:
        model: path, bytes or ModelProto.
        ratios: shares of each group's units, 0 < ratio < 1.
        criterion: None: ``ziplm`` with data, else ``l2``.
        metric: function from the path of a model to a number, or ``"script.py:function"``.
        jobs: processes; None for what ``joblib.parallel_config`` says, else one. The work goes through joblib, so that
            its backends for Dask or Ray spread it over machines, where paths have to mean the same.
        layers: see ``onnxprune.prune``.
        include: see ``onnxprune.prune``.
        exclude: see ``onnxprune.prune``.
        scope: see ``onnxprune.prune``.
        policy: see ``onnxprune.prune``.
        normalize: see ``onnxprune.prune``.
        group_policy: see ``onnxprune.prune``.
        reshape_axis: see ``onnxprune.prune``.
        max_ratio: see ``onnxprune.prune``.
        cost: see ``onnxprune.prune``.
        round_to: see ``onnxprune.prune``.
        step: see ``onnxprune.prune``.
        rounding: see ``onnxprune.prune``.
        steps: see ``onnxprune.prune``.
        schedule: see ``onnxprune.prune``.
        approximate: see ``onnxprune.prune``.
        providers: see ``onnxprune.prune``.
        threads: see ``onnxprune.prune``.
        input_shapes: see ``onnxprune.prune``.
        data: see ``onnxprune.prune``.
        samples: see ``onnxprune.prune``.
        batch_size: see ``onnxprune.prune``.
        images: see ``onnxprune.prune``.
        cache: see ``onnxprune.prune``.
        seed: see ``onnxprune.prune``.
        recover: see ``onnxprune.prune``.
        memory_limit: see ``onnxprune.prune``.
        progress: called with (stage, fraction).

    Returns:
        curves; ``save`` writes them, ``prune(sensitivity=...)`` allocates by them. They are kept for later runs.

    Raises:
        OnnxpruneError: bad input, or nothing to cut.
    """
    choosing: Options = {
        "layers": layers,
        "include": include,
        "exclude": exclude,
        "scope": scope,
        "policy": policy,
        "normalize": normalize,
        "group_policy": group_policy,
        "reshape_axis": reshape_axis,
        "max_ratio": max_ratio,
        "cost": cost,
        "round_to": round_to,
        "step": step,
        "rounding": rounding,
        "steps": steps,
        "schedule": schedule,
    }
    running: dict[str, Any] = {"memory_limit": memory_limit, "cache": cache, "seed": seed, "progress": progress}
    reading: dict[str, Any] = {"data": data, "samples": samples, "batch_size": batch_size, "images": images}
    where: dict[str, Any] = {"providers": providers, "threads": threads, "input_shapes": input_shapes}
    mode, _ = settle_mode(recover, data is not None, True)
    context = Context.of(model, approximate=approximate, **reading, **running, **where)
    name = criterion or default_criterion(context)
    choosing["max_ratio"] = WIDEST if max_ratio is None else max_ratio
    prune = Prune(name, 0.5, approximate=approximate, **choosing)
    sizes = rewritable_sizes(prune.prepared(context, Model.of(context.analysis)))
    function = load_metric(metric) if isinstance(metric, str) else metric
    selector = prune.selector(context, sizes.analysis)
    return measure_sensitivity(context, selector, mode=mode, metric=function, shares=ratios, jobs=jobs)


@called("sweep")
def sweep(
    model: ModelSource,
    *,
    targets: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
    kind: str = "macs",
    criterion: str | Criterion | None = None,
    metric: str | Metric | None = None,
    factorize: bool = False,
    trials: int | None = None,
    layers: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scope: str = "local",
    policy: str = "sum",
    normalize: str = "auto",
    group_policy: str = "count",
    reshape_axis: str = "head_dim",
    max_ratio: float | None = None,
    cost: str = "none",
    round_to: int = 1,
    step: int = 1,
    rounding: str = "nearest",
    steps: int = 1,
    schedule: str = "linear",
    approximate: bool = False,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    recover: str | None = None,
    memory_limit: int | None = None,
    latency: bool = True,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> SweepFacts:
    """Cut a model to a row of budgets: what it loses by what it costs.

    Args:
        model: path, bytes or ModelProto.
        targets: shares of the original's cost, 0 < share <= 1.
        kind: of which cost: ``macs``, ``params``, ``size``, ``latency``, ``peak-memory``.
        criterion: None: ``ziplm`` with data, else ``l2``.
        metric: function from the path of a model to a number, or ``"script.py:function"``.
        factorize: see ``onnxprune.prune``.
        trials: see ``onnxprune.prune``.
        layers: see ``onnxprune.prune``.
        include: see ``onnxprune.prune``.
        exclude: see ``onnxprune.prune``.
        scope: see ``onnxprune.prune``.
        policy: see ``onnxprune.prune``.
        normalize: see ``onnxprune.prune``.
        group_policy: see ``onnxprune.prune``.
        reshape_axis: see ``onnxprune.prune``.
        max_ratio: see ``onnxprune.prune``.
        cost: see ``onnxprune.prune``.
        round_to: see ``onnxprune.prune``.
        step: see ``onnxprune.prune``.
        rounding: see ``onnxprune.prune``.
        steps: see ``onnxprune.prune``.
        schedule: see ``onnxprune.prune``.
        approximate: see ``onnxprune.prune``.
        providers: see ``onnxprune.prune``.
        threads: see ``onnxprune.prune``.
        input_shapes: see ``onnxprune.prune``.
        data: see ``onnxprune.prune``.
        samples: see ``onnxprune.prune``.
        batch_size: see ``onnxprune.prune``.
        images: see ``onnxprune.prune``.
        cache: see ``onnxprune.prune``.
        seed: see ``onnxprune.prune``.
        recover: see ``onnxprune.prune``.
        memory_limit: see ``onnxprune.prune``.
        latency: measure times.
        folder: keep the models here.
        progress: called with (stage, fraction).

    Returns:
        a point per model, the original first; those that no other beats are marked.

    Raises:
        OnnxpruneError: bad input, or none of the budgets can be met.
    """
    choosing: Options = {
        "layers": layers,
        "include": include,
        "exclude": exclude,
        "scope": scope,
        "policy": policy,
        "normalize": normalize,
        "group_policy": group_policy,
        "reshape_axis": reshape_axis,
        "max_ratio": max_ratio,
        "cost": cost,
        "round_to": round_to,
        "step": step,
        "rounding": rounding,
        "steps": steps,
        "schedule": schedule,
    }
    running: dict[str, Any] = {"memory_limit": memory_limit, "cache": cache, "seed": seed, "progress": progress}
    reading: dict[str, Any] = {"data": data, "samples": samples, "batch_size": batch_size, "images": images}
    where: dict[str, Any] = {"providers": providers, "threads": threads, "input_shapes": input_shapes}
    mode, why = settle_mode(recover, data is not None, True)
    wanted = [parse(f"{kind}={share}", "targets") for share in targets]
    wishes = Wishes.of([wanted[0]] if wanted else None, metric=metric, factorize=factorize, trials=trials)
    budget = Budget(wishes, criterion, recover=mode, why=why, approximate=approximate, **choosing)
    context = Context.of(model, approximate=approximate, **reading, **running, **where)
    home = Path(folder) if folder is not None else None
    return run_sweep(context, budget, [t.value for t in wanted], kind=kind, timed=latency, folder=home)
