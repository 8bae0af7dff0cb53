"""The user's data in calls that the model can take."""

from __future__ import annotations

from collections.abc import Iterator

from onnxprune.analysis import Analysis
from onnxprune.pipeline import Context
from onnxprune.runtime.sessions import Feed


class CalibrationBatches:
    """The calibration data of a run.

    Some exports declare a free batch and reshape to a fixed one: analysis then has found one size that makes sense,
    every call has that size, and samples that fill no call are left out.

    Attributes:
        fixed: the number of samples that every call has to have, None where any number will do.
        max_size: samples per call that the user wants at most, where any number will do.
    """

    def __init__(self, context: Context, analysis: Analysis, limit: int | None = None) -> None:
        """``limit``: samples that are enough, where the user does not say how many to take; at least one call's."""
        probes = analysis.facts.probes
        leads = [{name: s[0] for name, s in probe.inputs.items() if s} for probe in probes]
        self._sizes = leads[0] if all(own == leads[0] for own in leads) else {}
        self.fixed = next(iter(self._sizes.values()), None)
        data, calibration = context.inputs(), context.calibration
        assert calibration is not None
        self.max_size = calibration.batch_size or 16
        limited = limit is not None and calibration.limit is None
        self._data = data.first(max(limit or 1, self.fixed or 1)) if limited else data

    def __iter__(self) -> Iterator[Feed]:
        """One pass in batches of the usual size."""
        return self.batches()

    @property
    def samples(self) -> int | None:
        """Samples of one pass, None where they are not known before."""
        known = self._data.samples
        return known // self.fixed * self.fixed if known and self.fixed else known

    def batches(self, batch_size: int | None = None) -> Iterator[Feed]:
        """One pass over the data."""
        for feed in self._data.batches(self.fixed or batch_size):
            if all(len(feed[name]) >= size for name, size in self._sizes.items() if name in feed):
                yield feed

    def fingerprint(self) -> str | None:
        """What stands for the data's content, None where it can be read only once."""
        return self._data.fingerprint()
