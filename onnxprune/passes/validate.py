"""Validate: is the result a model, is the cut exact, how faithful is it, how fast is it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from onnxprune.analysis import Analysis
from onnxprune.errors import ModelError
from onnxprune.graph.bounds import integer_bounds
from onnxprune.graph.probes import input_specs
from onnxprune.model.save import save
from onnxprune.passes.exactness import check_exactness
from onnxprune.passes.state import State
from onnxprune.passes.structure import check_file, check_sizes
from onnxprune.runtime import fidelity, inputs, latency, sessions

# From this size on, the original and the result are never in memory together.
_LARGE = 1 << 30
# Inputs of the user that tell enough, where nobody says how many to take.
_SAMPLES = 256


class Validate:
    """Check the structure; compare with the masked original and with the original; time both.

    Args:
        exact, faithful, timed: which questions to ask. With none, nothing is run: sizes alone are checked.

    Raises:
        ValidationError: the cut is not exact, or the result is not a valid model.
    """

    def __init__(self, *, exact: bool = True, faithful: bool = True, timed: bool = True) -> None:
        self.exact, self.faithful, self.timed = exact, faithful, timed

    def __call__(self, state: State) -> None:
        """Fill the report's exactness, fidelity and latency."""
        analysis = state.analyzed()
        assert state.proto is not None
        with state.stage("structure"):
            check_sizes(analysis.graph.proto, state.proto)
        if not (self.exact or self.faithful or self.timed):
            state.later.append(lambda: _note(state))
            return
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            self._run(state, analysis, Path(folder))

    def _run(self, state: State, analysis: Analysis, folder: Path) -> None:
        assert state.proto is not None
        final, original = folder / "final.onnx", _original(analysis, folder)
        with state.stage("write"):
            external = bool(analysis.loaded.external)
            state.report.totals.bytes_after = save(state.proto, state.weights, final, prefer_external=external)
            check_file(final, original)
        with state.stage("inputs"):
            synthetic = _synthetic(state, analysis)
            feeds, source = (synthetic, "synthetic") if state.data is None else _given(state)
        if self.exact and state.removed is not None:
            with state.stage("exactness"), _blaming(original):
                state.report.exactness = check_exactness(state, analysis, folder, original, final, synthetic)
        large = analysis.loaded.size > _LARGE
        if self.faithful:
            with state.stage("fidelity"):
                state.report.fidelity = fidelity.fidelity(original, final, feeds, source, together=not large)
        if self.timed and large:
            state.report.warnings.append("Latency was not measured: original and result would be in memory at once.")
        elif self.timed:
            with state.stage("latency"):
                state.report.latency = latency.latency(original, final, list(islice(feeds, 1)))


@contextmanager
def _blaming(original: Path) -> Iterator[None]:
    """Where a model does not run, say so of the user's own file, unless that one does."""
    try:
        yield
    except ModelError:
        sessions.open_session(original, optimize=False)
        raise


def _note(state: State) -> None:
    state.report.exactness.note = "not asked: models were not run"


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


def _given(state: State) -> tuple[Iterable[Any], str]:
    """The user's inputs, and what to call them."""
    samples = state.calibration()
    return (samples if state.samples is not None else samples.first(_SAMPLES)), samples.name
