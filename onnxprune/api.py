"""The calls of Python: prune, factorize, sparsify, recover, analyze, compare, profile, sensitivity, sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxprune.allocation.knapsack import Sensitivity
from onnxprune.allocation.latency_model import LatencyTable
from onnxprune.allocation.settings import WIDEST, Options
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import Plan
from onnxprune.devices import Kernels
from onnxprune.errors import BudgetError, Note, UsageError, argument
from onnxprune.factorization.settings import Options as FactorOptions
from onnxprune.graph.resized import Resizing
from onnxprune.importance.criteria import Criterion, get, needs_of
from onnxprune.importance.statistics import GRADIENTS
from onnxprune.io.interchange import ModelSource
from onnxprune.passes import (
    Adopt,
    Depth,
    Exact,
    Experts,
    Factorize,
    Finetune,
    Flush,
    LockZeros,
    Pipeline,
    Prune,
    Quantize,
    Recover,
    Regularize,
    RemoveDead,
    Result,
    Rotate,
    Sparsify,
    StoreZeros,
    Validate,
    Vocabulary,
)
from onnxprune.passes.finetune import ShortFinetune
from onnxprune.passes.prune import with_criterion
from onnxprune.passes.recover import check_mode, no_data, settle_mode
from onnxprune.passes.training_sizes import LEAST_SAMPLES
from onnxprune.pipeline import Context, Model, Progress, RunSettings
from onnxprune.report.facts import Report, SweepFacts
from onnxprune.runtime.diagnosis import explain_failures
from onnxprune.runtime.images import ImageOptions
from onnxprune.runtime.sessions import with_custom_ops
from onnxprune.search.budget import Budget
from onnxprune.search.comparison import MeasureMetric, check_gates, compare_models
from onnxprune.search.evaluation import Metric, load_metric
from onnxprune.search.latency import LatencyProfile, describe_times, latency_table, rewritable_sizes
from onnxprune.search.problem import tolerance
from onnxprune.search.scope import PruneByTrial
from onnxprune.search.sensitivity import SHARES, measure_sensitivity
from onnxprune.search.spec import BudgetSpec
from onnxprune.search.sweep import sweep as run_sweep
from onnxprune.settings import called, check_dead_alone, default, effort_of, has_budget, record_of
from onnxprune.sparsification.scores import GRADIENTS as GRADIENT_SCORES
from onnxprune.sparsification.settings import Options as SparseOptions
from onnxprune.targets import Target, parse
from onnxprune.targets import TargetInput as Targets
from onnxprune.training.loop import Effort


@called("prune")
@with_custom_ops
def prune(
    model: ModelSource,
    *,
    criterion: str | Criterion | None = None,
    ratio: float | None = None,
    depth: float | str | None = None,
    rotate: str = "auto",
    keep_cache: bool = False,
    experts: float | None = None,
    vocabulary: Any = None,
    keep_ids: bool = False,
    tokenizer: str | Path | None = None,
    plan: Plan | str | Path | None = None,
    remove_dead: bool = False,
    layers: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scope: str = "auto",
    policy: str = "sum",
    normalize: str = "auto",
    group_policy: str = "count",
    reshape_axis: str = "head_dim",
    max_ratio: float | None = None,
    cost: str = "auto",
    round_to: int | str = "auto",
    device: str | Kernels | None = None,
    step: int = 1,
    rounding: str = "nearest",
    steps: int = 1,
    schedule: str = "linear",
    approximate: bool = False,
    resize_io: Sequence[str] = (),
    cache_heads: bool = False,
    model_config: str | Path | None = None,
    target: Targets | None = None,
    max_drop: float | None = None,
    metric: str | Metric | None = None,
    sensitivity: str | Path | Sensitivity | None = None,
    jobs: int | None = None,
    factorize: bool | None = None,
    trials: int | None = None,
    latency_table: str | Path | LatencyTable | None = None,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    outputs: Mapping[str, str] | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    custom_op_libraries: Sequence[str | Path] = (),
    recover: str | None = None,
    finetune: int | str | bool | None = None,
    labels: Any = None,
    augment: str = "auto",
    blocks: str = "no",
    pattern_lock: bool | None = None,
    quantize: str | None = None,
    memory_limit: int | None = None,
    effort: str = "normal",
    validate: bool = True,
    min_fidelity: float | None = None,
    latency: bool | str = True,
    progress: Progress | None = None,
) -> Result:
    """Prune a model, prove that the removal is exact, and with ``data`` recover accuracy.

    Args:
        model: path, bytes or ModelProto; never changed.
        criterion: a name, see ``onnxprune.criteria.names()``, or a function from a slot (and its maps) to scores
            [channels]; some need ``data``. None: ``ziplm`` with data, else ``l2``.
        ratio: share of units to remove, 0 <= ratio < 1, rounded to counts that groups allow; None: 0.3, or
            no units where ``depth``, ``experts`` or ``vocabulary`` is given.
        depth: residual branches to remove as a whole, a number from 1 or the share of all, 0 < depth < 1: those whose
            removal changes the outputs on ``data`` least, see :class:`onnxprune.passes.Depth`; or ``"auto"``: as many
            as ``target`` is best met with. None: none.
        rotate: whether residual streams are turned to the principal directions of ``data`` first, so that pruned
            channels carry least: ``yes``, ``no``, or ``auto`` (default): if a trial at the same MACs is more
            faithful with it; not with ``quick`` effort, see :class:`onnxprune.passes.Rotate`.
        keep_cache: keep the inputs and outputs of caches in branches that ``depth`` removes, each output then equal to
            its input; False: they are removed as well.
        experts: experts to remove from every mixture, a number from 1 or a share, 0 < share < 1, never below the number
            that is chosen per token, see :class:`onnxprune.passes.Experts`. None: none.
        vocabulary: tokens to keep, the others leave embeddings and logits: ids, a text or JSON file of ids, ``"auto"``
            for those in ``data``, or {input: one of these}, see :class:`onnxprune.passes.Vocabulary`. None: all.
        keep_ids: let the inputs of a model with a smaller vocabulary take ids of the original; False.
        tokenizer: config.json, tokenizer.json or a folder with them: special tokens, which ``vocabulary`` must not
            drop; None: none are known.
        plan: a plan or its file, replayed instead of scoring; None: score.
        remove_dead: remove only units that change no output for any input, in place of a ratio, see
            :class:`onnxprune.passes.RemoveDead`; False.
        layers: {glob over node or weight names: ratio}, 0 <= ratio < 1; the last match applies. None: ``ratio``
            everywhere.
        include: globs; only groups with a node or weight of such a name are pruned. Empty: all groups.
        exclude: globs; no group with a node or weight of such a name is pruned. Empty: none is excluded.
        scope: ranking scope: the units of each group (``local``), of all groups (``global``), of groups of
            the same structure (``isomorphic``), or of all groups by SLAMP (``slamp``);
            ``auto`` (default): ``global`` under the default criterion with ``data``, else ``local``.
        policy: aggregation of the scores of a unit over several weights: ``sum`` (default), ``average``, ``max``,
            ``backward``.
        normalize: normalization of scores across weights: ``auto`` (default), ``mean``, ``none``, ``root``,
            ``standard``, ``tss``, ``linear``, ``softmax``, ``measured``.
        group_policy: constraint shared by the rows of a grid (heads, convolution groups): ``count`` (default), ``sum``,
            ``average``, ``none``.
        reshape_axis: axis of a grid to prune: cells of every row (``head_dim``, the default), whole rows (``heads``),
            ``both``.
        max_ratio: largest share of a group to remove, 0 < max_ratio <= 1; None: all but one unit, 0.9 where groups
            compete.
        cost: cost that divides the score of a unit: ``none``, ``macs``, ``params``, ``latency``; ``auto`` (default):
            ``macs`` under the default criterion with ``data``, else ``none``.
        round_to: keep a multiple of this many units per group where possible, 1 or more; auto: multiples that the
            kernels of the device like; auto.
        device: for auto: a name such as avx512, arm64 or tensorrt, a JSON file, or multiples; None for this machine.
        step: remove a multiple of this many units per group, 1 or more; 1.
        rounding: rounding of the counts that follow from ratios: ``nearest`` (default), ``up``, ``down``.
        steps: number of rounds of scoring and removing, each on the survivors of the last, 1 or more, with half of
            ``finetune`` between; 1.
        schedule: growth of the removed share over the steps: ``linear`` (default), ``exp``, ``cos``, ``cube``.
        approximate: also prune through normalisations, which is not exact; False.
        resize_io: globs over inputs and outputs of the model that may lose channels, both halves of a cache or none.
            Empty: all keep their sizes.
        cache_heads: let the inputs and outputs of all caches shrink, past and present alike; False.
        model_config: config.json or genai_config.json that came with the model: ``save`` writes it with the new sizes
            beside the result. None: none is written.
        target: a budget in place of a ratio: ``"macs=0.5"``, a list of such, or ``{"macs": 0.5, "size": "3MB"}``; kinds
            are ``macs``, ``params``, ``size``, ``latency`` and ``peak-memory``. None: no budget.
        max_drop: largest allowed drop of the metric, 0 or more; without a metric in percentage points of fidelity.
            Without targets, ratio, layers and plan the smallest model within it is searched for, else the result is
            checked. None: no limit.
        metric: function from the path of a model to a number, higher is better, or ``"script.py:function"``; None:
            fidelity.
        sensitivity: measured sensitivities of the groups, which then also decide the counts, or their file, or
            ``"measure"``; None: not used.
        jobs: processes to measure sensitivities in; -1: all processors; None: as ``joblib.parallel_config`` sets, else
            one.
        factorize: whether to factorize layers as well where that keeps more than pruning them; not for
            ``peak-memory``. None: with data, where pruning alone damages the model.
        trials: number of candidates to evaluate around the best solution, 0 or more; None: with a recovery about half a
            minute's work, else none.
        latency_table: times of another device, from :func:`profile`, or their file; None: measured on this machine.
        providers: onnxruntime providers for measurements of time; None: the CPU.
        threads: threads inside an operator for measurements of time, 1 or more; None: all processors.
        input_shapes: {input: shape} for dynamic inputs; None: sizes are inferred.
        data: inputs without labels for recovery, validation and criteria that need them: a .npz or .npy file, a folder
            of such or of images, an array or tensor, a mapping of input names to these, an iterable of these, such as
            a loader of (inputs, labels), whose labels are left out, or a reader with onnxruntime's
            ``CalibrationDataReader`` interface. None: seeded synthetic inputs for validation.
        samples: number of samples to use, 1 or more; None: up to 256 to validate, all for recovery and for criteria.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays; None: from the model's input.
        outputs: {output: kind}, such as ``"classes"`` or ``"boxes:1"`` with an axis, where fidelity should not decide
            by names, values and the graph; None: none.
        cache: folder of statistics, from which an interrupted or repeated run continues; None: not kept.
        seed: seed of all random numbers, 0 or more; 0.
        custom_op_libraries: shared libraries of custom operators, known to every session of onnxruntime. Empty: none.
        recover: mode of the closed-form recovery from ``data``: ``full``, ``lstsq``, ``bn``, ``bias`` or ``none``, see
            :class:`onnxprune.passes.Recover`; or ``datafree``, from synthetic inputs: weaker, with data only used for
            comparison. None: ``full`` with data and ``validate``, else ``none``. Every eighth batch is a hold-out for
            the reported fidelity.
        finetune: then train by gradients towards the original's outputs on ``data``: steps (500), time (``"3m"``), or
            True for 1,000 steps or 3 minutes, whichever ends first; kept only where it is better on the hold-out, see
            :class:`onnxprune.passes.Finetune`. None: with 512 samples or more as long as ``effort`` allows; False: no
            training.
        labels: labels of the samples in the order of ``data``, classes or values, or their .npy or .npz file: half of
            the loss of ``finetune`` is then on them, and criteria of gradients take their loss. None: without labels.
        augment: variants of images in ``finetune``, where they change the original's answers little: ``auto``,
            ``shift``, ``flip`` or ``none``.
        blocks: whether ``finetune`` trains one block of the model after the other: ``no`` (default), ``yes``, or
            ``auto``: with fewer than 512 samples both are tried, and the better one on the hold-out goes on.
        pattern_lock: whether zeros of weights stay 0 in recovery and fine-tuning; False lets them change; None as well,
            but then fine-tuning a model that holds a pattern of zeros is refused.
        quantize: then quantize to 8 bits: ``dynamic``, or ``qdq`` with ranges from ``data``, see
            :class:`onnxprune.passes.Quantize`; fidelity is that of the quantized model. None: not.
        memory_limit: bytes of activations to hold in memory at a time, 1,000,000 or more; None: 512 MiB.
        effort: bounds on the work of searches and recoveries: ``quick``, ``normal`` (default) or ``thorough``; the
            report lists the skipped stages.
        validate: run the checks; True.
        min_fidelity: smallest allowed fidelity: points, 1 < min_fidelity <= 100; or the cosine of each output with the
            original's, both centred per channel, 0 < min_fidelity <= 1; None: no limit.
        latency: measure latency, with ``"layers"`` also that of each layer, which pages colour by; True.
        progress: callback, called with (stage, fraction), fraction in [0, 1]; None: no calls.

    Returns:
        the pruned ``model``, ``plan`` and ``report``; ``save`` writes them.

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input, 3 model not processable, 4 validation failed, 5 nothing to
            prune, or a budget or gate that is not met.

    Example:
        ::

            result = onnxprune.prune("model.onnx", ratio=0.3, data="calibration.npz")
            result.save("small.onnx")
    """
    options, run = record_of(Options, locals()), record_of(RunSettings, locals())
    amounts = {"target": target, "max_drop": max_drop, "ratio": ratio, "plan": plan, "layers": layers}
    searches = has_budget({**amounts, "remove_dead": remove_dead})
    quality = (metric, max_drop) if searches else (None, None)
    gates = target, min_fidelity, *quality, latency_table, sensitivity, jobs
    spec = BudgetSpec.of(*gates, factorize=factorize, trials=trials, quantize=quantize)
    mode_and_reason = mode, reason = settle_mode(recover, data is not None, validate)
    common = {"approximate": approximate, **options.arguments}
    _check_depth(depth, spec, keep_cache)
    first: Any
    if remove_dead:
        patterns = {"include": include or None, "exclude": exclude or None}
        check_dead_alone({**amounts, **patterns, "criterion": criterion, "depth": depth, "max_drop": None})
        first, mode_and_reason = RemoveDead(check=validate), ("none", "nothing is lost")
    elif spec.any:
        _alone(ratio, plan)
        gated = min_fidelity is not None or max_drop is not None or metric is not None
        spec = replace(spec, must_run=validate or gated or data is not None)
        first = Budget(spec, criterion, recover=mode, why=reason, shorter=depth == "auto", **common)
    else:
        share = default("ratio") if ratio is None else ratio
        judges = criterion is None and plan is None and validate and mode_and_reason == ("full", "data was given")
        first = (PruneByTrial if judges else Prune)(criterion, share, plan=plan, **common)
    which = {"include": include, "exclude": exclude, "keep_cache": keep_cache}
    tuned = _finetuning(finetune, labels, augment, blocks)
    if isinstance(first, Prune) and plan is None:
        tuned, between = _split(tuned, steps)
        first = replace(first, between=between)
    shorter = _shortening(depth, first, validate, which)
    expert_pass = _experts(experts, first, validate, {"include": include, "exclude": exclude})
    words = _vocabulary(vocabulary, keep_ids, tokenizer, first, validate)
    is_request = ratio is not None or layers or spec.any or remove_dead
    if (shorter or words or expert_pass) and not (is_request or _lists_more(first.replayed)):
        first = None
    _check_labels(labels, first, tuned)
    by_default = finetune is None and mode_and_reason == ("full", "data was given")
    trained = [ShortFinetune(augment, blocks)] if by_default else tuned
    locks = _locking(pattern_lock, mode_and_reason[0], tuned)
    later = [*trained, *_quantizing(quantize)]
    turned = _rotation(rotate, first, mode, data is not None and validate and effort != "quick", spec)
    stages = [
        *turned,
        *locks,
        *shorter,
        *expert_pass,
        *_stages(first, mode_and_reason, validate, validate and latency, later),
    ]
    if words and first is None and not (shorter or expert_pass):
        stages = [*_quantizing(quantize), Validate(exact=False, faithful=False, timed=False)]  # nothing is lost
    stages = [*words, *stages]
    stages = [Flush(), *stages] if remove_dead else stages  # what is next to 0 may be all that a unit has
    judged = not searches or quantize is not None  # a search judges models before they are quantized
    result = Pipeline([*stages, *_measures(metric)] if judged else stages).execute(model, run)
    if spec.any:
        _warn_of_targets_met_before(result.report)
    _warn_of_no_gain(result.report)
    _check_quantized_costs(result.report)
    if judged:
        _check_quality(result, min_fidelity, max_drop)
    return result


LAST = 0.5
"""Share of a fine-tuning that comes behind the last of several steps; the others share the rest evenly."""


def _warn_of_targets_met_before(report: Report) -> None:
    """Warn of every target that asks for nothing: a run that changes nothing must not look like a success."""
    for target in report.budget.targets if report.budget is not None else ():
        if target.met_before and target.limit != target.before:
            original = Target(target.kind, target.before, absolute=True)
            report.warnings.append(f"{target.asked} was met before pruning: the original has {original}")


def _check_quantized_costs(report: Report) -> None:
    """Check the size of a quantized file against its target, and warn of targets that the float model met.

    Raises:
        BudgetError: the file is larger than the target allows.
    """
    if report.quantization is None or report.budget is None:
        return
    targets = {target.kind: target for target in report.budget.targets}
    size = targets.get("size")
    if size is not None:
        size.after = float(report.totals.bytes_after)
        if size.after > size.limit * (1 + tolerance("size")):
            best = Target("size", size.after, absolute=True)
            raise BudgetError(
                f"{size.asked} was not met: the quantized file has {best}.",
                hint=f"Nothing was written. Ask for less, or drop {argument('quantize')}.",
            )
    float_kinds = [kind for kind, target in targets.items() if kind == "peak-memory" or target.how == "predicted"]
    if float_kinds:
        what = f"{argument('target')} {' and '.join(sorted(float_kinds))}"
        report.warnings.append(Note(f"{what}: met by the float model; {argument('quantize')} came after it"))


def _warn_of_no_gain(report: Report) -> None:
    """Warn of a result that does less work and is not faster, with options that would make it so."""
    timed, sums = report.latency, report.totals
    if timed is None or timed.speed_verdict == "faster" or sums.macs_after >= sums.macs_before:
        return
    low, high = timed.speedup_interval or (timed.speedup, timed.speedup)
    times = f"{timed.speedup:.2f} times as fast ({low:.2f} to {high:.2f})"
    what = "less work but slower" if timed.speed_verdict == "slower" else "less work, but no gain in speed was measured"
    rounded = report.settings.get("round_to", "auto") == "auto"
    targets = report.budget.targets if report.budget is not None else ()
    if not rounded:
        advice = f"; {argument('round_to', 'auto')} keeps the numbers of channels that kernels here take at a time"
    elif any(target.kind == "latency" for target in targets):
        advice = ""
    else:
        advice = f"; {argument('target', 'latency=0.8')} chooses the numbers of channels by times measured here"
    report.warnings.append(Note(f"{what}: {times}{advice}"))


def _stages(
    cut: Any, mode_and_reason: tuple[str, str], validate: bool, timed: bool | str, later: Sequence[Any] = ()
) -> list[Any]:
    """Return the passes of a run: pruning, checks before the recovery, and a recovery if pruning does none."""
    plan = cut.replayed if isinstance(cut, Prune) else None
    factors = [Factorize(plan=plan, check=validate)] if _factorizes(plan) else []
    changed = mode_and_reason[0] != "none" or factors or isinstance(cut, Budget) or later
    exact = [Exact()] if validate and changed else []
    repair = [] if isinstance(cut, Budget) else [Recover(mode_and_reason[0], why=mode_and_reason[1])]
    check = Validate(exact=validate, faithful=validate, timed=timed)
    first = [] if cut is None else [cut]
    return [*first, Flush(), *exact, *factors, *repair, *later, check]


def _check_depth(depth: float | str | None, spec: BudgetSpec, keep_cache: bool) -> None:
    """Reject arguments that a number of branches chosen by a budget excludes; raises UsageError."""
    if depth == "auto" and not spec.targets:
        raise UsageError(
            f"{argument('depth', 'auto')} needs a target",
            hint=f"Give {argument('target')}, such as macs=0.5, or a number of branches.",
        )
    if depth == "auto" and keep_cache:
        raise UsageError(
            f"{argument('keep_cache')} has no meaning with {argument('depth', 'auto')}",
            hint="Give a number of branches.",
        )


def _shortening(depth: float | str | None, first: Any, validate: bool, which: dict[str, Any]) -> list[Depth]:
    """Return the removal of branches that was asked for, if any."""
    plan = first.replayed if isinstance(first, Prune) else None
    if plan is not None and plan.branches:
        return [Depth(plan=plan, check=validate)]
    return [] if depth is None or isinstance(depth, str) else [Depth(depth, check=validate, **which)]


def _experts(amount: float | None, first: Any, validate: bool, which: dict[str, Any]) -> list[Experts]:
    """Return the removal of experts that was asked for, if any; raises UsageError beside a budget."""
    plan = first.replayed if isinstance(first, Prune) else None
    if plan is not None and plan.experts:
        return [Experts(plan=plan, check=validate)]
    if amount is not None and not isinstance(first, Prune):
        raise UsageError(
            f"{argument('experts', amount)} sets how much to remove, and so does a budget or {argument('remove_dead')}",
            hint="Remove experts first, and give the result to a second run.",
        )
    return [] if amount is None else [Experts(amount, check=validate, **which)]


def _vocabulary(
    tokens: Any, keep_ids: bool, tokenizer: str | Path | None, first: Any, validate: bool
) -> list[Vocabulary]:
    """Return the removal of tokens that was asked for, if any."""
    plan = first.replayed if isinstance(first, Prune) else None
    if plan is not None and plan.vocabulary is not None:
        return [Vocabulary(plan=plan, tokenizer=tokenizer, check=validate)]
    if tokens is None:
        return []
    return [Vocabulary(tokens, keep_ids=keep_ids, tokenizer=tokenizer, check=validate)]


def _rotation(mode: str, first: Any, recover: str, can_try: bool, spec: BudgetSpec) -> list[Rotate]:
    """Return the rotation of streams that was asked for, or that is tried by default, if any."""
    if isinstance(first, Prune) and first.replayed is not None:
        return [Rotate(plan=first.replayed)] if first.replayed.rotations else []
    if mode == "yes":
        return [Rotate("yes")]
    if mode == "no" or not can_try or not isinstance(first, (Prune, Budget)):
        return []
    shares = [target.value for target in spec.targets if target.kind == "macs" and not target.absolute]
    trial = first if isinstance(first, Prune) else Prune(first.criterion, **first.arguments)
    return [Rotate("auto", trial=trial, share=min(shares, default=None), recover=recover)]


def _lists_more(plan: Plan | None) -> bool:
    """Return whether a plan lists more than branches."""
    return plan is not None and bool(plan.groups or plan.factorized)


def _finetuning(
    effort: int | str | bool | None, labels: Any, augment: str = "auto", blocks: str = "no"
) -> list[Finetune]:
    """Return the training that was asked for, if any."""
    return [] if effort in (None, False, "none") else [Finetune(effort, labels=labels, augment=augment, blocks=blocks)]


def _quantizing(mode: str | None) -> list[Quantize]:
    """Return the quantization that was asked for, if any."""
    return [] if mode is None else [Quantize(mode)]


def _split(tuned: Sequence[Finetune], steps: int) -> tuple[list[Finetune], list[Finetune]]:
    """Return the training behind the last of several steps, and that between any two."""
    if steps == 1:
        return [*tuned], []
    return [t.part(LAST) for t in tuned], [t.part((1 - LAST) / (steps - 1)) for t in tuned]


def _locking(lock: bool | None, recover: str, tuned: Sequence[Finetune]) -> list[LockZeros]:
    """Return the pass that keeps zeros, or looks whether there are any that would be lost."""
    changes = recover != "none" or bool(tuned)
    return [LockZeros(lock, trained=bool(tuned))] if changes and lock is not False else []


def _check_labels(labels: Any, first: Any, tuned: Sequence[Finetune]) -> None:
    """Refuse labels that nothing reads; raises UsageError."""
    criterion = getattr(first, "criterion", None)
    criterion = get(criterion) if isinstance(criterion, str) else criterion
    scores_gradients = criterion is not None and set(needs_of(criterion)) & set(GRADIENTS)
    if labels is not None and not tuned and not scores_gradients:
        raise _unread_labels()


def _unread_labels() -> UsageError:
    """Return the error of labels that nothing reads."""
    return UsageError(
        f"{argument('labels')} says what to learn, but neither {argument('finetune')} nor a criterion of gradients "
        "uses it",
        hint=f"Give {argument('finetune')}, or {argument('criterion', 'taylor')}.",
    )


def _factorizes(plan: Plan | None) -> bool:
    return plan is not None and bool(plan.factorized)


def _alone(ratio: float | None, plan: Any) -> None:
    """Reject a ratio or a plan beside a budget; raises UsageError."""
    for name, value in (("ratio", ratio), ("plan", plan)):
        if value is not None:
            raise UsageError(
                f"a budget and {argument(name)} were both given, but each sets how much to remove",
                hint="Drop one of the two: a budget allocates by itself.",
            )


def _check_quality(result: Result, min_fidelity: float | None, max_drop: float | None) -> None:
    """Check the gates of a run without a budget; raises BudgetError where one is not met or not measured."""
    facts, metric = result.report.fidelity, result.report.metric
    measured = metric is not None or (facts is not None and facts.outputs)
    advice = f"Give {argument('data')}, and drop {argument('validate', False)}."
    hint = f"Prune less: lower {argument('ratio')}." if measured else advice
    check_gates(result.report, min_fidelity=min_fidelity, max_drop=max_drop, hint=hint)


@called("recover")
@with_custom_ops
def recover(
    original: ModelSource,
    cut: ModelSource,
    *,
    plan: Plan | str | Path,
    data: Any = None,
    recover: str = "full",
    finetune: int | str | bool | None = None,
    labels: Any = None,
    augment: str = "auto",
    blocks: str = "no",
    pattern_lock: bool | None = None,
    quantize: str | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    outputs: Mapping[str, str] | None = None,
    metric: str | Metric | None = None,
    max_drop: float | None = None,
    min_fidelity: float | None = None,
    memory_limit: int | None = None,
    effort: str = "normal",
    cache: str | Path | None = None,
    seed: int = 0,
    custom_op_libraries: Sequence[str | Path] = (),
    approximate: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Recover the accuracy of a pruned model, in closed form, from the outputs of its original.

    Args:
        original: the model before pruning: path, bytes or ModelProto; never changed.
        cut: the pruned model, with its weights as pruned or trained further: path, bytes or ModelProto; never changed.
        plan: the plan that was saved with the pruned model, or its file.
        data: inputs without labels, as for :func:`prune`; None only with ``datafree``.
        recover: mode of the recovery: ``full`` (default), ``lstsq``, ``bn``, ``bias`` or ``datafree``.
        finetune: then train by gradients towards the original's outputs on ``data``: steps (500), time (``"3m"``), or
            True for 1,000 steps or 3 minutes, whichever ends first; kept only where it is better on the hold-out, see
            :class:`onnxprune.passes.Finetune`. None: no training.
        labels: labels of the samples in the order of ``data``, classes or values, or their .npy or .npz file: half of
            the loss of ``finetune`` is then on them. None: without labels.
        augment: variants of images in ``finetune``, where they change the original's answers little: ``auto``,
            ``shift``, ``flip`` or ``none``.
        blocks: whether ``finetune`` trains one block of the model after the other: ``no`` (default), ``yes``, or
            ``auto``: with fewer than 512 samples both are tried, and the better one on the hold-out goes on.
        pattern_lock: whether zeros of weights stay 0 in recovery and fine-tuning; False lets them change; None as well,
            but then fine-tuning a model that holds a pattern of zeros is refused.
        input_shapes: {input: shape} for dynamic inputs; None: sizes are inferred.
        samples: number of samples to use, 1 or more; None: all.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays; None: from the model's input.
        outputs: {output: kind}, such as ``"classes"`` or ``"boxes:1"`` with an axis, where fidelity should not decide
            by names, values and the graph; None: none.
        metric: function from the path of a model to a number, higher is better, or ``"script.py:function"``; None:
            fidelity.
        max_drop: largest allowed drop of the metric, 0 or more; without a metric in points of fidelity; None: no limit.
        min_fidelity: smallest allowed fidelity: points, 1 < min_fidelity <= 100; or the cosine of each output with the
            original's, both centred per channel, 0 < min_fidelity <= 1; None: no limit.
        quantize: then quantize to 8 bits: ``dynamic``, or ``qdq`` with ranges from ``data``, see
            :class:`onnxprune.passes.Quantize`; fidelity is that of the quantized model. None: not.
        memory_limit: bytes of activations to hold in memory at a time, 1,000,000 or more; None: 512 MiB.
        effort: bounds on the work of searches and recoveries: ``quick``, ``normal`` (default) or ``thorough``; the
            report lists the skipped stages.
        cache: folder of statistics, from which an interrupted or repeated run continues; None: not kept.
        seed: seed of all random numbers, 0 or more; 0.
        custom_op_libraries: shared libraries of custom operators, known to every session of onnxruntime. Empty: none.
        approximate: whether the model was pruned with ``approximate``; False.
        progress: callback, called with (stage, fraction), fraction in [0, 1]; None: no calls.

    Returns:
        the recovered ``model`` and ``report``; ``save`` writes them.

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input or a plan that does not lead from one model to the other, 3
            model not processable, 4 the result is not a valid model, 5 a gate that is not met.

    Example:
        ::

            result = onnxprune.recover("model.onnx", "small.onnx", plan="small.plan.json", data="calibration.npz")
            result.save("recovered.onnx")
    """
    run = record_of(RunSettings, locals())
    if data is None and check_mode(recover) != "datafree":
        raise no_data(recover)
    take, check = Adopt(cut, plan, approximate=approximate), Validate(exact=False, timed=False)
    tuned = _finetuning(finetune, labels, augment, blocks)
    locks = _locking(pattern_lock, recover, tuned)
    rotations = [Rotate(plan=take.plan)] if take.plan.rotations else []
    stages = [
        *rotations,
        take,
        Flush(),
        *locks,
        Recover(recover),
        *tuned,
        *_quantizing(quantize),
        check,
        *_measures(metric),
    ]
    result = Pipeline(stages).execute(original, run)
    check_gates(result.report, min_fidelity=min_fidelity, max_drop=max_drop)
    return result


