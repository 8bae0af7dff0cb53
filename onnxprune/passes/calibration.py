"""The user's inputs as calls of the model, and the hold-out split of a fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.channels.analysis import Analysis
from onnxprune.pipeline import Context, HoldOut
from onnxprune.runtime.capture import MEMORY, CallLimits, count
from onnxprune.runtime.data import StoredFeeds
from onnxprune.runtime.sessions import Feed

# One batch of this many is held out: of a recovery, which needs most for the fit; and of measurements of sensitivity
# to single groups, which need many to resolve differences.
HELD_OUT_OF_RECOVERY, HELD_OUT_OF_SENSITIVITY = 8, 3
MAX_VALIDATION = 256
"""Largest number of samples to measure on."""
MIN_VALIDATION = 32
"""Number of samples below which the model of a trial is measured on the hold-out of its recovery."""
MAX_TRIAL = 128
"""Number of samples that resolves the difference of two candidates."""


class CalibrationBatches:
    """The calibration data of a run.

    Some exports declare a free batch and reshape to a fixed one: analysis then has found one size that makes sense,
    every call has that size, and samples that fill no call are left out.

    Attributes:
        fixed: required number of samples per call, None where any number is allowed.
        max_size: largest number of samples per call, where any number is allowed.
    """

    def __init__(self, context: Context, analysis: Analysis, limit: int | None = None) -> None:
        """``limit``: samples that are enough, where the user does not say how many to take; at least one call's."""
        probes = analysis.facts.probes
        leads = [{name: s[0] for name, s in probe.inputs.items() if s} for probe in probes]
        self._sizes = leads[0] if all(lead == leads[0] for lead in leads) else {}
        # States of recurrent nets have their samples along the second axis.
        shapes = {name: np.broadcast_to(0, shape) for name, shape in probes[0].inputs.items()}
        self.fixed = count(shapes) if self._sizes else None
        data, calibration = context.inputs(), context.calibration
        assert calibration is not None
        self.max_size = calibration.batch_size or 16
        limited = limit is not None and calibration.limit is None
        self._data = data.first(max(limit or 1, self.fixed or 1)) if limited else data

    def __iter__(self) -> Iterator[Feed]:
        """Iterate over the data once, in batches of the usual size."""
        return self.batches()

    def limits(self, memory: int | None) -> CallLimits:
        """Return the limits of a call that captures inner tensors within ``memory`` bytes; None: the usual ones."""
        return CallLimits(self.fixed or 1, self.fixed or self.max_size, min(MEMORY, memory or MEMORY))

    @property
    def samples(self) -> int | None:
        """The number of samples of one pass, None where it is unknown before."""
        declared = self._data.samples
        return declared // self.fixed * self.fixed if declared and self.fixed else declared

    def batches(self, batch_size: int | None = None) -> Iterator[Feed]:
        """Iterate over the data once."""
        for feed in self._data.batches(self.fixed or batch_size):
            if all(len(feed[name]) >= size for name, size in self._sizes.items() if name in feed):
                yield feed

    def fingerprint(self) -> str | None:
        """Return a fingerprint of the content of the data, None where they can be read only once."""
        return self._data.fingerprint()


def is_held_out(number: int, period: int) -> bool:
    """Return whether a batch is held out: the last one of every so many, so that few batches are all used to fit."""
    return number % period == period - 1


@dataclass(frozen=True, slots=True)
class CalibrationSplit:
    """Inputs of a recovery.

    Attributes:
        fit: batches to fit to.
        validation: batches to compare results on; those of ``fit`` where there are too few.
        synthetic: description of ``fit`` where it is not the user's inputs, else empty.
    """

    fit: Sequence[Feed]
    validation: HoldOut
    synthetic: str = ""

    @classmethod
    def of(cls, batches: Sequence[Feed], name: str, synthetic: str = "") -> CalibrationSplit:
        """Hold out every eighth batch, up to 256 samples; with fewer batches, results are compared on all of them.

        Args:
            batches: the inputs.
            name: their name in reports.
            synthetic: their description where they are not the user's, else empty.
        """
        stored = batches if isinstance(batches, StoredFeeds) else StoredFeeds(batches)
        parts: dict[bool, list[int]] = {False: [], True: []}
        samples = 0
        for number, feed in enumerate(stored):
            held_out = is_held_out(number, HELD_OUT_OF_RECOVERY) and samples < MAX_VALIDATION
            parts[held_out].append(number)
            samples += count(feed) if held_out else 0
        fit = stored.part(parts[False])
        if parts[True]:
            return cls(fit, HoldOut(stored.part(parts[True]), f"{name}, not used by the recovery"), synthetic)
        return cls(fit, HoldOut(fit, f"{name}, also used by the recovery"), synthetic)

    @property
    def num_fit(self) -> int:
        """The number of samples to fit to."""
        return sum(map(count, self.fit))

    @property
    def num_held_out(self) -> int:
        """The number of hold-out samples."""
        return 0 if self.validation.inputs is self.fit else sum(map(count, self.validation.inputs))


@dataclass(frozen=True, slots=True)
class TrialSplit:
    """Inputs of a trial: the first samples are for the fit, those behind them for validation.

    Attributes:
        max_fit: largest number of samples to fit to, at most half of all.
        max_validation: largest number of samples to measure on.
    """

    max_fit: int = MAX_TRIAL
    max_validation: int = MAX_VALIDATION

    def num_fit(self, context: Context, analysis: Analysis) -> int:
        """Return the number of samples to fit to."""
        total = None if context.calibration is None else CalibrationBatches(context, analysis).samples
        return self.max_fit if total is None else min(self.max_fit, max(1, total // 2))

    def validation(self, context: Context, analysis: Analysis) -> list[Feed]:
        """Batches to measure on; none where they are too few."""
        if context.calibration is None:
            return []
        start = self.num_fit(context, analysis)
        batches = list(_between(CalibrationBatches(context, analysis).batches(), start, start + self.max_validation))
        return batches if sum(map(count, batches)) >= MIN_VALIDATION else []

    def first(self, context: Context, analysis: Analysis) -> list[Feed]:
        """Batches to measure on where nothing is fitted."""
        return list(_between(CalibrationBatches(context, analysis).batches(), 0, self.max_validation))


def _between(batches: Iterator[Feed], start: int, stop: int) -> Iterator[Feed]:
    """Batches that begin at sample ``start`` or behind it, until ``stop`` samples were read."""
    samples = 0
    for batch in batches:
        if samples >= start:
            yield batch
        samples += count(batch)
        if samples >= stop:
            return
