"""What a factorization did: a table of layers with methods and ranks, and why others stay."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report import repairs, tables, units, words
from onnxprune.report.facts import FactorizedLayer, Report
from onnxprune.report.tables import table_of


def whole(report: Report, *, name_width: int, verbose: bool) -> list[RenderableType]:
    """The whole report: layers, sums, whether the new layers are right, fidelity."""
    parts: list[RenderableType] = [*layers(report.factorized, name_width=name_width, verbose=verbose), Text("")]
    parts += [tables.totals(report.totals, report.latency)]
    note = tables.latency_note(report.latency)
    slower = _speed_note(report)
    parts += [x for x in (note, slower) if x is not None]
    parts += [Text(""), _settings(report)]
    if report.product is not None:
        parts.append(product(report))
    parts += tables.flushed(report.flushed)
    repaired = repairs.summary(report)
    if repaired is not None:
        parts.append(repaired)
    return [*parts, *tables.fidelity(report.fidelity, name_width=name_width)]


def layers(facts: Sequence[FactorizedLayer], *, name_width: int, verbose: bool) -> list[RenderableType]:
    """The table of layers that were taken apart; the others are a count with their reasons."""
    table = table_of(
        ("layer", "left"), ("op", "left"), ("method", "left"), ("ranks", "right"), ("params", "right"),
        ("MACs", "right"), ("error", "right"), ("alone", "right"),
    )  # fmt: skip
    taken = [f for f in facts if f.method]
    for name, item in zip(units.distinct([f.name for f in facts]), facts, strict=True):
        if not item.method:
            continue
        table.add_row(
            units.shorten(name, name_width),
            item.op,
            item.method,
            ", ".join(str(rank) for rank in item.ranks),
            units.change(units.count(item.params_before), units.count(item.params_after)),
            units.change(units.count(item.macs_before), units.count(item.macs_after)),
            f"{100 * item.error:.2f} %",
            _alone(item),
        )
    others = [f for f in facts if not f.method]
    parts: list[RenderableType] = [table] if taken else []
    if others and verbose:
        parts += left(facts, name_width=name_width)
    elif others:
        why = words.tally(f.reason for f in others)
        parts.append(Text(f"{len(others)} of {len(facts)} layers stay: {why} (--explain names them)", style="dim"))
    return parts


def _alone(item: FactorizedLayer) -> str:
    if item.before_ms is None or item.after_ms is None or not item.after_ms:
        return units.DASH
    return f"{item.before_ms / item.after_ms:.2f}{units.TIMES} speed"


def left(facts: Sequence[FactorizedLayer], *, name_width: int) -> list[RenderableType]:
    """Layers that stay, those with the same reason together."""
    by_reason: dict[str, list[str]] = {}
    for item in facts:
        if not item.method:
            by_reason.setdefault(f"{item.reason[:1].upper()}{item.reason[1:]}.", []).append(item.name)
    parts: list[RenderableType] = [tables.heading("Layers that stay as they are")]
    for why, names in sorted(by_reason.items(), key=lambda pair: -len(pair[1])):
        parts.append(Text(why, style="bold"))
        parts += [Text(f"  {units.shorten(name, name_width)}") for name in names]
    return parts if by_reason else []


def _settings(report: Report) -> Text:
    said = dict(report.settings)
    method = said.pop("method", "")
    usual = {"cost": "macs", "round_to": 1}
    how = [f"{name.replace('_', ' ')} {value}" for name, value in said.items() if usual.get(name) != value]
    return Text.assemble(("by        ", "bold"), ", ".join([str(method), *how]) if method else "a plan")


def product(report: Report) -> Text:
    """Whether the new layers compute what they should."""
    facts = report.product
    assert facts is not None
    if facts.passed is None:
        return Text.assemble(("product   ", "bold"), ("not checked", "yellow"), f": {facts.note}" if facts.note else "")
    error = f"{facts.error:.1e}" if facts.error else "0"
    note = f"; {facts.note}" if facts.note else ""
    text = ": new layers compute the product of their weights, largest relative difference"
    return Text.assemble(
        ("product   ", "bold"), ("yes", "bold green"), f"{text} {error} (allowed {facts.tolerance:.0e}){note}"
    )


def _speed_note(report: Report) -> Text | None:
    """What to try where less work takes longer: more layers have to be started."""
    timed, sums = report.latency, report.totals
    if timed is None or timed.speedup >= tables.SLOWER or sums.macs_after >= sums.macs_before:
        return None
    return Text("less work but slower: --method auto takes apart only what gets faster here", style="yellow")
