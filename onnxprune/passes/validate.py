"""Validate: is the cut exact, how faithful is the result, how fast is it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from onnxprune.errors import ModelError, ValidationError
from onnxprune.inspection import Analysis
from onnxprune.model.bounds import integer_bounds
from onnxprune.model.probes import input_specs
from onnxprune.model.save import save
from onnxprune.passes.state import State
from onnxprune.report.facts import Exactness
from onnxprune.rewrite.oracle import masked_original
from onnxprune.runtime import compare, fidelity, inputs, latency
from onnxprune.runtime.data import load_data

_UNKNOWN = "No Op registered for"


class Validate:
    """Compare the current model with the masked original, with the original, and time both.

    Args:
        exact, faithful, timed: which questions to ask.

    Raises:
        ValidationError: the cut is not exact, or the result is not a valid model.
    """

    def __init__(self, *, exact: bool = True, faithful: bool = True, timed: bool = True) -> None:
        self.exact, self.faithful, self.timed = exact, faithful, timed

    def __call__(self, state: State) -> None:
        """Fill the report's exactness, fidelity and latency."""
        analysis = state.analyzed()
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            self._run(state, analysis, Path(folder))

    def _run(self, state: State, analysis: Analysis, folder: Path) -> None:
        assert state.proto is not None
        final, original = folder / "final.onnx", _original(analysis, folder)
        with state.stage("write"):
            external = bool(analysis.loaded.external)
            state.report.totals.bytes_after = save(state.proto, state.weights, final, prefer_external=external)
            check_structure(final, original)
        with state.stage("inputs"):
            feeds, source = _feeds(state, analysis)
        if self.exact and state.removed is not None:
            with state.stage("exactness"):
                self._exactness(state, analysis, folder, final, _synthetic(state, analysis))
        if self.faithful:
            with state.stage("fidelity"):
                state.report.fidelity = fidelity.fidelity(original, final, feeds, source)
        if self.timed:
            with state.stage("latency"):
                state.report.latency = latency.latency(original, final, feeds[:1])

    def _exactness(self, state: State, analysis: Analysis, folder: Path, final: Path, feeds: Sequence[Any]) -> None:
        """One masked original per probe, since a mask may depend on the batch size."""
        assert state.removed is not None
        approximate = any(not g.exact for g in analysis.units.groups)
        worst = Exactness(passed=True)
        quantized = any(
            n.op in ("QuantizeLinear", "QLinearConv", "DynamicQuantizeLinear") for n in analysis.graph.nodes
        )
        for probe, feed in enumerate(feeds):
            proto, weights = masked_original(analysis.table, state.removed, probe)
            reference = folder / f"masked{probe}.onnx"
            save(proto, weights, reference, prefer_external=bool(analysis.loaded.external))
            facts = compare.exactness(reference, final, [feed], quantized=quantized)
            facts.batches = [*worst.batches, *facts.batches]
            if not facts.passed or facts.error >= worst.error:
                worst = facts
            else:
                worst.batches = facts.batches
            for file in folder.glob(f"masked{probe}.onnx*"):
                file.unlink()
            if not facts.passed:
                break
        if approximate and not worst.passed:
            worst.passed, worst.note = (
                None,
                f"not asked: cut through a normalisation (relative difference {worst.error:.2g})",
            )
        state.report.exactness = worst
        if worst.passed is False:
            raise ValidationError(
                f"The cut is not exact: output {worst.worst_output!r} differs by {worst.error:.3g} "
                f"(allowed {worst.tolerance:.3g}). {worst.note}",
                hint="This is a bug in onnxprune: nothing was written. Please report the model's operators.",
            )


def check_structure(path: Path, original: Path) -> None:
    """onnx's checker on a written model.

    Raises:
        ModelError: it objects to the original already. ValidationError: it objects to the result alone.
    """
    complaint = _complaint(path)
    if complaint is None:
        return
    before = _complaint(original)
    if before == complaint and _UNKNOWN in complaint:
        return  # an operator that only onnxruntime knows: it says more than the checker when it loads the model
    if before is not None:
        raise ModelError(f"The model is not valid ONNX: {before}", hint="Export it again, or mend it.")
    raise ValidationError(
        f"The result is not a valid model: {complaint}", hint="This is a bug in onnxprune; please report it."
    )


def _complaint(path: Path) -> str | None:
    """The first line of what onnx's checker says against a model, or None."""
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        return str(error).strip().splitlines()[0]
    return None


def _original(analysis: Analysis, folder: Path) -> Path:
    """The original as a file: its own, or a copy of what is only in memory."""
    if analysis.loaded.path is not None:
        return analysis.loaded.path
    path = folder / "original.onnx"
    save(analysis.loaded.proto, analysis.loaded.weights, path)
    return path


def _synthetic(state: State, analysis: Analysis) -> list[Any]:
    """One seeded feed per probe."""
    specs = input_specs(analysis.graph)
    bounds = integer_bounds(analysis.graph, analysis.facts)
    return [inputs.synthetic(specs, probe.inputs, bounds=bounds, seed=state.seed) for probe in analysis.facts.probes]


def _feeds(state: State, analysis: Analysis) -> tuple[list[Any], str]:
    if state.data is None:
        return _synthetic(state, analysis), "synthetic"
    specs = input_specs(analysis.graph)
    source = str(state.data) if isinstance(state.data, (str, Path)) else "data"
    return list(load_data(state.data, specs)), source
