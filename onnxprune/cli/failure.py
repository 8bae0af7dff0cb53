"""Every way a command can end badly, as one message on stderr and one exit code; a traceback only with ``-vv``."""

from __future__ import annotations

import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import click
from rich.text import Text

from onnxprune.errors import OnnxpruneError, UsageError
from onnxprune.report.console import Screen, silence

INTERRUPTED = 128 + signal.SIGINT
INTERNAL = 3
USAGE = 2


@dataclass(frozen=True, slots=True)
class Failure:
    """The answer to the user: the message, the next step, and the exit code."""

    kind: str
    message: str
    hint: str
    exit_code: int


_SIGNALS = {
    getattr(signal, name): words
    for name, words in (("SIGINT", "interrupted"), ("SIGTERM", "terminated"), ("SIGHUP", "the terminal was closed"))
    if hasattr(signal, name)
}


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Let signals that end a program raise :class:`Stopped`, so that everything is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for other in set(_SIGNALS) - {signal.SIGINT}:
            signal.signal(other, signal.SIG_IGN)  # cleaning up is under way
        raise Stopped(number)

    # Signals that are ignored (nohup, jobs in the background) stay ignored.
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe(error: BaseException, command_path: str = "onnxprune") -> Failure:
    """Describe the failure behind an exception; an unexpected exception is an internal error (exit code 3)."""
    if isinstance(error, OnnxpruneError):
        return Failure(type(error).__name__, error.message, error.hint, error.exit_code)
    if isinstance(error, Stopped):
        return Failure("Interrupted", _SIGNALS[signal.Signals(error.number)], "", 128 + error.number)
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
    if isinstance(error, SystemExit):
        return Failure("InternalError", f"code called by the run ended it with sys.exit({error.code!r})", "", 3)
    text = " ".join(str(error).split()) or "no message"
    hint = "Please report this with the command and, if you can, the model; -vv shows where it happened."
    return Failure("InternalError", f"{type(error).__name__}: {text}", hint, INTERNAL)


def _click_message(error: click.ClickException) -> str:
    if isinstance(error, click.NoSuchOption):  # releases of click word it in different ways
        return f"no such option '{error.option_name}'"
    # Errors carry their suggestions in format_message(); these go into the hint instead.
    text = error.message if getattr(error, "possibilities", None) else error.format_message()
    text = text.strip().rstrip(".")
    return text[:1].lower() + text[1:]


def _click_hint(error: click.ClickException, command_path: str) -> str:
    near = getattr(error, "possibilities", None)
    if near:
        return f"Did you mean {near[0]}?"
    if re.search(r"unexpected extra argument.*\.json\b", error.message):
        return "--json takes no file: it prints to standard output, so write '--json > FILE'."
    return f"'{command_path} --help' lists all options."


def show(error: BaseException, screen: Screen, command_path: str = "onnxprune") -> int:
    """Print an error to stderr and return the exit code.

    With ``--json`` an object with the key ``error`` goes to stdout too, beside the whole report of a run that was
    finished and then failed a gate.
    """
    failure = describe(error, command_path)
    message, hint = screen.spelled(failure.message), screen.spelled(failure.hint)
    label = "internal error: " if failure.kind == "InternalError" else "error: "
    if screen.verbosity >= 2:
        screen.tell(Text("".join(traceback.format_exception(error)).rstrip()), soft_wrap=True)
    screen.tell(Text.assemble((label, "bold red"), message), soft_wrap=True)
    if hint:
        screen.tell(Text.assemble(("hint: ", "cyan"), hint), soft_wrap=True)
    if screen.as_json:
        record = {
            "type": failure.kind,
            "message": message,
            "hint": hint,
            "exit_code": failure.exit_code,
        }
        report = getattr(error, "report", None)
        screen.emit({**(report.to_dict() if report is not None else {}), "error": record}, failure.exit_code)
    return failure.exit_code


def check_shown(screen: Screen) -> None:
    """Return whether the result of a command has reached its reader: files that it wrote, else the report.

    Raises:
        UsageError: there is only the report, and stdout did not take it. Who closes a pipe (``| head``) wants no more.
    """
    error = screen.lost
    if error is None or (screen.verbosity < 0 and not screen.as_json):
        return
    reader_left = isinstance(error, BrokenPipeError)
    if screen.wrote:
        files = ", ".join(map(str, screen.wrote))
        why = "its reader closed it" if reader_left else (error.strerror or str(error)).lower()
        screen.warn(f"wrote {files}, but could not write the whole report to stdout: {why}")
    elif not reader_left:
        raise UsageError(
            f"cannot write the report to stdout: {(error.strerror or str(error)).lower()}",
            hint="Redirect stdout to a file or a terminal.",
        )


def show_unwritable(error: OSError) -> int:
    """Print to stderr that stdout cannot be written, and return the exit code."""
    if sys.stdout is not None:
        silence(sys.stdout)
    Screen.open().tell(Text.assemble(("error: ", "bold red"), f"cannot write to stdout: {error.strerror}"))
    return USAGE
