"""Facts as rich renderables: layers, totals, exactness, fidelity of a cut; groups, barriers, unlocks of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from onnxprune.report import units, words
from onnxprune.report.facts import Exactness, Fidelity, Latency, LayerFacts, Report, Totals

SPATIAL = "spatial"
LONG = 30
"""Up to this many layers every one is listed; in a longer model the untouched ones are folded into a count."""


def _table(*columns: tuple[str, str]) -> Table:
    """A borderless table; each column is (title, ``left`` or ``right``)."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for title, side in columns:
        table.add_column(
            title, justify="right" if side == "right" else "left", no_wrap=side == "right", overflow="fold"
        )
    return table


def heading(text: str) -> Text:
    """A section's title with an empty line in front."""
    return Text(f"\n{text}", style="bold cyan")


def untouched(layer: LayerFacts) -> bool:
    """True when neither the layer's outputs nor its inputs lost anything."""
    return layer.channels_before == layer.channels_after and layer.params_before == layer.params_after


def reason(layer: LayerFacts) -> str:
    """Why the layer was not touched, with the reason that its own size is."""
    return layer.reason or ("single" if layer.channels_before <= 1 and untouched(layer) else "")


def layers(facts: Sequence[LayerFacts], *, name_width: int, fold: bool) -> list[RenderableType]:
    """The table per layer, before → after; with ``fold`` the untouched layers become one line with their reasons."""
    hidden = [layer for layer in facts if fold and untouched(layer)]
    shown = [layer for layer in facts if not (fold and untouched(layer))]
    columns = [("layer", "left"), ("op", "left"), ("channels", "right"), ("params", "right"), ("MACs", "right")]
    table = _table(*columns, ("removed", "left"))
    table.columns[0].min_width = min(name_width, max((len(layer.name) for layer in shown), default=0))
    for layer in shown:
        table.add_row(
            units.shorten(layer.name, name_width),
            layer.op,
            units.change(str(layer.channels_before), str(layer.channels_after)),
            units.change(units.count(layer.params_before), units.count(layer.params_after)),
            units.change(units.count(layer.macs_before), units.count(layer.macs_after)),
            _removed_or_why(layer),
            style="dim" if untouched(layer) else "",
        )
    parts: list[RenderableType] = [table] if shown else []
    if hidden:
        why = words.tally(reason(layer) for layer in hidden)
        parts.append(Text(f"{len(hidden)} of {len(facts)} layers untouched: {why} (-v lists them)", style="dim"))
    return parts


def _removed_or_why(layer: LayerFacts) -> str:
    """The share of parameters removed, and where there is a reason for no more, the reason in a few words."""
    why = reason(layer)
    if not why:
        return units.removed(layer.params_before, layer.params_after)
    share = "" if untouched(layer) else f"{units.removed(layer.params_before, layer.params_after)}, "
    return f"{share}{words.short(why)}"


def inspected(facts: Sequence[LayerFacts], *, name_width: int, every: bool) -> list[RenderableType]:
    """The layers of a model as it is; without ``every`` a long model shows only those with most MACs or parameters."""
    shown = list(facts)
    if not every and len(shown) > LONG:
        weight = {id(layer): max(layer.macs_before, layer.params_before) for layer in shown}
        largest = set(sorted(weight, key=weight.__getitem__, reverse=True)[:LONG])
        shown = [layer for layer in shown if id(layer) in largest]
    table = _table(
        ("layer", "left"), ("op", "left"), ("channels", "right"), ("params", "right"), ("MACs", "right"), ("", "left")
    )
    for layer in shown:
        name, channels = units.shorten(layer.name, name_width), str(layer.channels_before)
        params, macs = units.count(layer.params_before), units.count(layer.macs_before)
        table.add_row(
            name, layer.op, channels, params, macs, words.short(layer.reason), style="dim" if layer.reason else ""
        )
    hidden = len(facts) - len(shown)
    parts: list[RenderableType] = [table]
    if hidden:
        parts.append(Text(f"and {hidden} smaller layers (-v lists them)", style="dim"))
    return parts


def totals(sums: Totals, latency: Latency | None) -> Table:
    """Parameters, MACs, file size and latency, before and after, with the share removed."""
    table = _table(("", "left"), ("before", "right"), ("after", "right"), ("removed", "right"))
    table.columns[3].style = "bold green"

    def row(label: str, before: int, after: int, text: Any) -> None:
        if before or after:
            table.add_row(label, text(before), text(after), units.removed(before, after))

    row("parameters", sums.params_before, sums.params_after, units.count)
    row("MACs", sums.macs_before, sums.macs_after, units.count)
    if sums.bytes_after:
        row("file size", sums.bytes_before, sums.bytes_after, units.size)
    if latency is not None:
        before = units.milliseconds(latency.before_ms, latency.before_spread_ms)
        after = units.milliseconds(latency.after_ms, latency.after_spread_ms)
        table.add_row("latency", before, after, f"{latency.speedup:.2f}{units.TIMES} speed")
    return table


