"""Settings of a factorization: the method, the ranks, and the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from onnxprune.errors import UsageError, argument
from onnxprune.factorization.decompositions import METHODS, Ranks
from onnxprune.globs import last_match, reason_to_exclude
from onnxprune.settings import checked, default

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """Options of every call and pass that factorizes, beside the method: each once.

    One of ``ratio``, ``rank``, ``energy`` and ``vbmf`` determines the ranks.

    Attributes:
        ratio: share of the cost to save, 0 < ratio < 1: of every layer, or of the whole model, see ``scope``; None: 0.3
            where no other determines the ranks.
        rank: ranks, one per mode of the method or one for all, or {glob over node or weight names: ranks}; 0 keeps a
            mode whole.
        energy: share of every mode's energy to keep, 0 < energy <= 1.
        vbmf: ranks above noise, moved towards the full rank (1) or none (-1) by this ratio.
        layers: {glob: ratio}; the last match applies.
        include, exclude: such globs: only layers with such a name are factorized, or none of them.
        round_to: ranks are multiples of this.
        scope: ``local`` or ``global``; None: ``global`` under ``auto``, else ``local``.
        cost: cost that the ratio refers to, ``macs`` or ``params``.
        timed: ``auto`` skips layers that do not get faster, as measured.
    """

    ratio: float | None = None
    rank: int | Sequence[int] | Mapping[str, int | Sequence[int]] | None = None
    energy: float | None = None
    vbmf: float | None = None
    layers: Mapping[str, float] | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    round_to: int = 1
    scope: str | None = None
    cost: str = "macs"
    timed: bool = True

    @property
    def arguments(self) -> dict[str, Any]:
        """Return these options by name, for another call."""
        return {entry.name: getattr(self, entry.name) for entry in fields(Options)}


@dataclass(frozen=True, kw_only=True)
class Request(Options):
    """Method and options of a factorization, checked.

    Attributes:
        method: a name, or ``auto``: per layer the method of least error for the work it saves.
        ranks: {glob over node or weight names: ranks}, one per mode of the method; 0 keeps a mode whole.

    Raises:
        UsageError: a value is not allowed, or two contradict each other.
    """

    method: str = AUTO
    ranks: Mapping[str, Ranks] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)
    scope: str = "local"

    def __post_init__(self) -> None:
        for entry in fields(self):
            if entry.name not in ("rank", "ranks"):
                checked(entry.name, getattr(self, entry.name), "factorize")
        self._check_together()

    def _check_together(self) -> None:
        ways = {"ratio": self.ratio, "rank": self.ranks or None, "energy": self.energy, "vbmf": self.vbmf}
        arguments = [name for name, value in ways.items() if value is not None]
        if len(arguments) > 1:
            both = f"{argument(arguments[0])} and {argument(arguments[1])}"
            raise UsageError(f"{both} both set the ranks.", hint="Give one of the two.")
        by_rank = argument(arguments[0]) if arguments and arguments[0] != "ratio" else ""
        if by_rank and (self.method == AUTO or self.scope == "global"):
            what = argument("method", "auto") if self.method == AUTO else argument("scope", "global")
            hint = f"Name a method ({', '.join(METHODS)}) and {argument('scope', 'local')} for {by_rank}."
            raise UsageError(f"{what} chooses the ranks, so {by_rank} has no effect.", hint=hint)
        if by_rank and self.layers:
            raise UsageError(
                f"{argument('layers')} gives ratios, but {by_rank} does not use ratios.", hint="Drop one of the two."
            )
        if self.method == "cp" and (self.energy is not None or self.scope == "global"):
            what = argument("energy") if self.energy is not None else argument("scope", "global")
            raise UsageError(
                f"CP does not order its components by energy, so {what} cannot choose the ranks.",
                hint=f"Give {argument('ratio')}, {argument('rank')} or {argument('vbmf')}.",
            )
        if self.method != AUTO:
            modes = METHODS[self.method].modes
            for pattern, ranks in self.ranks.items():
                _check_ranks(self.method, pattern, ranks, modes)

    @property
    def share(self) -> float:
        """Return the ratio where it determines the ranks."""
        return float(default("ratio")) if self.ratio is None else self.ratio

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings by name, for the report."""
        settings: dict[str, Any] = {"method": self.method, "cost": self.cost, "round_to": self.round_to}
        if self.ranks:
            return {**settings, "rank": {p: list(r) for p, r in self.ranks.items()}}
        if self.energy is not None or self.vbmf is not None:
            return {**settings, **({"energy": self.energy} if self.energy is not None else {"vbmf": self.vbmf})}
        return {**settings, "ratio": self.share, "scope": self.scope}

    def is_excluded(self, names: Sequence[str]) -> bool:
        """Return whether ``exclude`` or ``include`` excludes a layer with these names."""
        return bool(reason_to_exclude(names, self.include, self.exclude))

    def ratio_of(self, names: Sequence[str]) -> float:
        """Return the ratio of a layer with these names: that of the last pattern in ``layers``, else the common one."""
        match = last_match(names, self.layers)
        return self.share if match is None else match[1]

    def ranks_of(self, names: Sequence[str]) -> tuple[str, Ranks] | None:
        """Return the last pattern that matches, and its ranks."""
        return last_match(names, self.ranks)


def request_of(method: str, options: Options) -> Request:
    """Build the request of a call.

    Raises:
        UsageError: a value is not allowed.
    """
    arguments = {name: value for name, value in options.arguments.items() if value is not None}
    rank = arguments.pop("rank", None)
    if rank is not None:
        by_pattern = rank if isinstance(rank, Mapping) else {"*": rank}
        arguments["ranks"] = {p: (r,) if isinstance(r, int) else tuple(r) for p, r in by_pattern.items()}
    arguments.setdefault("scope", "global" if method == AUTO else "local")
    arguments |= {name: checked(name, arguments[name], "factorize") for name in ("include", "exclude")}
    return Request(method=method, **arguments)


def _check_ranks(method: str, pattern: str, ranks: Ranks, modes: Sequence[str]) -> None:
    max_ranks = len(modes) + 3 if method == "tucker" else len(modes)
    valid = all(isinstance(r, int) and not isinstance(r, bool) and r >= 0 for r in ranks)
    if not valid or not any(ranks) or not (len(ranks) in (1, len(modes)) or len(modes) < len(ranks) <= max_ranks):
        several = len(modes) > 1
        counts = "one rank for both of its channel modes, or one for each (in,out)" if several else "one rank"
        zero = ", 0 keeps a mode as it is" if several else ""
        raise UsageError(
            f"{argument('rank')} {','.join(map(str, ranks)) or 'nothing'} of {pattern!r} is not allowed.",
            hint=f"{method} takes {counts}: whole numbers from 1{zero}.",
        )
