"""Settings of an allocation: how scores become units, how many units to prune, and in which groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from onnxprune.devices import Kernels, kernels_of
from onnxprune.errors import argument
from onnxprune.globs import check_patterns
from onnxprune.settings import checked, default

WIDEST = 0.9
"""The largest share that a group loses where groups compete with each other, unless ``max_ratio`` says otherwise."""


AUTO = "auto"
# Values of "auto" where no criterion from data decides otherwise.
_PLAIN = {"scope": "local", "cost": "none"}
_CHOICES = ("policy", "normalize", "group_policy", "reshape_axis", "scope", "rounding", "cost", "schedule")


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """Options of every call and pass that prunes, beside the ratio: each once.

    Attributes:
        layers: {glob over node or weight names: ratio}; the last match applies.
        include, exclude: such globs: only groups with such a name are pruned, or none of them.
        scope: ranking scope, the units that compete with each other; ``auto``: those of a group, unless a default
            criterion compares them all.
        policy: aggregation of a unit's scores in several weights.
        normalize: normalisation of the scores of one weight, so that weights compare; ``auto`` is ``none`` for criteria
            whose scores compare without it, else ``mean``.
        group_policy: constraint on pruning the rows of a grid.
        reshape_axis: the prunable parts of a grid: cells of every row, whole rows, or both.
        max_ratio: the largest share that one group loses; None: all but one unit, or 0.9 where groups compete.
        cost: kind of the saving that a unit's score is divided by; ``auto``: none, unless the criterion is a default
            that divides by MACs.
        round_to: keep a multiple of this many units per group where possible; ``auto``: multiples that the kernels of
            the device like, see :mod:`onnxprune.devices`.
        device: for ``auto``: its name, its file or its multiples; None for where the model is timed, else this machine.
        step: units of a group are removed in multiples of this many.
        rounding: of the counts that follow from ratios.
        steps: number of rounds of scoring and pruning.
        schedule: growth of the removed share from one step to the next.
    """

    layers: Mapping[str, float] | None = default("layers")
    include: Sequence[str] = default("include")
    exclude: Sequence[str] = default("exclude")
    scope: str = default("scope")
    policy: str = default("policy")
    normalize: str = default("normalize")
    group_policy: str = default("group_policy")
    reshape_axis: str = default("reshape_axis")
    max_ratio: float | None = default("max_ratio")
    cost: str = default("cost")
    round_to: int | str = default("round_to")
    device: str | Kernels | None = None
    step: int = default("step")
    rounding: str = default("rounding")
    steps: int = default("steps")
    schedule: str = default("schedule")

    @property
    def arguments(self) -> dict[str, Any]:
        """Return these options by name, for another call."""
        return {entry.name: getattr(self, entry.name) for entry in fields(Options)}


@dataclass(frozen=True, kw_only=True)
class Request(Options):
    """Ratio and options of an allocation, checked, without ``auto`` but for ``round_to``.

    Attributes:
        ratio: share of units to remove, 0 <= ratio < 1: of every group, or of all groups together, see ``scope``.

    Raises:
        UsageError: a value is not allowed.
    """

    ratio: float = default("ratio")
    layers: Mapping[str, float] = field(default_factory=dict)
    normalize: str = "mean"
    scope: str = _PLAIN["scope"]
    cost: str = _PLAIN["cost"]

    def __post_init__(self) -> None:
        for entry in fields(self):
            checked(entry.name, getattr(self, entry.name))
        if self.device is not None:
            kernels_of(self.device)

    @property
    def widest(self) -> float:
        """Return the largest share that one group loses; at least one step remains besides."""
        if self.max_ratio is not None:
            return self.max_ratio
        return 1.0 if self.scope == "local" else WIDEST

    @property
    def least_multiple(self) -> int:
        """Return the multiple that was asked for as a number, 1 for ``auto``."""
        return self.round_to if isinstance(self.round_to, int) else 1

    @property
    def patterned(self) -> bool:
        """Return whether any setting depends on names."""
        return bool(self.layers or self.include or self.exclude)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings by name, for the report."""
        return {
            **{name: getattr(self, name) for name in _CHOICES},
            **{name: getattr(self, name) for name in ("ratio", "max_ratio", "round_to", "step", "steps")},
        }


def request_of(ratio: float, options: Options) -> Request:
    """Build the request of a call.

    Raises:
        UsageError: a value is not allowed.
    """
    values = {name: value for name, value in options.arguments.items() if value is not None}
    values |= {name: plain for name, plain in _PLAIN.items() if values.get(name) == AUTO}
    values |= {name: checked(name, values[name]) for name in ("include", "exclude")}
    return Request(ratio=ratio, **values)


def check_names(request: Request, names: Iterable[str]) -> None:
    """Check that every pattern of a request matches some node or weight of the model.

    Raises:
        UsageError: one does not; the nearest name is suggested.
    """
    names = list(names)
    check_patterns([(argument(name), getattr(request, name)) for name in ("layers", "include", "exclude")], names)
