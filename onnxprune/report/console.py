"""Where text goes: the report to stdout, everything else to stderr; colour and bars on a terminal, plain when piped."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, Protocol, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from onnxprune.report.units import ARROW, DASH, ELLIPSIS, PLUS_MINUS, TIMES

# Nothing wraps or is cut short in a file or a pipe, where there is no edge to wrap at.
PIPE_WIDTH = 1000
FIGURES_WIDTH = 85
_ASCII = {
    ARROW: "->",
    PLUS_MINUS: "+/-",
    TIMES: "x",
    ELLIPSIS: "...",
    DASH: "-",
    "\N{BOX DRAWINGS LIGHT HORIZONTAL}": "-",
}


def _plain_characters(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: a stream that cannot hold a sign gets its ASCII spelling instead of an exception."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_ASCII.get(sign, "?") for sign in error.object[error.start : error.end]), error.end


codecs.register_error("onnxprune.ascii", _plain_characters)


class _Console(Console):
    """A console that lets a closed pipe surface as BrokenPipeError; rich would end the program with code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@contextmanager
def _until_closed(console: Console) -> Iterator[None]:
    """Writing to a pipe whose reader left (``| head``) is no failure: what is left to say goes nowhere."""
    try:
        yield
        console.file.flush()
    except BrokenPipeError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, console.file.fileno())
        os.close(nothing)


def _console(stream: TextIO) -> Console:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="onnxprune.ascii")
    width = None if stream.isatty() else PIPE_WIDTH
    return _Console(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


class ProgressCallback(Protocol):
    """What the API calls while it works: the stage's name and how much of it is done, 0 to 1."""

    def __call__(self, stage: str, fraction: float) -> None:
        """Show that ``fraction`` of ``stage`` is done."""


@dataclass(frozen=True)
class Screen:
    """The two streams and how much to say: ``verbosity`` is -1 (errors only), 0, 1 or 2 (tracebacks too)."""

    out: Console
    err: Console
    as_json: bool = False
    verbosity: int = 0

    @classmethod
    def open(cls, *, as_json: bool = False, verbosity: int = 0) -> Screen:
        """Consoles on the present ``sys.stdout`` and ``sys.stderr``."""
        return cls(_console(sys.stdout), _console(sys.stderr), as_json, verbosity)

    @property
    def name_width(self) -> int:
        """Room for a node's name in a table: all of it in a pipe, on a terminal what the figures beside it leave."""
        return PIPE_WIDTH if self.out.width >= PIPE_WIDTH else max(18, self.out.width - FIGURES_WIDTH)

    def show(self, *parts: RenderableType) -> None:
        """Print parts of a report: on stdout; with ``--json`` on stderr and only with ``-v``; not when quiet."""
        if self.verbosity < 0 or (self.as_json and self.verbosity < 1):
            return
        console = self.err if self.as_json else self.out
        with _until_closed(console):
            for part in parts:
                if console.is_terminal:
                    console.print(part)
                    continue
                # Cells are padded to their column; in a file that is only trailing space.
                with console.capture() as captured:
                    console.print(part)
                console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def emit(self, record: Mapping[str, Any]) -> None:
        """Write the one JSON object of ``--json`` to stdout; NaN and infinity become null."""
        with _until_closed(self.out):
            self.out.file.write(json.dumps(plain(record), indent=2, allow_nan=False) + "\n")

    def warn(self, message: str) -> None:
        """A warning line on stderr, unless quiet."""
        if self.verbosity >= 0:
            self.err.print(Text.assemble(("warning: ", "yellow"), message))

    def note(self, message: str) -> None:
        """A line on stderr for those who asked for more with ``-v``."""
        if self.verbosity > 0:
            self.err.print(Text(message, style="dim"))

    @contextmanager
    def progress(self) -> Iterator[ProgressCallback]:
        """A callback that draws one bar per stage on a terminal, and elsewhere only names the stages with ``-v``."""
        if self.verbosity < 0 or not self.err.is_terminal:
            yield self._named_stages()
            return
        columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.err, transient=True) as bars:
            tasks: dict[str, TaskID] = {}

            def advance(stage: str, fraction: float) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=1.0)
                bars.update(tasks[stage], completed=min(max(fraction, 0.0), 1.0))

            yield advance

    def _named_stages(self) -> ProgressCallback:
        seen: set[str] = set()

        def name(stage: str, fraction: float) -> None:
            if stage not in seen:
                seen.add(stage)
                self.note(f"{stage} ...")

        return name


def plain(value: Any) -> Any:
    """Any fact as JSON-ready data: dataclasses to objects, arrays to lists, NaN and infinity to null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return str(value)
