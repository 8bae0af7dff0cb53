"""The calls of Python: prune, factorize, recover, analyze, profile, sensitivity, sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxprune.allocation.knapsack import Sensitivity
from onnxprune.allocation.latency_model import LatencyTable
from onnxprune.allocation.settings import WIDEST, Options
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import Plan
from onnxprune.errors import BudgetError, UsageError, argument
from onnxprune.factorization.settings import Options as FactorOptions
from onnxprune.importance.criteria import Criterion
from onnxprune.io.interchange import ModelSource
from onnxprune.passes import Adopt, Exact, Factorize, Flush, Pipeline, Prune, Recover, Result, Validate
from onnxprune.passes.recover import check_mode, no_data, settle_mode
from onnxprune.pipeline import Context, Model, Progress
from onnxprune.report.facts import Report, SweepFacts
from onnxprune.runtime.diagnosis import explained
from onnxprune.runtime.images import ImageOptions
from onnxprune.search.budget import Budget, default_criterion
from onnxprune.search.evaluation import Metric, load_metric
from onnxprune.search.latency import Profiled, latency_table, profiled, rewritable_sizes
from onnxprune.search.sensitivity import SHARES, measure_sensitivity
from onnxprune.search.sweep import sweep as run_sweep
from onnxprune.search.wishes import Wishes
from onnxprune.settings import called, default
from onnxprune.targets import Given as Targets
from onnxprune.targets import Target, parse


@called("prune")
def prune(
    model: ModelSource,
    *,
    criterion: str | Criterion | None = None,
    ratio: float | None = None,
    plan: Plan | str | Path | None = None,
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
    target: Targets | None = None,
    max_drop: float | None = None,
    metric: str | Metric | None = None,
    sensitivity: str | Path | Sensitivity | None = None,
    jobs: int | None = None,
    factorize: bool = False,
    trials: int | None = None,
    latency_table: str | Path | LatencyTable | None = None,
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
    validate: bool = True,
    min_fidelity: float | None = None,
    latency: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Cut a model, prove that the cut is exact, and with ``data`` repair it.

    Args:
        model: path, bytes or ModelProto; never changed.
        criterion: a name, see ``onnxprune.criteria.names()``, or a function from a slot (and its maps) to scores
            [channels]; some need ``data``. None: ``l2``, with data and a budget ``ziplm``.
        ratio: share of units to remove, 0 <= ratio < 1, rounded to what the groups' constraints allow; 0.3.
        plan: a plan or its file, replayed instead of scoring.
        layers: {glob over node or weight names: ratio}; the last that matches counts.
        include: globs; only groups with a node or weight of such a name.
        exclude: globs; no group with a node or weight of such a name.
        scope: who competes: the units of each group (``local``), of all groups (``global``), of groups of the same
            structure (``isomorphic``), or all by SLAMP (``slamp``).
        policy: how the scores that a unit has in several weights become one: ``sum``, ``average``, ``max``,
            ``backward``.
        normalize: what makes scores of different weights comparable: ``auto``, ``mean``, ``none``, ``root``,
            ``standard``, ``tss``, ``linear``, ``softmax``, ``measured``.
        group_policy: what rows of a grid (heads, convolution groups) have in common: ``count``, ``sum``, ``average``,
            ``none``.
        reshape_axis: what goes of a grid: cells of every row (``head_dim``), whole rows (``heads``), ``both``.
        max_ratio: the largest share that one group loses, 0 < max_ratio <= 1; None: all but one unit, 0.9 where groups
            compete.
        cost: what removing a unit saves, which its score is divided by: ``none``, ``macs``, ``params``, ``latency``.
        round_to: keep a multiple of this many units per group where it can be had.
        step: remove a multiple of this many units per group.
        rounding: of the counts that follow from ratios: ``nearest``, ``up``, ``down``.
        steps: how often to score and remove, each on what the last one left.
        schedule: how the removed share grows over the steps: ``linear``, ``exp``, ``cos``, ``cube``.
        approximate: also cut through normalisations, which is not exact.
        target: a budget in place of a ratio: ``"macs=0.5"``, a list of such, or ``{"macs": 0.5, "size": "3MB"}``; kinds
            are ``macs``, ``params``, ``size``, ``latency`` and ``peak-memory``.
        max_drop: what the metric may lose, 0 or more; without a metric points of per cent of fidelity. Without targets
            the smallest model within it is looked for.
        metric: function from the path of a model to a number, higher is better, or ``"script.py:function"``.
        sensitivity: what cutting each group alone did, or its file: counts are then chosen by it, too; ``"measure"``.
        jobs: processes to measure sensitivities in; None: as joblib is configured, -1: all processors.
        factorize: take layers apart as well, where that keeps more than cutting them; not for ``peak-memory``.
        trials: answers to try around the best cut; None: with a repair about half a minute's worth of work, else none.
        latency_table: times of another device, as :func:`profile` gives them.
        providers: of onnxruntime, where time is measured; None: the CPU.
        threads: inside an operator, where time is measured; None: all processors.
        input_shapes: {input: shape} for dynamic inputs.
        data: inputs without labels, to repair and validate with and for criteria that need them: a .npz or .npy file, a
            folder of such or of images, an array, a mapping of input names to arrays, an iterable of these, or a reader
            with onnxruntime's ``CalibrationDataReader`` interface.
        samples: how many of the data to use; None: up to 256 to validate, all to repair and for criteria.
        batch_size: samples at a time where the model leaves that open; 16.
        images: how images become arrays.
        cache: folder that keeps statistics, so that an interrupted or repeated run need not start anew.
        seed: of everything random, 0 or more.
        recover: how to repair the cut from ``data``, in closed form: ``full``, ``lstsq``, ``bn``, ``bias`` or ``none``,
            see :class:`onnxprune.passes.Recover`; or ``datafree``, from inputs that are made up: weaker, and data only
            serve to compare on. None: ``full`` where there is data and ``validate``, else ``none``. Every eighth batch
            is not repaired from: the report's fidelity is measured on these.
        memory_limit: bytes of activations to hold in memory at a time, 1,000,000 or more; 2 GiB.
        validate: run the checks.
        min_fidelity: the smallest cosine that an output may have to the original's, 0 < min_fidelity <= 1.
        latency: measure speed.
        progress: called with (stage, fraction).

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input, 3 model not processable, 4 validation failed,
            5 nothing to cut, or a budget or gate that is not met.
    """
    wishes = Wishes.of(
        target, min_fidelity, metric, max_drop, latency_table, sensitivity, jobs, factorize=factorize, trials=trials
    )
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
    way = settle_mode(recover, data is not None, validate)
    if wishes.any:
        _alone(ratio, plan)
        first: Any = Budget(wishes, criterion, recover=way[0], why=way[1], approximate=approximate, **choosing)
    else:
        share = default("ratio") if ratio is None else ratio
        first = Prune(criterion or "l2", share, plan=plan, approximate=approximate, **choosing)
    pipe = Pipeline(_stages(first, way, validate, validate and latency))
    reading: dict[str, Any] = {"data": data, "samples": samples, "batch_size": batch_size, "images": images}
    running: dict[str, Any] = {"memory_limit": memory_limit, "cache": cache, "seed": seed, "progress": progress}
    where: dict[str, Any] = {"providers": providers, "threads": threads, "input_shapes": input_shapes}
    result = pipe.run(model, **reading, **running, **where)
    if wishes.any:
        _warn_of_targets_met_before(result.report)
    _faithful(result, wishes)
    return result


