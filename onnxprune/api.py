"""The calls most users need: :func:`prune`, :func:`factorize`, :func:`repair` and :func:`analyze`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import onnx

from onnxprune.analysis import Analysis
from onnxprune.budget.target import Target
from onnxprune.criteria import Criterion
from onnxprune.errors import BudgetError, UsageError
from onnxprune.factors.request import Options as FactorOptions
from onnxprune.passes import Adopt, Exact, Factorize, Flush, Pipeline, Prune, Recover, Result, Validate
from onnxprune.passes.recover import check_mode, no_data, settle_mode
from onnxprune.pipeline import Progress
from onnxprune.plan import Plan
from onnxprune.report.facts import Report
from onnxprune.runtime.diagnosis import explained
from onnxprune.runtime.images import ImageOptions
from onnxprune.search.budget import Budget
from onnxprune.search.wishes import Asked, Wishes, split

_RATIO = 0.3


def prune(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    criterion: str | Criterion | None = None,
    ratio: float | None = None,
    plan: Plan | str | Path | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    recover: str | None = None,
    seed: int = 0,
    approximate: bool = False,
    validate: bool = True,
    latency: bool = True,
    progress: Progress | None = None,
    **options: Unpack[Asked],
) -> Result:
    """Cut a model, prove that the cut is exact, and with ``data`` repair it.

    Args:
        model: path, bytes or ModelProto; never changed.
        criterion: a name, see ``onnxprune.criteria.names()``, or a function from a slot (and its maps) to scores
            [channels]; some need ``data``. None: ``l2``, with data and a budget ``ziplm``.
        ratio: share of units to remove, 0 <= ratio < 1, rounded to what the groups' constraints allow; 0.3.
        plan: a plan or its file, replayed instead of scoring. input_shapes: {input: shape} for dynamic inputs.
        data: inputs without labels, to repair and validate with and for criteria that need them: a .npz or .npy file, a
            folder of such or of images, an array, a mapping of input names to arrays, an iterable of these, or a reader
            with onnxruntime's ``CalibrationDataReader`` interface.
            Of it ``samples`` are used, else up to 256 to validate, all to repair and for criteria; ``batch_size`` at a
            time where the model leaves that open (16). ``images``: how images become arrays.
        recover: how to repair the cut from ``data``, in closed form: ``full``, ``lstsq``, ``bn``, ``bias`` or ``none``,
            see :class:`onnxprune.passes.Recover`; or ``datafree``, from inputs that are made up: weaker, and data only
            serve to compare on. None: ``full`` where there is data and ``validate``, else ``none``. Every eighth batch
            is not repaired from: the report's fidelity is measured on these. ``memory_limit``: bytes of activations to
            hold in memory at a time. ``cache``: folder that keeps statistics, so that an interrupted or repeated run
            need not start anew.
        seed: of everything random. approximate: also cut through normalisations, which is not exact.
        validate, latency: run the checks; measure speed. progress: called with (stage, fraction).
        options: a budget, see :class:`onnxprune.search.wishes.Wishes`: ``target`` (``"macs=0.5"``, a list of such, or
            ``{"macs": 0.5, "size": "3MB"}``), ``metric``, ``max_drop``, ``min_fidelity``, ``latency_table``,
            ``factorize``, ``trials``; where time is measured: ``providers``, ``threads``; how units are chosen, see
            :class:`onnxprune.selection.request.Request`: ``layers`` ({glob over node or weight names: ratio}),
            ``include``, ``exclude``, ``scope``, ``policy``, ``normalize``, ``group_policy``, ``reshape_axis``,
            ``max_ratio``, ``round_to``, ``step``, ``rounding``, ``cost``, ``steps`` and ``schedule``.

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input, 3 model not processable, 4 validation failed,
            5 nothing to cut, or a budget or gate that is not met.
    """
    wishes, running, choosing = split(options)
    way = settle_mode(recover, data is not None, validate)
    if wishes.any:
        _alone(ratio, plan)
        first: Any = Budget(wishes, criterion, recover=way[0], why=way[1], approximate=approximate, **choosing)
    else:
        share = _RATIO if ratio is None else ratio
        first = Prune(criterion or "l2", share, plan=plan, approximate=approximate, **choosing)
    pipe = Pipeline(_stages(first, way, validate, validate and latency))
    result = pipe.run(model, input_shapes=input_shapes, data=data, seed=seed, progress=progress, **running)
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
    """What follows a cut: its proof, before the effort of a repair; the repair, if it is none of the cut's own."""
    factors = [Factorize(plan=cut.plan, check=validate)] if isinstance(cut, Prune) and _factorizes(cut.plan) else []
    exact = [Exact()] if validate and (way[0] != "none" or factors or isinstance(cut, Budget)) else []
    repair = [] if isinstance(cut, Budget) else [Recover(way[0], why=way[1])]
    return [cut, Flush(), *exact, *factors, *repair, Validate(exact=validate, faithful=validate, timed=timed)]


