"""The calls most users need: :func:`prune`, :func:`repair` and :func:`analyze`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import onnx

from onnxprune.analysis import Analysis
from onnxprune.criteria import Criterion
from onnxprune.factors.request import Options as FactorOptions
from onnxprune.passes import Adopt, Exact, Factorize, Pipeline, Prune, Recover, Result, Validate
from onnxprune.passes.material import no_data
from onnxprune.passes.recover import check_mode
from onnxprune.passes.state import Progress
from onnxprune.plan import Plan
from onnxprune.runtime.images import ImageOptions
from onnxprune.selection.request import Options


def prune(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    criterion: str | Criterion = "l2",
    ratio: float = 0.3,
    plan: Plan | str | Path | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    samples: int | None = None,
    batch_size: int | None = None,
    images: ImageOptions | None = None,
    recover: str | None = None,
    memory_limit: int | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    approximate: bool = False,
    validate: bool = True,
    latency: bool = True,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Result:
    """Cut a model, prove that the cut is exact, and with ``data`` repair it.

    Args:
        model: path, bytes or ModelProto; never changed.
        criterion: a name, see ``onnxprune.criteria.names()``, or a function from a slot (and its maps) to scores
            [channels]; criteria that look at feature maps need ``data``.
        ratio: share of units to remove, 0 <= ratio < 1, rounded to what the groups' constraints allow.
        plan: a plan or its file, replayed instead of scoring.
        input_shapes: {input: shape} for dynamic inputs.
        data: inputs without labels, to repair and validate with and for criteria that look at feature maps: a .npz or
            .npy file, a folder of such or of images, an array, a mapping of input names to arrays, an iterable of
            these, or a reader with onnxruntime's ``CalibrationDataReader`` interface.
        samples: use this many of them; else validation takes up to 256, repair and criteria all.
        batch_size: samples per call where the model leaves that open (16). images: how images become arrays.
        recover: how to repair the cut from ``data``, in closed form: ``full``, ``lstsq``, ``bn``, ``bias`` or ``none``,
            see :class:`onnxprune.passes.Recover`; or ``datafree``, from inputs that are made up: weaker, and data only
            serve to compare on. None: ``full`` where there is data and ``validate``, else ``none``. Every eighth batch
            is not repaired from: the report's fidelity is measured on these.
        memory_limit: bytes of activations to hold in memory at a time. cache: folder that keeps captured statistics, so
            that an interrupted or repeated run need not start anew.
        seed: of everything random. approximate: also cut through normalisations, which is not exact.
        validate, latency: run the checks; measure speed. progress: called with (stage, fraction).
        options: how units are chosen: ``layers`` ({glob over node or weight names: ratio}), ``include``, ``exclude``
            (such globs), ``scope``, ``policy``, ``normalize``, ``group_policy``, ``reshape_axis``, ``max_ratio``,
            ``round_to``, ``step``, ``rounding``, ``cost``, ``steps`` and ``schedule``, each explained at
            :class:`onnxprune.selection.request.Request`.

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input, 3 model not processable, 4 validation failed,
            5 nothing to cut.
    """
    mode, why = _way(recover, data is not None, validate)
    cut = Prune(criterion, ratio, plan=plan, approximate=approximate, **options)
    prove = [Exact()] if validate and mode != "none" else []  # before the effort of a repair
    check = Validate(exact=validate, faithful=validate, timed=validate and latency)
    reading: dict[str, Any] = {"data": data, "samples": samples, "batch_size": batch_size, "images": images}
    running: dict[str, Any] = {"memory_limit": memory_limit, "cache": cache, "seed": seed, "progress": progress}
    stages: list[Any] = [cut, *prove, Recover(mode, why=why), check]
    return Pipeline(stages).run(model, input_shapes=input_shapes, **reading, **running)


def _way(recover: str | None, data: bool, validate: bool) -> tuple[str, str]:
    """How to repair, and who says so."""
    if recover is not None:
        if check_mode(recover) not in ("none", "datafree") and not data:
            raise no_data(recover)
        return recover, "asked for"
    if not data:
        return "none", "no data was given"
    return ("full", "data was given") if validate else ("none", "models are not run")


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
    running: dict[str, Any] = {"memory_limit": memory_limit, "seed": seed, "progress": progress}
    return Pipeline([take, Recover(recover), check]).run(original, input_shapes=input_shapes, **reading, **running)


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
    mode, why = _way(recover, data is not None, validate)
    take = Factorize(method, plan=plan, check=validate, **options)
    check = Validate(exact=False, faithful=validate, timed=validate and latency)
    reading: dict[str, Any] = {"data": data, "samples": samples, "batch_size": batch_size, "images": images}
    running: dict[str, Any] = {"memory_limit": memory_limit, "seed": seed, "progress": progress}
    return Pipeline([take, Recover(mode, why=why), check]).run(model, input_shapes=input_shapes, **reading, **running)


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
    return Analysis(model, input_shapes=input_shapes, approximate=approximate)
