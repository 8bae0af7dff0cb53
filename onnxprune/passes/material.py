"""What a repair is fitted to and what it is judged on: the user's data, or inputs that are made up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from onnxprune.analysis import Analysis
from onnxprune.errors import UsageError
from onnxprune.passes.calls import Calls
from onnxprune.passes.datafree import make_up
from onnxprune.passes.outcome import MOST, set_aside
from onnxprune.passes.state import State
from onnxprune.recover.held import HELD
from onnxprune.runtime.capture import count
from onnxprune.runtime.sessions import Feed


class Material(NamedTuple):
    """Inputs of a repair.

    Attributes:
        fit: batches to fit to. judge, name: batches to compare results on, and a name for them.
        made_up: what ``fit`` is where it is not the user's data.
    """

    fit: Sequence[Feed]
    judge: Sequence[Feed]
    name: str
    made_up: str = ""


def no_data(mode: str) -> UsageError:
    """What is said where there is nothing to repair from."""
    return UsageError(
        f"recover {mode!r} needs calibration data, and there is none",
        hint="Give inputs with --data (Python: data=...), a few hundred without labels are enough; or repair without, "
        "which is weaker, by 'datafree'.",
    )


def gather(state: State, analysis: Analysis, mode: str) -> Material:
    """The inputs for a way to repair.

    Raises:
        UsageError: there is no data and the way needs some, or it does not fit.
    """
    if mode != "datafree":
        if state.data is None:
            raise no_data(mode)
        fit, (judge, name) = set_aside(_feeds(state, analysis), state.calibration().name)
        return Material(fit, judge, name)
    with state.stage("inputs"):
        made, spread = make_up(state, analysis)
    words = f"synthetic inputs (range {spread})" if spread else "synthetic inputs"
    if state.data is None:
        fit, (judge, name) = set_aside(made, "synthetic")
        return Material(fit, judge, name, words)
    source = Calls(state, analysis)
    samples = 0
    given: list[Feed] = []
    for feed in source.batches():
        given.append(feed)
        samples += count(feed)
        if state.samples is None and samples >= MOST:
            break
    if not given:
        raise _too_few(source)
    return Material(made, given, state.calibration().name, words)


def _feeds(state: State, analysis: Analysis) -> list[Feed]:
    """The data in batches that leave enough of them to hold some out."""
    source = Calls(state, analysis)
    many = min(32, state.batch_size or 32)
    if source.samples is not None:
        many = max(1, min(many, source.samples // (2 * HELD)))
    feeds = list(source.batches(many))
    if not feeds:
        raise _too_few(source)
    return feeds


def _too_few(source: Calls) -> UsageError:
    return UsageError("The data fill no call of the model.", hint=f"It takes {source.fixed or 1} samples at a time.")
