"""Budget targets: ``macs=0.5``, ``size=3MB``, ``latency=12ms``, parsed and compared with the original."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnxprune.errors import UsageError, argument, nearest

_COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30}
_SECONDS = {"US": 1e-6, "MS": 1e-3, "S": 1.0}
UNITS: dict[str, dict[str, float]] = {
    "macs": _COUNTS,
    "params": _COUNTS,
    "size": _BYTES,
    "latency": _SECONDS,
    "peak-memory": _BYTES,
}
"""The kinds of targets, and the units that an absolute value of each may have."""
EXAMPLES = {"macs": "20M", "params": "1.5M", "size": "3MB", "latency": "12ms", "peak-memory": "64MB"}
COUNTABLE = ("macs", "params", "size", "peak-memory")
"""The kinds that follow from the graph alone."""
# A bare number up to this is more likely a percentage than so many multiplications.
_MOST_PERCENT = 100.0
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Target:
    """The most that a model may cost of one kind.

    Attributes:
        kind: a key of ``UNITS``.
        value: a share of the original, 0 < value <= 1, or an amount (a number of MACs or parameters, bytes, seconds).
        absolute: whether it is an amount.
    """

    kind: str
    value: float
    absolute: bool = False

    def limit(self, original: float) -> float:
        """Return the largest allowed cost, given the cost of the original."""
        return self.value if self.absolute else self.value * original

    def with_limit(self, limit: float, original: float) -> Target:
        """Return a target of the same kind with another limit."""
        return Target(self.kind, limit if self.absolute else limit / original, self.absolute)

    def __str__(self) -> str:
        """Return the target as it is written on the command line."""
        if not self.absolute:
            return f"{self.kind}={self.value:.4g}"
        units = {u: f for u, f in UNITS[self.kind].items() if "I" not in u and u not in ("", "T")}
        if self.kind in ("macs", "params"):
            units.pop("B")
        fitting = [u for u, f in units.items() if self.value >= f] or list(units)[:1]
        unit = max(fitting, key=units.__getitem__)
        unit_name = unit.lower() if self.kind == "latency" else unit.replace("KB", "kB")
        return f"{self.kind}={self.value / units[unit]:.4g}{unit_name}"


def parse(text: str, option: str = argument("target")) -> Target:
    """Parse a target from ``KIND=VALUE``.

    Raises:
        UsageError: an unknown kind, no number, a percent sign, a unit of another kind, or a value out of range.
    """
    kind, sign, value = (part.strip() for part in text.partition("="))
    if not sign:
        raise UsageError(f"{option}: {text!r} is not KIND=VALUE", hint=f"For example {option} macs=0.5.")
    if kind not in UNITS:
        listed = f"Allowed: {', '.join(UNITS)}."
        near = nearest(kind, UNITS)
        hint = f"{near} {listed}" if near.startswith("Did") else listed
        raise UsageError(f"{option}: unknown kind {kind!r}", hint=hint)
    return _target(kind, value, option)


def _target(kind: str, text: str, option: str) -> Target:
    kind_and_rest, either = (
        f"{option} {kind}",
        f"Give a share of the original such as 0.5, or an amount such as {EXAMPLES[kind]}.",
    )
    if text.endswith("%"):
        raise UsageError(f"{kind_and_rest}: {text!r} has a percent sign", hint=_as_share(kind, text[:-1]) or either)
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise UsageError(f"{kind_and_rest}: {text!r} is not a value", hint=either)
    number, unit = float(match[1]), match[2].upper()
    if not math.isfinite(number) or number <= 0:
        raise UsageError(f"{kind_and_rest}: {text} is out of range", hint=f"A target is more than 0. {either}")
    if unit not in UNITS[kind] and unit:
        units = ", ".join(filter(None, UNITS[kind]))
        raise UsageError(f"{kind_and_rest}: {match[2]!r} is no unit of {kind}", hint=f"Allowed: {units}. {either}")
    if unit:
        return Target(kind, number * UNITS[kind][unit], absolute=True)
    if number <= 1:
        return Target(kind, number)
    if "" in UNITS[kind] and number > _MOST_PERCENT:
        return Target(kind, number, absolute=True)
    raise UsageError(f"{kind_and_rest}: {text} is no share of the original", hint=_as_share(kind, text) or either)


def _as_share(kind: str, text: str) -> str:
    """Return a hint for a value that was given in percent."""
    try:
        percent = float(text)
    except ValueError:
        return ""
    if not 1 <= percent <= _MOST_PERCENT:
        return ""
    return f"To keep {percent:g} percent give {kind}={percent / 100:g}; an amount is written like {EXAMPLES[kind]}."


TargetInput = str | Target | Mapping[str, float | str] | Iterable[str | Target]


def targets(values: TargetInput, option: str = argument("target")) -> tuple[Target, ...]:
    """Parse the targets of a call: ``"macs=0.5"``, a list of such, or ``{"macs": 0.5, "latency": "12ms"}``.

    Raises:
        UsageError: one is not a target, none is given, or a kind is given twice with different values.
    """
    if isinstance(values, (str, Target)):
        values = [values]
    if isinstance(values, Mapping):
        values = [f"{kind}={value}" for kind, value in values.items()]
    if not isinstance(values, Iterable):
        raise UsageError(f"{option}: {values!r} is not allowed", hint="Give macs=0.5, or a list or mapping of these.")
    result: dict[str, Target] = {}
    for item in values:
        target = item if isinstance(item, Target) else parse(str(item), option)
        if result.setdefault(target.kind, target) != target:
            raise UsageError(f"{option} {target.kind} is given twice, with different values", hint="Give it once.")
    if not result:
        raise UsageError(f"{option} names no target", hint="For example macs=0.5.")
    return tuple(result.values())


def shares(text: str, option: str = argument("targets")) -> Sequence[float]:
    """Parse shares of the original from ``0.9,0.8,0.7``, largest first.

    Raises:
        UsageError: one is not a share.
    """
    result = []
    for part in text.split(","):
        target = _target("macs", part.strip(), option)
        if target.absolute:
            raise UsageError(f"{option}: {part.strip()} is no share of the original", hint="For example 0.9,0.7,0.5.")
        result.append(target.value)
    return sorted(set(result), reverse=True)
