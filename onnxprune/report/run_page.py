"""The report of one run for the person who decides: a self-contained HTML page, and Markdown for a pull request."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import PurePath
from typing import Any

from rich.text import Text

from onnxprune.report import network, numbers, page, reasons, summary, tables
from onnxprune.report.console import LABEL, Line
from onnxprune.report.facts import BudgetFacts, LayerFacts, LayerTimes, Report

_MAX_ROWS = 10
"""Layers that Markdown lists: those that lost most parameters."""


def run_page(report: Report, about: Mapping[str, Any] | None = None, spelled: Callable[[str], str] = str) -> str:
    """Return a self-contained HTML page about a run.

    Args:
        report: of pruning, factorizing, recovering or comparing.
        about: {name: value} of the run itself, such as its command line and the versions of packages.
        spelled: writes arguments in texts as the reader does.
    """
    name = PurePath(report.model).name or "model"
    parts = [
        f'<main class="wide"><h1>{escape(name)}</h1>',
        _verdict(report, spelled),
        _section("Before and after", _bars(report)),
        _section("Checks", _lines(report, spelled)),
        _section("Fine-tuning", _training(report)),
        _section("Not pruned, and why", _unpruned(report)),
        _section("Network", _network(report)),
        _section("Layers", _layers(report) + _factors(report) + _sparse(report)),
        _section("Branches", _branches(report)),
        _section("Candidates of the budget", _candidates(report)),
        _section("Sensitivity of the groups", _sensitivity(report)),
        _section("Recovery of the layers", _recovered(report)),
        _section("Warnings", "".join(page.paragraph(spelled(text)) for text in report.warnings)),
        _section("Time of the stages", _times(report)),
        _section("Settings and versions", _about(report, about or {})),
        f"</main><script>{_SCRIPT}</script>",
    ]
    return page.page(f"{name}: report", [part for part in parts if part], heading=False, style=_STYLE)


def markdown(report: Report, spelled: Callable[[str], str] = str) -> str:
    """Return the report as Markdown for a comment on a pull request.

    Args:
        report: of a run.
        spelled: writes arguments in texts as the reader does.
    """
    verdict = report.verdict
    name = PurePath(report.output or report.model).name or "model"
    head = f"### {_cell(name)}: {verdict.word if verdict else 'not judged'}"
    parts = [head]
    if verdict is not None:
        more = f" {_cell(_capital(spelled(verdict.next_step)))}." if verdict.next_step else ""
        parts.append(f"**{verdict.points:.1f} of 100 points.** {_cell(verdict.reason)}.{more}")
    rows = [f"| {label} | {before} | {after} | {less} |" for label, before, after, less, _ in _pairs(report)]
    parts.append("\n".join(["| | before | after | |", "|---|--:|--:|--:|", *rows]))
    parts += ["\n".join(f"- {label}: {_cell(text)}" for label, text in _facts_in_words(report, spelled))]
    changed = sorted(
        (layer for layer in report.layers if layer.params_after < layer.params_before),
        key=lambda layer: layer.params_after - layer.params_before,
    )[:_MAX_ROWS]
    if changed:
        named = dict(zip(map(id, report.layers), numbers.readable([x.name for x in report.layers]), strict=True))
        rows = [
            f"| `{_code(named[id(layer)])}` | {numbers.change(str(layer.channels_before), str(layer.channels_after))} "
            f"| {_change(layer.params_before, layer.params_after)} | {_change(layer.macs_before, layer.macs_after)} |"
            for layer in changed
        ]
        title = f"Layers that changed most ({len(changed)} of {len(report.layers)})"
        table = "\n".join(["| layer | channels | params | MACs |", "|---|--:|--:|--:|", *rows])
        parts.append(f"<details><summary>{title}</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(part for part in parts if part) + "\n"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cell(text: str) -> str:
    """Return a text without Markdown's markup."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#" else sign for sign in " ".join(text.split()))


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|")


def _change(before: int, after: int) -> str:
    return numbers.change(numbers.count(before), numbers.count(after))


