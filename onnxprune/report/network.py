"""The network as a drawing: layers from top to bottom, with their widths before and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from onnxprune.report import numbers
from onnxprune.report.facts import Network

BOX, TALL, ACROSS, DOWN = 176, 38, 196, 66
_NAME = 26
"""Characters of a name that fit into a box."""


@dataclass(frozen=True, slots=True)
class Box:
    """A layer of the drawing; it may be coloured by ``share_kept``, ``work`` or ``time``, shares from 0 to 1."""

    name: str
    text: str
    title: str
    share_kept: float
    work: float
    time: float = 0.0


def drawing(network: Network, layers: Sequence[Box]) -> str:
    """Return an SVG of the network; nodes that only move or map values are left out, edges run through them.

    Args:
        network: nodes in execution order.
        layers: layers, whose names are labels of nodes.
    """
    facts = _by_node(network, layers)
    inputs = _collapsed(network, facts)
    if not inputs:
        return ""
    places = _places(inputs)
    edges = [_edge(places[source], places[node]) for node, sources in inputs.items() for source in sources]
    names = numbers.fitted(numbers.readable([network.nodes[node].name for node in inputs]), _NAME)
    boxes = [
        _box(places[node], name, network.nodes[node].op, facts.get(node))
        for node, name in zip(inputs, names, strict=True)
    ]
    wide = max(x for x, _ in places.values()) + BOX + 20
    tall = max(y for _, y in places.values()) + TALL + 20
    head = f'<svg id="network" xmlns="http://www.w3.org/2000/svg" data-wide="{wide}" data-tall="{tall}"'
    return "\n".join([f'{head} viewBox="0 0 {wide} {tall}" role="img" aria-label="network">', *edges, *boxes, "</svg>"])


def _by_node(network: Network, layers: Sequence[Box]) -> dict[int, Box]:
    """Return the facts of each node that is a layer; of several with one name in order."""
    waiting: dict[str, list[Box]] = defaultdict(list)
    for layer in reversed(layers):
        waiting[layer.name].append(layer)
    return {i: waiting[node.name].pop() for i, node in enumerate(network.nodes) if waiting.get(node.name)}


def _collapsed(network: Network, facts: Mapping[int, Box]) -> dict[int, list[int]]:
    """Return the nodes to draw, layers and nodes that join several of them, each with the drawn nodes that it reads."""
    ends: list[list[int]] = []
    drawn: dict[int, list[int]] = {}
    for i, node in enumerate(network.nodes):
        sources = list(dict.fromkeys(end for j in node.inputs for end in ends[j]))
        if i in facts or len(sources) > 1:
            drawn[i] = sources
            ends.append([i])
        else:
            ends.append(sources)
    return drawn


def _places(inputs: Mapping[int, Sequence[int]]) -> dict[int, tuple[float, float]]:
    """Return x and y of each node: below all that it reads, and within a row near to the mean of these."""
    rank: dict[int, int] = {}
    for node, sources in inputs.items():
        rank[node] = 1 + max((rank[source] for source in sources), default=-1)
    rows: dict[int, list[int]] = defaultdict(list)
    for node, row in rank.items():
        rows[row].append(node)
    middle = ACROSS * (max(map(len, rows.values())) - 1) / 2
    places: dict[int, tuple[float, float]] = {}
    for row in sorted(rows):
        positions = {node: _mean([places[s][0] for s in inputs[node]], middle) for node in rows[row]}
        at = [positions[node] for node in sorted(rows[row], key=positions.__getitem__)]
        for i in range(1, len(at)):
            at[i] = max(at[i], at[i - 1] + ACROSS)
        shift = max(-min(at), _mean(list(positions.values()), middle) - _mean(at, middle))
        for node, x in zip(sorted(rows[row], key=positions.__getitem__), at, strict=True):
            places[node] = (round(x + shift, 1), 10 + DOWN * row)
    min_x = min(x for x, _ in places.values()) - 10
    return {node: (x - min_x, y) for node, (x, y) in places.items()}


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _edge(source: tuple[float, float], target: tuple[float, float]) -> str:
    """Return a curve from one box to another; past boxes in between it runs at their side."""
    x, y = source[0] + BOX / 2, source[1] + TALL - 10
    u, v = target[0] + BOX / 2, target[1] + 10
    if v - y <= DOWN:
        bend = max(14.0, (v - y) / 2)
        return (
            f'<path class="edge" d="M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {u:.0f} {v - bend:.0f} {u:.0f} {v:.0f}"/>'
        )
    side = max(x, u) + BOX / 2 + 9
    turns = f"C{side:.0f} {y + 10:.0f} {side:.0f} {y + 20:.0f} {side:.0f} {y + DOWN / 2 + 10:.0f}"
    ends = f"C{side:.0f} {v - 20:.0f} {side:.0f} {v - 10:.0f} {u:.0f} {v:.0f}"
    return f'<path class="edge" d="M{x:.0f} {y:.0f}{turns}V{v - DOWN / 2:.0f}{ends}"/>'


def _box(place: tuple[float, float], name: str, op: str, layer: Box | None) -> str:
    x, y = place
    if layer is None:
        size = f'width="{BOX // 2}" height="{TALL - 14}" rx="11"'
        box = f'<rect class="join" x="{x + BOX / 4:.0f}" y="{y + 8:.0f}" {size}/>'
        text = f'<text x="{x + BOX / 2:.0f}" y="{y + TALL / 2 + 5:.0f}">{escape(op)}</text>'
        return f'<g data-name="{escape(name)}"><title>{escape(name)} ({escape(op)})</title>{box}{text}</g>'
    style = f"--kept:{layer.share_kept:.3f};--work:{layer.work:.3f};--time:{layer.time:.3f}"
    box = f'<rect class="layer" x="{x:.0f}" y="{y:.0f}" width="{BOX}" height="{TALL}" rx="5"/>'
    lines = (
        f'<text x="{x + BOX / 2:.0f}" y="{y + 15:.0f}">{escape(name)}</text>'
        f'<text x="{x + BOX / 2:.0f}" y="{y + 31:.0f}" class="width">{escape(op)} {escape(layer.text)}</text>'
    )
    return f'<g data-name="{escape(layer.name)}" style="{style}"><title>{escape(layer.title)}</title>{box}{lines}</g>'
