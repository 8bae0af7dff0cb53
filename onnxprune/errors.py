"""Errors a user can act on: the offending value, the allowed ones, the next step; each owns its exit code.

A message names arguments through :func:`argument`: callers of Python read ``max_drop``, users of the command line
``--max-drop``, and programs ask ``error.argument``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any

# Private characters that no message has otherwise: the name of an argument, a key of it, a value of it.
_START, _KEY, _VALUE, _TEXT, _END = "\ue000", "\ue001", "\ue002", "\ue003", "\ue004"
_MARKED = re.compile(
    f"{_START}(?P<name>[a-z_]+)(?:{_KEY}(?P<key>[^{_END}]*?))?(?:(?P<kind>[{_VALUE}{_TEXT}])(?P<value>[^{_END}]*))?{_END}"
)
Spelling = Callable[[str, str, str], str]
"""(name, key, value) of an argument as a reader writes it; key and value are empty where a message gives none."""


def argument(name: str, value: Any = None, *, key: str = "") -> str:
    """Return the name of an argument for a message: ``max_drop``, ``recover='bn'`` or ``layers['conv1']``.

    Args:
        name: name of the argument in Python.
        value: one of its values; None for the argument itself.
        key: one of its keys, where it is a mapping.
    """
    at = f"{_KEY}{key}" if key else ""
    of = "" if value is None else f"{_TEXT if isinstance(value, str) else _VALUE}{value}"
    return f"{_START}{name}{at}{of}{_END}"


def spelled(text: str, spell: Spelling | None = None) -> str:
    """Return a message with its arguments as ``spell`` writes them; None: as Python does."""

    def one(match: re.Match[str]) -> str:
        name, key, value = match["name"], match["key"] or "", match["value"] or ""
        if spell is not None:
            return spell(name, key, value)
        of = f"={value!r}" if match["kind"] == _TEXT else f"={value}" if match["kind"] else ""
        return f"{name}[{key!r}]{of}" if key else name + of

    return _MARKED.sub(one, text)


class Note(str):
    """A text with names of arguments in it, in Python's spelling; ``marked`` can be spelled otherwise."""

    marked: str

    def __new__(cls, marked: str) -> Note:
        """Make a note of a text in which :func:`argument` was used; a note stays as it is."""
        if isinstance(marked, Note):
            return marked
        note = super().__new__(cls, spelled(marked))
        note.marked = marked
        return note


class OnnxpruneError(Exception):
    """Base of every error onnxprune raises on purpose.

    Args:
        message: description of the error with the offending value, and arguments named by :func:`argument`.
        hint: the next step for the user, one sentence; shown on its own line.
        report: the :class:`~onnxprune.report.facts.Report` of a run that was finished and then not good enough.

    Attributes:
        argument: the Python name of the argument in the message; empty where there is none.
    """

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "", report: Any = None) -> None:
        super().__init__(spelled(message))
        named = _MARKED.search(message)
        self.argument = named["name"] if named else ""
        self.message, self.hint, self.report = Note(message), Note(hint), report

    def spelled(self, spell: Spelling) -> tuple[str, str]:
        """Return message and hint with arguments in another spelling."""
        return spelled(self.message.marked, spell), spelled(self.hint.marked, spell)

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(OnnxpruneError):
    """A bad option value, a missing or unwritable path, a plan or data file that does not fit (exit code 2)."""

    exit_code = 2


class ArgumentError(UsageError, TypeError):
    """A call with unknown or too many arguments (exit code 2)."""


class ExtensionError(UsageError):
    """A criterion of the caller's own that raises, or that cannot be called as criteria are (exit code 2)."""


class ModelError(OnnxpruneError):
    """A model file that cannot be read, is not valid ONNX, or cannot be processed (exit code 3)."""

    exit_code = 3


class ValidationError(OnnxpruneError):
    """The pruned model differs from the masked original, or fails a structural check (exit code 4)."""

    exit_code = 4


class BudgetError(OnnxpruneError):
    """A budget or a gate that was not met, or nothing could be pruned at all (exit code 5)."""

    exit_code = 5


class PreconditionError(UsageError):
    """A requirement of a pass is not met: the order of passes, or the call, is wrong (exit code 2)."""


class PostconditionError(ValidationError):
    """A pass does not keep its guarantee: the pass is wrong (exit code 4)."""


def nearest(value: str, allowed: Iterable[str]) -> str:
    """Return a hint ``did you mean 'x'?`` for the nearest other name, or the allowed names when none is near."""
    names = sorted(set(allowed) - {value})
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"Allowed: {shown}." if names else ""