def _measures(metric: str | Metric | None) -> list[MeasureMetric]:
    """Return the pass that measures a metric, if there is one."""
    function = load_metric(metric) if isinstance(metric, str) else metric
    return [] if function is None else [MeasureMetric(function)]


@called("recover")
@with_custom_ops
def finetune(
    original: ModelSource,
    cut: ModelSource,
    *,
    plan: Plan | str | Path,
    data: Any,
    finetune: int | str | bool = True,
    labels: Any = None,
    augment: str = "auto",
    blocks: str = "no",
    pattern_lock: bool | None = None,
    quantize: str | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    outputs: Mapping[str, str] | None = None,
    metric: str | Metric | None = None,
    max_drop: float | None = None,
    min_fidelity: float | None = None,
    cache: str | Path | None = None,
    memory_limit: int | None = None,
    seed: int = 0,
    custom_op_libraries: Sequence[str | Path] = (),
    approximate: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Train a pruned model by gradients, as it is, to answer as its original does; no closed-form recovery comes first.

    Args:
        original: the model before pruning: path, bytes or ModelProto; never changed.
        cut: the pruned model, with its weights as pruned or trained further: path, bytes or ModelProto; never changed.
        plan: the plan that was saved with the pruned model, or its file.
        data: inputs, as for :func:`prune`; 64 samples or more, 512 or more do well.
        finetune: steps (500), time (``"3m"``), or True for 1,000 steps or 3 minutes, whichever ends first.
        labels: labels of the samples in the order of ``data``, classes or values, or their .npy or .npz file; None:
            distillation alone.
        augment: variants of images, where they change the original's answers little: ``auto``, ``shift``, ``flip`` or
            ``none``.
        blocks: whether one block of the model is trained after the other: ``no`` (default), ``yes``, or ``auto``: with
            fewer than 512 samples both are tried, and the better one on the hold-out goes on.
        pattern_lock: whether zeros of weights stay 0; False lets them change; None as well, but then a model that holds
            a pattern of zeros is refused.
        quantize: then quantize to 8 bits: ``dynamic``, or ``qdq`` with ranges from ``data``, see
            :class:`onnxprune.passes.Quantize`; fidelity is that of the quantized model. None: not.
        input_shapes: {input: shape} for dynamic inputs; None: sizes are inferred.
        samples: number of samples to use, 1 or more; None: all.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays; None: from the model's input.
        outputs: {output: kind}, such as ``"classes"`` or ``"boxes:1"`` with an axis, where fidelity should not decide
            by names, values and the graph; None: none.
        metric: function from the path of a model to a number, higher is better, or ``"script.py:function"``; None:
            fidelity.
        max_drop: largest allowed drop of the metric, 0 or more; without a metric in points of fidelity; None: no limit.
        min_fidelity: smallest allowed fidelity: points, 1 < min_fidelity <= 100; or the cosine of each output with the
            original's, both centred per channel, 0 < min_fidelity <= 1; None: no limit.
        cache: folder from which a training that was interrupted goes on, on the same data; None: not kept.
        memory_limit: bytes of activations to hold in memory at a time, 1,000,000 or more; None: 512 MiB.
        seed: seed of all random numbers, 0 or more; 0.
        custom_op_libraries: shared libraries of custom operators, known to every session of onnxruntime. Empty: none.
        approximate: whether the model was pruned with ``approximate``; False.
        progress: callback, called with (stage, fraction), fraction in [0, 1]; None: no calls.

    Returns:
        the trained ``model`` and ``report``; ``save`` writes them. Where training brought nothing on the hold-out, the
        model has the weights that it came with.

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input, 3 model not processable, 5 a gate that is not met.
    """
    run = record_of(RunSettings, locals())
    take, check = Adopt(cut, plan, approximate=approximate), Validate(exact=False, timed=False)
    rotations = [Rotate(plan=take.plan)] if take.plan.rotations else []
    tuned = Finetune(finetune, labels=labels, augment=augment, blocks=blocks)
    locks = _locking(pattern_lock, "none", [tuned])
    stages = [*rotations, take, Flush(), *locks, tuned, *_quantizing(quantize), check, *_measures(metric)]
    result = Pipeline(stages).execute(original, run)
    check_gates(result.report, min_fidelity=min_fidelity, max_drop=max_drop)
    return result


@called("factorize")
@with_custom_ops
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
    outputs: Mapping[str, str] | None = None,
    metric: str | Metric | None = None,
    max_drop: float | None = None,
    min_fidelity: float | None = None,
    recover: str | None = None,
    finetune: int | str | bool | None = None,
    labels: Any = None,
    augment: str = "auto",
    blocks: str = "no",
    pattern_lock: bool | None = None,
    quantize: str | None = None,
    memory_limit: int | None = None,
    seed: int = 0,
    custom_op_libraries: Sequence[str | Path] = (),
    validate: bool = True,
    latency: bool | str = True,
    progress: Progress | None = None,
) -> Result:
    """Factorize layers into products of smaller ones, check the products, and with ``data`` recover accuracy.

    Args:
        model: path, bytes or ModelProto; never changed.
        method: ``svd``, ``tucker``, ``cp``, ``spatial-svd``, or ``auto`` (default): per layer the method with the least
            error for its saving, under one budget for the whole model.
        ratio: share of the cost to save, 0 < ratio < 1; None: 0.3 where no other argument sets the ranks.
        rank: ranks in place of a ratio: a number, one per mode, or {glob: either}; 0 leaves a mode whole. None: not
            used.
        energy: share of every mode's energy to keep in place of a ratio, 0 < energy <= 1; None: not used.
        vbmf: ranks by variational Bayesian matrix factorization in place of a ratio, shifted by -1 <= vbmf <= 1 towards
            full rank (1) or rank 0 (-1); None: not used.
        layers: {glob over node or weight names: ratio}, 0 < ratio < 1; the last match applies. None: ``ratio``
            everywhere.
        include: globs; only layers with such a name are factorized. Empty: all layers.
        exclude: globs; no layer with such a name is factorized. Empty: none is excluded.
        round_to: ranks are multiples of this, 1 or more; 1.
        scope: ``local``: the ratio holds for every layer; ``global``: for the whole model. None: global for ``auto``.
        cost: cost to which the ratio refers, ``macs`` (default) or ``params``.
        timed: ``auto`` leaves layers whole that do not get faster, as measured; True.
        plan: a plan or its file, replayed instead of choosing ranks; None: choose.
        input_shapes: {input: shape} for dynamic inputs; None: sizes are inferred.
        data: inputs without labels, as for :func:`prune`: errors are then measured at the layers' outputs, and the
            remaining error is recovered. None: errors of the weights.
        samples: number of samples to use, 1 or more; None: up to 256 to validate, all for recovery and for criteria.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays; None: from the model's input.
        outputs: {output: kind}, such as ``"classes"`` or ``"boxes:1"`` with an axis, where fidelity should not decide
            by names, values and the graph; None: none.
        metric: function from the path of a model to a number, higher is better, or ``"script.py:function"``; None:
            fidelity.
        max_drop: largest allowed drop of the metric, 0 or more; without a metric in points of fidelity; None: no limit.
        min_fidelity: smallest allowed fidelity: points, 1 < min_fidelity <= 100; or the cosine of each output with the
            original's, both centred per channel, 0 < min_fidelity <= 1; None: no limit.
        recover: mode of the closed-form recovery from ``data``: ``full``, ``lstsq``, ``bn``, ``bias`` or ``none``, see
            :class:`onnxprune.passes.Recover`; or ``datafree``, from synthetic inputs: weaker, with data only used for
            comparison. None: ``full`` with data and ``validate``, else ``none``. Every eighth batch is a hold-out for
            the reported fidelity.
        finetune: then train by gradients towards the original's outputs on ``data``: steps (500), time (``"3m"``), or
            True for 1,000 steps or 3 minutes, whichever ends first; kept only where it is better on the hold-out, see
            :class:`onnxprune.passes.Finetune`. None: no training.
        labels: labels of the samples in the order of ``data``, classes or values, or their .npy or .npz file: half of
            the loss of ``finetune`` is then on them. None: without labels.
        augment: variants of images in ``finetune``, where they change the original's answers little: ``auto``,
            ``shift``, ``flip`` or ``none``.
        blocks: whether ``finetune`` trains one block of the model after the other: ``no`` (default), ``yes``, or
            ``auto``: with fewer than 512 samples both are tried, and the better one on the hold-out goes on.
        pattern_lock: whether zeros of weights stay 0 in recovery and fine-tuning; False lets them change; None as well,
            but then fine-tuning a model that holds a pattern of zeros is refused.
        quantize: then quantize to 8 bits: ``dynamic``, or ``qdq`` with ranges from ``data``, see
            :class:`onnxprune.passes.Quantize`; fidelity is that of the quantized model. None: not.
        memory_limit: bytes of activations to hold in memory at a time, 1,000,000 or more; None: 512 MiB.
        seed: seed of all random numbers, 0 or more; 0.
        custom_op_libraries: shared libraries of custom operators, known to every session of onnxruntime. Empty: none.
        validate: run the checks; True.
        latency: measure latency, with ``"layers"`` also that of each layer, which pages colour by; True.
        progress: callback, called with (stage, fraction), fraction in [0, 1]; None: no calls.

    Returns:
        the factorized ``model``, ``plan`` and ``report``; ``save`` writes them.

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input, 3 model not processable, 4 validation failed, 5 nothing to
            factorize, a ratio that no rank reaches, nothing that gets faster, or a gate that is not met.

    Example:
        ::

            result = onnxprune.factorize("model.onnx", method="svd", ratio=0.5)
            result.save("small.onnx")
    """
    options, run = record_of(FactorOptions, locals()), record_of(RunSettings, locals())
    mode, reason = settle_mode(recover, data is not None, validate)
    plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    if plan is not None and plan.groups:
        raise UsageError(
            "This plan removes channels as well, but factorize changes layers only",
            hint="Apply it with onnxprune.prune(plan=...), or 'onnxprune MODEL --apply-plan FILE'.",
        )
    take = Factorize(method, plan=plan, check=validate, **options.arguments)
    check = Validate(exact=False, faithful=validate, timed=validate and latency)
    tuned = _finetuning(finetune, labels, augment, blocks)
    locks = _locking(pattern_lock, mode, tuned)
    later = [*tuned, *_quantizing(quantize)]
    stages = [Flush(), *locks, take, Recover(mode, why=reason), *later, check, *_measures(metric)]
    result = Pipeline(stages).execute(model, run)
    check_gates(result.report, min_fidelity=min_fidelity, max_drop=max_drop)
    return result


@called("sparsify")
@with_custom_ops
def sparsify(
    model: ModelSource,
    *,
    pattern: str = "unstructured",
    ratio: float | None = None,
    energy: float | None = None,
    criterion: str | None = None,
    layers: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scope: str = "local",
    steps: int = 1,
    schedule: str = "linear",
    progressive: str = "none",
    remove_dead: bool = True,
    device: str | Kernels | None = None,
    storage: str = "dense",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    outputs: Mapping[str, str] | None = None,
    metric: str | Metric | None = None,
    max_drop: float | None = None,
    min_fidelity: float | None = None,
    recover: str | None = None,
    finetune: int | str | bool | None = None,
    labels: Any = None,
    augment: str = "auto",
    blocks: str = "no",
    pattern_lock: bool = True,
    quantize: str | None = None,
    memory_limit: int | None = None,
    seed: int = 0,
    custom_op_libraries: Sequence[str | Path] = (),
    validate: bool = True,
    latency: bool | str = True,
    progress: Progress | None = None,
) -> Result:
    """Set single weights to 0 in a pattern, update the others, and with ``data`` recover accuracy within the pattern.

    Shapes stay as they are. Zeros make a model faster only on devices with kernels for their pattern, see
    docs/methods/sparsify.md; everywhere they make it smaller when compressed.

    Args:
        model: path, bytes or ModelProto; never changed.
        pattern: where zeros lie: ``unstructured`` (default), N:M such as ``2:4`` (of every M neighbouring input
            channels N stay), or blocks NxM such as ``4x1`` (N outputs, M input channels).
        ratio: share of weights to set to 0, 0 < ratio < 1; None: 0.5 where neither the pattern nor ``energy`` sets it.
        energy: in place of a ratio: as many zeros per layer as leave this share of its scores, 0 < energy <= 1; None:
            not used.
        criterion: how single weights are scored: ``magnitude``, ``wanda``, ``obs``, ``gradient``, ``snip``,
            ``snip-momentum`` or ``taylor``; ``obs`` also updates the weights that stay. None: ``obs`` with data, else
            ``magnitude``.
        layers: {glob over node or weight names: ratio}, 0 < ratio < 1; the last match applies, also to layers that are
            left out otherwise. None: ``ratio`` everywhere.
        include: globs; only layers with such a name become sparse, also those that are left out otherwise. Empty: all
            but the first and last, depthwise, embeddings and small ones.
        exclude: globs; no layer with such a name becomes sparse. Empty: none is excluded.
        scope: ``local`` (default): the ratio holds for every layer; ``global``: the weights of all layers compete by
            their shares of their layers' scores.
        steps: number of rounds of scoring and setting zeros, 1 or more, with half of ``finetune`` between; 1.
        schedule: growth of the share of zeros over the steps: ``linear`` (default), ``exp``, ``cos``, ``cube``.
        progressive: how blocks of a pattern NxM become 0 over 2 steps or more: ``weights``: half of their weights
            first, those of the lowest scores; ``blocks``: half of them first, as smaller blocks; the
            others one step later; ``none`` (default): all at once.
        remove_dead: remove units that lose all of their weights, see :class:`onnxprune.passes.RemoveDead`; not under
            N:M and blocks, which would then lie elsewhere; True.
        device: where the result is to run, for a warning where zeros in this pattern are worth nothing; None for this
            machine.
        storage: ``dense`` (default), or ``sparse``: tensors that are smaller so become sparse initializers.
        input_shapes: {input: shape} for dynamic inputs; None: sizes are inferred.
        data: inputs without labels, as for :func:`prune`: weights are then scored by their activations, and
            the remaining error is recovered. None: scores of the weights alone.
        samples: number of samples to use, 1 or more; None: up to 256 to validate, all for recovery and for criteria.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays; None: from the model's input.
        outputs: {output: kind}, such as ``"classes"`` or ``"boxes:1"`` with an axis, where fidelity should not decide
            by names, values and the graph; None: none.
        metric: function from the path of a model to a number, higher is better, or ``"script.py:function"``; None:
            fidelity.
        max_drop: largest allowed drop of the metric, 0 or more; without a metric in points of fidelity; None: no limit.
        min_fidelity: smallest allowed fidelity: points, 1 < min_fidelity <= 100; or the cosine of each output with the
            original's, both centred per channel, 0 < min_fidelity <= 1; None: no limit.
        recover: mode of the closed-form recovery from ``data``: ``full``, ``lstsq``, ``bn``, ``bias`` or ``none``, see
            :class:`onnxprune.passes.Recover`; or ``datafree``, from synthetic inputs: weaker, with data only used for
            comparison. None: ``full`` with data and ``validate``, else ``none``. Zeros stay 0.
        finetune: then train by gradients towards the original's outputs on ``data``: steps (500), time (``"3m"``), or
            True for 1,000 steps or 3 minutes, whichever ends first; kept only where it is better on the hold-out, see
            :class:`onnxprune.passes.Finetune`. Zeros stay 0. None: no training.
        labels: labels of the samples in the order of ``data``, classes or values, or their .npy or .npz file: half of
            the loss of ``finetune`` is then on them, and criteria of gradients take their loss. None: without labels.
        augment: variants of images in ``finetune``, where they change the original's answers little: ``auto``,
            ``shift``, ``flip`` or ``none``.
        blocks: whether ``finetune`` trains one block of the model after the other: ``no`` (default), ``yes``, or
            ``auto``: with fewer than 512 samples both are tried, and the better one on the hold-out goes on.
        pattern_lock: whether zeros stay 0 in recovery and fine-tuning, which are refused otherwise; True.
        quantize: then quantize to 8 bits: ``dynamic``, or ``qdq`` with ranges from ``data``, see
            :class:`onnxprune.passes.Quantize`; fidelity is that of the quantized model. None: not.
        memory_limit: bytes of activations to hold in memory at a time, 1,000,000 or more; None: 512 MiB.
        seed: seed of all random numbers, 0 or more; 0.
        custom_op_libraries: shared libraries of custom operators, known to every session of onnxruntime. Empty: none.
        validate: run the checks; True.
        latency: measure latency, with ``"layers"`` also that of each layer, which pages colour by; True.
        progress: callback, called with (stage, fraction), fraction in [0, 1]; None: no calls.

    Returns:
        the sparse ``model``, and ``report`` with the pattern and the zeros of every layer; ``save`` writes them.

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input, 3 model not processable, 4 validation failed, 5 no layer
            that can become sparse, or a gate that is not met.

    Example:
        ::

            result = onnxprune.sparsify("model.onnx", pattern="2:4", data="calibration.npz")
            result.save("sparse.onnx")
    """
    options, run = record_of(SparseOptions, locals()), record_of(RunSettings, locals())
    mode, reason = settle_mode(recover, data is not None, validate)
    tuned = _finetuning(finetune, labels, augment, blocks)
    if not pattern_lock and (mode != "none" or tuned):
        what = argument("finetune") if tuned else argument("recover", mode)
        raise UsageError(
            f"{argument('pattern_lock', False)} lets {what} fill the zeros that this run makes.",
            hint=f"Drop it, or give {argument('recover', 'none')} and no {argument('finetune')}.",
        )
    if quantize is not None and storage == "sparse":
        raise UsageError(
            f"{argument('storage', 'sparse')} has no meaning with {argument('quantize')}, which stores codes",
            hint="Drop one of the two.",
        )
    tuned, between = _split(tuned, steps)
    take, store = Sparsify(pattern, between=between, **options.arguments), StoreZeros(storage, device)
    by = take.request.scored_by(data is not None)
    if labels is not None and not tuned and by not in GRADIENT_SCORES:
        raise _unread_labels()
    check = Validate(exact=False, faithful=validate, timed=validate and latency)
    dead = [RemoveDead(check=validate)] if remove_dead and take.request.shape.is_plain else []
    last = [store, *_quantizing(quantize), check, *_measures(metric)]
    stages = [Flush(), take, *dead, Recover(mode, why=reason), *tuned, *last]
    result = Pipeline(stages).execute(model, run)
    check_gates(result.report, min_fidelity=min_fidelity, max_drop=max_drop)
    return result


PENALIZED = 0.6
"""Share of a training with a penalty; the rest comes behind the removal."""


@called("train")
@with_custom_ops
def train(
    model: ModelSource,
    *,
    data: Any = None,
    regularize: str = "group-lasso",
    groups: str = "unit",
    ratio: float | None = None,
    strength: float | None = None,
    threshold: float | None = None,
    finetune: int | str | bool | None = None,
    labels: Any = None,
    remove_dead: bool = True,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    outputs: Mapping[str, str] | None = None,
    metric: str | Metric | None = None,
    max_drop: float | None = None,
    min_fidelity: float | None = None,
    cache: str | Path | None = None,
    memory_limit: int | None = None,
    seed: int = 0,
    custom_op_libraries: Sequence[str | Path] = (),
    latency: bool | str = True,
    progress: Progress | None = None,
) -> Result:
    """Train a model with a penalty that brings whole units to 0, remove these exactly, and train on without it.

    Args:
        model: path, bytes or ModelProto; never changed.
        data: inputs, as for :func:`prune`; 64 samples or more, 512 or more do well.
        regularize: penalty: ``group-lasso`` (default), ``slimming`` or ``l1-mask``, see
            :class:`onnxprune.passes.Regularize`.
        groups: weights that a group of ``group-lasso`` consists of: ``unit`` (default), ``filter``, ``channel`` or
            ``shape``.
        ratio: share of the units to bring to 0, 0 < ratio < 1; None: 0.3 where there is no strength.
        strength: fixed strength of the penalty, above 0, in place of one that follows from the ratio; None: adapted.
        threshold: relative size, or mask, below which a unit becomes 0, 0 <= threshold < 1; None: 0.05 for ``l1-mask``,
            else 0.001.
        finetune: steps (500) or time (``"3m"``), six tenths with the penalty, the others behind the removal; None or
            True: 1,000 steps or 3 minutes, whichever ends first.
        labels: labels of the samples in the order of ``data``, classes or values, or their .npy or .npz file; None:
            distillation from the model alone.
        remove_dead: remove the units that became 0, see :class:`onnxprune.passes.RemoveDead`; True.
        input_shapes: {input: shape} for dynamic inputs; None: sizes are inferred.
        samples: number of samples to use, 1 or more; None: all.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays; None: from the model's input.
        outputs: {output: kind}, such as ``"classes"`` or ``"boxes:1"`` with an axis, where fidelity should not decide
            by names, values and the graph; None: none.
        metric: function from the path of a model to a number, higher is better, or ``"script.py:function"``; None:
            fidelity.
        max_drop: largest allowed drop of the metric, 0 or more; without a metric in points of fidelity; None: no limit.
        min_fidelity: smallest allowed fidelity: points, 1 < min_fidelity <= 100; or the cosine of each output with the
            original's, both centred per channel, 0 < min_fidelity <= 1; None: no limit.
        cache: folder from which a training that was interrupted goes on, on the same data; None: not kept.
        memory_limit: bytes of activations to hold in memory at a time, 1,000,000 or more; None: 512 MiB.
        seed: seed of all random numbers, 0 or more; 0.
        custom_op_libraries: shared libraries of custom operators, known to every session of onnxruntime. Empty: none.
        latency: measure latency, with ``"layers"`` also that of each layer, which pages colour by; True.
        progress: callback, called with (stage, fraction), fraction in [0, 1]; None: no calls.

    Returns:
        the trained and pruned ``model``, ``plan`` and ``report``; ``save`` writes them.

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input, 3 model not processable, 4 validation failed, 5 a gate that
            is not met.

    Example:
        ::

            result = onnxprune.train("model.onnx", data="inputs.npz", regularize="slimming", ratio=0.5)
            result.save("small.onnx")
    """
    run = record_of(RunSettings, locals())
    if data is None:
        raise UsageError(
            f"training needs inputs, but {argument('data')} is not given",
            hint=f"Give {LEAST_SAMPLES} samples or more, better 512; {argument('labels')} are optional.",
        )
    if finetune is False or finetune == "none":
        raise UsageError(
            f"{argument('finetune', 'none')} leaves nothing to train",
            hint="Give steps (500), a time (90s, 3m, 1h), or nothing.",
        )
    effort = Effort(*effort_of(True if finetune is None else finetune, argument("finetune")))
    penalized, remaining = effort.part(PENALIZED), effort.part(1 - PENALIZED)
    first = Regularize(
        regularize, ratio, penalized, labels=labels, groups=groups, strength=strength, threshold=threshold
    )
    removal = [RemoveDead(), Exact()] if remove_dead else []
    check = Validate(exact=False, timed=latency)
    stages = [Flush(), first, *removal, Finetune(remaining, labels=labels), check, *_measures(metric)]
    result = Pipeline(stages).execute(model, run)
    check_gates(result.report, min_fidelity=min_fidelity, max_drop=max_drop)
    return result


@called("inspect")
def analyze(
    model: ModelSource,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    approximate: bool = False,
    resize_io: Sequence[str] = (),
    cache_heads: bool = False,
) -> Analysis:
    """Analyze the groups, units, slots and barriers of a model, without changing or running it.

    Args:
        model: path, bytes or ModelProto; never changed.
        input_shapes: {input: shape} for dynamic inputs; None: sizes are inferred.
        approximate: count channels behind normalisations as removable; False.
        resize_io: globs over inputs and outputs of the model that may lose channels, both halves of a cache or none.
            Empty: all keep their sizes.
        cache_heads: let the inputs and outputs of all caches shrink, past and present alike; False.

    Returns:
        the analysis: groups that can be pruned, and barriers with their reasons.

    Raises:
        OnnxpruneError: the model cannot be read, or an input shape does not fit.

    Example:
        ::

            analysis = onnxprune.analyze("model.onnx")
            print(len(analysis.groups))
    """
    with explain_failures(model):
        resizing = Resizing(tuple(resize_io), cache_heads)
        return Analysis(model, input_shapes=input_shapes, approximate=approximate, resizing=resizing)


@called("compare")
@with_custom_ops
def compare(
    original: ModelSource,
    model: ModelSource,
    *,
    data: Any = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    outputs: Mapping[str, str] | None = None,
    metric: str | Metric | None = None,
    max_drop: float | None = None,
    min_fidelity: float | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    seed: int = 0,
    custom_op_libraries: Sequence[str | Path] = (),
    latency: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Compare two models with the same interface, however the second was made: pruned, quantized, trained further.

    Args:
        original: the model to be faithful to: path, bytes or ModelProto.
        model: the model to judge: path, bytes or ModelProto.
        data: inputs without labels, as for :func:`prune`; None: seeded synthetic inputs.
        samples: number of samples to use, 1 or more; None: up to 256.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays; None: from the model's input.
        outputs: {output: kind}, such as ``"classes"`` or ``"boxes:1"`` with an axis, where fidelity should not decide
            by names, values and the graph; None: none.
        metric: function from the path of a model to a number, higher is better, or ``"script.py:function"``; None:
            fidelity.
        max_drop: largest allowed drop of the metric, 0 or more; without a metric in points of fidelity; None: no limit.
        min_fidelity: smallest allowed fidelity: points, 1 < min_fidelity <= 100; or the cosine of each output with the
            original's, both centred per channel, 0 < min_fidelity <= 1; None: no limit.
        input_shapes: {input: shape} for dynamic inputs; None: sizes are inferred.
        providers: onnxruntime providers for measurements of time; None: the CPU.
        threads: threads inside an operator for measurements of time, 1 or more; None: all processors.
        seed: seed of all random numbers, 0 or more; 0.
        custom_op_libraries: shared libraries of custom operators, known to every session of onnxruntime. Empty: none.
        latency: measure latency; True.
        progress: callback, called with (stage, fraction), fraction in [0, 1]; None: no calls.

    Returns:
        fidelity with its verdict, sizes, MACs and latency of both.

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input or different interfaces, 3 a model that cannot be run, 5 a
            gate that is not met; ``report`` of the error is the whole comparison.

    Example:
        ::

            report = onnxprune.compare("model.onnx", "small.onnx", data="calibration.npz")
            print(report.fidelity.points, report.verdict.word)
    """
    context = Context.of(original, record_of(RunSettings, locals()))
    function = load_metric(metric) if isinstance(metric, str) else metric
    report = compare_models(context, model, metric=function, timed=latency)
    check_gates(report, min_fidelity=min_fidelity, max_drop=max_drop)
    return report


@called("profile")
@with_custom_ops
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
    custom_op_libraries: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> LatencyProfile:
    """Measure on this machine the time of every node as a function of its numbers of channels.

    The model is pruned to random counts several times, and every node timed within the whole model, with its fusions
    and layouts. The table is kept for later runs of ``onnxprune.prune`` on this machine.

    Args:
        model: path, bytes or ModelProto; never changed.
        providers: onnxruntime providers for measurements of time; None: the CPU.
        threads: threads inside an operator for measurements of time, 1 or more; None: all processors.
        seconds: time to spend on measuring in seconds, more than 0; at least 12 pruned models are measured; 60.
        input_shapes: {input: shape} for dynamic inputs; None: sizes are inferred.
        data: inputs of which one sample is run, as for :func:`prune`; None: seeded synthetic ones.
        samples: number of samples to use, 1 or more; None: all.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays; None: from the model's input.
        cache: folder to keep the table in; None: the user's cache folder.
        seed: seed of all random numbers, 0 or more; 0.
        custom_op_libraries: shared libraries of custom operators, known to every session of onnxruntime. Empty: none.
        progress: callback, called with (stage, fraction), fraction in [0, 1]; None: no calls.

    Returns:
        ``facts`` to read, ``table`` for ``prune(latency_table=...)``, ``save`` to take it to another machine.

    Raises:
        OnnxpruneError: bad input, a model that does not run, or nothing to prune.

    Example:
        ::

            times = onnxprune.profile("model.onnx", seconds=30)
            onnxprune.prune("model.onnx", target="latency=0.7", latency_table=times.table)
    """
    context = Context.of(model, record_of(RunSettings, locals()))
    sizes = rewritable_sizes(context.analysis)
    table = latency_table(context, sizes, seconds=seconds, anew=True)
    return LatencyProfile(describe_times(sizes, table, str(context.analysis.loaded.path or "the model")), table)


@called("sensitivity")
@with_custom_ops
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
    scope: str = "auto",
    policy: str = "sum",
    normalize: str = "auto",
    group_policy: str = "count",
    reshape_axis: str = "head_dim",
    max_ratio: float | None = None,
    cost: str = "auto",
    round_to: int | str = "auto",
    device: str | Kernels | None = None,
    step: int = 1,
    rounding: str = "nearest",
    steps: int = 1,
    schedule: str = "linear",
    approximate: bool = False,
    resize_io: Sequence[str] = (),
    cache_heads: bool = False,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    outputs: Mapping[str, str] | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    custom_op_libraries: Sequence[str | Path] = (),
    recover: str | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Measure the sensitivity of the model to pruning each group alone, at several ratios.

    Every point is measured end to end: outputs (or the metric) of the whole model on hold-out samples. Only the layers
    that read the pruned group are recovered, from 128 samples.

    Args:
        model: path, bytes or ModelProto; never changed.
        ratios: shares of each group's units to remove, 0 < ratio < 1.
        criterion: a name, see ``onnxprune.criteria.names()``, or a function from a slot (and its maps) to scores
            [channels]. None: ``ziplm`` with data, else ``l2``.
        metric: function from the path of a model to a number, higher is better, or ``"script.py:function"``; None:
            fidelity.
        jobs: processes; -1: all processors; None: as ``joblib.parallel_config`` sets, else one. joblib's backends for
            Dask or Ray distribute the work over machines that share file paths.
        layers: {glob over node or weight names: ratio}, 0 <= ratio < 1; the last match applies. None: ``ratio``
            everywhere.
        include: globs; only groups with a node or weight of such a name are pruned. Empty: all groups.
        exclude: globs; no group with a node or weight of such a name is pruned. Empty: none is excluded.
        scope: ranking scope: the units of each group (``local``), of all groups (``global``), of groups of
            the same structure (``isomorphic``), or of all groups by SLAMP (``slamp``);
            ``auto`` (default): ``global`` under the default criterion with ``data``, else ``local``.
        policy: aggregation of the scores of a unit over several weights: ``sum`` (default), ``average``, ``max``,
            ``backward``.
        normalize: normalization of scores across weights: ``auto`` (default), ``mean``, ``none``, ``root``,
            ``standard``, ``tss``, ``linear``, ``softmax``, ``measured``.
        group_policy: constraint shared by the rows of a grid (heads, convolution groups): ``count`` (default), ``sum``,
            ``average``, ``none``.
        reshape_axis: axis of a grid to prune: cells of every row (``head_dim``, the default), whole rows (``heads``),
            ``both``.
        max_ratio: largest share of a group to remove, 0 < max_ratio <= 1; None: all but one unit, 0.9 where groups
            compete.
        cost: cost that divides the score of a unit: ``none``, ``macs``, ``params``, ``latency``; ``auto`` (default):
            ``macs`` under the default criterion with ``data``, else ``none``.
        round_to: keep a multiple of this many units per group where possible, 1 or more; auto: multiples that the
            kernels of the device like; auto.
        device: for auto: a name such as avx512, arm64 or tensorrt, a JSON file, or multiples; None for this machine.
        step: remove a multiple of this many units per group, 1 or more; 1.
        rounding: rounding of the counts that follow from ratios: ``nearest`` (default), ``up``, ``down``.
        steps: number of rounds of scoring and removing, each on the survivors of the last, 1 or more; 1.
        schedule: growth of the removed share over the steps: ``linear`` (default), ``exp``, ``cos``, ``cube``.
        approximate: also prune through normalisations, which is not exact; False.
        resize_io: globs over inputs and outputs of the model that may lose channels, both halves of a cache or none.
            Empty: all keep their sizes.
        cache_heads: let the inputs and outputs of all caches shrink, past and present alike; False.
        providers: onnxruntime providers for measurements of time; None: the CPU.
        threads: threads inside an operator for measurements of time, 1 or more; None: all processors.
        input_shapes: {input: shape} for dynamic inputs; None: sizes are inferred.
        data: inputs without labels for recovery, validation and criteria that need them: a .npz or .npy file, a folder
            of such or of images, an array or tensor, a mapping of input names to these, an iterable of these, such as
            a loader of (inputs, labels), whose labels are left out, or a reader with onnxruntime's
            ``CalibrationDataReader`` interface. None: seeded synthetic inputs for validation.
        samples: number of samples to use, 1 or more; None: up to 256 to validate, all for recovery and for criteria.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays; None: from the model's input.
        outputs: {output: kind}, such as ``"classes"`` or ``"boxes:1"`` with an axis, where fidelity should not decide
            by names, values and the graph; None: none.
        cache: folder of statistics, from which an interrupted or repeated run continues; None: not kept.
        seed: seed of all random numbers, 0 or more; 0.
        custom_op_libraries: shared libraries of custom operators, known to every session of onnxruntime. Empty: none.
        recover: mode of the closed-form recovery from ``data``: ``full``, ``lstsq``, ``bn``, ``bias`` or ``none``, see
            :class:`onnxprune.passes.Recover`; or ``datafree``, from synthetic inputs: weaker, with data only used for
            comparison. None: ``full`` with data and ``validate``, else ``none``. Every eighth batch is a hold-out for
            the reported fidelity.
        memory_limit: bytes of activations to hold in memory at a time, 1,000,000 or more; None: 512 MiB.
        progress: callback, called with (stage, fraction), fraction in [0, 1]; None: no calls.

    Returns:
        curves; ``save`` writes them, ``prune(sensitivity=...)`` allocates by them. They are kept for later runs.

    Raises:
        OnnxpruneError: bad input, or nothing to prune.

    Example:
        ::

            curves = onnxprune.sensitivity("model.onnx", data="calibration.npz")
            onnxprune.prune("model.onnx", target="macs=0.5", sensitivity=curves)
    """
    options, run = record_of(Options, locals()), record_of(RunSettings, locals())
    mode, _ = settle_mode(recover, data is not None, True)
    context = Context.of(model, run, approximate=approximate)
    widest = WIDEST if max_ratio is None else max_ratio
    function = load_metric(metric) if isinstance(metric, str) else metric

    def measure(name: str | Criterion) -> Sensitivity:
        prune = Prune(name, 0.5, approximate=approximate, **{**options.arguments, "max_ratio": widest})
        sizes = rewritable_sizes(prune.prepared(context, Model.of(context.analysis)))
        selector = prune.selector(context, sizes.analysis)
        return measure_sensitivity(context, selector, mode=mode, metric=function, shares=ratios, jobs=jobs)

    return with_criterion(context, criterion, measure)[0]


@called("sweep")
@with_custom_ops
def sweep(
    model: ModelSource,
    *,
    targets: Sequence[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
    kind: str = "macs",
    criterion: str | Criterion | None = None,
    metric: str | Metric | None = None,
    factorize: bool = False,
    trials: int | None = None,
    jobs: int | None = None,
    layers: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    scope: str = "auto",
    policy: str = "sum",
    normalize: str = "auto",
    group_policy: str = "count",
    reshape_axis: str = "head_dim",
    max_ratio: float | None = None,
    cost: str = "auto",
    round_to: int | str = "auto",
    device: str | Kernels | None = None,
    step: int = 1,
    rounding: str = "nearest",
    steps: int = 1,
    schedule: str = "linear",
    approximate: bool = False,
    resize_io: Sequence[str] = (),
    cache_heads: bool = False,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    outputs: Mapping[str, str] | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    custom_op_libraries: Sequence[str | Path] = (),
    recover: str | None = None,
    memory_limit: int | None = None,
    effort: str = "normal",
    latency: bool = True,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> SweepFacts:
    """Prune a model to several budgets and measure its quality at each cost.

    Args:
        model: path, bytes or ModelProto; never changed.
        targets: shares of the original's cost, 0 < share <= 1.
        kind: kind of cost: ``macs`` (default), ``params``, ``size``, ``latency``, ``peak-memory``.
        criterion: a name, see ``onnxprune.criteria.names()``, or a function from a slot (and its maps) to scores
            [channels]. None: ``ziplm`` with data, else ``l2``.
        metric: function from the path of a model to a number, higher is better, or ``"script.py:function"``; None:
            fidelity.
        factorize: also factorize layers where that keeps more than pruning them; not for ``peak-memory``; False.
        trials: number of candidates to evaluate around the best solution, 0 or more; None: with a recovery about half a
            minute's work, else none.
        jobs: processes, each of which prunes to one of the budgets at a time; -1: all processors; None: as
            ``joblib.parallel_config`` sets, else one. joblib's backends for Dask or Ray distribute the work over
            machines that share file paths. With ``kind="latency"`` budgets follow one another in this process, where
            models are timed, and only their candidates are distributed.
        layers: {glob over node or weight names: ratio}, 0 <= ratio < 1; the last match applies. None: ``ratio``
            everywhere.
        include: globs; only groups with a node or weight of such a name are pruned. Empty: all groups.
        exclude: globs; no group with a node or weight of such a name is pruned. Empty: none is excluded.
        scope: ranking scope: the units of each group (``local``), of all groups (``global``), of groups of
            the same structure (``isomorphic``), or of all groups by SLAMP (``slamp``);
            ``auto`` (default): ``global`` under the default criterion with ``data``, else ``local``.
        policy: aggregation of the scores of a unit over several weights: ``sum`` (default), ``average``, ``max``,
            ``backward``.
        normalize: normalization of scores across weights: ``auto`` (default), ``mean``, ``none``, ``root``,
            ``standard``, ``tss``, ``linear``, ``softmax``, ``measured``.
        group_policy: constraint shared by the rows of a grid (heads, convolution groups): ``count`` (default), ``sum``,
            ``average``, ``none``.
        reshape_axis: axis of a grid to prune: cells of every row (``head_dim``, the default), whole rows (``heads``),
            ``both``.
        max_ratio: largest share of a group to remove, 0 < max_ratio <= 1; None: all but one unit, 0.9 where groups
            compete.
        cost: cost that divides the score of a unit: ``none``, ``macs``, ``params``, ``latency``; ``auto`` (default):
            ``macs`` under the default criterion with ``data``, else ``none``.
        round_to: keep a multiple of this many units per group where possible, 1 or more; auto: multiples that the
            kernels of the device like; auto.
        device: for auto: a name such as avx512, arm64 or tensorrt, a JSON file, or multiples; None for this machine.
        step: remove a multiple of this many units per group, 1 or more; 1.
        rounding: rounding of the counts that follow from ratios: ``nearest`` (default), ``up``, ``down``.
        steps: number of rounds of scoring and removing, each on the survivors of the last, 1 or more; 1.
        schedule: growth of the removed share over the steps: ``linear`` (default), ``exp``, ``cos``, ``cube``.
        approximate: also prune through normalisations, which is not exact; False.
        resize_io: globs over inputs and outputs of the model that may lose channels, both halves of a cache or none.
            Empty: all keep their sizes.
        cache_heads: let the inputs and outputs of all caches shrink, past and present alike; False.
        providers: onnxruntime providers for measurements of time; None: the CPU.
        threads: threads inside an operator for measurements of time, 1 or more; None: all processors.
        input_shapes: {input: shape} for dynamic inputs; None: sizes are inferred.
        data: inputs without labels for recovery, validation and criteria that need them: a .npz or .npy file, a folder
            of such or of images, an array or tensor, a mapping of input names to these, an iterable of these, such as
            a loader of (inputs, labels), whose labels are left out, or a reader with onnxruntime's
            ``CalibrationDataReader`` interface. None: seeded synthetic inputs for validation.
        samples: number of samples to use, 1 or more; None: up to 256 to validate, all for recovery and for criteria.
        batch_size: samples per call where the model leaves that open, 1 or more; None: 16.
        images: conversion of images to arrays; None: from the model's input.
        outputs: {output: kind}, such as ``"classes"`` or ``"boxes:1"`` with an axis, where fidelity should not decide
            by names, values and the graph; None: none.
        cache: folder of statistics, from which an interrupted or repeated run continues; None: not kept.
        seed: seed of all random numbers, 0 or more; 0.
        custom_op_libraries: shared libraries of custom operators, known to every session of onnxruntime. Empty: none.
        recover: mode of the closed-form recovery from ``data``: ``full``, ``lstsq``, ``bn``, ``bias`` or ``none``, see
            :class:`onnxprune.passes.Recover`; or ``datafree``, from synthetic inputs: weaker, with data only used for
            comparison. None: ``full`` with data and ``validate``, else ``none``. Every eighth batch is a hold-out for
            the reported fidelity.
        memory_limit: bytes of activations to hold in memory at a time, 1,000,000 or more; None: 512 MiB.
        effort: bounds on the work of searches and recoveries: ``quick``, ``normal`` (default) or ``thorough``; the
            report lists the skipped stages.
        latency: measure latency; True.
        folder: folder to keep the models in; None: they are deleted.
        progress: callback, called with (stage, fraction), fraction in [0, 1]; None: no calls.

    Returns:
        a point per model, the original first; non-dominated points are marked.

    Raises:
        OnnxpruneError: bad input, or no budget can be met.

    Example:
        ::

            facts = onnxprune.sweep("model.onnx", targets=(0.75, 0.5), data="calibration.npz")
            print([(point.target, point.cosine) for point in facts.points])
    """
    options, run = record_of(Options, locals()), record_of(RunSettings, locals())
    mode, reason = settle_mode(recover, data is not None, True)
    budgets = [parse(f"{kind}={share}", "targets") for share in targets]
    spec = BudgetSpec.of(
        [budgets[0]] if budgets else None, metric=metric, jobs=jobs, factorize=factorize, trials=trials
    )
    budget = Budget(spec, criterion, recover=mode, why=reason, approximate=approximate, **options.arguments)
    context = Context.of(model, run, approximate=approximate)
    home = Path(folder) if folder is not None else None
    return run_sweep(context, budget, [t.value for t in budgets], kind=kind, timed=latency, folder=home)