def _warn_of_targets_met_before(report: Report) -> None:
    """Warn of every target that asks for nothing: a run that changes nothing must not look like a success."""
    for target in report.budget.targets if report.budget is not None else ():
        if target.met_before and target.limit != target.before:
            original = Target(target.kind, target.before, absolute=True)
            report.warnings.append(f"{target.asked} was met before the cut: the original has {original}")


def _stages(cut: Any, way: tuple[str, str], validate: bool, timed: bool) -> list[Any]:
    """Return the passes of a run: pruning, checks before the recovery, and a recovery if pruning does none."""
    factors = [Factorize(plan=cut.plan, check=validate)] if isinstance(cut, Prune) and _factorizes(cut.plan) else []
    exact = [Exact()] if validate and (way[0] != "none" or factors or isinstance(cut, Budget)) else []
    repair = [] if isinstance(cut, Budget) else [Recover(way[0], why=way[1])]
    return [cut, Flush(), *exact, *factors, *repair, Validate(exact=validate, faithful=validate, timed=timed)]


def _factorizes(plan: Plan | None) -> bool:
    return plan is not None and bool(plan.factorized)


def _alone(ratio: float | None, plan: Any) -> None:
    """Reject a ratio or a plan beside a budget; raises UsageError."""
    for name, given in (("ratio", ratio), ("plan", plan)):
        if given is not None:
            raise UsageError(
                f"a budget and {argument(name)} were both given: each says how much goes",
                hint="Drop one of the two: a budget finds the ratios by itself.",
            )


