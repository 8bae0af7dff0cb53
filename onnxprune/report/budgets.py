"""A budget as rich renderables: what was asked for, what came of it, and which answer won."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report import tables, units
from onnxprune.report.facts import BudgetFacts, TargetFacts


def render(facts: BudgetFacts | None) -> list[RenderableType]:
    """The targets as a table, and how the counts were found."""
    if facts is None:
        return []
    parts: list[RenderableType] = []
    if facts.targets:
        table = tables.table_of(
            ("target", "left"), ("before", "right"), ("allowed", "right"), ("after", "right"), ("share", "right")
        )
        table.add_column("")
        for target in facts.targets:
            amounts = (amount(target.kind, x) for x in (target.before, target.limit, target.after))
            table.add_row(target.asked, *amounts, f"{target.after / target.before:.3f}", verdict(target))
        parts += [table, Text("")]
    lost = facts.points_before - facts.points_after
    allowed = "" if facts.max_drop is None else f" (allowed {facts.max_drop:g})"
    drop = f"{facts.what} {facts.points_before:.4g} {units.ARROW} {facts.points_after:.4g}, {lost:.3g} lost{allowed}"
    parts.append(Text.assemble(("budget    ", "bold"), f"{drop}; counts by {_answers(facts)}"))
    return parts


def verdict(target: TargetFacts) -> str:
    """Whether the target was met, and who says so."""
    if target.met_before:
        return f"met before the cut, {target.how}"
    return f"{'met' if target.after <= target.limit else 'met within tolerance'}, {target.how}"


def amount(kind: str, value: float) -> str:
    """A cost with its unit."""
    if kind == "latency":
        return f"{1e3 * value:.3g} ms"
    return units.count(round(value)) if kind in ("macs", "params") else units.size(round(value))


def _answers(facts: BudgetFacts) -> str:
    """The answer that won and those that it was held against."""
    best = next((a for a in facts.answers if a.chosen), None)
    if best is None:
        return "no search"
    gap = "" if facts.gap is None else f" (within {100 * facts.gap:.1f} % of the bound)"
    others = ", ".join(f"{a.name} {a.fine:.4g}" for a in facts.answers if not a.chosen)
    return f"{best.name}{gap}" + (f", {best.fine:.4g} against {others}" if others else "")