def _factorizes(plan: Plan | None) -> bool:
    return plan is not None and bool(plan.factorized)


def _alone(ratio: float | None, plan: Any) -> None:
    """What says how much goes, besides a budget; raises UsageError."""
    for name, given in (("ratio", ratio), ("plan", plan)):
        if given is not None:
            raise UsageError(
                f"a budget and {name} were both given: each says how much goes",
                hint="Drop one of the two: a budget finds the ratios by itself.",
            )


def _faithful(result: Result, wishes: Wishes) -> None:
    """The gate of a cut without a budget; raises BudgetError where an output's cosine is too low or not known."""
    if wishes.min_fidelity is None or wishes.any:
        return
    facts = result.report.fidelity
    if facts is None or not facts.outputs:
        said = f"min_fidelity {wishes.min_fidelity:g}: fidelity could not be measured."
        raise BudgetError(said, hint="Give data, and let models be run.", report=result.report)
    if not all(output.cosine >= wishes.min_fidelity for output in facts.outputs):
        said = f"worst cosine {facts.worst_cosine:.4f} is below min_fidelity {wishes.min_fidelity:g}."
        raise BudgetError(said, hint="Cut less.", report=result.report)


def repair(
    original: str | Path | bytes | onnx.ModelProto,
    cut: str | Path | bytes | onnx.ModelProto,
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
        original: the model before the cut. cut: the model to repair, as it was cut or trained further; neither is
            changed. plan: what was removed from where, as it was saved with the cut.
        data: inputs without labels, see :func:`prune`, as are the other arguments; ``datafree`` needs none.
        recover: ``full``, ``lstsq``, ``bn``, ``bias`` or ``datafree``. approximate: the cut was made with it.

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


def factorize(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    method: str = "auto",
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
    **options: Unpack[FactorOptions],
) -> Result:
    """Take layers apart into smaller ones, check that they compute what they should, and with ``data`` repair.

    Args:
        model: path, bytes or ModelProto; never changed.
        method: ``svd``, ``tucker``, ``cp``, ``spatial-svd``, or ``auto``: per layer whichever errs least for what it
            saves, as one budget for the whole model.
        plan: a plan or its file, replayed instead of choosing.
        data: inputs without labels: errors then count at the layers' outputs, and what is left is repaired. This and
            the arguments behind it are explained at :func:`prune`.
        options: how far to go, one of ``ratio`` (share of the cost to save, 0.3), ``rank`` (a number, one per mode, or
            {glob: either}), ``energy`` (share to keep) and ``vbmf`` (calibration from -1 to 1); ``layers`` ({glob:
            ratio}), ``include``, ``exclude``, ``round_to``, ``scope``, ``cost`` and ``timed``, each explained at
            :class:`onnxprune.factors.request.Request`.

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input, 3 model not processable, 4 validation failed,
            5 nothing to take apart, a ratio that no rank reaches, or nothing that gets faster.
    """
    mode, why = settle_mode(recover, data is not None, validate)
    plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    if plan is not None and plan.groups:
        raise UsageError(
            "This plan removes channels, too, and a factorization does not",
            hint="Replay it with onnxprune.prune(plan=...) or 'onnxprune MODEL --apply-plan'.",
        )
    take = Factorize(method, plan=plan, check=validate, **options)
    check = Validate(exact=False, faithful=validate, timed=validate and latency)
    reading: dict[str, Any] = {"data": data, "samples": samples, "batch_size": batch_size, "images": images}
    running: dict[str, Any] = {"memory_limit": memory_limit, "seed": seed, "progress": progress}
    return Pipeline([Flush(), take, Recover(mode, why=why), check]).run(
        model, input_shapes=input_shapes, **reading, **running
    )


def analyze(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    approximate: bool = False,
) -> Analysis:
    """Groups, units, slots and barriers of a model; nothing is changed or run.

    Raises:
        OnnxpruneError: the model cannot be read, or an input shape does not fit.
    """
    with explained(model):
        return Analysis(model, input_shapes=input_shapes, approximate=approximate)
