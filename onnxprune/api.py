"""The two calls most users need: :func:`prune` and :func:`analyze`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import onnx

from onnxprune.analysis import Analysis
from onnxprune.criteria import Criterion
from onnxprune.passes import Pipeline, Prune, Result, Validate
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
    seed: int = 0,
    approximate: bool = False,
    validate: bool = True,
    latency: bool = True,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> Result:
    """Cut a model and prove that the cut is exact.

    Args:
        model: path, bytes or ModelProto; never changed.
        criterion: a name, see ``onnxprune.criteria.names()``, or a function from a slot (and its maps) to scores
            [channels]; criteria that look at feature maps need ``data``.
        ratio: share of units to remove, 0 <= ratio < 1, rounded to what the groups' constraints allow.
        plan: a plan or its file, replayed instead of scoring.
        input_shapes: {input: shape} for dynamic inputs.
        data: inputs to validate with, and for what asks for calibration data: a .npz or .npy file, a folder of such or
            of images, an array, a mapping of input names to arrays, an iterable of these, or a reader with
            onnxruntime's ``CalibrationDataReader`` interface.
        samples: use this many of them; else validation takes up to 256, calibration all.
        batch_size: samples per call where the model leaves that open (16). images: how images become arrays.
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
    cut = Prune(criterion, ratio, plan=plan, approximate=approximate, **options)
    check = Validate(exact=validate, faithful=validate, timed=validate and latency)
    reading: dict[str, Any] = {"samples": samples, "batch_size": batch_size, "images": images}
    return Pipeline([cut, check]).run(
        model, input_shapes=input_shapes, data=data, seed=seed, progress=progress, **reading
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
    return Analysis(model, input_shapes=input_shapes, approximate=approximate)
