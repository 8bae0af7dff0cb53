"""The options for what happens to the weights after a cut."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from onnxprune.cli import options
from onnxprune.cli.layout import option
from onnxprune.errors import UsageError, nearest
from onnxprune.recover import MODES

# Generic for the type checker since click 8.2, and not subscriptable at run time before.
if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_LEAST = 10**6


class ModeType(_ParamType):
    """One of the ways to repair a cut."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.name = "|".join(words)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word; raises UsageError with the nearest."""
        if value not in self.words:
            raise UsageError(f"{options.flag(param)}: unknown way {value!r}", hint=nearest(str(value), self.words))
        return str(value)


class MemoryType(_ParamType):
    """``2GB``, ``500MB``, ``1.5GiB``: a number of bytes with its unit."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; raises UsageError."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(value), flags=re.IGNORECASE)
        unit = _UNITS.get(found[2].upper()) if found else None
        if found is None or unit is None:
            raise UsageError(
                f"{options.flag(param)}: {value!r} is not a size",
                hint="Give a number and its unit: 2GB, 500MB.",
            )
        size = int(float(found[1]) * unit)
        if size < _LEAST:
            raise UsageError(f"{options.flag(param)}: {value} is too little", hint="Give 1MB or more.")
        return size


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryOptions:
    """What was said about the repair; ``recover`` is None where nothing was."""

    recover: str | None
    memory_limit: int | None

    def check(self, *, data: bool) -> None:
        """Whether what was asked can be done with or without data; raises UsageError."""
        if data or self.recover == "datafree":
            return
        if self.recover not in (None, "none"):
            raise UsageError(
                f"--recover {self.recover} needs calibration data, and there is none",
                hint="Give inputs with --data, a few hundred without labels are enough; or repair without, which is "
                "weaker, by --recover datafree.",
            )
        if self.memory_limit is not None:
            raise UsageError(
                "--memory-limit is about data that runs through the model, and there is no --data",
                hint="Give --data, or drop the option.",
            )


def recovery_options(
    heading: str, *, none: bool = True, default: str = "full with --data, else none"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options under ``heading``; the command gets them as ``recovery``, a :class:`RecoveryOptions`.

    Args:
        none: whether no repair may be asked for. default: what is done where nothing is said.
    """
    kind = ModeType(*(mode for mode in MODES if none or mode != "none"))
    add = functools.partial(option, heading=heading)
    added = [
        add(
            "--recover",
            type=kind,
            metavar=kind.name,
            help="Repair from --data in closed form: means (bias), scale and shift (bn), weights by least squares "
            "(lstsq), or the best of them aimed at sums (full); or without --data from synthetic inputs, which is "
            f"weaker (datafree); default {default}.",
        ),
        add(
            "--memory-limit",
            type=MemoryType(),
            help="Activations to hold in memory at a time, for example 2GB; more go to temporary files.",
        ),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def packed(*args: Any, recover: str | None, memory_limit: int | None, **values: Any) -> Any:
            return command(*args, recovery=RecoveryOptions(recover=recover, memory_limit=memory_limit), **values)

        return functools.reduce(lambda wrapped, put: put(wrapped), reversed(added), packed)

    return decorate
