"""The options for how units are chosen: what scores mean together, and how much of what goes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import click

from onnxprune.cli import options
from onnxprune.cli.layout import option
from onnxprune.errors import UsageError
from onnxprune.selection.request import CHOICES, choice

# Generic for the type checker since click 8.2, and not subscriptable at run time before.
if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

_HELP = {
    "scope": "Who competes: the units of each group, of all groups, of groups of the same structure, or all by SLAMP.",
    "policy": "How the scores that a unit has in several weights become one.",
    "normalize": "What makes the scores of different weights comparable.",
    "group_policy": "Heads and convolution groups: each loses its own indices (count), all lose the same ones by the "
    "sum or the average over them, or none loses any.",
    "reshape_axis": "Heads: cut channels within, whole heads where possible, or both.",
    "rounding": "How counts that follow from ratios are rounded.",
    "cost": "Divide scores by what removing the unit saves.",
    "schedule": "How the removed share grows over --steps.",
}


class ChoiceType(_ParamType):
    """One of the values that the option ``field`` may have."""

    def __init__(self, field: str) -> None:
        self.field = field
        self.name = "|".join(CHOICES[field])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The value; raises UsageError with the nearest."""
        return choice(self.field, str(value))


class ShareType(_ParamType):
    """A number R with 0 < R <= 1."""

    name = "R"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The share as float; raises UsageError."""
        if str(value) == "1" or value == 1:
            return 1.0
        share = options.ratio(str(value), options.flag(param))
        if share == 0:
            raise UsageError(
                f"{options.flag(param)}: {value} is out of range", hint="Allowed: 0 < R <= 1, for example 0.8."
            )
        return share


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionOptions:
    """How units are chosen; the fields are those of ``onnxprune.selection.request.Request``."""

    scope: str
    policy: str
    normalize: str
    group_policy: str
    reshape_axis: str
    max_ratio: float | None
    round_to: int
    step: int
    rounding: str
    cost: str
    steps: int
    schedule: str

    def arguments(self) -> dict[str, Any]:
        """The options as ``onnxprune.prune`` takes them."""
        return asdict(self)


def selection_options(heading: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options under ``heading``; the command gets them as ``selection``, a :class:`SelectionOptions`."""
    add = functools.partial(option, heading=heading)

    def pick(name: str) -> Callable[..., Any]:
        values = CHOICES[name]
        kind = ChoiceType(name)
        return add(
            f"--{name.replace('_', '-')}", type=kind, default=values[0], show_default=True, metavar=kind.name,
            help=_HELP[name],
        )  # fmt: skip

    def number(flag: str, meaning: str, text: str) -> Callable[..., Any]:
        return add(flag, type=options.NumberType(1, meaning), default=1, help=text)

    added = [
        pick("scope"),
        pick("policy"),
        pick("normalize"),
        pick("group_policy"),
        pick("reshape_axis"),
        add(
            "--max-ratio",
            type=ShareType(),
            help="No group loses more than this share; default 0.9 where groups compete, else all but one unit.",
        ),
        number("--round-to", "what to keep a multiple of", "Keep a multiple of N per group where it can be had."),
        number("--step", "what to remove a multiple of", "Remove a multiple of N units per group."),
        pick("rounding"),
        pick("cost"),
        number("--steps", "a number of steps", "Score and remove in N steps, each on what the last one left."),
        pick("schedule"),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def packed(*args: Any, **values: Any) -> Any:
            own = {entry.name: values.pop(entry.name) for entry in fields(SelectionOptions)}
            return command(*args, selection=SelectionOptions(**own), **values)

        return functools.reduce(lambda wrapped, put: put(wrapped), reversed(added), packed)

    return decorate
