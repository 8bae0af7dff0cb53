"""A profile as rich renderables: the nodes that take most time, what fewer channels save, and the steps of kernels."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from onnxprune.report import tables, units
from onnxprune.report.facts import SHARES, NodeTime, Profile

MOST = 20
"""Nodes that are listed where not every one is asked for."""


def render(facts: Profile, *, name_width: int, every: bool) -> list[RenderableType]:
    """The whole profile."""
    alike: dict[str, list[NodeTime]] = {}
    for node in facts.nodes:
        alike.setdefault(node.name if every else repr((node.op, node.ms, node.at_shares)), []).append(node)
    shown = list(alike.values())[: None if every else MOST]
    columns = [(f"at {share:g}", "right") for share in SHARES]
    table = tables.table_of(("node", "left"), ("op", "left"), ("ms", "right"), ("share", "right"), *columns)
    total = sum(node.ms for node in facts.nodes) or 1.0
    for nodes in shown:
        node, count = nodes[0], len(nodes)
        each = [f"{count * ms:.4f}" for ms in node.at_shares]
        name = units.shorten(node.name, name_width) + (f" and {count - 1} alike" if count > 1 else "")
        table.add_row(name, node.op, f"{count * node.ms:.4f}", f"{100 * count * node.ms / total:.1f} %", *each)
    parts: list[RenderableType] = [_title(facts), tables.heading("Nodes, and their time where groups keep a share")]
    parts.append(table)
    left = len(facts.nodes) - sum(map(len, shown))
    if left:
        parts.append(Text(f"and {left} shorter ones (-v lists them)", style="dim"))
    if facts.steps:
        parts += [tables.heading("Time of one node by its channels"), _steps(facts)]
    return [*parts, Text(""), _checked(facts)]


def _title(facts: Profile) -> Text:
    device = facts.device
    threads = f"{device['threads']} thread{'' if device['threads'] == 1 else 's'}"
    where = f"{device['processor']}, {threads}, onnxruntime {device['onnxruntime']}, {device['providers']}"
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in facts.inputs.items())
    return Text.assemble((facts.model, "bold"), f"  {facts.ms:.3g} ms for {shapes}\n{where}")


def _steps(facts: Profile) -> RenderableType:
    table = tables.table_of(("op", "left"), ("nodes", "right"), ("by what it", "left"), ("channels: ms", "left"))
    for kind in facts.steps:
        points = ", ".join(f"{count}: {ms:.3g}" for count, ms in zip(kind.channels, kind.ms, strict=True))
        table.add_row(kind.op, str(kind.nodes), kind.by, points)
    return table


def _checked(facts: Profile) -> Text:
    pairs = ", ".join(f"{p:.3g} / {m:.3g}" for p, m in facts.checks)
    said = f"{len(facts.checks)} whole runs, predicted / measured ms: {pairs}; largest error {100 * facts.error:.1f} %"
    return Text.assemble(("checked   ", "bold"), said)
