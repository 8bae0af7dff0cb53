"""The two calls most users need: :func:`prune` and :func:`analyze`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from onnxprune.analysis import Analysis
from onnxprune.criteria import Criterion
from onnxprune.passes import Pipeline, Prune, Result, Validate
from onnxprune.passes.state import Progress
from onnxprune.plan import Plan
from onnxprune.runtime.images import ImageOptions


def prune(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    criterion: str | Criterion = "l2",
    ratio: float = 0.3,
    layers: Mapping[str, float] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    round_to: int = 1,
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
) -> Result:
    """Cut a model and prove that the cut is exact.

    Args:
        model: path, bytes or ModelProto; never changed.
        criterion: a name (``l1 l2 gm bn random``) or a function from a slot to scores [channels].
        ratio: share of every group's units to remove, 0 <= ratio < 1, rounded to what the group's constraints allow.
        layers: {glob over node or weight names: ratio}. include, exclude: such globs.
        round_to: keep a multiple of this many units per group where it can be had.
        plan: a plan or its file, replayed instead of scoring.
        input_shapes: {input: shape} for dynamic inputs.
        data: inputs to validate with, and for what asks for calibration data: a .npz or .npy file, a folder of such or
            of images, an array, a mapping of input names to arrays, an iterable of these, or a reader with
            onnxruntime's ``CalibrationDataReader`` interface.
        samples: use this many of them; else validation takes up to 256, calibration all.
        batch_size: samples per call where the model leaves that open (16). images: how images become arrays.
        seed: of everything random. approximate: also cut through normalisations, which is not exact.
        validate, latency: run the checks; measure speed. progress: called with (stage, fraction).

    Raises:
        OnnxpruneError: with an ``exit_code``: 2 bad input, 3 model not processable, 4 validation failed,
            5 nothing to cut.
    """
    cut = Prune(
        criterion,
        ratio,
        layers=layers,
        include=include,
        exclude=exclude,
        round_to=round_to,
        plan=plan,
        approximate=approximate,
    )
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
