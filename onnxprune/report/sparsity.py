"""Zeros of a model as tables and lines: those of a sparsification, and those of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report import numbers, reasons, tables
from onnxprune.report.facts import Report, SparsifiedLayer, SparsityFacts, ZerosFacts


def layers(facts: Sequence[SparsifiedLayer], *, name_width: int) -> list[RenderableType]:
    """Render the layers that became sparse, and those that were left out by reason."""
    columns = [("layer", "left"), ("op", "left"), ("pattern", "left"), ("matrix", "right")]
    table = tables.table_of(*columns, ("zeros", "right"), ("error", "right"), ("", "left"))
    for name, item in zip(numbers.readable([f.name for f in facts]), facts, strict=True):
        if item.pattern:
            error = numbers.DASH if item.error is None else f"{100 * item.error:.2f} %"
            sizes = item.shape if item.shape[0] > 1 else item.shape[1:]
            matrix = f" {numbers.TIMES} ".join(map(str, sizes))
            shown = (numbers.shorten(name, name_width), item.op, item.pattern, matrix, _share(item), error, item.note)
            table.add_row(*shown)
    return [table, *left_out(facts, name_width=name_width)]


def left_out(facts: Sequence[SparsifiedLayer], *, name_width: int) -> list[RenderableType]:
    """Render the layers that were left out, grouped by reason."""
    by_reason: dict[str, list[str]] = {}
    for item in facts:
        if not item.pattern:
            by_reason.setdefault(_sentence(reasons.in_words(item.reason) or item.reason), []).append(item.name)
    parts: list[RenderableType] = [tables.heading("Layers without new zeros")] if by_reason else []
    for why, names in sorted(by_reason.items(), key=lambda pair: -len(pair[1])):
        parts.append(Text(why, style="bold"))
        parts += [Text(f"  {numbers.shorten(name, name_width)}") for name in names]
    return parts


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."


def _share(item: SparsifiedLayer | SparsityFacts) -> str:
    return f"{100 * item.zeros / item.elements:.1f} %" if item.elements else numbers.DASH


def lines(report: Report) -> Iterator[Text]:
    """Yield the lines of the summary: how many zeros, where, how they are stored, and their worth."""
    if not report.sparsified:
        return
    items = [item for item in report.sparsified if item.pattern]
    others = reasons.tally((item.reason for item in report.sparsified if not item.pattern), max_reasons=3)
    zeros, elements = sum(item.zeros for item in items), sum(item.elements for item in items)
    criterion, pattern = report.settings.get("criterion", ""), items[0].pattern if items else ""
    share = f"{100 * zeros / elements:.1f} % of their weights" if elements else "no weights"
    text = f"{len(items)} of {len(report.sparsified)} layers {pattern} by {criterion}, {share}"
    yield Text.assemble(("zeros     ", "bold"), text, f"; not: {others}" if others else "")
    if report.zeros is not None:
        yield from _stored(report.zeros)


def _stored(facts: ZerosFacts) -> Iterator[Text]:
    how = facts.storage
    if facts.sparse_tensors:
        count = f"{facts.sparse_tensors} tensor{'s' if facts.sparse_tensors > 1 else ''}"
        how = f"{count} as sparse initializers, which onnxruntime makes dense when it loads them"
    share = 100 * facts.zeros / facts.elements if facts.elements else 0.0
    packed = f"{numbers.size(facts.weight_bytes)} of weights, {numbers.size(facts.deflated_bytes)} after deflate"
    yield Text.assemble(("stored    ", "bold"), f"{how}; {share:.1f} % of all weights of layers are 0; {packed}")
    if facts.advice:
        text = (f"{facts.advice}", "yellow")
        yield Text.assemble(("device    ", "bold"), text, "; docs/methods/sparsify.md lists where zeros pay")
    elif facts.where:
        yield Text.assemble(("device    ", "bold"), f"{facts.device} makes use of these zeros in {facts.where}")


def inspected(facts: Sequence[SparsityFacts], *, name_width: int, list_all: bool) -> list[RenderableType]:
    """Render the zeros of a file: density and pattern per layer, and whether N:M holds everywhere it should.

    Args:
        facts: of every layer.
        name_width: room for names.
        list_all: whether to list layers without zeros, too.
    """
    elements, zeros = sum(f.elements for f in facts), sum(f.zeros for f in facts)
    if not zeros or not any(f.pattern for f in facts):
        return []
    parts: list[RenderableType] = [tables.heading(f"Zeros ({100 * zeros / elements:.1f} % of the weights of layers)")]
    table = tables.table_of(
        ("layer", "left"), ("op", "left"), ("weights", "right"), ("density", "right"), ("pattern", "left"), ("", "left")
    )
    shown = [f for f in facts if list_all or f.zeros]
    for name, item in zip(numbers.readable([f.name for f in shown]), shown, strict=True):
        density = f"{100 * (1 - item.zeros / item.elements):.1f} %"
        note = f"should be {item.expected}" if item.expected and not item.holds else ""
        size = numbers.count(item.elements)
        table.add_row(numbers.shorten(name, name_width), item.op, size, density, item.pattern or numbers.DASH, note)
    parts.append(table)
    return [*parts, *_verdict(facts)]


def _verdict(facts: Sequence[SparsityFacts]) -> Iterator[Text]:
    """Yield whether the pattern of most layers holds everywhere it should."""
    should = [f for f in facts if f.expected]
    if not should:
        return
    missing, pattern = [f.name for f in should if not f.holds], should[0].expected
    if not missing:
        count = f"{len(should)} layer{'s' if len(should) > 1 else ''}"
        yield Text.assemble((f"{pattern} holds everywhere it should", "green"), f": in {count}")
        return
    names = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    text = f"{pattern} does not hold in {len(missing)} of {len(should)} layers where it should"
    yield Text.assemble((text, "yellow"), f": {names}")
