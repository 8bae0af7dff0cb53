"""Settings of a sparsification: the pattern, how many zeros, where, and how weights are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from onnxprune.allocation.selection import removed_share
from onnxprune.errors import UsageError, argument
from onnxprune.globs import any_match, last_match, reason_to_exclude
from onnxprune.settings import checked
from onnxprune.sparsification.patterns import Pattern
from onnxprune.sparsification.scores import NEEDS_DATA

RATIO = 0.5
"""Share of zeros where nothing sets another."""
MAX_SHARE = 0.98
"""Largest share of zeros of a layer where layers compete."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """Options of every call and pass that sparsifies, beside the pattern: each once.

    Attributes:
        criterion: how weights are scored; None: obs with data, else magnitude.
        ratio: share of weights to set to 0; None: 0.5 where nothing else sets it.
        energy: share of a layer's scores to keep, in place of a ratio.
        layers: {glob over node or weight names: ratio}; the last match applies.
        include, exclude: such globs: only layers with such a name become sparse, or none of them.
        scope: ``local``: the ratio holds for every layer; ``global``: the weights of all layers compete.
        steps, schedule: number of rounds of scoring, and how the share grows over them.
        progressive: what blocks lose first, one step before the rest: half of their ``weights``, or smaller
            ``blocks``; ``none``: they become 0 at once.
    """

    criterion: str | None = None
    ratio: float | None = None
    energy: float | None = None
    layers: Mapping[str, float] | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    scope: str = "local"
    steps: int = 1
    schedule: str = "linear"
    progressive: str = "none"

    @property
    def arguments(self) -> dict[str, Any]:
        """Return these options by name, for another call."""
        return {entry.name: getattr(self, entry.name) for entry in fields(Options)}


@dataclass(frozen=True, kw_only=True)
class Request(Options):
    """Pattern and options of a sparsification, checked.

    Attributes:
        pattern: ``unstructured``, N:M or NxM.

    Raises:
        UsageError: a value is not allowed, or two contradict each other.
    """

    pattern: str = "unstructured"
    layers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, checked(entry.name, getattr(self, entry.name), "sparsify"))
        if self.ratio is not None and self.energy is not None:
            raise UsageError(
                f"{argument('ratio')} and {argument('energy')} both set the number of zeros.",
                hint="Give one of the two.",
            )
        if self.layers and self.energy is not None:
            raise UsageError(
                f"{argument('layers')} gives ratios, but {argument('energy')} sets the number of zeros.",
                hint="Drop one of the two.",
            )
        if self.shape.ratio is not None:
            self._check_fixed(self.shape.ratio)
        if self.finer_pattern is not None:
            self._check_progressive()

    def _check_progressive(self) -> None:
        """Check that there are blocks and steps to set them to 0 in."""
        name = argument("progressive", self.progressive)
        if self.shape.block == 1:
            raise UsageError(
                f"{name} needs blocks, and {argument('pattern', self.pattern)} has none.",
                hint=f"Give {argument('pattern', '4x1')} or other blocks NxM, or drop it.",
            )
        if self.steps == 1:
            raise UsageError(
                f"{name} needs 2 steps or more, and {argument('steps')} is 1.",
                hint=f"Give {argument('steps', 4)}, or drop it.",
            )

    def _check_fixed(self, fixed: float) -> None:
        """Check that nothing contradicts a pattern that sets the number of zeros."""
        hint = f"Drop it, or give {argument('pattern', 'unstructured')}."
        ratios = [(argument("ratio"), self.ratio)]
        ratios += [(argument("layers", key=pattern), ratio) for pattern, ratio in self.layers.items()]
        for name, ratio in ratios:
            if ratio is not None and abs(ratio - fixed) > 1e-9:
                what = f"{argument('pattern', self.pattern)} sets {fixed:g} of the weights to 0"
                raise UsageError(f"{name} {ratio:g} contradicts the pattern: {what}.", hint=hint)
        for name, is_given in (("energy", self.energy is not None), ("scope", self.scope == "global")):
            if is_given:
                raise UsageError(
                    f"{argument(name)} has no meaning with {argument('pattern', self.pattern)}, which sets "
                    f"{fixed:g} of the weights of every layer to 0.",
                    hint=hint,
                )

    @property
    def shape(self) -> Pattern:
        """The pattern."""
        return Pattern.of(self.pattern)

    @property
    def finer_pattern(self) -> Pattern | None:
        """The pattern of the weights that blocks lose first; None where they become 0 at once."""
        return {"none": None, "weights": Pattern(), "blocks": self.shape.half_size}[self.progressive]

    @property
    def share(self) -> float:
        """The share of zeros where it is the same everywhere."""
        return self.shape.ratio or (RATIO if self.ratio is None else self.ratio)

    def scored_by(self, has_data: bool) -> str:
        """Return the criterion.

        Raises:
            UsageError: it needs data, and there are none.
        """
        if self.criterion is None:
            return "obs" if has_data else "magnitude"
        if self.criterion in NEEDS_DATA and not has_data:
            raise UsageError(
                f"{argument('criterion', self.criterion)} needs inputs, but {argument('data')} is missing.",
                hint=f"Give {argument('data')} (a few hundred, without labels), or "
                f"{argument('criterion', 'magnitude')}, which reads the weights alone.",
            )
        return self.criterion

    def progress(self, step: int) -> float:
        """Return the share of the zeros of the last step that are there behind a step, counted from 1."""
        last = self.steps  # the last step of progressive masks sets second halves to 0
        last -= self.finer_pattern is not None
        if step >= last:
            return 1.0
        return removed_share(self.share, self.schedule, step / last) / self.share

    def is_excluded(self, names: Sequence[str]) -> bool:
        """Return whether ``exclude`` or ``include`` leaves out a layer with these names."""
        return bool(reason_to_exclude(names, self.include, self.exclude))

    def is_named(self, names: Sequence[str]) -> bool:
        """Return whether a layer with these names was asked for, and is taken also where it is left out by default."""
        return any_match(names, (*self.include, *self.layers))

    def own_ratio(self, names: Sequence[str]) -> float | None:
        """Return the ratio of the last pattern in ``layers`` that matches; None without."""
        match = last_match(names, self.layers)
        return None if match is None else match[1]

    def settings(self, criterion: str) -> dict[str, Any]:
        """Return the settings by name, for the report."""
        settings: dict[str, Any] = {"pattern": self.pattern, "criterion": criterion, "scope": self.scope}
        settings |= {"energy": self.energy} if self.energy is not None else {"ratio": self.share}
        steps = {"steps": self.steps, "schedule": self.schedule} if self.steps > 1 else {}
        progressive = {} if self.finer_pattern is None else {"progressive": self.progressive}
        return {**settings, **steps, **progressive}


def request_of(pattern: str, options: Options) -> Request:
    """Build the request of a call.

    Raises:
        UsageError: a value is not allowed.
    """
    arguments = {name: value for name, value in options.arguments.items() if value is not None}
    return Request(pattern=pattern, **arguments)