def _section(title: str, html: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{html}</section>" if html else ""


def _verdict(report: Report, spelled: Callable[[str], str]) -> str:
    """Return the verdict as a badge with its reason and the next step."""
    verdict = report.verdict
    if verdict is None:
        return '<p class="verdict"><b class="badge">not judged</b> Outputs were not compared.</p>'
    step = f" <em>{escape(_capital(spelled(verdict.next_step)))}.</em>" if verdict.next_step else ""
    badge = f'<b class="badge {escape(verdict.word)}">{escape(verdict.word)}</b>'
    return f'<p class="verdict">{badge} <b>{verdict.points:.1f}</b> of 100 points. {escape(verdict.reason)}.{step}</p>'


def _pairs(report: Report) -> list[tuple[str, str, str, str, float]]:
    """Label, before, after, change and the share that is left of each size, and of the time."""
    sums = report.totals
    pairs = [
        (label, show(before), show(after), numbers.less(before, after), after / before)
        for label, before, after, show in (
            ("parameters", sums.params_before, sums.params_after, numbers.count),
            ("MACs", sums.macs_before, sums.macs_after, numbers.count),
            ("file size", sums.bytes_before, sums.bytes_after, numbers.size),
        )
        if before and after
    ]
    timed = report.latency
    if timed is not None and timed.before_ms > 0:
        before, after = (f"{numbers.short_milliseconds(ms)} ms" for ms in (timed.before_ms, timed.after_ms))
        pairs.append(("latency", before, after, summary.speed(timed), timed.after_ms / timed.before_ms))
    return pairs


def _bars(report: Report) -> str:
    rows = []
    for label, before, after, less, share in _pairs(report):
        longest = max(1.0, share)
        bars = "".join(
            f'<div class="bar {kind}"><i style="width:{100 * part / longest:.1f}%"></i>'
            f"<span>{escape(text)}</span></div>"
            for kind, part, text in (("before", 1.0, before), ("after", share, after))
        )
        rows.append(f'<div class="pair"><b>{label}</b><div>{bars}</div><span class="less">{escape(less)}</span></div>')
    return "".join(rows)


def _facts_in_words(report: Report, spelled: Callable[[str], str]) -> list[tuple[str, str]]:
    """Return the lines of the summary that are no sizes: label and text."""
    lines = [part.text for part in summary.summary(report, name_width=1000, spelled=spelled) if isinstance(part, Line)]
    pairs = [(line.plain[:LABEL].strip(), line.plain[LABEL:].strip()) for line in lines]
    shown = {"verdict", "params", "MACs", "file size", "speed"}
    return [pair for pair in pairs if pair[0] not in shown]


def _lines(report: Report, spelled: Callable[[str], str]) -> str:
    pairs = _facts_in_words(report, spelled)
    rows = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in pairs)
    return f"<dl>{rows}</dl>" if rows else ""


def _training(report: Report) -> str:
    """Draw the points on the hold-out over the steps of a training, beside those before it."""
    facts = report.finetuning
    if facts is None or len(facts.curve) < 2:
        return _penalized(report)
    points = [(float(step), 100 - far, f"step {step}: {100 - far:.1f}") for step, far in facts.curve]
    before, last = points[0][1], points[-1][0]
    series = [
        page.Series("while training", points),
        page.Series("before", [(0.0, before, ""), (last, before, "")], dashed=True),
    ]
    return _penalized(report) + page.chart("Held-out samples", "steps", "points", series)


def _penalized(report: Report) -> str:
    """Draw the penalised objective over the steps of a training that brings units to 0."""
    facts = report.regularized
    if facts is None or len(facts.curve) < 2:
        return ""
    points = [(float(step), value, f"step {step}: {value:.1f}") for step, value in facts.curve]
    what = "points lost, and percent of the units not at 0 yet"
    return page.chart("With a penalty", "steps", what, [page.Series("while training", points)])


