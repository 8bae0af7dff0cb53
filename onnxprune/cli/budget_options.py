"""The options for what a model may cost, and how good it has to stay."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxprune.cli import options, shared_options
from onnxprune.cli.layout import option
from onnxprune.errors import UsageError

# Generic for the type checker since click 8.2, and not subscriptable at run time before.
if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType

# What a budget finds by itself: giving one of these beside it would be silently ignored otherwise.
DECIDED = ("ratio", "scope", "rounding", "cost", "steps", "schedule")


class TargetType(_ParamType):
    """``KIND=VALUE``."""

    name = "KIND=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The target; raises UsageError."""
        from onnxprune.budget.target import parse

        return parse(str(value), options.flag(param))


class DropType(_ParamType):
    """A number X >= 0."""

    name = "X"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; raises UsageError."""
        try:
            drop = float(str(value))
        except ValueError:
            drop = math.nan
        if not 0 <= drop < math.inf:
            raise UsageError(
                f"{options.flag(param)}: {value} is not allowed",
                hint="Give what the metric may lose, 0 or more, for example 1.0; without --metric, points of per cent.",
            )
        return drop


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetOptions:
    """What was said about the budget."""

    targets: tuple[Any, ...]
    max_drop: float | None
    metric: str | None
    latency_table: Path | None
    sensitivity: str | None
    jobs: int | None
    factorize: bool
    trials: int | None

    @property
    def any(self) -> bool:
        """Whether a budget was asked for."""
        return bool(self.targets) or self.max_drop is not None

    def arguments(self, min_fidelity: float | None) -> dict[str, Any]:
        """The options as ``onnxprune.prune`` takes them."""
        return {
            "target": list(self.targets) or None,
            "max_drop": self.max_drop,
            "metric": self.metric,
            "latency_table": self.latency_table,
            "sensitivity": self.sensitivity,
            "jobs": self.jobs or -1 if self.sensitivity else None,
            "factorize": self.factorize,
            "trials": self.trials,
            "min_fidelity": min_fidelity if self.any else None,
        }

    def check(self, ctx: click.Context) -> None:
        """Whether the options go together, and with the others; raises UsageError."""
        from onnxprune.search.wishes import Wishes

        if self.latency_table is not None:
            options.existing(self.latency_table, "latency table")
        if self.sensitivity not in (None, "measure"):
            options.existing(Path(str(self.sensitivity)), "file of sensitivities")
        if self.jobs is not None and self.sensitivity != "measure":
            raise UsageError("--jobs is about measuring sensitivities", hint="Give --sensitivity measure, or drop it.")
        Wishes.of(**self.arguments(None))
        if not self.any:
            return
        name = "--target" if self.targets else "--max-drop"
        for decided in (*DECIDED, "apply_plan"):
            if ctx.get_parameter_source(decided) is click.core.ParameterSource.COMMANDLINE:
                given = f"--{decided.replace('_', '-')}"
                raise UsageError(
                    f"{given} and {name} were both given: each says how much goes",
                    hint=f"Drop one of the two: a budget finds the counts by itself; {given} is for cuts without one.",
                )


def budget_options(heading: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options under ``heading``; the command gets them as ``budget``, a :class:`BudgetOptions`."""
    add = functools.partial(option, heading=heading)
    added = [
        add(
            "--target",
            "targets",
            type=TargetType(),
            multiple=True,
            help="In place of --ratio: what the model may cost, as a share of the original or an amount: macs=0.5, "
            "params=0.4, size=3MB, latency=0.6 or 12ms, peak-memory=64MB; repeatable.",
        ),
        add(
            "--max-drop",
            type=DropType(),
            help="What the metric may lose; alone: find the smallest model within it.",
        ),
        shared_options.metric,
        add(
            "--sensitivity",
            metavar="FILE.json|measure",
            help="Choose counts by what cutting each group alone did, too: as 'onnxprune sensitivity' wrote it, or "
            "measured first (minutes; kept for later runs).",
        ),
        shared_options.jobs,
        add(
            "--factorize",
            is_flag=True,
            help="Take layers apart as well, where that keeps more than cutting them; for all kinds but peak-memory.",
        ),
        add(
            "--trials",
            type=options.NumberType(0, "how many answers to try"),
            help="Answers to try around the best cut; default: with a repair about half a minute's worth, else none.",
        ),
        add(
            "--latency-table",
            type=click.Path(path_type=Path),
            metavar="FILE.json",
            help="Times of another device, as 'onnxprune profile MODEL -o FILE.json' wrote them there.",
        ),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def packed(*args: Any, **values: Any) -> Any:
            own = {entry.name: values.pop(entry.name) for entry in fields(BudgetOptions)}
            return command(*args, budget=BudgetOptions(**own), **values)

        return functools.reduce(lambda wrapped, put: put(wrapped), reversed(added), packed)

    return decorate
