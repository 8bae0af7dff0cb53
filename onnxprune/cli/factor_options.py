"""The options of a factorization: by which method, how far, of which layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import click

from onnxprune.cli import options
from onnxprune.cli.layout import option
from onnxprune.errors import UsageError, nearest

# Generic for the type checker since click 8.2, and not subscriptable at run time before.
if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

METHODS = ("auto", "svd", "tucker", "cp", "spatial-svd")


class WordType(_ParamType):
    """One of a few words."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.name = "|".join(words)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The word; raises UsageError with the nearest."""
        if value not in self.words:
            raise UsageError(f"{options.flag(param)}: unknown value {value!r}", hint=nearest(str(value), self.words))
        return str(value)


class RankType(_ParamType):
    """``R``, ``IN,OUT`` or ``PATTERN=`` and either: ranks of all layers, or of those whose name matches."""

    name = "[PATTERN=]R[,R]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        """(pattern, ranks); raises UsageError."""
        if isinstance(value, tuple):
            return value
        pattern, sign, ranks = str(value).rpartition("=")
        parts = [part.strip() for part in ranks.split(",")]
        if (sign and not pattern) or not all(part.isdecimal() for part in parts):
            raise UsageError(
                f"{options.flag(param)}: {value!r} is not a rank",
                hint="Give a number, one per mode (in,out), or PATTERN= in front: --rank '*/conv1/*=16,32'.",
            )
        return pattern or "*", tuple(int(part) for part in parts)


class NumberBetween(_ParamType):
    """A number from ``low`` to ``high``; ``open_low``: without ``low`` itself."""

    def __init__(self, low: float, high: float, meaning: str, *, open_low: bool = False, name: str = "X") -> None:
        self.low, self.high, self.meaning, self.open_low, self.name = low, high, meaning, open_low, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; raises UsageError."""
        try:
            number = float(str(value))
        except ValueError:
            number = float("nan")
        if not self.low <= number <= self.high or (self.open_low and number == self.low):
            less = "<" if self.open_low else "<="
            raise UsageError(
                f"{options.flag(param)}: {value} is not allowed",
                hint=f"Give {self.meaning}: {self.low:g} {less} {self.name} <= {self.high:g}.",
            )
        return number


class SavedType(options.RatioType):
    """A share to save, 0 < R < 1."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share; raises UsageError."""
        share = super().convert(value, param, ctx)
        if not share:
            raise UsageError(f"{options.flag(param)}: {value} saves nothing", hint="Give 0 < R < 1, for example 0.3.")
        return share


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorOptions:
    """What was said about ranks and layers."""

    method: str
    ratio: float | None
    rank: tuple[tuple[str, tuple[int, ...]], ...]
    energy: float | None
    vbmf: bool
    calibration: float | None
    layers: tuple[tuple[str, float], ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    round_to: int
    scope: str | None
    cost: str
    timed: bool

    def arguments(self) -> dict[str, Any]:
        """The options as ``onnxprune.factorize`` takes them; raises UsageError."""
        if self.calibration is not None and not self.vbmf:
            raise UsageError("--calibration moves the ranks that --vbmf finds", hint="Give --vbmf, or drop it.")
        same = ("method", "ratio", "energy", "include", "exclude", "round_to", "scope", "cost", "timed")
        return {
            **{name: getattr(self, name) for name in same},
            "rank": options.unique("--rank", self.rank) or None,
            "vbmf": (self.calibration or 0.0) if self.vbmf else None,
            "layers": options.unique("--layer", self.layers) or None,
        }


def factor_options(how: str, far: str, which: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options under three headings; the command gets them as ``factors``, a :class:`FactorOptions`."""
    word = WordType(*METHODS)
    number = options.NumberType(1, "what ranks are a multiple of")
    share = NumberBetween(0, 1, "the share of the energy to keep", open_low=True, name="E")
    moved = NumberBetween(-1, 1, "how far to move the ranks: to all (1) or to none (-1)", name="C")
    scope, cost = WordType("local", "global"), WordType("macs", "params")
    added = [
        option("--method", heading=how, type=word, default="auto", show_default=True, metavar=word.name,
               help="How to take layers apart; auto: per layer whichever errs least for what it saves."),
        option("--ratio", heading=far, type=SavedType(),
               help="Share of the cost to save, of every layer or (auto) of the model; default 0.3."),
        option("--rank", heading=far, type=RankType(), multiple=True,
               help="Ranks, of all layers or those whose name matches; one per mode, 0 leaves one; repeatable."),
        option("--energy", heading=far, type=share, help="Keep this share of the energy of every mode."),
        option("--vbmf", heading=far, is_flag=True, help="Keep what is more than noise (variational Bayes)."),
        option("--calibration", heading=far, type=moved,
               help="Move the ranks of --vbmf towards all (1) or none (-1); default 0."),
        option("--cost", heading=far, type=cost, default="macs", show_default=True, metavar=cost.name,
               help="What --ratio is a share of."),
        option("--scope", heading=far, type=scope, metavar=scope.name,
               help="The ratio in every layer, or one budget; default global for auto, else local."),
        option("--round-to", heading=far, type=number, default=1, help="Ranks are multiples of N."),
        option("--layer", "layers", heading=which, type=options.LayerRatioType(), multiple=True,
               help="Another ratio for the layers or weights whose name matches; repeatable."),
        option("--include", heading=which, multiple=True, metavar="PATTERN", help="Only these layers; repeatable."),
        option("--exclude", heading=which, multiple=True, metavar="PATTERN", help="Not these layers; repeatable."),
        option("--timed/--untimed", heading=which, default=True,
               help="auto: leave alone what does not get faster here, as measured (default), or go by work alone."),
    ]  # fmt: skip

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def packed(*args: Any, **values: Any) -> Any:
            own = {entry.name: values.pop(entry.name) for entry in fields(FactorOptions)}
            return command(*args, factors=FactorOptions(**own), **values)

        return functools.reduce(lambda wrapped, put: put(wrapped), reversed(added), packed)

    return decorate
