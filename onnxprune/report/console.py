"""Targets of text: the report to stdout, everything else to stderr; colour and bars on a terminal, plain when piped."""

from __future__ import annotations

import codecs
import errno
import io
import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from onnxprune.errors import Note, Spelling, spelled
from onnxprune.report import progress
from onnxprune.report.numbers import ARROW, DASH, ELLIPSIS, PLUS_MINUS, TIMES
from onnxprune.report.progress import ProgressCallback

# A table in a file or a pipe is as wide as an editor shows; text there has no edge to wrap at.
PIPE_WIDTH = 120
SCHEMA_VERSION = 1
"""Version of the output of ``--json``: docs/json.md."""
_RUNTIMES = ("onnxruntime", *(f"onnxruntime-{device}" for device in ("gpu", "openvino", "directml", "qnn", "silicon")))
WHOLE_NAME = 1000
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


class _Loss:
    """The result of writing to a stream: the error that ended it, if one did."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error = error

    @contextmanager
    def noted(self, console: Console) -> Iterator[None]:
        """Discard further text where a stream takes no more (a closed pipe, a full disk)."""
        try:
            yield
            console.file.flush()
        except OSError as error:
            self.error = self.error or error
            silence(console.file)


def silence(stream: IO[str]) -> None:
    """Discard all text written to a stream from here on, and the text that it has buffered."""
    with suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
        stream.flush()


def _stream(stream: TextIO | None) -> tuple[TextIO, OSError | None]:
    """Return the stream, or a null stream in place of one that was closed before the program began."""
    if stream is None or stream.closed:
        nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        return nowhere, OSError(errno.EBADF, "it is closed")
    return stream, None


def occupy_closed() -> None:
    """Open the standard streams that are closed: else the next file opened, a model even, would be one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _console(stream: TextIO) -> _Console:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="onnxprune.ascii")
    width = None if stream.isatty() else PIPE_WIDTH
    return _Console(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


LABEL = 10
"""Characters of the labels in front of lines."""


@dataclass(frozen=True)
class Line:
    """A text that begins with a label: where a terminal has to wrap it, its rest stands below the text."""

    text: Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the line within the width of ``options``."""
        if options.no_wrap or options.max_width < 3 * LABEL:
            yield self.text
            return
        label, text = self.text[:LABEL], self.text[LABEL:]
        for number, part in enumerate(text.wrap(console, options.max_width - LABEL)):
            part.rstrip()
            yield Text.assemble(label if number == 0 else " " * LABEL, part)


_LONGEST_WORD = 72
"""Characters of a word in a warning; some converters join the names of all operators that a layer was made of."""


def _middle_out(word: re.Match[str]) -> str:
    """Return the beginning and the end of a long name; paths stay, since they may be copied."""
    text = word[0]
    path = Path(text.strip("'\"(),:;"))
    with suppress(OSError):  # too long a name for a path
        if path.exists() or (path.is_absolute() and path.parent != Path("/") and path.parent.is_dir()):
            return text
    return f"{text[:24]}\N{HORIZONTAL ELLIPSIS}{text[24 - _LONGEST_WORD :]}"


@dataclass(frozen=True)
class Screen:
    """The two streams and how much to say: ``verbosity`` is -1 (errors only), 0, 1 or 2 (tracebacks too)."""

    out: Console
    err: Console
    as_json: bool = False
    verbosity: int = 0
    wrote: list[Path] = field(default_factory=list)
    """Files that the command has written."""
    about: dict[str, Any] = field(default_factory=dict)
    """The entries of ``--json`` about the run itself, in front of its results."""
    loss: _Loss = field(default_factory=_Loss)
    spell: Spelling | None = None
    """Spelling of arguments in messages; None: as in Python."""

    @classmethod
    def open(cls, *, as_json: bool = False, verbosity: int = 0, spell: Spelling | None = None) -> Screen:
        """Consoles on the present ``sys.stdout`` and ``sys.stderr``."""
        occupy_closed()
        (out, error), (err, _) = _stream(sys.stdout), _stream(sys.stderr)
        return cls(_console(out), _console(err), as_json, verbosity, loss=_Loss(error), spell=spell)

    def spelled(self, text: str) -> str:
        """Return a text with its arguments as the user writes them."""
        return spelled(text.marked, self.spell) if isinstance(text, Note) else text

    @property
    def lost(self) -> OSError | None:
        """The reason for which stdout did not take all of the report."""
        return self.loss.error

    @property
    def name_width(self) -> int:
        """Room for a node's name on a line of its own; tables fit names to the width beside their figures."""
        return max(18, self.out.width - 2) if self.out.is_terminal else WHOLE_NAME

    def show(self, *parts: RenderableType) -> None:
        """Print parts of a report: on stdout; with ``--json`` on stderr and only with ``-v``; not when quiet."""
        if self.verbosity < 0 or (self.as_json and self.verbosity < 1):
            return
        console = self.err if self.as_json else self.out
        with (_Loss() if self.as_json else self.loss).noted(console):
            for part in parts:
                if console.is_terminal:
                    console.print(part)
                    continue
                # Cells are padded to their column; in a file that is only trailing space.
                with console.capture() as captured:
                    console.print(part, soft_wrap=isinstance(part, (Text, Line)))
                console.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))

    def emit(self, record: Mapping[str, Any], exit_status: int = 0) -> None:
        """Write the one JSON object of ``--json`` to stdout; NaN and infinity become null."""
        record_of_run = {"schema_version": SCHEMA_VERSION, "versions": versions(), **self.about}
        record_of_run |= {"exit_status": exit_status, **record}
        with self.loss.noted(self.out):
            self.out.file.write(json.dumps(self._shown(plain(record_of_run)), indent=2, allow_nan=False) + "\n")

    def _shown(self, value: Any) -> Any:
        """Plain data with every text as the user writes it."""
        if isinstance(value, dict):
            return {key: self._shown(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._shown(item) for item in value]
        return self.spelled(value) if isinstance(value, str) else value

    def warn(self, message: str) -> None:
        """Write a warning line to stderr, unless quiet."""
        if self.verbosity >= 0:
            short = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", _middle_out, self.spelled(message))
            self.tell(Text.assemble(("warning: ", "yellow"), short))

    def note(self, message: str) -> None:
        """Write a line to stderr with ``-v``."""
        if self.verbosity > 0:
            self.tell(Text(message, style="dim"))

    def tell(self, text: Text, *, soft_wrap: bool = False) -> None:
        """Write a text to stderr, where that is possible."""
        with _Loss().noted(self.err):
            self.err.print(text, soft_wrap=soft_wrap or not self.err.is_terminal)

    def progress(self) -> AbstractContextManager[ProgressCallback]:
        """Return a callback that shows stages: as bars on a terminal, as lines in pipes and logs, not when quiet."""
        if self.verbosity < 0:
            return nullcontext(lambda stage, fraction: None)
        # A log that is forced to colour is no terminal: bars there would be one frame below the other.
        if self.err.file.isatty() and not self.err.is_dumb_terminal:
            return progress.bars(self.err)
        return progress.lines(lambda line: self.tell(Text(line, style="dim")))


def versions() -> dict[str, str | None]:
    """Return the versions of the tool and the packages its results depend on; None where one is not installed."""
    names = ("onnxprune", "numpy", "onnx")
    known = {"python": platform.python_version(), **{name: _version(name) for name in names}}
    # onnxruntime is one module and several packages: for processors, graphics cards and vendors.
    loaded = getattr(sys.modules.get("onnxruntime"), "__version__", None)
    return {**known, "onnxruntime": loaded or next(filter(None, map(_version, _RUNTIMES)), None)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
