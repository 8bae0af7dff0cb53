"""Errors a user can act on: the offending value, what was allowed, the next step; each owns its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class OnnxpruneError(Exception):
    """Base of every error onnxprune raises on purpose.

    Args:
        message: what is wrong, with the offending value in it.
        hint: the next step for the user, one sentence; shown on its own line.
        report: the :class:`~onnxprune.report.facts.Report` of a run that was finished and then not good enough.
    """

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "", report: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.report = report

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(OnnxpruneError):
    """A bad option value, a missing or unwritable path, a plan or data file that does not fit (exit code 2)."""

    exit_code = 2


class ModelError(OnnxpruneError):
    """A model file that cannot be read, is not valid ONNX, or cannot be processed (exit code 3)."""

    exit_code = 3


class ValidationError(OnnxpruneError):
    """The cut model differs from the masked original, or fails a structural check (exit code 4)."""

    exit_code = 4


class BudgetError(OnnxpruneError):
    """A budget or a gate that was not met, or nothing could be cut at all (exit code 5)."""

    exit_code = 5


class PreconditionError(UsageError):
    """A pass was called without what it requires: the order of passes, or the call, is wrong (exit code 2)."""


class PostconditionError(ValidationError):
    """A pass does not keep what it ensures: the pass is wrong (exit code 4)."""


def nearest(value: str, allowed: Iterable[str]) -> str:
    """A hint ``did you mean 'x'?`` for the nearest allowed name, or the list of allowed names when none is near."""
    names = sorted(set(allowed))
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"Allowed: {shown}." if names else ""
