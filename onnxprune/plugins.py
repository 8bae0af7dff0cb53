"""Extensions by name: built in, registered by a program, announced by another package's entry point, or in a script."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, Generic, TypeVar

from onnxprune.errors import UsageError, nearest

T = TypeVar("T")


def announced(group: str) -> dict[str, Any]:
    """Load the extensions of an entry point group, {name: object}.

    Raises:
        UsageError: one cannot be loaded; the message names its package.
    """
    points = {}
    for point in entry_points(group=group):
        try:
            points[point.name] = point.load()
        except (Exception, SystemExit) as error:
            package = point.dist.name if point.dist is not None else point.value
            raise UsageError(
                f"The extension {point.name!r} of {package} cannot be loaded: {type(error).__name__}: {error}",
                hint=f"Repair or uninstall {package}.",
            ) from error
    return points


class Named(Generic[T]):
    """A table of extensions of one kind; those of an entry point group join it when names are first looked at.

    Args:
        kind: name of the kind in messages.
        group: name of the entry point group.
        built_in: built-in extensions by name; as ``package.module:name`` where they are imported on first use.
    """

    def __init__(self, kind: str, group: str, built_in: Mapping[str, T] | None = None) -> None:
        self._kind, self._group, self._loaded = kind, group, False
        self._table: dict[str, T] = dict(built_in or {})

    def add(self, name: str, extension: T) -> None:
        """Add an extension.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._table:
            raise ValueError(f"a {self._kind} named {name!r} is already registered")
        self._table[name] = extension

    def remove(self, name: str) -> None:
        """Remove an extension, so that another can take its name."""
        self._table.pop(name, None)

    def get(self, name: str) -> T:
        """Return the extension of that name.

        Raises:
            UsageError: there is no such extension; the nearest name is suggested.
        """
        known = self.names()
        if name not in self._table:
            raise UsageError(f"Unknown {self._kind} {name!r}.", hint=nearest(name, known))
        extension: T = self._table[name]
        if isinstance(extension, str):
            extension = self._table[name] = resolve_name(extension)
        return extension

    def names(self) -> list[str]:
        """Return all names, sorted."""
        if not self._loaded:
            for name, extension in announced(self._group).items():
                self._table.setdefault(name, extension)
            self._loaded = True
        return sorted(self._table)


# -- functions in scripts ----------------------------------------------------------------------------------------------


def load_function(text: str, option: str, hint: str) -> Callable[..., Any]:
    """Run a script, once unless it changes, and return one of its functions.

    Args:
        text: ``script.py:function``.
        option: the option that names it, for messages.
        hint: form of such a function, for messages.

    Raises:
        UsageError: no such file or function, or a file that does not run.
    """
    path, sign, name = text.rpartition(":")
    if not sign or not path or not name:
        raise UsageError(f"{option}: {text!r} is not script.py:function", hint=hint)
    if not Path(path).is_file():
        raise UsageError(f"{option}: no file {path!r}", hint=hint)
    if importlib.util.spec_from_file_location("script", path) is None:
        raise UsageError(f"{option}: {path!r} is not a Python file", hint=hint)
    try:
        module = _run_script(Path(path).resolve(), Path(path).stat().st_mtime_ns)
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise UsageError(f"{option}: {path} does not run: {in_words(error)}", hint=hint) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UsageError(f"{option}: {path} has no function {name!r}", hint=nearest(name, names) or hint)
    loaded: Callable[..., Any] = function
    return loaded


@cache
def _run_script(path: Path, modified: int) -> ModuleType:
    """Run a script with its folder on the import path; ``modified``: time of its last change."""
    spec = importlib.util.spec_from_file_location(f"onnxprune_script_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def is_interrupt(error: BaseException) -> bool:
    """Return whether an exception comes from the user or the system, and not from the user's function."""
    if not isinstance(error, KeyboardInterrupt):
        return isinstance(error, MemoryError)
    # The package's signal handlers raise their own exception class.
    return type(error) is not KeyboardInterrupt or signal.getsignal(signal.SIGINT) is signal.default_int_handler


def in_words(error: BaseException) -> str:
    """Return an exception as text."""
    if isinstance(error, SystemExit):
        return f"it called sys.exit({'' if error.code is None else repr(error.code)})"
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
