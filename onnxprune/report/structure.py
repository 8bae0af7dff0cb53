"""What a model is made of, as rich renderables: groups that can be cut, barriers, and what would unlock most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from onnxprune.report import units, words
from onnxprune.report.tables import table_of


def groups(records: Iterable[Mapping[str, Any]], *, name_width: int, most: int | None = None) -> list[RenderableType]:
    """The groups that can be cut, most units first; those that cannot are counted with their reasons."""
    found = list(records)
    free = sorted((group for group in found if group.get("prunable", True)), key=lambda group: -_units(group))
    # What is covered is cut all the same, as the group that covers it.
    fixed = [group for group in found if not group.get("prunable", True) and _cause(group) != "covered"]
    cut = any(group.get("removed") for group in free)
    table = table_of(
        ("group", "right"),
        ("kind", "left"),
        ("units", "right"),
        ("steps", "right"),
        ("slots", "right"),
        ("layers", "left"),
    )
    for group in free[:most]:
        size = _units(group)
        names = [str(name) for name in group.get("layers", ())] or [str(group.get("name", ""))]
        more = f" + {len(names) - 1} more" if len(names) > 1 else ""
        table.add_row(
            str(group.get("id", "")),
            str(group.get("kind", "channels")),
            units.change(str(size), str(size - _removed(group))) if cut else str(size),
            str(group.get("steps", size)),
            str(len(group.get("slots", ()))),
            units.shorten(names[0], name_width) + more,
        )
    parts: list[RenderableType] = [table] if free else []
    if most is not None and len(free) > most:
        parts.append(Text(f"and {len(free) - most} smaller groups (-v lists them)", style="dim"))
    if fixed:
        why = words.tally(str(group.get("reason", "")) for group in fixed)
        parts.append(Text(f"{len(fixed)} group{'' if len(fixed) == 1 else 's'} cannot be cut: {why}", style="dim"))
    return parts


def _cause(group: Mapping[str, Any]) -> str:
    return words.split(str(group.get("reason", "")))[0]


def _units(group: Mapping[str, Any]) -> int:
    return int(group.get("size", group.get("units", 0)))


def _removed(group: Mapping[str, Any]) -> int:
    removed = group.get("removed", 0)
    return removed if isinstance(removed, int) else len(removed)


def barriers(records: Iterable[Mapping[str, Any]], *, name_width: int, every: bool) -> list[RenderableType]:
    """Barriers, those that hold most channels first: one row per code and operator, or with ``every`` one per node."""
    every_record = sorted(records, key=lambda barrier: -int(barrier.get("channels", 0)))
    found = [barrier for barrier in every_record if not _kernel(barrier)]
    aside: list[RenderableType] = []
    if len(found) < len(every_record):
        count = len(every_record) - len(found)
        aside = [
            Text(
                f"{count} kernel{' keeps its size' if count == 1 else 's keep their size'}; positions are no channels",
                style="dim",
            )
        ]
    if not found:
        return [Text("none: every channel can be removed", style="green"), *aside]
    return [_barrier_table(found, name_width=name_width, every=every), *aside, *_legend(found)]


def held(records: Iterable[Mapping[str, Any]]) -> int:
    """Channels that barriers hold; the positions of a kernel are none."""
    return _channels(barrier for barrier in records if not _kernel(barrier))


def _kernel(barrier: Mapping[str, Any]) -> bool:
    """True for the height and width of a kernel: every convolution has them, and they were never channels."""
    return _code(barrier) == "spatial" and "kernel" in str(barrier.get("detail", ""))


def _barrier_table(found: Sequence[Mapping[str, Any]], *, name_width: int, every: bool) -> Table:
    if every:
        table = table_of(
            ("channels", "right"), ("code", "left"), ("operator", "left"), ("node", "left"), ("detail", "left")
        )
        for barrier in found:
            name = units.shorten(str(barrier.get("node", "")), name_width)
            table.add_row(
                str(barrier.get("channels", 0)), _code(barrier), _op(barrier), name, str(barrier.get("detail", ""))
            )
        return table
    merged: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for barrier in found:
        merged.setdefault((_code(barrier), _op(barrier)), []).append(barrier)
    rows = sorted(merged.items(), key=lambda item: -_channels(item[1]))
    table = table_of(
        ("channels", "right"), ("places", "right"), ("code", "left"), ("operator", "left"), ("for example", "left")
    )
    for (code, op), places in rows:
        example = units.shorten(str(places[0].get("node", "")), name_width)
        table.add_row(str(_channels(places)), str(len(places)), code, op, example)
    return table


def _code(barrier: Mapping[str, Any]) -> str:
    return str(barrier.get("code", ""))


def _op(barrier: Mapping[str, Any]) -> str:
    return str(barrier.get("op", ""))


def _channels(places: Iterable[Mapping[str, Any]]) -> int:
    return sum(int(place.get("channels", 0)) for place in places)


def _legend(found: Iterable[Mapping[str, Any]]) -> list[RenderableType]:
    """Each code that occurs, once, in plain words."""
    lines: list[RenderableType] = [Text("")]
    for code in dict.fromkeys(_code(barrier) for barrier in found):
        if code in words.BARRIERS:
            step = words.advice(code)
            text = f"{words.BARRIERS[code].why}{' ' + step if step else ''}"
            lines.append(Text.assemble((f"{code}: ", "bold"), text))
    return lines if len(lines) > 1 else []


def unlocks(found: Sequence[tuple[str, int]], most: int = 10) -> Table:
    """Operators that hold channels back, most channels first."""
    table = table_of(("channels", "right"), ("operator", "left"))
    for op, channels in sorted(found, key=lambda item: -item[1])[:most]:
        table.add_row(str(channels), op)
    return table