def _unpruned(report: Report) -> str:
    """List the layers that kept their channels, grouped by reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    default = "No ratio was given, or it is less than one unit."
    if report.settings.get("scope") == "global":
        default = "Units of other layers score less for their cost, or the ratio is less than one unit."
    default = default if report.budget is None else "The budget keeps all of their units."
    named = numbers.readable([layer.name for layer in report.layers])
    for name, layer in zip(named, report.layers, strict=True):
        if layer.channels_before == layer.channels_after:
            why = reasons.in_words(tables.reason(layer)) or default
            advice = reasons.advice(tables.reason(layer))
            by_reason[f"{why} {advice}".strip()].append(name)
    unchanged = [(f.name, f.reason) for f in report.factorized if not f.method]
    unchanged += [(item.name, item.reason) for item in report.sparsified if not item.pattern]
    for name, reason in unchanged:
        by_reason[f"{reason[:1].upper()}{reason[1:]}."].append(name)
    parts = []
    for why, names in sorted(by_reason.items(), key=lambda pair: -len(pair[1])):
        items = "".join(f"<li>{escape(name)}</li>" for name in names)
        count = f"{len(names)} layer{'' if len(names) == 1 else 's'}"
        parts.append(f"<details><summary><b>{count}</b>: {escape(why)}</summary><ul>{items}</ul></details>")
    return "".join(parts)


def _boxes(report: Report) -> list[network.Box]:
    """Layers as the drawing shows them: widths before and after, or the ranks of their factors."""
    macs = [*(layer.macs_after for layer in report.layers), *(item.macs_before for item in report.factorized)]
    max_macs = max(macs, default=0) or 1
    ranks = {layer.name: "rank " + ", ".join(map(str, layer.ranks)) for layer in report.factorized if layer.method}
    boxes = []
    for layer in report.layers:
        width = numbers.change(str(layer.channels_before), str(layer.channels_after))
        title = f"{layer.name} ({layer.op}): {width} channels, {_change(layer.macs_before, layer.macs_after)} MACs"
        share = layer.channels_after / layer.channels_before if layer.channels_before else 1.0
        text = f"{width} {ranks.get(layer.name, '')}".strip()
        boxes.append(network.Box(layer.name, text, title, share, (layer.macs_after / max_macs) ** 0.5))
    known = {layer.name for layer in report.layers}
    for item in report.factorized:
        if item.name not in known:
            title = (
                f"{item.name} ({item.op}): {item.method or 'whole'}, {_change(item.macs_before, item.macs_after)} MACs"
            )
            share = item.params_after / item.params_before if item.method and item.params_before else 1.0
            work = ((item.macs_after if item.method else item.macs_before) / max_macs) ** 0.5
            boxes.append(network.Box(item.name, ranks.get(item.name, ""), title, share, min(work, 1.0)))
    times = report.layer_times
    return boxes if times is None else [_timed(box, times) for box in boxes]


def _timed(box: network.Box, times: LayerTimes) -> network.Box:
    """Return a box with its share of the longest time of a layer."""
    longest = max(times.after.values(), default=0.0) or 1.0
    title = f"{box.title}, {_ms(times, box.name)} ms"
    return replace(box, title=title, time=times.after.get(box.name, 0.0) / longest)


def _ms(times: LayerTimes, name: str) -> str:
    """Return the milliseconds of a layer before and after."""
    return numbers.change(*(numbers.short_milliseconds(side.get(name, 0.0)) for side in (times.before, times.after)))


def _network(report: Report) -> str:
    drawn = network.drawing(report.network, _boxes(report)) if report.network is not None else ""
    if not drawn:
        return ""
    colours = '<option value="kept">share kept</option><option value="work">work (MACs) after</option>'
    colours += '<option value="time">time after</option>' if report.layer_times is not None else ""
    tools = (
        '<input id="find" type="search" placeholder="find a layer" aria-label="find a layer"> '
        f'<label>colour by <select id="colour">{colours}</select></label> '
        '<button id="closer" title="closer">+</button><button id="further" title="further">\N{MINUS SIGN}</button>'
        '<button id="whole">whole</button> <span id="hits"></span>'
    )
    legend = '<p class="legend"><i class="low"></i> little <i class="high"></i> much. Drag to move, scroll with Ctrl '
    legend += "to zoom; width before \N{RIGHTWARDS ARROW} after in each box.</p>"
    return f'<div class="tools">{tools}</div><div id="view" class="kept">{drawn}</div>{legend}'


def _table(heads: Sequence[str], rows: Sequence[Sequence[tuple[str, float | str]]]) -> str:
    """Return a table that is sorted by a click on a head; cells are a text and its sort key."""
    top = "".join(f'<th tabindex="0" aria-sort="none">{escape(head)}</th>' for head in heads)
    body = "".join(
        "<tr>" + "".join(f'<td data-by="{escape(str(by))}">{escape(text)}</td>' for text, by in row) + "</tr>"
        for row in rows
    )
    kind = "sorts" if rows and isinstance(rows[0][-1][1], str) else "sorts figures"
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _pair(before: int, after: int) -> tuple[str, float]:
    return _change(before, after), float(after)


def _layers(report: Report) -> str:
    def row(name: str, layer: LayerFacts) -> list[tuple[str, float | str]]:
        channels = numbers.change(str(layer.channels_before), str(layer.channels_after))
        removed = numbers.removed(layer.params_before, layer.params_after)
        share = 1 - layer.params_after / layer.params_before if layer.params_before else 0.0
        why = reasons.short(tables.reason(layer)) if layer.channels_before == layer.channels_after else ""
        return [
            (name, name),
            (layer.op, layer.op),
            (channels, float(layer.channels_after)),
            _pair(layer.params_before, layer.params_after),
            _pair(layer.macs_before, layer.macs_after),
            (removed, share),
            *([] if times is None else [(_ms(times, layer.name), times.after.get(layer.name, 0.0))]),
            (why, why),
        ]

    times = report.layer_times
    if not report.layers:
        return ""
    names = numbers.readable([layer.name for layer in report.layers])
    rows = [row(name, layer) for name, layer in zip(names, report.layers, strict=True)]
    timed = [] if times is None else ["ms"]
    return _table(("layer", "op", "channels", "params", "MACs", "removed", *timed, "reason"), rows)


def _branches(report: Report) -> str:
    names = numbers.readable([branch.name for branch in report.branches])
    rows: list[list[tuple[str, float | str]]] = [
        [
            (name, name),
            (", ".join(branch.layers), float(len(branch.layers))),
            (numbers.count(branch.params), float(branch.params)),
            (numbers.count(branch.macs), float(branch.macs)),
            (tables.branch_fate(branch), tables.branch_fate(branch)),
        ]
        for name, branch in zip(names, report.branches, strict=True)
    ]
    return _table(("branch", "layers", "params", "MACs", ""), rows) if rows else ""


def _factors(report: Report) -> str:
    names = numbers.readable([layer.name for layer in report.factorized])
    rows: list[list[tuple[str, float | str]]] = [
        [
            (name, name),
            (item.op, item.op),
            (item.method, item.method),
            (", ".join(map(str, item.ranks)), float(item.ranks[0])),
            _pair(item.params_before, item.params_after),
            _pair(item.macs_before, item.macs_after),
            (f"{100 * item.error:.2f} %", item.error),
        ]
        for name, item in zip(names, report.factorized, strict=True)
        if item.method and item.ranks
    ]
    return _table(("layer", "op", "method", "ranks", "params", "MACs", "error"), rows) if rows else ""


def _sparse(report: Report) -> str:
    names = numbers.readable([layer.name for layer in report.sparsified])
    rows: list[list[tuple[str, float | str]]] = [
        [
            (name, name),
            (item.op, item.op),
            (item.pattern, item.pattern),
            (numbers.count(item.elements), float(item.elements)),
            (f"{100 * (1 - item.density):.1f} %", 1 - item.density),
            ("" if item.error is None else f"{100 * item.error:.2f} %", item.error or 0.0),
        ]
        for name, item in zip(names, report.sparsified, strict=True)
        if item.pattern
    ]
    return _table(("layer", "op", "pattern", "weights", "zeros", "error"), rows) if rows else ""


def _candidates(report: Report) -> str:
    facts = report.budget
    if facts is None:
        return ""
    lines = "".join(page.paragraph(str(part)) for part in tables.render(facts) if isinstance(part, Text) and part)
    rows: list[list[tuple[str, float | str]]] = [
        [
            (a.name + (" (selected)" if a.chosen else ""), a.name),
            (f"{a.fine:.4g}", a.fine),
            (f"{a.points:.4g}", a.points),
        ]
        for a in facts.answers
    ]
    return _pareto(facts) + lines + (_table(("allocation", "score", "points"), rows) if rows else "")


def _pareto(facts: BudgetFacts) -> str:
    """Draw the points of all candidates over their cost, with those that no other one beats joined by a line."""
    places = [(c.cost, c.points, f"{c.name}{' (trial)' if c.trial else ''}: {c.points:.4g}") for c in facts.candidates]
    selected = [place for c, place in zip(facts.candidates, places, strict=True) if c.chosen]
    if len(places) < 2:
        return ""
    original = (1.0, facts.points_before, f"original: {facts.points_before:.4g}")
    best: list[tuple[float, float, str]] = []
    for place in sorted([*places, original], key=lambda p: (p[0], -p[1])):
        if not best or place[1] > best[-1][1]:
            best.append(place)
    series = [
        page.Series("no other is better at its cost", best),
        page.Series("other candidates", [p for p in places if p not in best], line=False),
        page.Series("selected", selected, line=False),
    ]
    kind = "MACs" if facts.cost == "macs" else facts.cost.replace("params", "parameters").replace("-", " ")
    drawn = page.chart("", f"share of the original's {kind}", facts.what, series, legend=False)
    names = " ".join(
        f'<i style="background:{colour}"></i> {escape(one.name)}'
        for one, colour in zip(series, page.COLOURS, strict=False)
        if one.points
    )
    note = "Candidates of a trial were recovered from fewer samples." if any(c.trial for c in facts.candidates) else ""
    return f'<div class="plot">{drawn}</div><p class="legend">{names}. {note}</p>'


def _sensitivity(report: Report) -> str:
    """Return a heat map: a row for every group, and the loss of pruning it alone to a few shares."""
    facts = report.budget
    if facts is None or not facts.losses:
        return ""
    known = [loss for group in facts.losses for loss in group.losses if math.isfinite(loss) and loss > 0]
    highest, lowest = max(known, default=1.0), max(min(known, default=1.0), 1e-6 * max(known, default=1.0))

    def cell(share: float, loss: float) -> str:
        depth = (
            math.log(max(loss, lowest) / lowest) / math.log(highest / lowest) if highest > lowest and loss > 0 else 0.0
        )
        style = f"--depth:{100 * min(1.0, depth):.0f}%"
        return f'<td style="{style}" title="{100 * share:.0f} % removed">{loss:.2g} <small>{share:.2f}</small></td>'

    names = numbers.readable([group.name for group in facts.losses])
    pairs = sorted(zip(names, facts.losses, strict=True), key=lambda pair: -sum(pair[1].losses))
    wide = max(len(group.losses) for group in facts.losses)
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{group.units}</td>"
        + "".join(cell(s, x) for s, x in zip(group.shares, group.losses, strict=True))
        + "<td></td>" * (wide - len(group.losses))
        + "</tr>"
        for name, group in pairs
    )
    head = f'<tr><th>group</th><th>units</th><th colspan="{wide}">loss <small>at a share removed</small></th></tr>'
    note = (
        f"Loss where one group alone is pruned, from {facts.losses_by}; the darker, the more is lost, on a logarithm."
    )
    return f'{page.paragraph(note)}<div class="scroll"><table class="heat">{head}{rows}</table></div>'


def _recovered(report: Report) -> str:
    """List the layers that recovery looked at, with their error before and after."""
    names = numbers.readable([layer.layer for layer in report.repairs])
    rows: list[list[tuple[str, float | str]]] = [
        [
            (name, name),
            (tables.fit_in_words(layer.how), layer.how),
            (f"{100 * layer.before:.2f} %", layer.before),
            (f"{100 * layer.after:.2f} %", layer.after),
        ]
        for name, layer in zip(names, report.repairs, strict=True)
        if not layer.how.startswith("left")
    ]
    return _table(("layer", "fit", "error before", "after"), rows) if rows else ""


def _times(report: Report) -> str:
    """List the time of each stage, on the clock and of all processors; a stage may lie within another."""
    rows: list[list[tuple[str, float | str]]] = [
        [(name, name), *((numbers.seconds(each), each) for each in (time.seconds, time.processor_seconds))]
        for name, time in report.timings.items()
    ]
    return _table(("stage", "on the clock", "of all processors"), rows) if rows else ""


def _about(report: Report, about: Mapping[str, Any]) -> str:
    pairs = {**{k.replace("_", " "): v for k, v in report.settings.items()}, **about}
    if report.output:
        pairs["file"] = report.output
    rows = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_value(v))}</dd>" for k, v in pairs.items() if v is not None)
    return f"<dl>{rows}</dl>" if rows else ""


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


_STYLE = """
body { max-width: 72em; }
.verdict { font-size: 1.1em; } .badge { border-radius: 1em; padding: .15em .8em; background: #777; color: #fff; }
.badge.faithful { background: #1a7f37; } .badge.degraded { background: #9a6700; }
.badge.damaged { background: #cf222e; }
.pair { display: grid; grid-template-columns: 7em 1fr 12em; gap: .3em 1em; align-items: center; margin: .6em 0; }
.less { font-weight: 600; } .bar { position: relative; height: 1.5em; margin: 2px 0; background: var(--soft); }
.bar i { display: block; height: 100%; background: var(--line); }
.bar.after i { background: color-mix(in srgb, var(--strong) 40%, var(--paper)); }
.bar span { position: absolute; left: .5em; top: 0; line-height: 1.65em; font-size: .9em; color: var(--ink); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .3em 1.2em; margin: 0; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .4em 0; } summary { cursor: pointer; } li, td:first-child { overflow-wrap: anywhere; }
.scroll { overflow: auto; max-height: 34em; border: 1px solid var(--line); border-radius: 6px; }
.scroll table { margin: 0; width: 100%; }
.sorts:not(.figures) td:last-child, .sorts:not(.figures) th:last-child { text-align: left; }
.sorts th { cursor: pointer; position: sticky; top: 0; background: var(--paper); white-space: nowrap; }
.sorts td { white-space: nowrap; border-top: 1px solid var(--line); } .sorts td:first-child { min-width: 12em; }
.sorts td:nth-child(2), .sorts th:nth-child(2) { text-align: left; }
th[aria-sort=ascending]::after { content: " \\25B4"; } th[aria-sort=descending]::after { content: " \\25BE"; }
.tools { margin: .5em 0; display: flex; flex-wrap: wrap; gap: .5em; align-items: center; }
.tools input, .tools select, .tools button { font: inherit; color: inherit; background: var(--soft);
  border: 1px solid var(--line); border-radius: 5px; padding: .2em .6em; }
#view { border: 1px solid var(--line); border-radius: 6px; height: min(34em, 75vh); overflow: hidden; cursor: grab; }
#view svg { width: 100%; height: 100%; max-width: none; touch-action: none; user-select: none; display: block; }
#view text { font: 12px system-ui, sans-serif; text-anchor: middle; fill: var(--ink); pointer-events: none; }
#view .width { font-weight: 600; } .edge { fill: none; stroke: var(--grey); stroke-width: 1.3; }
.join { fill: var(--soft); stroke: var(--grey); } .layer { stroke: var(--grey); }
#view { --low: var(--cool); --high: var(--warm); }
#view.kept .layer { fill: color-mix(in srgb, var(--cool) calc(var(--kept) * 100%), var(--warm)); }
#view.work .layer { fill: color-mix(in srgb, var(--warm) calc(var(--work) * 100%), var(--cool)); }
#view .hit .layer, #view .hit .join { stroke: var(--strong); stroke-width: 3.5; }
#view.time .layer { fill: color-mix(in srgb, var(--warm) calc(var(--time) * 100%), var(--cool)); }
.plot { overflow-x: auto; } .plot svg { max-width: none; } .heat td, .heat th { white-space: nowrap; }
.heat td[style] { background: color-mix(in srgb, var(--warm) var(--depth), var(--paper)); }
small { color: var(--quiet); }
.legend { color: var(--quiet); font-size: .9em; } .legend i { display: inline-block; width: 1em; height: 1em;
  vertical-align: -.1em; border: 1px solid var(--grey); background: var(--warm); }
.legend i.high, .legend.work-legend i.low { background: var(--cool); }
.legend.work-legend i.high { background: var(--warm); }
@media (max-width: 600px) { .pair { grid-template-columns: 1fr; } dl { grid-template-columns: minmax(0, 1fr); }
  dd { margin-bottom: .5em; } td, th { padding: .2em .5em; } .sorts td:first-child, .heat td:first-child {
  min-width: 8em; max-width: 11em; white-space: normal; font-size: .9em; } }
"""

_SCRIPT = """
for (const head of document.querySelectorAll('.sorts th')) {
  const sort = () => {
    const place = head.cellIndex, body = head.closest('table').tBodies[0];
    const up = head.ariaSort !== 'ascending' && head.ariaSort !== null ? head.ariaSort === 'descending' : false;
    for (const other of head.parentNode.cells) other.ariaSort = 'none';
    head.ariaSort = up ? 'ascending' : 'descending';
    const key = row => row.cells[place].dataset.by;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)], n = x - y;
      return (Number.isNaN(n) ? x.localeCompare(y, undefined, {numeric: true}) : n) * (up ? 1 : -1);
    });
    body.append(...rows);
  };
  head.addEventListener('click', sort);
  head.addEventListener('keydown', event => { if (event.key === 'Enter') sort(); });
}
const view = document.getElementById('view');
if (view) {
  const svg = view.querySelector('svg'), wide = +svg.dataset.wide, tall = +svg.dataset.tall;
  let x = 0, y = 0, zoom = 1;
  const draw = () => svg.setAttribute('viewBox', [x, y, view.clientWidth / zoom, view.clientHeight / zoom].join(' '));
  const start = () => { zoom = Math.min(1, Math.max(0.55, view.clientWidth / wide));
    x = (wide - view.clientWidth / zoom) / 2; y = 0; draw(); };
  const whole = () => { zoom = Math.min(view.clientWidth / wide, view.clientHeight / tall);
    x = (wide - view.clientWidth / zoom) / 2; y = (tall - view.clientHeight / zoom) / 2; draw(); };
  const scale = (by, u, v) => { const px = x + u / zoom, py = y + v / zoom;
    zoom = Math.min(4, Math.max(0.01, zoom * by)); x = px - u / zoom; y = py - v / zoom; draw(); };
  const centre = by => scale(by, view.clientWidth / 2, view.clientHeight / 2);
  document.getElementById('closer').onclick = () => centre(1.4);
  document.getElementById('further').onclick = () => centre(1 / 1.4);
  document.getElementById('whole').onclick = whole;
  view.addEventListener('wheel', event => { if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault(); const box = view.getBoundingClientRect();
    scale(Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top); }, {passive: false});
  let last = null;
  view.addEventListener('pointerdown', event => { last = event; view.setPointerCapture(event.pointerId); });
  view.addEventListener('pointermove', event => { if (!last) return;
    x -= (event.clientX - last.clientX) / zoom; y -= (event.clientY - last.clientY) / zoom; last = event; draw(); });
  for (const end of ['pointerup', 'pointercancel']) view.addEventListener(end, () => { last = null; });
  document.getElementById('colour').onchange = event => { view.className = event.target.value;
    document.querySelector('#view + .legend').classList.toggle('work-legend', event.target.value !== 'kept'); };
  document.getElementById('find').addEventListener('input', event => {
    const word = event.target.value.toLowerCase(); let first = null, count = 0;
    for (const node of svg.querySelectorAll('g')) {
      const hit = word !== '' && node.dataset.name.toLowerCase().includes(word);
      node.classList.toggle('hit', hit);
      if (hit) { count += 1; first = first || node; }
    }
    document.getElementById('hits').textContent = word ? `${count} found` : '';
    if (first) { const box = first.getBBox(); zoom = Math.max(zoom, 0.8);
      x = box.x + box.width / 2 - view.clientWidth / zoom / 2;
      y = box.y + box.height / 2 - view.clientHeight / zoom / 2; draw(); }
  });
  addEventListener('resize', draw);
  start();
}
"""
