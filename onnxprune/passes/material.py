"""What a recovery is fitted to and what it is judged on: the user's inputs, or synthetic ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxprune.analysis import Analysis
from onnxprune.errors import UsageError
from onnxprune.passes.calibration import CalibrationBatches
from onnxprune.passes.datafree import make_up
from onnxprune.passes.outcome import MOST, set_aside
from onnxprune.pipeline import Context, HoldOut
from onnxprune.recover.held import HELD
from onnxprune.runtime.capture import count
from onnxprune.runtime.sessions import Feed

NO_DATA = (
    "Give inputs with --data (Python: data=...), a few hundred without labels are enough; or repair without, "
    "which is weaker, by 'datafree'."
)


@dataclass(frozen=True, slots=True)
class CalibrationSplit:
    """Inputs of a recovery.

    Attributes:
        fit: batches to fit to. validation: batches to compare results on; those of ``fit`` where there are too few.
        synthetic: what ``fit`` is where it is not the user's inputs.
    """

    fit: Sequence[Feed]
    validation: HoldOut
    synthetic: str = ""

    @property
    def num_fit(self) -> int:
        """Samples to fit to."""
        return sum(map(count, self.fit))

    @property
    def num_held_out(self) -> int:
        """Samples that are not fitted to."""
        return 0 if self.validation.inputs is self.fit else sum(map(count, self.validation.inputs))


def no_data(mode: str) -> UsageError:
    """The error where there is nothing to recover from."""
    return UsageError(f"recover {mode!r} needs calibration data, and there is none", hint=NO_DATA)


def split_for(context: Context, analysis: Analysis, mode: str) -> CalibrationSplit:
    """The inputs for a mode of recovery.

    Args:
        context: the run. analysis: of the model that was pruned. mode: see :class:`onnxprune.passes.Recover`.

    Raises:
        UsageError: there is no data and the mode needs some, or it does not fit.
    """
    if mode != "datafree":
        if context.calibration is None:
            raise no_data(mode)
        return CalibrationSplit(*set_aside(_batches(context, analysis), context.inputs().name))
    with context.stage("inputs"):
        made, spread = make_up(context, analysis)
    words = f"synthetic inputs (range {spread})" if spread else "synthetic inputs"
    if context.calibration is None:
        return CalibrationSplit(*set_aside(made, "synthetic"), words)
    source = CalibrationBatches(context, analysis)
    samples = 0
    given: list[Feed] = []
    for feed in source.batches():
        given.append(feed)
        samples += count(feed)
        if context.calibration.limit is None and samples >= MOST:
            break
    if not given:
        raise _too_few(source)
    return CalibrationSplit(made, HoldOut(given, context.inputs().name), words)


def _batches(context: Context, analysis: Analysis) -> list[Feed]:
    """The data in batches that leave enough of them to hold some out."""
    assert context.calibration is not None
    source = CalibrationBatches(context, analysis)
    size = min(32, context.calibration.batch_size or 32)
    if source.samples is not None:
        size = max(1, min(size, source.samples // (2 * HELD)))
    batches = list(source.batches(size))
    if not batches:
        raise _too_few(source)
    return batches


def _too_few(source: CalibrationBatches) -> UsageError:
    return UsageError("The data fill no call of the model.", hint=f"It takes {source.fixed or 1} samples at a time.")
