"""Facts as rich renderables: layers, totals, exactness and fidelity of a cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from onnxprune.report import units, words
from onnxprune.report.facts import Exactness, Fidelity, Latency, LayerFacts, Report, Totals

LONG = 30
"""Up to this many layers every one is listed; in a longer model the untouched ones are folded into a count."""
SLOWER = 0.95
"""Speed-ups below this are worth a hint; closer to 1 they are noise."""
_LESS, _MORE = "bold green", "yellow"
BLOCK = 8
"""Channels that a vectorised kernel takes at once."""


class FittedTable(Table):
    """A table that cuts the names of nodes short in front where they would make it wider than there is room."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table within the width that ``options`` allow."""
        self._fit(options.max_width)
        yield from super().__rich_console__(console, options)

    def _fit(self, width: int) -> None:
        named = next((column for column in self.columns if str(column.header).strip() in NAMES), None)
        widths = {id(c): max((cell_len(str(cell)) for cell in (c.header, *c.cells)), default=0) for c in self.columns}
        gaps = _GAP * (len(self.columns) - 1)
        figures = sum(widths[id(c)] for c in self.columns if c.no_wrap and c is not named)
        prose = sum(min(widths[id(c)], _PROSE) for c in self.columns if not c.no_wrap and c is not named)
        if named is not None:
            room = max(_LEAST_NAME, width - gaps - figures - prose)
            named.no_wrap = True
            named._cells[:] = units.fitted([str(cell) for cell in named.cells], room)
            figures += min(widths[id(named)], room)
        if figures + gaps > width:  # figures that stand side by side in one cell then stand below each other
            for column in self.columns:
                column.no_wrap = column is named


NAMES = {"layer", "layers", "node", "group", "for example", "output"}
"""Titles of columns that hold names of nodes."""
_GAP, _PROSE, _LEAST_NAME = 2, 36, 24


def table_of(*columns: tuple[str, str]) -> Table:
    """A borderless table; each column is (title, ``left`` or ``right``)."""
    table = FittedTable(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold", show_edge=False)
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
    shown = [pair for pair in _named(facts) if not (fold and untouched(pair[1]))]
    columns = [("layer", "left"), ("op", "left"), ("channels", "right"), ("params", "right"), ("MACs", "right")]
    table = table_of(*columns, ("removed", "left"))
    for name, layer in shown:
        table.add_row(
            units.shorten(name, name_width),
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


def _named(facts: Sequence[LayerFacts]) -> list[tuple[str, LayerFacts]]:
    """Layers with names that tell them apart."""
    return list(zip(units.distinct([layer.name for layer in facts]), facts, strict=True))


def _removed_or_why(layer: LayerFacts) -> str:
    """The share of parameters removed, and where there is a reason for no more, the reason in a few words."""
    why = reason(layer)
    if not why:
        return units.removed(layer.params_before, layer.params_after)
    share = "" if untouched(layer) else f"{units.removed(layer.params_before, layer.params_after)}, "
    return f"{share}{words.short(why)}"


def inspected(facts: Sequence[LayerFacts], *, name_width: int, every: bool) -> list[RenderableType]:
    """The layers of a model as it is; without ``every`` a long model shows only those with most MACs or parameters."""
    shown = _named(facts)
    if not every and len(shown) > LONG:
        weight = {id(layer): max(layer.macs_before, layer.params_before) for layer in facts}
        largest = set(sorted(weight, key=weight.__getitem__, reverse=True)[:LONG])
        shown = [pair for pair in shown if id(pair[1]) in largest]
    table = table_of(
        ("layer", "left"), ("op", "left"), ("channels", "right"), ("params", "right"), ("MACs", "right"), ("", "left")
    )
    for full_name, layer in shown:
        name, channels = units.shorten(full_name, name_width), str(layer.channels_before)
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
    table = table_of(("", "left"), ("before", "right"), ("after", "right"), ("removed", "right"))

    def row(label: str, before: int, after: int, text: Any) -> None:
        if before or after:
            style = _LESS if after < before else _MORE if after > before else ""
            table.add_row(label, text(before), text(after), Text(units.removed(before, after), style))

    row("parameters", sums.params_before, sums.params_after, units.count)
    row("MACs", sums.macs_before, sums.macs_after, units.count)
    if sums.bytes_after:
        row("file size", sums.bytes_before, sums.bytes_after, units.size)
    if latency is not None:
        before = units.milliseconds(latency.before_ms, latency.before_spread_ms)
        after = units.milliseconds(latency.after_ms, latency.after_spread_ms)
        style = _LESS if latency.speedup > 1 else _MORE if latency.speedup < SLOWER else ""
        table.add_row("latency", before, after, Text(f"{latency.speedup:.2f}{units.TIMES} speed", style))
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


def flushed(values: int) -> list[Text]:
    """One line where weights were subnormal: how many are 0 now."""
    if not values:
        return []
    what = "weight" if values == 1 else "weights"
    return [
        Text.assemble(("flushed   ", "bold"), f"{values:,} {what} too small for quick arithmetic (subnormal) set to 0")
    ]


def speed_note(report: Report) -> Text | None:
    """What to try where fewer channels take longer: onnxruntime's kernels work on blocks of channels."""
    timed, sums = report.latency, report.totals
    if timed is None or timed.speedup > SLOWER or sums.macs_after >= sums.macs_before:
        return None
    cut_layers = [layer for layer in report.layers if layer.channels_after < layer.channels_before]
    if all(layer.channels_after % BLOCK == 0 for layer in cut_layers):
        return None
    return Text(
        f"less work but slower: kernels take channels in blocks; --round-to {BLOCK} or {2 * BLOCK} often helps",
        style="yellow",
    )


def _listed(sizes: Sequence[int]) -> str:
    """``2``, ``2 and 3``, ``2, 3 and 1``."""
    *most, last = map(str, sizes)
    return f"{', '.join(most)} and {last}" if most else last


def exactness(facts: Exactness) -> Text:
    """One line: is the cut model the original with the removed channels held at 0?"""
    if facts.passed is None:
        return Text.assemble(("exact     ", "bold"), ("not checked", "yellow"), f": {facts.note}" if facts.note else "")
    verdict = ("yes", "bold green") if facts.passed else ("NO", "bold red")
    batches = f", batch {_listed(facts.batches)}" if facts.batches else ""
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
    table = table_of(("  output", "left"), ("cosine", "right"), ("signal-to-noise", "right"), ("top-1", "right"))
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
