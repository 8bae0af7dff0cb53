"""How good a model is, as one number: the user's metric, or how close its outputs are to the original's."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onnxprune.errors import UsageError, nearest
from onnxprune.passes.outcome import noise
from onnxprune.report.facts import Fidelity

Metric = Callable[[str], float]


@dataclass(frozen=True, slots=True)
class Quality:
    """A model's quality.

    Attributes:
        points: what ``--max-drop`` counts in: the metric, or per cent of top-1 agreement, else of cosine.
        fine: what candidates are compared by; higher is better. fidelity: to the original, where it was measured.
    """

    points: float
    fine: float
    fidelity: Fidelity | None = None


def of_fidelity(facts: Fidelity) -> Quality:
    """Quality without a metric: agreement with the original for points, less noise the finer measure."""
    shares = [o.top1 for o in facts.outputs if o.top1 is not None]
    points = 100 * min(shares) if shares and len(shares) == len(facts.outputs) else 100 * facts.worst_cosine
    return Quality(points, -noise(facts), facts)


def said(metric: Metric | None, facts: Fidelity | None) -> str:
    """What the points are."""
    if metric is not None:
        return str(getattr(metric, "label", getattr(metric, "__name__", "metric")))
    tops = facts is not None and facts.outputs and all(o.top1 is not None for o in facts.outputs)
    return "top-1 agreement in %" if tops else "cosine in %"


def measured(metric: Metric, path: Path) -> float:
    """The metric of a model file, which it may change or remove: nothing else must need the file any more.

    Raises:
        UsageError: it raises, or gives no finite number.
    """
    label = getattr(metric, "label", getattr(metric, "__name__", "metric"))
    folder = Path.cwd()
    try:
        value = metric(str(path))
    except BaseException as error:
        if _is_interrupt(error):
            raise
        raise UsageError(
            f"The metric {label} failed: {_words(error)}",
            hint="It is called with the path of a model and returns a number, higher is better.",
        ) from error
    finally:
        os.chdir(folder)  # paths of outputs are relative to it
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UsageError(
            f"The metric {label} returned a {type(value).__name__}, a number was expected.",
            hint="It is called with the path of a model and returns a number, higher is better.",
        ) from None
    if not math.isfinite(number):
        raise UsageError(f"The metric {label} returned {number}.", hint="It has to be a finite number for every model.")
    return number


def _is_interrupt(error: BaseException) -> bool:
    """Whether an exception comes from the user, or the system, and not from the metric itself."""
    if not isinstance(error, KeyboardInterrupt):
        return isinstance(error, MemoryError)
    # Handlers of our own raise a kind of their own.
    return type(error) is not KeyboardInterrupt or signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _words(error: BaseException) -> str:
    """An exception as words."""
    if isinstance(error, SystemExit):
        return f"it called sys.exit({'' if error.code is None else repr(error.code)})"
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def load_metric(text: str) -> Metric:
    """The function that ``script.py:function`` names.

    Raises:
        UsageError: no such file or function, or a file that does not run.
    """
    path, sign, name = text.rpartition(":")
    hint = "Give script.py:function; it is called with the path of a model and returns a number, higher is better."
    if not sign or not path or not name:
        raise UsageError(f"--metric: {text!r} is not script.py:function", hint=hint)
    if not Path(path).is_file():
        raise UsageError(f"--metric: no file {path!r}", hint=hint)
    spec = importlib.util.spec_from_file_location(f"onnxprune_metric_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--metric: {path!r} is no Python file", hint=hint)
    module = importlib.util.module_from_spec(spec)
    try:
        with _beside(Path(path)):
            spec.loader.exec_module(module)
    except BaseException as error:
        if _is_interrupt(error):
            raise
        raise UsageError(f"--metric: {path} does not run: {_words(error)}", hint=hint) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UsageError(f"--metric: {path} has no function {name!r}", hint=nearest(name, known) or hint)
    return Named(function, text)


@dataclass(frozen=True, slots=True)
class Named:
    """A metric with the name that the user gave it."""

    function: Metric
    label: str

    def __call__(self, path: str) -> float:
        """The metric of a model file."""
        return self.function(path)

    def __reduce__(self) -> tuple[Callable[[str], Metric], tuple[str]]:
        """Workers load the script themselves."""
        return load_metric, (self.label,)


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """A script finds modules that lie beside it."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
