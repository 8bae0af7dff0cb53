"""Is the result a valid model: onnx's checker on the file, and strict shape inference without any weights."""

from __future__ import annotations

from pathlib import Path

import onnx

from onnxprune.errors import ModelError, ValidationError
from onnxprune.graph.values import propagates
from onnxprune.io.subgraphs import outline_bodies

_REPORT = "This is a bug in onnxprune; please report it."


def check_file(path: Path, original: Path) -> None:
    """onnx's checker on a written model.

    Raises:
        ModelError: it objects to the original already. ValidationError: it objects to the result alone.
    """
    complaint = _complaint(path)
    if complaint is None:
        return
    before = _complaint(original)
    if before == complaint:
        return  # an operator that the checker calls unknown or deprecated: onnxruntime has the last word
    if before is not None:
        raise ModelError(f"The model is not valid ONNX: {before}", hint="Export the model again, or repair the file.")
    raise ValidationError(f"The result is not a valid model: {complaint}", hint=_REPORT)


def check_sizes(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Strict shape inference on two skeletons: shapes that agree before must agree after.

    Raises:
        ValidationError: sizes contradict each other in the result alone.
    """
    complaint = _contradiction(outline_bodies(after, {})[0])
    if complaint is not None and _contradiction(outline_bodies(before, {})[0]) is None:
        raise ValidationError(f"Sizes in the result contradict each other: {complaint}", hint=_REPORT)


def _complaint(path: Path) -> str | None:
    """Return the first line of the error of onnx's checker for a model, or None."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return None


def _contradiction(proto: onnx.ModelProto) -> str | None:
    """Return the last line of the error of strict shape inference for a skeleton, or None."""
    try:
        onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=propagates(proto))
    except Exception as error:  # inference raises several types; each means that it objects
        return str(error).strip().splitlines()[-1]
    return None
