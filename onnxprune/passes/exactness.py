"""Is the cut exact: the cut model against the masked original, at every probe size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.analysis import Analysis
from onnxprune.errors import ValidationError
from onnxprune.model.save import save
from onnxprune.model.weights import Weight
from onnxprune.passes.state import State
from onnxprune.planning import atoms_removed
from onnxprune.report.facts import Exactness
from onnxprune.rewrite.cut import cut
from onnxprune.rewrite.oracle import masked_original
from onnxprune.runtime import compare

_QUANTISED = {"QuantizeLinear", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear"}


def check_exactness(
    state: State, analysis: Analysis, folder: Path, original: Path, final: Path, feeds: Sequence[Any]
) -> Exactness:
    """Compare the cut with the masked original on one feed per probe.

    Groups that were cut through a normalisation have no exact counterpart: the comparison is then made on a cut of all
    the others, and the note says so.

    Raises:
        ValidationError: they differ.
    """
    assert state.removed is not None
    quantized = any(n.op in _QUANTISED for n in analysis.graph.nodes)
    if analysis.folds or analysis.hoists or analysis.copies:
        _check_preparation(analysis, folder, original, feeds, quantized)
    removed, skipped = _exact_part(analysis, state.removed)
    if skipped:
        final = folder / "exact_part.onnx"
        _save(analysis, cut(analysis.table, removed), final)
    worst = Exactness(passed=True)
    for probe, feed in enumerate(feeds):
        reference = folder / f"masked{probe}.onnx"
        _save(analysis, masked_original(analysis.table, removed, probe), reference)
        facts = compare.exactness(reference, final, [feed], quantized=quantized)
        batches = [*worst.batches, *facts.batches]
        if not facts.passed or facts.error >= worst.error:
            worst = facts
        worst.batches = batches
        for file in folder.glob(f"{reference.name}*"):
            file.unlink()
        if not facts.passed:
            break
    if worst.passed is False:
        raise ValidationError(
            f"The cut is not exact: output {worst.worst_output!r} differs by {worst.error:.3g} "
            f"(allowed {worst.tolerance:.3g}). {worst.note}",
            hint="This is a bug in onnxprune: nothing was written. Please report the model's operators.",
        )
    if skipped:
        what = "1 group that was" if skipped == 1 else f"{skipped} groups that were"
        note = f"without {what} cut through a normalisation, where only fidelity can be asked"
        worst.note = f"{worst.note}; {note}" if worst.note else note
    return worst


def _check_preparation(analysis: Analysis, folder: Path, original: Path, feeds: Sequence[Any], quantized: bool) -> None:
    """The masked original is made of the prepared graph (folded, hoisted): that must equal the model as it came.

    Raises:
        ValidationError: it does not.
    """
    prepared = folder / "prepared.onnx"
    _save(analysis, (analysis.graph.proto, analysis.graph.weights), prepared)
    facts = compare.exactness(original, prepared, feeds[:1], quantized=quantized)
    for file in folder.glob("prepared.onnx*"):
        file.unlink()
    if facts.passed is False:
        raise ValidationError(
            f"Preparing the graph changed output {facts.worst_output!r} by {facts.error:.3g} "
            f"(allowed {facts.tolerance:.3g}). {facts.note}",
            hint="This is a bug in onnxprune: nothing was written. Please report the model's operators.",
        )


def _exact_part(analysis: Analysis, removed: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], int]:
    """The removal without groups that run through a normalisation, and how many of these were cut."""
    units = analysis.units
    gone = np.zeros(units.frozen.size, dtype=bool)
    gone[units.component[removed]] = True
    chosen, skipped = np.zeros_like(gone), 0
    for group in units.groups:
        mine = group.units[gone[group.units]]
        if group.exact:
            chosen[mine] = True
        elif mine.size:
            skipped += 1
    return (atoms_removed(units, chosen), skipped) if skipped else (removed, 0)


def _save(analysis: Analysis, model: tuple[onnx.ModelProto, Mapping[str, Weight]], path: Path) -> None:
    save(*model, path, prefer_external=bool(analysis.loaded.external))
