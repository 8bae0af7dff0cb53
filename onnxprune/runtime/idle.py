"""Outputs that are the same whatever goes in, which proves nothing: find them, and inputs that wake them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onnxprune.errors import ModelError
from onnxprune.runtime.differences import TOLERANCE, Output, add
from onnxprune.runtime.sessions import Feed, Openable, open_session, run


def varying(model: Openable, feeds: Sequence[Feed]) -> set[str]:
    """Outputs that vary, within one run or from one to the next, by more than the tolerance of ``exactness``.

    Raises:
        ModelError: the model does not load or run.
    """
    session = open_session(model, optimize=False)
    seen: dict[str, Output] = {}
    for feed in feeds:
        _note(run(session, feed), seen)
    return {name for name, output in seen.items() if not output.vacuous}


def waking(model: Openable, idle: Iterable[str], feeds: Sequence[Feed], others: Iterable[Feed]) -> list[Feed]:
    """Those of ``others`` that make an output of ``idle`` vary, beside what it is on ``feeds``; stops when all do."""
    session = open_session(model, optimize=False)
    seen: dict[str, Output] = {}
    for feed in feeds:
        _note(run(session, feed), seen)
    asleep = {name for name in idle if name in seen}
    chosen = []
    for feed in others:
        try:
            _note(run(session, feed), seen)
        except ModelError:  # values that this model cannot take
            continue
        awake = {name for name in asleep if not seen[name].vacuous}
        if awake:
            chosen.append(feed)
            asleep -= awake
        if not asleep:
            break
    return chosen


def _note(outputs: Feed, seen: dict[str, Output]) -> None:
    add(outputs, outputs, False, seen)
    for output in seen.values():
        output.tolerance = max(TOLERANCE, 4 * output.eps)