def _faithful(result: Result, wishes: Wishes) -> None:
    """Check ``min_fidelity`` of a run without a budget; raises BudgetError where a cosine is low or not measured."""
    if wishes.min_fidelity is None or wishes.any:
        return
    facts = result.report.fidelity
    if facts is None or not facts.outputs:
        said = f"{argument('min_fidelity')} {wishes.min_fidelity:g}: fidelity could not be measured."
        hint = f"Give {argument('data')}, and let models be run."
        raise BudgetError(said, hint=hint, report=result.report)
    if not all(output.cosine >= wishes.min_fidelity for output in facts.outputs):
        said = f"worst cosine {facts.worst_cosine:.4f} is below {argument('min_fidelity')} {wishes.min_fidelity:g}."
        raise BudgetError(said, hint="Cut less.", report=result.report)


@called("recover")
def recover(
    original: ModelSource,
    cut: ModelSource,
    *,
    plan: Plan | str | Path,
    data: Any = None,
    recover: str = "full",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    memory_limit: int | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    approximate: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Repair a model that was cut before, so that it says what the original says.

    Args:
        original: the model before the cut; not changed.
        cut: the model to repair, as it was cut or trained further; not changed.
        plan: what was removed from where, as it was saved with the cut.
        data: inputs without labels, see :func:`prune`; ``datafree`` needs none.
        recover: ``full``, ``lstsq``, ``bn``, ``bias`` or ``datafree``.
        input_shapes: see :func:`prune`.
        samples: how many of the data to use; None: all.
        batch_size: see :func:`prune`.
        images: how images become arrays.
        memory_limit: see :func:`prune`.
        cache: see :func:`prune`.
        seed: of everything random, 0 or more.
        approximate: the cut was made with it.
        progress: called with (stage, fraction).

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input or a plan that does not lead from one model to the other,
            3 model not processable, 4 the result is not a valid model.
    """
    if data is None and check_mode(recover) != "datafree":
        raise no_data(recover)
    take, check = Adopt(cut, plan, approximate=approximate), Validate(exact=False, timed=False)
    reading: dict[str, Any] = {"data": data, "samples": samples, "batch_size": batch_size, "images": images}
    running: dict[str, Any] = {"memory_limit": memory_limit, "cache": cache, "seed": seed, "progress": progress}
    return Pipeline([take, Flush(), Recover(recover), check]).run(
        original, input_shapes=input_shapes, **reading, **running
    )


@called("factorize")
def factorize(
    model: ModelSource,
    *,
    method: str = "auto",
    ratio: float | None = None,
    rank: int | Sequence[int] | Mapping[str, int | Sequence[int]] | None = None,
    energy: float | None = None,
    vbmf: float | None = None,
    layers: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    round_to: int = 1,
    scope: str | None = None,
    cost: str = "macs",
    timed: bool = True,
    plan: Plan | str | Path | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    recover: str | None = None,
    memory_limit: int | None = None,
    seed: int = 0,
    validate: bool = True,
    latency: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Take layers apart into smaller ones, check that they compute what they should, and with ``data`` repair.

    Args:
        model: path, bytes or ModelProto; never changed.
        method: ``svd``, ``tucker``, ``cp``, ``spatial-svd``, or ``auto``: per layer whichever errs least for what it
            saves, as one budget for the whole model.
        ratio: share of the cost to save, 0 < ratio < 1; 0.3 where nothing says how far to go.
        rank: ranks in place of a ratio: a number, one per mode, or {glob: either}; 0 leaves a mode as it is.
        energy: share of every mode's energy to keep in place of a ratio, 0 < energy <= 1.
        vbmf: keep what is more than noise in place of a ratio, moved towards all (1) or none (-1) by this much.
        layers: {glob over node or weight names: ratio}; the last that matches counts.
        include: globs; only layers with such a name.
        exclude: globs; no layer with such a name.
        round_to: ranks are multiples of this.
        scope: ``local`` or ``global``: the ratio of every layer, or of the whole model; None: global for ``auto``.
        cost: what the ratio is of, ``macs`` or ``params``.
        timed: ``auto`` leaves alone what does not get faster, as measured.
        plan: a plan or its file, replayed instead of choosing.
        input_shapes: see :func:`prune`.
        data: inputs without labels: errors then count at the layers' outputs, and what is left is repaired.
        samples: see :func:`prune`.
        batch_size: see :func:`prune`.
        images: how images become arrays.
        recover: see :func:`prune`.
        memory_limit: see :func:`prune`.
        seed: of everything random, 0 or more.
        validate: run the checks.
        latency: measure speed.
        progress: called with (stage, fraction).

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input, 3 model not processable, 4 validation failed,
            5 nothing to take apart, a ratio that no rank reaches, or nothing that gets faster.
    """
    mode, why = settle_mode(recover, data is not None, validate)
    plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    if plan is not None and plan.groups:
        raise UsageError(
            "This plan removes channels, too, and a factorization does not",
            hint="Replay it with onnxprune.prune(plan=...), on the command line 'onnxprune MODEL --apply-plan FILE'.",
        )
    options: FactorOptions = {"ratio": ratio, "rank": rank, "energy": energy, "vbmf": vbmf, "layers": layers}
    options |= {"include": include, "exclude": exclude, "round_to": round_to}
    options |= {"scope": scope, "cost": cost, "timed": timed}
    take = Factorize(method, plan=plan, check=validate, **options)
    check = Validate(exact=False, faithful=validate, timed=validate and latency)
    reading: dict[str, Any] = {"data": data, "samples": samples, "batch_size": batch_size, "images": images}
    running: dict[str, Any] = {"memory_limit": memory_limit, "seed": seed, "progress": progress}
    return Pipeline([Flush(), take, Recover(mode, why=why), check]).run(
        model, input_shapes=input_shapes, **reading, **running
    )


@called("inspect")
def analyze(
    model: ModelSource,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    approximate: bool = False,
) -> Analysis:
    """Analyze the groups, units, slots and barriers of a model, without changing or running it.

    Args:
        model: path, bytes or ModelProto.
        input_shapes: {input: shape} for dynamic inputs.
        approximate: count channels behind normalisations as removable.

    Raises:
        OnnxpruneError: the model cannot be read, or an input shape does not fit.
    """
    with explained(model):
        return Analysis(model, input_shapes=input_shapes, approximate=approximate)


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
