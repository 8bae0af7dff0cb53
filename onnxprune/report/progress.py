"""Progress of a run: bars on a terminal and in a notebook, plain lines in pipes and logs."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, ParamSpec, Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

P = ParamSpec("P")
R = TypeVar("R")

INTERVAL = 10.0
"""Seconds between two lines of a stage in a log."""


_TELLING = 0.01
"""Share of a stage from which on its speed tells how long the rest takes; the first steps are of any speed."""


class ProgressCallback(Protocol):
    """Progress callback: takes the stage's name and the share of it that is done, 0 to 1."""

    def __call__(self, stage: str, fraction: float) -> None:
        """Show that ``fraction`` of ``stage`` is done."""


def time_left(elapsed: float, fraction: float) -> float | None:
    """Return the seconds that a stage still takes if it goes on as it did; None while too little is done to tell."""
    return elapsed * (1 - fraction) / fraction if _TELLING <= fraction <= 1 and elapsed > 0 else None


def duration(seconds: float) -> str:
    """Return a length of time in the two largest units."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, remainder = divmod(total, 60)
    return f"{minutes} min {remainder:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class _RemainingTime(ProgressColumn):
    """The time that a bar still needs."""

    def render(self, task: Task) -> Text:
        """Return the time left, nothing where it is not known."""
        remaining = time_left(task.elapsed or 0.0, task.completed / (task.total or 1.0))
        return Text(
            "" if remaining is None or task.finished else f"{duration(remaining)} left", style="progress.remaining"
        )


@contextmanager
def bars(console: Console) -> Iterator[ProgressCallback]:
    """Return a callback that draws one bar per stage; bars disappear at the end."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        _RemainingTime(),
    )
    with Progress(*columns, console=console, transient=True) as shown:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, fraction: float) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=1.0)
            elif fraction == 0:
                shown.reset(tasks[stage])
            shown.update(tasks[stage], completed=min(max(fraction, 0.0), 1.0))

        yield advance


class Lines:
    """One line when a stage first begins, and one at every tick of the current stage.

    Args:
        write: function that writes a line.
        clock: function that returns the time in seconds.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._named: set[str] = set()
        self._open: dict[str, tuple[float, float]] = {}  # {stage: (time of its beginning, share done)}
        self._lock = threading.Lock()

    def __call__(self, stage: str, fraction: float) -> None:
        """Take in that ``fraction`` of ``stage`` is done."""
        with self._lock:
            began, before = self._open.get(stage, (self._clock(), 0.0))
            if fraction >= 1:
                self._open.pop(stage, None)
            else:
                self._open[stage] = (self._clock() if fraction < before else began, max(fraction, 0.0))
            first = stage not in self._named
            self._named.add(stage)
        if first:
            self._write(f"{stage} ...")

    def tick(self) -> None:
        """Write the share of the longest open stage that knows it, and the stage within that is under way."""
        with self._lock:
            stages = list(self._open.items())
        if not stages:
            return
        start = next((i for i, (_, (_, share)) in enumerate(stages) if share > 0), len(stages) - 1)
        stage, (began, fraction) = stages[start]
        elapsed = self._clock() - began
        remaining = time_left(elapsed, fraction)
        parts = [f"{stage}: {100 * fraction:.0f} %", f"{duration(elapsed)} so far"]
        parts += [] if remaining is None else [f"about {duration(remaining)} left"]
        inner = f" ({stages[-1][0]} {100 * stages[-1][1][1]:.0f} %)" if len(stages) > start + 1 else ""
        self._write(", ".join(parts) + inner)


@contextmanager
def lines(write: Callable[[str], None], interval: float | None = None) -> Iterator[ProgressCallback]:
    """Return a callback that writes lines, see :class:`Lines`; a thread ticks, since stages may be silent for long.

    Args:
        write: function that writes a line.
        interval: seconds between ticks; None: ``INTERVAL``.
    """
    reporter, finished = Lines(write), threading.Event()
    pause = INTERVAL if interval is None else interval

    def tick() -> None:
        while not finished.wait(pause):
            reporter.tick()

    thread = threading.Thread(target=tick, name="onnxprune progress", daemon=True)
    thread.start()
    try:
        yield reporter
    finally:
        finished.set()
        thread.join()


def in_notebook() -> bool:
    """Return whether this program is the kernel of a notebook."""
    return "ipykernel" in sys.modules and Console().is_jupyter


def watched(function: Callable[P, R]) -> Callable[P, R]:
    """Make a call show its progress in a notebook, unless it is given a callback of its own, as a decorator."""
    if "progress" not in inspect.signature(function).parameters:
        return function

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("progress") is not None or not in_notebook():
            return function(*args, **kwargs)
        # rich draws its bars with ipywidgets
        display = bars(Console()) if find_spec("ipywidgets") else lines(_print)
        with display as progress:
            arguments: dict[str, Any] = {**kwargs, "progress": progress}
            return function(*args, **arguments)

    return call


def _print(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
