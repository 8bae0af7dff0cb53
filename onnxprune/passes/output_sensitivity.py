"""Output sensitivity: change of the outputs when one group is pruned alone, measured on hold-out samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxprune.allocation.selection import SHARES, along, counts, weakest
from onnxprune.channels.analysis import Analysis
from onnxprune.channels.groups import Group
from onnxprune.channels.selection import removed_atoms
from onnxprune.channels.survivors import Survivors
from onnxprune.errors import ModelError, UsageError, argument
from onnxprune.importance.criteria import corrected
from onnxprune.importance.slots import CapturedMaps, ContractionInput
from onnxprune.importance.statistics import Maps
from onnxprune.io.files import workspace
from onnxprune.io.weights import ArrayWeight, GatheredWeight, Weight
from onnxprune.io.write import save
from onnxprune.passes.calibrate import captured_maps
from onnxprune.passes.calibration import HELD_OUT_OF_SENSITIVITY, CalibrationBatches, is_held_out
from onnxprune.pipeline import Context
from onnxprune.pruning.rewriting import CannotRewrite, cut
from onnxprune.runtime.capture import count
from onnxprune.runtime.fidelity import are_probabilities, roots
from onnxprune.runtime.masks import without_padding
from onnxprune.runtime.sessions import Array, Feed, at_sizes_of, measures, open_session, run

Scores = NDArray[np.float64]

MAX_SAMPLES = 64
"""Largest number of samples to measure on."""
# Samples per call, for ten calls where possible.
_CALL = 8


def output_sensitivity(
    context: Context,
    analysis: Analysis,
    groups: Sequence[Group],
    scores: Mapping[int, Scores],
    shares: Sequence[float] = SHARES,
    max_samples: int = MAX_SAMPLES,
) -> dict[int, Scores]:
    """Measure scores [units] by group that add up to the output sensitivity, in the order of the given scores.

    Each group is pruned alone, to a few sizes; the contractions that read it are corrected for the removed channels
    (least squares, see :func:`onnxprune.importance.criteria.corrected`), and sensitivity is
    |y' - y|^2 / |y - mean y|^2 over hold-out samples (of class probabilities the square roots), averaged over the
    outputs. Groups then compare by their effect on the outputs, at any width and depth.
    A group of which no pruned model runs gets the mean of the others.

    Args:
        context: context of the run, with the calibration data.
        analysis: analysis of the model.
        groups: groups to measure.
        scores: scores [units] by group.
        shares: shares of every group to remove, 0 < share < 1.
        max_samples: largest number of samples to measure on.

    Raises:
        UsageError: no data, too few of them, or outputs that are constant. ModelError: the model does not run.
    """
    fit, hold_out = (
        _SplitBatches(context, analysis, False),
        list(_SplitBatches(context, analysis, True).first(max_samples)),
    )
    if not hold_out:
        raise UsageError(
            f"{argument('normalize', 'measured')} needs hold-out samples, and the data has too few.",
            hint=f"Give ten or more samples, or choose {argument('normalize', 'root')}.",
        )
    captured = captured_maps(context, analysis, groups, ("gram",), source=fit)
    by_count: dict[int, dict[int, float]] = {}
    with context.stage("measure"), workspace() as folder:
        runs = _PrunedRuns(analysis, captured, hold_out, folder / "cut.onnx")
        runs.original()
        removals = [(g, n) for g in groups if g.id in scores for n in counts(g.steps, shares)]
        for number, (group, num_removed) in enumerate(removals):
            units = group.units[weakest(scores[group.id], group.classes, group.steps, num_removed)]
            with suppress(CannotRewrite, ModelError):
                by_count.setdefault(group.id, {})[num_removed] = runs.sensitivity(units)
            context.tell("measure", (number + 1) / len(removals))
    drops = [d for by_num_removed in by_count.values() for d in by_num_removed.values()]
    if not drops:
        return dict(scores)
    result = {}
    for group in groups:
        if group.id in scores:
            values = scores[group.id] - min(0.0, float(scores[group.id].min()))
            by_num_removed = by_count.get(group.id) or {max(group.steps - 1, 1): float(np.mean(drops))}
            result[group.id] = along(values, group.classes, group.steps, by_num_removed)
    return result


class _SplitBatches(CalibrationBatches):
    """The calls of the hold-out, or the others."""

    def __init__(self, context: Context, analysis: Analysis, held_out: bool) -> None:
        super().__init__(context, analysis)
        self._held_out = held_out
        samples = super().samples
        self._size = self.fixed or max(1, min(_CALL, self.max_size, (samples or 10 * _CALL) // 10))

    def batches(self, batch_size: int | None = None) -> Iterator[Feed]:
        """Iterate over the same samples at any batch size: calls are as large as the split needs them.

        Runs of samples are held out, since those next to each other are often alike.
        """
        samples = super().samples
        calls = None if samples is None else -(-samples // self._size)
        for number, feed in enumerate(super().batches(self._size)):
            run = number if calls is None or calls < 10 else number * 10 // calls
            if is_held_out(run % 10, HELD_OUT_OF_SENSITIVITY) == self._held_out:
                yield feed

    def first(self, samples: int) -> Iterator[Feed]:
        """Iterate over calls with about this many samples."""
        num_samples = 0
        for feed in self.batches():
            yield feed
            num_samples += count(feed)
            if num_samples >= samples:
                break

    def fingerprint(self) -> str | None:
        """Return the fingerprint of all data, marked."""
        fingerprint = super().fingerprint()
        return (
            None if fingerprint is None else f"{fingerprint}:{'held' if self._held_out else 'fit'} runs of {self._size}"
        )


@dataclass(slots=True)
class _PrunedRuns:
    """Runs of pruned models with the contractions behind the removed channels corrected.

    Args:
        captured: Gram matrices in front of contractions.
        feeds: calls of the model.
        path: path of the temporary model file.
    """

    analysis: Analysis
    captured: CapturedMaps
    feeds: Sequence[Feed]
    path: Path
    _expected: Sequence[dict[str, Array]] = ()
    _scale: Mapping[str, float] | None = None
    _probable: set[str] | None = None

    def sensitivity(self, units: NDArray[np.int64]) -> float:
        """Measure the mean sensitivity of the outputs to the removal of these components, each at most 1."""
        units_of = self.analysis.units
        mask = np.zeros(units_of.frozen.size, dtype=bool)
        mask[units] = True
        removed = removed_atoms(units_of, mask)
        proto, weights = cut(self.analysis.table, removed)
        after = Survivors(self.analysis.table, removed)
        for site in self.captured.sites:
            self._correct(site, after, weights)
        scale = self.original()
        session = self._session(proto, weights)
        errors = dict.fromkeys(scale, 0.0)
        outputs = (part for feed in self.feeds for part in self._outputs(session, feed))
        for part, original in zip(outputs, self._expected, strict=True):
            expected = at_sizes_of(session, original)
            for name in scale:
                errors[name] += square_error(part[name], expected[name])
        return float(np.mean([min(errors[n] / scale[n], 1.0) for n in scale]))

    def original(self) -> Mapping[str, float]:
        """Return the sum of squares about its mean of every output of the original that varies, by name."""
        if self._scale is None:
            graph = self.analysis.graph
            session = self._session(graph.proto, graph.weights)
            self._expected = [
                {n: a for n, a in part.items() if measures(a.dtype) and a.dtype.kind != "c"}
                for feed in self.feeds
                for part in self._outputs(session, feed)
            ]
            scale = {name: spread_about_mean([w[name] for w in self._expected]) for name in self._expected[0]}
            self._scale = {name: value for name, value in scale.items() if value > 0}
            if not self._scale:
                raise UsageError(
                    f"{argument('normalize', 'measured')} compares outputs, but the outputs of this model do not "
                    "vary over the data.",
                    hint=f"Choose another {argument('normalize')}, such as root.",
                )
        return self._scale

    def _outputs(self, session: Any, feed: Feed) -> Iterator[dict[str, Array]]:
        """Run the model and return its outputs without padding, with the square roots of class probabilities."""
        outputs = run(session, feed)
        if self._probable is None:  # the original comes first
            self._probable = {name for name, value in outputs.items() if are_probabilities(value)}
        for part in without_padding(feed, outputs):
            yield {name: roots(value) if name in self._probable else value for name, value in part.items()}

    def _session(self, proto: onnx.ModelProto, weights: Mapping[str, Weight]) -> Any:
        save(proto, weights, self.path)
        return open_session(self.path)

    def _correct(self, site: ContractionInput, after: Survivors, weights: dict[str, Weight]) -> None:
        """Correct one contraction for the channels removed in front of it, where possible."""
        form, maps = site.form, self.captured.columns.get(site.columns_key, {})
        if form is None or "gram" not in maps or after.mask(site.label) is None:
            return
        graph, inputs = self.analysis.graph, site.node.inputs
        name = inputs[form.weight]
        bias = inputs[form.bias] if form.bias is not None and form.bias < len(inputs) else ""
        constants = [n for n in (name, bias) if n]
        if any(n not in graph.weights or len(graph.consumers.get(n, ())) != 1 for n in constants):
            return
        old = graph.weights[name].read()
        matrix = form.matrix(old.astype(np.float64))
        parts, n, outputs = matrix.shape
        taps = n * parts // site.label.ids.size
        mask = after.removed[site.channels(site.label.ids)].reshape(parts, -1)
        gram = maps["gram"]
        if gram.shape == (parts, n, n):
            matrix, mask, taps = matrix, np.repeat(mask, taps, axis=1), 1
        elif gram.shape != (parts, n // taps, n // taps):
            return
        flat = matrix.reshape(parts, n // taps, taps * outputs)
        fitted, shift = corrected(Maps(self.captured.samples, maps), flat, mask, biased=bool(bias))
        fitted = form.restore(fitted.reshape(parts, n, outputs), old).astype(old.dtype)
        weights[name] = GatheredWeight(ArrayWeight(name, fitted), after.steps(name))
        if bias:
            before = graph.weights[bias].read()
            added = shift.reshape(parts, taps, outputs).sum(axis=1).reshape(-1) * form.scale / form.bias_scale
            if before.size == added.size:
                value = (before + added.reshape(before.shape)).astype(before.dtype)
                weights[bias] = GatheredWeight(ArrayWeight(bias, value), after.steps(bias))


def square_error(actual: Array, expected: Array) -> float:
    """Return the sum of squares of the difference where the original is finite; of the original where shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    finite = np.isfinite(expected)
    difference = np.where(finite, actual, 0).astype(np.float64) - np.where(finite, expected, 0)
    return float(np.square(np.nan_to_num(difference, nan=0.0, posinf=1e30, neginf=1e30)).sum())


def spread_about_mean(values: Sequence[Array]) -> float:
    """Return the sum of squares about the mean over samples; about the mean of all, where calls differ in shape."""
    if len({a.shape[1:] for a in values}) == 1 and all(a.ndim for a in values):
        rows = np.concatenate(values).astype(np.float64)
        rows = np.where(np.isfinite(rows), rows, 0.0)
        return float(np.square(rows - rows.mean(axis=0)).sum())
    flat = np.concatenate([a.ravel() for a in values]).astype(np.float64)
    flat = flat[np.isfinite(flat)]
    return float(np.square(flat - flat.mean()).sum()) if flat.size else 0.0
