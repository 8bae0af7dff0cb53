"""Every way a command can end badly, as one message on stderr and one exit code; a traceback only with ``-vv``."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import click
from rich.text import Text

from onnxprune.errors import OnnxpruneError
from onnxprune.report.console import Screen

INTERRUPTED = 130
INTERNAL = 3
USAGE = 2


@dataclass(frozen=True, slots=True)
class Failure:
    """What the user is told: the message, the next step, and the exit code."""

    kind: str
    message: str
    hint: str
    exit_code: int


def describe(error: BaseException, command_path: str = "onnxprune") -> Failure:
    """The failure an exception stands for; an exception nobody planned is an internal error (exit code 3)."""
    if isinstance(error, OnnxpruneError):
        return Failure(type(error).__name__, error.message, error.hint, error.exit_code)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return Failure("Interrupted", "interrupted", "", INTERRUPTED)
    if isinstance(error, click.ClickException):
        return Failure("UsageError", _click_message(error), _click_hint(error, command_path), USAGE)
    if isinstance(error, MemoryError):
        return Failure("MemoryError", "not enough memory for this model", "", INTERNAL)
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return Failure(
            "UsageError", f"{error.strerror.lower()}{where}", "Check the path, its rights and the space left.", USAGE
        )
    text = " ".join(str(error).split()) or "no message"
    hint = "Please report this with the command and, if you can, the model; -vv shows where it happened."
    return Failure("InternalError", f"{type(error).__name__}: {text}", hint, INTERNAL)


def _click_message(error: click.ClickException) -> str:
    # NoSuchOption and NoSuchCommand carry their suggestions in format_message(); these go into the hint instead.
    text = error.message if getattr(error, "possibilities", None) else error.format_message()
    text = text.strip().rstrip(".")
    return text[:1].lower() + text[1:]


def _click_hint(error: click.ClickException, command_path: str) -> str:
    near = getattr(error, "possibilities", None)
    if near:
        return f"Did you mean {near[0]}?"
    return f"'{command_path} --help' lists what can be given."


def show(error: BaseException, screen: Screen, command_path: str = "onnxprune") -> int:
    """Tell the user about ``error`` (stderr, with ``--json`` an object on stdout too); returns the exit code."""
    failure = describe(error, command_path)
    label = "internal error: " if failure.kind == "InternalError" else "error: "
    if screen.verbosity >= 2:
        screen.err.print(Text("".join(traceback.format_exception(error)).rstrip()))
    screen.err.print(Text.assemble((label, "bold red"), failure.message), soft_wrap=True)
    if failure.hint:
        screen.err.print(Text.assemble(("hint: ", "cyan"), failure.hint), soft_wrap=True)
    if screen.as_json:
        record = {
            "type": failure.kind,
            "message": failure.message,
            "hint": failure.hint,
            "exit_code": failure.exit_code,
        }
        screen.emit({"error": record})
    return failure.exit_code
