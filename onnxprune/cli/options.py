"""What the options may hold: each value is parsed here, each bad one says what was allowed and what to give."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxprune.errors import UsageError, nearest

# Generic for the type checker since click 8.2, and not subscriptable at run time before.
if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType


def ratio(text: str, name: str = "--ratio") -> float:
    """A share of units to remove, 0 <= R < 1; raises UsageError with a guess at what was meant."""
    allowed = "A ratio R is the share of units to remove, 0 <= R < 1, for example 0.3."
    try:
        value = float(text)
    except ValueError:
        number = text.strip().removesuffix("%").strip()
        raise UsageError(f"{name}: {text!r} is not a number", hint=_as_share(number) or allowed) from None
    if not 0 <= value < 1:
        hint = _as_share(text) if value > 1 else allowed
        raise UsageError(f"{name}: {text} is out of range", hint=hint or allowed)
    return value


def _as_share(text: str) -> str:
    """A hint for someone who gave percent: ``For 30 percent give 0.3.``"""
    try:
        percent = float(text)
    except ValueError:
        return ""
    return f"For {percent:g} percent give {percent / 100:g}; allowed is 0 <= R < 1." if 1 <= percent < 100 else ""


class RatioType(_ParamType):
    """A number R with 0 <= R < 1."""

    name = "R"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The ratio as float; raises UsageError."""
        return ratio(str(value), flag(param))


class LayerRatioType(_ParamType):
    """``PATTERN=R``: a glob over node or initializer names, and a ratio."""

    name = "PATTERN=R"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """(pattern, ratio); raises UsageError."""
        if isinstance(value, tuple):
            return value
        pattern, sign, share = str(value).rpartition("=")
        if not sign or not pattern:
            raise UsageError(f"{flag(param)}: {value!r} is not PATTERN=R", hint="For example --layer '*/conv1/*=0.5'.")
        return pattern, ratio(share, f"{flag(param)} {pattern}")


class ShapeType(_ParamType):
    """``NAME=2,3,224,224``: an input's name and its whole shape."""

    name = "NAME=N,C,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        """(input name, sizes); raises UsageError."""
        if isinstance(value, tuple):
            return value
        hint = f"Give the input's name and every size, for example {flag(param)} images=2,3,224,224."
        name, sign, sizes = str(value).rpartition("=")
        if not sign or not name:
            raise UsageError(f"{flag(param)}: {value!r} is not NAME=SIZES", hint=hint)
        shape = []
        for part in sizes.split(","):
            text = part.strip()
            if not text.isdecimal() or int(text) < 1:
                raise UsageError(
                    f"{flag(param)} {name}: {text!r} is not a size; sizes are whole numbers from 1", hint=hint
                )
            shape.append(int(text))
        return name, tuple(shape)


class NumberType(_ParamType):
    """A whole number not below ``least``, with ``meaning`` for the message."""

    name = "N"

    def __init__(self, least: int, meaning: str) -> None:
        self.least = least
        self.meaning = meaning

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number; raises UsageError."""
        try:
            number = int(str(value))
        except ValueError:
            number = self.least - 1
        if number < self.least:
            raise UsageError(
                f"{flag(param)}: {value} is not allowed",
                hint=f"Give {self.meaning}: a whole number from {self.least}.",
            )
        return number


class CosineType(_ParamType):
    """A cosine to gate on, 0 < X <= 1."""

    name = "X"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The cosine; raises UsageError."""
        try:
            cosine = float(str(value))
        except ValueError:
            cosine = math.nan
        if not 0 < cosine <= 1:
            raise UsageError(
                f"{flag(param)}: {value} is not allowed",
                hint="Give the smallest cosine to accept, 0 < X <= 1, for example 0.95.",
            )
        return cosine


def flag(param: click.Parameter | None) -> str:
    """The option as the user types it."""
    return max(param.opts, key=len) if param is not None else "value"


def unique(option: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Repeated ``NAME=VALUE`` options as a mapping; raises UsageError when one name is given two values."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            raise UsageError(f"{option} {name} is given twice, with different values", hint="Give it once.")
        found[name] = value
    return found


def existing(path: Path, what: str, *, folder_allowed: bool = False) -> Path:
    """``path`` when it is there; raises UsageError with the nearest name in its folder when it is not."""
    if path.is_file() or (folder_allowed and path.is_dir()):
        return path
    if path.is_dir():
        from onnxprune.model.sniff import guess_folder

        known = guess_folder(path) if what == "model" else None
        hint = f"It is {known.name}. {known.hint}" if known is not None else "Give a file."
        raise UsageError(f"{what} {str(path)!r} is a folder", hint=hint)
    if not path.parent.is_dir():
        raise UsageError(f"{what} {str(path)!r} not found", hint=f"The folder {str(path.parent)!r} does not exist.")
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    hint = f"Did you mean {str(path.with_name(near[0]))!r}?" if near else "Check the path."
    raise UsageError(f"{what} {str(path)!r} not found", hint=hint)


def folder(flag: str, path: Path | None) -> None:
    """Whether ``path`` can be a folder that is made where it is not there; raises UsageError."""
    if path is not None and path.exists() and not path.is_dir():
        raise UsageError(f"{flag} {str(path)!r} is not a folder", hint="Give a folder; a new one is made.")


def criterion(name: str, known: Iterable[str]) -> str:
    """``name`` when it is a known criterion; raises UsageError with the nearest one."""
    names = list(known)
    if name not in names:
        raise UsageError(f"--criterion: unknown criterion {name!r}", hint=nearest(name, names))
    return name


def default_output(model: Path) -> Path:
    """``MODEL.pruned.onnx`` beside the input."""
    return model.with_name(model.name.removesuffix(".onnx") + ".pruned.onnx")