def latency_note(latency: Latency | None) -> Text | None:
    """How the latency was measured."""
    if latency is None:
        return None
    threads = (
        "1 thread" if latency.threads == 1 else f"{latency.threads} threads" if latency.threads else "default threads"
    )
    return Text(
        f"latency: median {units.PLUS_MINUS} interquartile range, {latency.runs} runs in turn, onnxruntime, {threads}",
        style="dim",
    )


def exactness(facts: Exactness) -> Text:
    """One line: is the cut model the original with the removed channels held at 0?"""
    if facts.passed is None:
        return Text.assemble(("exact     ", "bold"), ("not checked", "yellow"), f": {facts.note}" if facts.note else "")
    verdict = ("yes", "bold green") if facts.passed else ("NO", "bold red")
    batches = f", batch {' and '.join(str(size) for size in facts.batches)}" if facts.batches else ""
    where = f" at output {facts.worst_output!r}" if facts.worst_output and not facts.passed else ""
    note = f"; {facts.note}" if facts.note else ""
    error = f"{facts.error:.1e}" if facts.error else "0"
    measured = f": largest relative difference {error} (allowed {facts.tolerance:.0e}{batches}){where}{note}"
    return Text.assemble(("exact     ", "bold"), verdict, measured)


def fidelity(facts: Fidelity | None, *, name_width: int, most: int = 8) -> list[RenderableType]:
    """The final model against the original: one line for one output, a table for more, the worst ``most`` of many."""
    if facts is None or not facts.outputs:
        note = facts.note if facts is not None else ""
        return [Text.assemble(("fidelity  ", "bold"), ("not measured", "yellow"), f": {note}" if note else "")]
    source = "seeded synthetic inputs" if facts.source == "synthetic" else facts.source
    samples = f"{facts.samples} sample{'' if facts.samples == 1 else 's'}, {source}"
    note = f"; {facts.note}" if facts.note else ""
    worst = sorted(facts.outputs, key=lambda output: output.cosine)
    if len(worst) == 1:
        output = worst[0]
        top1 = f", top-1 agreement {100 * output.top1:.1f} %" if output.top1 is not None else ""
        line = f"cosine {output.cosine:.4f}, signal-to-noise {units.decibels(output.snr_db)}{top1} ({samples}){note}"
        return [Text.assemble(("fidelity  ", "bold"), line)]
    table = _table(("  output", "left"), ("cosine", "right"), ("signal-to-noise", "right"), ("top-1", "right"))
    for output in worst[:most]:
        table.add_row(
            "  " + units.shorten(output.output, name_width),
            f"{output.cosine:.4f}",
            units.decibels(output.snr_db),
            units.DASH if output.top1 is None else f"{100 * output.top1:.1f} %",
        )
    head = f"worst cosine {facts.worst_cosine:.4f} over {len(worst)} outputs ({samples}){note}"
    parts: list[RenderableType] = [Text.assemble(("fidelity  ", "bold"), head), table]
    if len(worst) > most:
        parts.append(Text(f"  and {len(worst) - most} outputs with a larger cosine", style="dim"))
    return parts


def groups(records: Iterable[Mapping[str, Any]], *, name_width: int, most: int | None = None) -> list[RenderableType]:
    """The groups that can be cut, most units first; those that cannot are counted with their reasons."""
    found = list(records)
    free = sorted((group for group in found if group.get("prunable", True)), key=lambda group: -_units(group))
    # What is covered is cut all the same, as the group that covers it.
    fixed = [group for group in found if not group.get("prunable", True) and _cause(group) != "covered"]
    cut = any(group.get("removed") for group in free)
    table = _table(
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
    found = [barrier for barrier in every_record if _code(barrier) != SPATIAL]
    aside: list[RenderableType] = []
    if len(found) < len(every_record):
        count = len(every_record) - len(found)
        aside = [Text(f"{count} axes are positions (kernels, height, width, time), not channels", style="dim")]
    if not found:
        return [Text("none: every channel can be removed", style="green"), *aside]
    return [_barrier_table(found, name_width=name_width, every=every), *aside, *_legend(found)]


def held(records: Iterable[Mapping[str, Any]]) -> int:
    """Channels that barriers hold; positions are none."""
    return _channels(barrier for barrier in records if _code(barrier) != SPATIAL)


def _barrier_table(found: Sequence[Mapping[str, Any]], *, name_width: int, every: bool) -> Table:
    if every:
        table = _table(
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
    table = _table(
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
    table = _table(("channels", "right"), ("operator", "left"))
    for op, channels in sorted(found, key=lambda item: -item[1])[:most]:
        table.add_row(str(channels), op)
    return table


def cut(report: Report, *, name_width: int, verbose: bool) -> list[RenderableType]:
    """The whole report after a cut: layers, totals, exactness, fidelity."""
    fold = not verbose and len(report.layers) > LONG
    parts: list[RenderableType] = []
    if report.layers:
        parts += [*layers(report.layers, name_width=name_width, fold=fold), Text("")]
    parts += [totals(report.totals, report.latency)]
    note = latency_note(report.latency)
    if note is not None:
        parts.append(note)
    parts += [Text(""), exactness(report.exactness)]
    return [*parts, *fidelity(report.fidelity, name_width=name_width)]
