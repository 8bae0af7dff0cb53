"""Diagnosis of a model that caused an error, by onnx and onnxruntime; runs only after an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import onnx

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import ModelError, OnnxpruneError, ValidationError
from onnxprune.graph.facts import integer_bounds
from onnxprune.graph.probes import input_specs
from onnxprune.graph.values import propagates
from onnxprune.io.read import Loaded, load
from onnxprune.io.write import assemble
from onnxprune.runtime.inputs import synthetic
from onnxprune.runtime.sessions import open_session, run

_Check = Callable[[onnx.ModelProto], None]

# Larger models are not put together once more only to be complained of.
_LARGEST = 1 << 30


@contextmanager
def explain_failures(
    source: str | Path | bytes | onnx.ModelProto | Loaded, analysis: Analysis | None = None
) -> Iterator[None]:
    """Turn an unplanned exception, or a wrong result, into a ModelError where the model is at fault.

    Else it is a bug, and stays one.

    Args:
        source: the model.
        analysis: of it, where there is one: whether the model runs is asked, too.

    Raises:
        ModelError: onnx or onnxruntime object to the model; with their words.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        planned, wrong = isinstance(error, OnnxpruneError), isinstance(error, ValidationError)
        # A result that is wrong is the model's fault only where that makes no sense to the checker, or does not run.
        checks: Sequence[_Check] = [_check] if wrong else _CHECKS
        if analysis is not None:
            checks = [*checks, partial(_run, analysis=analysis)]
        complaint = None if planned and not wrong else complaint_about(source, checks)
        if complaint is None:
            raise
        raise ModelError(
            f"the model is not valid ONNX: {complaint}",
            hint=f"Export it again, or correct it. (Here it ended in {type(error).__name__}: {_line(error)[:120]})",
        ) from error


def complaint_about(source: str | Path | bytes | onnx.ModelProto | Loaded, checks: Sequence[_Check]) -> str | None:
    """Return the objection of the first check that rejects a model; None where none does."""
    try:
        loaded = source if isinstance(source, Loaded) else load(source)
        if loaded.size > _LARGEST:
            return None
        model = assemble(loaded.as_read, loaded.weights)
    except OnnxpruneError as error:
        return error.message
    except Exception:  # what cannot even be put together; the checker could not say why
        return None
    for check in checks:
        try:
            check(model)
        except MemoryError:
            return None
        except Exception as error:  # the exceptions of onnx and onnxruntime have no common base
            return error.message if isinstance(error, OnnxpruneError) else _line(error)
    return None


def _check(model: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        if "No Op registered" not in str(error):  # onnxruntime has operators of its own in ONNX's domain
            raise


def _infer(model: onnx.ModelProto) -> None:
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=propagates(model))


def _open(model: onnx.ModelProto) -> None:
    open_session(model.SerializeToString(), optimize=False)


def _run(model: onnx.ModelProto, *, analysis: Analysis) -> None:
    specs, shapes = input_specs(analysis.graph), analysis.facts.probes[0].inputs
    bounds = integer_bounds(analysis.graph, analysis.facts)
    run(open_session(model.SerializeToString(), optimize=False), synthetic(specs, shapes, bounds=bounds, seed=0))


_CHECKS = (_check, _infer, _open)


def _line(error: Exception) -> str:
    """Format an exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__
