"""Facts as tables for a terminal: layers, totals, proof, fidelity, recovery, factorization, budget, structure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from onnxprune.devices import MULTIPLES, Kernels
from onnxprune.errors import Note, argument
from onnxprune.importance.criteria import Description
from onnxprune.labels.atoms import Reason
from onnxprune.report import numbers, reasons
from onnxprune.report.facts import (
    SHARES,
    BranchFacts,
    BudgetFacts,
    DeadChannels,
    Exactness,
    ExpertFacts,
    FactorizedLayer,
    Fidelity,
    Finetuning,
    Latency,
    LayerFacts,
    NodeTime,
    Profile,
    Recovery,
    Regularized,
    Repair,
    Report,
    ResizedTensor,
    RotatedStream,
    TargetFacts,
    Verdict,
    VocabularyFacts,
)

LONG = 30
"""Up to this many layers ``inspect`` lists every one; of a longer model the largest."""


class FittedTable(Table):
    """A table that cuts the names of nodes short in front where they would make it wider than there is room."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table within the width of ``options``."""
        self._fit(options.max_width)
        yield from super().__rich_console__(console, options)

    def _fit(self, width: int) -> None:
        named = next((column for column in self.columns if str(column.header).strip() in NAMES), None)
        widths = {id(c): max((cell_len(str(cell)) for cell in (c.header, *c.cells)), default=0) for c in self.columns}
        gaps = _GAP * (len(self.columns) - 1)
        for column in self.columns:  # single words, as types of operators are, have no place to wrap at
            column.no_wrap |= column is not named and not any(" " in str(cell) for cell in column.cells)
        figures = sum(widths[id(c)] for c in self.columns if c.no_wrap and c is not named)
        texts = [widths[id(c)] for c in self.columns if not c.no_wrap and c is not named]
        prose, least_prose = (sum(min(text, limit) for text in texts) for limit in (_PROSE, _LEAST_PROSE))
        if named is not None:
            least = min(_LEAST_NAME, max(_SHORTEST_NAME, width - gaps - figures - least_prose))
            room = max(least, width - gaps - figures - prose)
            named.no_wrap = True
            named._cells[:] = numbers.fitted([str(cell) for cell in named.cells], room)
            figures += min(widths[id(named)], room)
        if figures + gaps > width:  # figures that stand side by side in one cell then stand below each other
            for column in self.columns:
                column.no_wrap = column is named


NAMES = {"layer", "layers", "branch", "node", "group", "for example", "output"}
"""Titles of columns that hold names of nodes."""
_GAP, _PROSE, _LEAST_PROSE, _LEAST_NAME, _SHORTEST_NAME = 2, 36, 7, 24, 20


def table_of(*columns: tuple[str, str]) -> Table:
    """Return a borderless table; each column is (title, ``left`` or ``right``)."""
    table = FittedTable(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold", show_edge=False)
    for title, side in columns:
        table.add_column(
            title, justify="right" if side == "right" else "left", no_wrap=side == "right", overflow="fold"
        )
    return table


def criteria(described: Sequence[Description]) -> Table:
    """Return a table of criteria, one line each."""
    table = table_of(("criterion", "left"), ("from", "left"), ("scores channels by", "left"), ("source", "left"))
    for one in described:
        source = f"{one.paper.split()[0]} {one.paper.split()[-1]}" if one.paper else ""
        table.add_row(one.name, "data" if one.needs else "weights", one.measures, source)
    return table


def devices(kernels: Sequence[Kernels], here: str, *, sources: bool) -> Table:
    """Return a table of the multiples that devices like, one line each; ``here`` is the device of this machine.

    Args:
        kernels: the devices.
        here: name of the one that is this machine.
        sources: whether to say where each rule comes from.
    """
    table = table_of(("device", "left"), *((name, "right") for name in MULTIPLES), ("", "left"))
    for one in kernels:
        remark = [*(["this machine"] if one.name == here else []), *([one.source] if sources else [])]
        table.add_row(one.name, *(str(getattr(one, name)) for name in MULTIPLES), ". ".join(remark))
    return table


def heading(text: str) -> Text:
    """Return a section's title with an empty line in front."""
    return Text(f"\n{text}", style="bold cyan")


def untouched(layer: LayerFacts) -> bool:
    """Return whether neither the layer's outputs nor its inputs lost a channel."""
    return layer.channels_before == layer.channels_after and layer.params_before == layer.params_after


def reason(layer: LayerFacts) -> str:
    """Return the reason why the layer is unchanged; its own size may be one."""
    return layer.reason or (Reason.SINGLE if layer.channels_before <= 1 and untouched(layer) else "")


def layers(facts: Sequence[LayerFacts], *, name_width: int) -> Table:
    """Render a table of all layers, before → after."""
    columns = [("layer", "left"), ("op", "left"), ("channels", "right"), ("params", "right"), ("MACs", "right")]
    table = table_of(*columns, ("removed", "left"))
    for name, layer in _named(facts):
        table.add_row(
            numbers.shorten(name, name_width),
            layer.op,
            numbers.change(str(layer.channels_before), str(layer.channels_after)),
            numbers.change(numbers.count(layer.params_before), numbers.count(layer.params_after)),
            numbers.change(numbers.count(layer.macs_before), numbers.count(layer.macs_after)),
            _removed_or_why(layer),
            style="dim" if untouched(layer) else "",
        )
    return table


def _named(facts: Sequence[LayerFacts]) -> list[tuple[str, LayerFacts]]:
    """Layers with names that tell them apart."""
    return list(zip(numbers.readable([layer.name for layer in facts]), facts, strict=True))


def _removed_or_why(layer: LayerFacts) -> str:
    """Return the share of parameters removed and, where there is one, the reason for no more, in a few words."""
    why = reason(layer)
    if not why:
        return numbers.removed(layer.params_before, layer.params_after)
    share = "" if untouched(layer) else f"{numbers.removed(layer.params_before, layer.params_after)}, "
    return f"{share}{reasons.short(why)}"


def inspected(facts: Sequence[LayerFacts], *, name_width: int, show_all: bool) -> list[RenderableType]:
    """Render the layers of a model; without ``show_all`` a long model shows only those with most MACs or parameters."""
    shown = _named(facts)
    if not show_all and len(shown) > LONG:
        weight = {id(layer): max(layer.macs_before, layer.params_before) for layer in facts}
        largest = set(sorted(weight, key=weight.__getitem__, reverse=True)[:LONG])
        shown = [pair for pair in shown if id(pair[1]) in largest]
    table = table_of(
        ("layer", "left"), ("op", "left"), ("channels", "right"), ("params", "right"), ("MACs", "right"), ("", "left")
    )
    for full_name, layer in shown:
        name, channels = numbers.shorten(full_name, name_width), str(layer.channels_before)
        params, macs = numbers.count(layer.params_before), numbers.count(layer.macs_before)
        table.add_row(
            name, layer.op, channels, params, macs, reasons.short(layer.reason), style="dim" if layer.reason else ""
        )
    hidden = len(facts) - len(shown)
    parts: list[RenderableType] = [table]
    if hidden:
        parts.append(Text(f"and {hidden} smaller layers (-v lists them)", style="dim"))
    return parts


def latency_note(latency: Latency | None) -> Text | None:
    """Return the conditions of the measurement of latency."""
    if latency is None:
        return None
    threads = (
        "1 thread" if latency.threads == 1 else f"{latency.threads} threads" if latency.threads else "default threads"
    )
    spread = f"median {numbers.PLUS_MINUS} interquartile range, {latency.runs} runs in turn"
    interval = ""
    if latency.speedup_interval is not None:
        low, high = latency.speedup_interval
        interval = f"; {latency.speed_verdict}: 95 % interval {low:.2f} to {high:.2f} times as fast"
    return Text(f"latency: {spread}, onnxruntime, {threads}{interval}", style="dim")


def flushed(values: int) -> list[Text]:
    """Render the number of subnormal weights that were set to 0; no line without any."""
    if not values:
        return []
    what = "weight" if values == 1 else "weights"
    return [
        Text.assemble(("flushed   ", "bold"), f"{values:,} {what} set to 0, too small for fast arithmetic (subnormal)")
    ]


def dead(facts: DeadChannels | None) -> list[Text]:
    """Render a line about dead units, and one for every layer that keeps some."""
    if facts is None:
        return []
    parts = [f"{facts.found:,} of {facts.units:,} units change no output"]
    parts += [f"{facts.removed:,} were removed"] if facts.found else []
    parts += [f"{facts.folded:,} constants became part of a bias"] if facts.folded else []
    lines = [Text.assemble(("dead      ", "bold"), "; ".join(parts))]
    lines += [Text(f"          {name}: {why}", style="dim") for name, why in list(facts.reasons.items())[:4]]
    more = len(facts.reasons) - 4
    return lines + ([Text(f"          and {more} more layers", style="dim")] if more > 0 else [])


def regularized(facts: Regularized | None) -> list[Text]:
    """Render a line about a training with a penalty."""
    if facts is None:
        return []
    text = f"{facts.kind}, {facts.steps:,} steps of {facts.batch} in {facts.seconds:.0f} s from {facts.samples} samples"
    text += f": {facts.zeros:,} of {facts.units:,} {_GROUPED.get(facts.groups, 'units')} are 0"
    one, other = facts.before.points, facts.after.points
    text += "" if one is None or other is None else f", {one:.1f} {numbers.ARROW} {other:.1f} points"
    undone = ("undone: " if facts.undone else "", "yellow")
    return [Text.assemble(("penalty   ", "bold"), undone, text)]


_GROUPED = {"shape": "kernel positions"}


def _listed(sizes: Sequence[int]) -> str:
    """``2``, ``2 and 3``, ``2, 3 and 1``."""
    *others, last = map(str, sizes)
    return f"{', '.join(others)} and {last}" if others else last


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


_COLOURS = {"faithful": "bold green", "degraded": "bold yellow", "damaged": "bold red"}


def verdict_line(facts: Verdict | None, spelled: Callable[[str], str] = str) -> list[Text]:
    """One line: whether the model still gives the answers of its original, the loss, and the next step."""
    if facts is None:
        return []
    points = f", {facts.points:.1f} of 100 points"
    lost = "" if facts.word == "faithful" and facts.points > 99.95 else f"; {facts.reason}"
    line = Text.assemble(("verdict   ", "bold"), (facts.word, _COLOURS[facts.word]), points, lost)
    return [line.append(f"; {spelled(facts.next_step)}") if facts.next_step else line]


def fidelity(facts: Fidelity | None, *, name_width: int, max_rows: int = 8) -> list[RenderableType]:
    """Compare the final model with the original: one line for one output, else a table of the worst ``max_rows``."""
    if facts is None or not facts.outputs:
        note = facts.note if facts is not None else ""
        return [Text.assemble(("fidelity  ", "bold"), ("not measured", "yellow"), f": {note}" if note else "")]
    source = "seeded synthetic data" if facts.source == "synthetic" else facts.source
    samples = f"{facts.samples} sample{'' if facts.samples == 1 else 's'}, {source}"
    note = f"; {facts.note}" if facts.note else ""
    points = "" if facts.points is None else f"{facts.points:.1f} points, "
    worst = sorted(facts.outputs, key=lambda output: output.cosine)
    if len(worst) == 1:
        output = worst[0]
        top1 = f", top-1 agreement {100 * output.top1:.1f} %" if output.top1 is not None else ""
        line = f"cosine {output.cosine:.4f}, signal-to-noise {numbers.decibels(output.snr_db)}{top1} ({samples}){note}"
        return [Text.assemble(("fidelity  ", "bold"), points, line)]
    read, cosine, noise, top = (
        ("read as", "left"),
        ("cosine", "right"),
        ("signal-to-noise", "right"),
        ("top-1", "right"),
    )
    table = table_of(("  output", "left"), read, cosine, noise, top)
    for output in worst[:max_rows]:
        table.add_row(
            "  " + numbers.shorten(output.output, name_width),
            output.kind or numbers.DASH,
            f"{output.cosine:.4f}",
            numbers.decibels(output.snr_db),
            numbers.DASH if output.top1 is None else f"{100 * output.top1:.1f} %",
        )
    head = f"{points}worst cosine {facts.worst_cosine:.4f} over {len(worst)} outputs ({samples}){note}"
    parts: list[RenderableType] = [Text.assemble(("fidelity  ", "bold"), head), table]
    if len(worst) > max_rows:
        parts.append(Text(f"  and {len(worst) - max_rows} outputs with a larger cosine", style="dim"))
    return parts


_BY = {
    "bias": "by output means",
    "bn": "by scale and shift",
    "lstsq": "by least squares",
    "full": "by least squares",
    "datafree": "by least squares",
}
_HOW = {"bias": "means", "affine": "scale and shift", "lstsq": "least squares", "kept": "kept"}
# Hold-out error, as a share of the variance, that is rounding: the removal did not affect the layer.
_UNTOUCHED = 1e-9
_NO_BETTER = "No recovery lowered the error on hold-out samples."


def summary(report: Report, spelled: Callable[[str], str] = str) -> Text | None:
    """Return one line on the recovery: its inputs, and its effect on the outputs; None where there is none to tell of.

    Args:
        report: of a run.
        spelled: writes arguments in texts as the reader does.
    """
    facts = report.recovery
    if not facts.why:
        return None
    mode, data = spelled(Note(argument("recover", facts.mode))), spelled(Note(argument("data")))
    if facts.mode == "none" or facts.before is None:
        why = facts.why if facts.mode == "none" else "nothing was pruned"
        why = mode if why == "asked for" else why
        weaker = spelled(Note(argument("recover", "datafree")))
        advice = f"; give {data} to recover accuracy, or {weaker} (weaker, needs no data)"
        advice = advice if facts.why == "no data was given" else ""
        return Text.assemble(("recovered ", "bold"), "no: ", why, advice)
    num_recovered, reached = _counts(report.repairs)
    reason = "" if facts.why == "asked for" else f", {mode} because {facts.why}"
    samples = f"{facts.samples} sample{'' if facts.samples == 1 else 's'}"
    if facts.inputs:
        samples = f"{facts.samples} {facts.inputs} ({data} recovers more)"
    how = f"{num_recovered} of {reached} layers {_BY.get(facts.mode, 'by ' + facts.mode)} from {samples}{reason}"
    if facts.undone:
        return Text.assemble(("recovered ", "bold"), ("undone", "yellow"), f": {how}, {_change(facts)}")
    return Text.assemble(("recovered ", "bold"), f"{how}: {_change(facts)}")


def rotated(facts: Sequence[RotatedStream]) -> list[Text]:
    """Return one line on streams that were turned: their channels, and the share of the energy that is left."""
    if not facts:
        return []
    streams = [
        f"{stream.name} {stream.channels_before} to {stream.channels_after} channels with {stream.energy:.2%} of the "
        "energy"
        for stream in facts[:3]
    ]
    more = f" and {len(facts) - 3} more" if len(facts) > 3 else ""
    return [Text.assemble(("rotated   ", "bold"), "; ".join(streams), more)]


def branches_line(facts: Sequence[BranchFacts]) -> list[Text]:
    """Return one line on removed residual branches: how many, their share of the work, and their names."""
    removed = [branch for branch in facts if branch.removed]
    if not removed:
        return []
    names = ", ".join(branch.name for branch in removed[:3]) + (
        f" and {len(removed) - 3} more" if len(removed) > 3 else ""
    )
    macs = numbers.count(sum(branch.macs for branch in removed))
    caches = sum(len(branch.cache) for branch in removed)
    ends = f"; {caches} inputs and outputs of their caches went too" if caches else ""
    text = f"{len(removed)} of {len(facts)} removed, {macs} MACs: {names}{ends}"
    return [Text.assemble(("branches  ", "bold"), text)]


def _shape(sizes: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def resized_line(facts: Sequence[ResizedTensor]) -> list[Text]:
    """Return one line on inputs and outputs that lost channels, those of equal shapes together."""
    if not facts:
        return []
    changes = Counter((_shape(one.before), _shape(one.after)) for one in facts)
    texts = [f"{count} of {before} {numbers.ARROW} {after}" for (before, after), count in changes.most_common(3)]
    more = f" and {len(changes) - 3} other shapes" if len(changes) > 3 else ""
    first = ", ".join(one.name for one in facts[:2]) + (", ..." if len(facts) > 2 else "")
    return [Text.assemble(("resized   ", "bold"), f"{', '.join(texts)}{more} ({first})")]


def experts_line(facts: Sequence[ExpertFacts]) -> list[Text]:
    """Return one line on removed experts: how many of how many, in how many mixtures, and their parameters."""
    if not facts:
        return []
    removed, total = sum(len(one.removed) for one in facts), sum(one.experts for one in facts)
    params = numbers.count(sum(one.params for one in facts))
    where = "1 mixture" if len(facts) == 1 else f"{len(facts)} mixtures"
    fewer = "; ".join(dict.fromkeys(one.reason for one in facts if one.reason))
    text = f"{removed} of {total} removed in {where}, {params} parameters{f' ({fewer})' if fewer else ''}"
    return [Text.assemble(("experts   ", "bold"), text)]


def mixtures(facts: Sequence[ExpertFacts]) -> list[RenderableType]:
    """Return a table of all mixtures of experts: which went, or why fewer than asked, or none."""
    if not facts:
        return []
    table = table_of(("mixture", "left"), ("experts", "right"), ("chosen", "right"), ("removed", "left"), ("", "left"))
    for one in facts:
        sizes = str(one.experts or ""), str(one.top_k or "")
        table.add_row(one.name, *sizes, ", ".join(map(str, one.removed)), one.reason)
    return [table, Text("")]


def vocabulary_line(facts: VocabularyFacts | None) -> list[Text]:
    """Return one line on a vocabulary: tokens before and after, the bytes saved, and whose ids it takes."""
    if facts is None:
        return []
    lost = f"{facts.tokens_before:,} to {facts.tokens_after:,}, {numbers.size(facts.bytes_saved)} saved"
    ids = "takes ids of the original" if facts.keep_ids else "takes new ids"
    outputs = f"; {', '.join(facts.outputs)} has a position for each" if facts.outputs else ""
    return [Text.assemble(("tokens    ", "bold"), f"{lost}: {', '.join(facts.inputs)} {ids}{outputs}")]


def branches(facts: Sequence[BranchFacts]) -> list[RenderableType]:
    """Return a table of all residual branches: the work of each, the loss of outputs without it, or why it stays."""
    if not facts:
        return []
    table = table_of(("branch", "left"), ("holds", "right"), ("params", "right"), ("MACs", "right"), ("", "left"))
    for name, branch in zip(numbers.readable([branch.name for branch in facts]), facts, strict=True):
        sizes = f"{len(branch.layers)} layers", numbers.count(branch.params), numbers.count(branch.macs)
        table.add_row(name, *sizes, branch_fate(branch))
    return [table, Text("")]


def inspected_branches(facts: Sequence[BranchFacts], *, name_width: int, max_rows: int | None) -> list[RenderableType]:
    """Return a table of the residual branches of a model: layers, shares of the work, why some may not go.

    Args:
        facts: of every branch.
        name_width: room for names.
        max_rows: how many to list; None for all.
    """
    if not facts:
        return []
    free = sum(not branch.reason for branch in facts)
    parts: list[RenderableType] = [heading(f"Residual branches ({free} of {len(facts)} can be removed)")]
    table = table_of(("branch", "left"), ("layers", "right"), ("params", "right"), ("MACs", "right"), ("", "left"))
    shown = facts[:max_rows]
    for name, branch in zip(numbers.readable([branch.name for branch in shown]), shown, strict=True):
        shares = (f"{100 * share:.1f} %" for share in (branch.params_share, branch.macs_share))
        style = "dim" if branch.reason else ""
        table.add_row(numbers.shorten(name, name_width), str(len(branch.layers)), *shares, branch.reason, style=style)
    parts.append(table)
    if len(shown) < len(facts):
        parts.append(Text(f"and {len(facts) - len(shown)} more (-v lists them)", style="dim"))
    return parts


def branch_fate(branch: BranchFacts) -> str:
    """Return as text whether a branch was removed, and the loss of the outputs, or why it stays."""
    if not branch.removed:
        return branch.reason if branch.error is None else f"outputs would change by {_share(branch.error)}"
    return "removed" if branch.error is None else f"removed; outputs changed by {_share(branch.error)}"


def finetuned(facts: Finetuning | None) -> list[Text]:
    """Return one line on the training: its effort, and its effect on the hold-out; none where there was none."""
    if facts is None:
        return []
    per_step = f"{facts.steps} steps of {facts.batch} in {facts.seconds:.0f} s from {facts.samples} samples"
    one, other = facts.before.points, facts.after.points
    change = "" if one is None or other is None else f": {one:.1f} {numbers.ARROW} {other:.1f} points on {facts.aside}"
    change += " held-out samples" if change else ""
    if len(facts.by_labels) == 2:
        one, other = facts.by_labels
        change += f", {one:.1f} {numbers.ARROW} {other:.1f} by their labels"
    undone = ("undone: " if facts.undone else "", "yellow")
    return [Text.assemble(("finetuned ", "bold"), undone, per_step, change)]


def _counts(repairs: Sequence[Repair]) -> tuple[int, int]:
    """Count the layers with new weights, and the layers affected by the removal."""
    return sum(r.done for r in repairs), sum(not _untouched(r) for r in repairs)


def _untouched(repair: Repair) -> bool:
    return repair.how == "kept" and repair.before <= _UNTOUCHED


def _change(facts: Recovery) -> str:
    """Fidelity before and after, on the same inputs."""
    before, after = facts.before, facts.after
    if before is None or after is None or not before.outputs:
        return "fidelity not measured"
    if before.points is None or after.points is None:
        text = f"fidelity {before.worst_cosine:.4f} {numbers.ARROW} {after.worst_cosine:.4f}"
    else:
        text = f"fidelity {before.points:.1f} {numbers.ARROW} {after.points:.1f} points"
    one, other = _top1(before), _top1(after)
    if one is not None and other is not None:
        text += f", top-1 agreement {100 * one:.1f} {numbers.ARROW} {100 * other:.1f} %"
    return text


def _top1(facts: Fidelity) -> float | None:
    return facts.outputs[0].top1 if len(facts.outputs) == 1 else None


def recovered_layers(repairs: Sequence[Repair], *, name_width: int) -> list[RenderableType]:
    """Render the layers that recovery fitted: the mode, and the hold-out error before and after."""
    if all(r.how.startswith("left") or _untouched(r) for r in repairs):
        return []
    table = table_of(("layer", "left"), ("recovered by", "left"), ("hold-out error", "right"))
    for name, item in zip(numbers.readable([r.layer for r in repairs]), repairs, strict=True):
        if item.how.startswith("left") or _untouched(item):
            continue
        error = numbers.change(_share(item.before), _share(item.after))
        style = "" if item.done else "dim"
        table.add_row(numbers.shorten(name, name_width), fit_in_words(item.how), error, style=style)
    note = "hold-out error: error at the layer's output on hold-out samples, as a share of its variance"
    return [table, Text(note, style="dim")]


def fit_in_words(how: str) -> str:
    """Return in words how a layer was fitted."""
    first, *tail = how.split(" ", 1)
    word = _HOW.get(first.rstrip(","), first)
    return f"{word}, ridge {tail[0]}" if first == "lstsq" and tail else " ".join([word, *tail])


def _share(error: float) -> str:
    return f"{100 * error:.2f} %"


def unrecovered_layers(repairs: Sequence[Repair], *, name_width: int) -> list[RenderableType]:
    """Render the layers that a recovery left unchanged, grouped by reason."""
    by_reason: dict[str, list[str]] = {}
    for item in repairs:
        if item.how.startswith("left"):
            why = item.how.partition(":")[2].strip()
            by_reason.setdefault(f"{why[:1].upper()}{why[1:]}.", []).append(item.layer)
        elif item.how == "kept" and not _untouched(item):
            by_reason.setdefault(_NO_BETTER, []).append(item.layer)
    parts: list[RenderableType] = []
    for why, names in sorted(by_reason.items(), key=lambda pair: -len(pair[1])):
        parts.append(Text(why, style="bold"))
        parts += [Text(f"  {numbers.shorten(name, name_width)}") for name in names]
    return parts or [Text("every layer affected by pruning was recovered", style="green")]


def factorized_layers(facts: Sequence[FactorizedLayer], *, name_width: int, verbose: bool) -> list[RenderableType]:
    """Render the factorized layers; the others are a count with their reasons."""
    table = table_of(
        ("layer", "left"), ("op", "left"), ("method", "left"), ("ranks", "right"), ("params", "right"),
        ("MACs", "right"), ("error", "right"), ("alone", "right"),
    )  # fmt: skip
    factorized = [f for f in facts if f.method]
    for name, item in zip(numbers.readable([f.name for f in facts]), facts, strict=True):
        if not item.method:
            continue
        table.add_row(
            numbers.shorten(name, name_width),
            item.op,
            item.method,
            ", ".join(str(rank) for rank in item.ranks),
            numbers.change(numbers.count(item.params_before), numbers.count(item.params_after)),
            numbers.change(numbers.count(item.macs_before), numbers.count(item.macs_after)),
            f"{100 * item.error:.2f} %",
            _alone(item),
        )
    others = [f for f in facts if not f.method]
    parts: list[RenderableType] = [table] if factorized else []
    if others and verbose:
        parts += unfactorized_layers(facts, name_width=name_width)
    elif others:
        why = reasons.tally(f.reason for f in others)
        parts.append(
            Text(f"{len(others)} of {len(facts)} layers not factorized: {why} (--explain lists them)", style="dim")
        )
    return parts


def _alone(item: FactorizedLayer) -> str:
    if item.before_ms is None or item.after_ms is None or not item.after_ms:
        return numbers.DASH
    return f"{item.before_ms / item.after_ms:.2f}{numbers.TIMES} speed"


def unfactorized_layers(facts: Sequence[FactorizedLayer], *, name_width: int) -> list[RenderableType]:
    """Render the layers that were not factorized, grouped by reason."""
    by_reason: dict[str, list[str]] = {}
    for item in facts:
        if not item.method:
            by_reason.setdefault(f"{item.reason[:1].upper()}{item.reason[1:]}.", []).append(item.name)
    parts: list[RenderableType] = [heading("Layers that were not factorized")]
    for why, names in sorted(by_reason.items(), key=lambda pair: -len(pair[1])):
        parts.append(Text(why, style="bold"))
        parts += [Text(f"  {numbers.shorten(name, name_width)}") for name in names]
    return parts if by_reason else []


def product(report: Report) -> Text:
    """Return one line on the check of the new layers."""
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


def render(facts: BudgetFacts | None) -> list[RenderableType]:
    """Render the targets as a table, and the search for the counts."""
    if facts is None:
        return []
    parts: list[RenderableType] = []
    if facts.targets:
        table = table_of(
            ("target", "left"), ("before", "right"), ("allowed", "right"), ("after", "right"), ("share", "right")
        )
        table.add_column("")
        for target in facts.targets:
            amounts = (amount(target.kind, x) for x in (target.before, target.limit, target.after))
            table.add_row(target.asked, *amounts, f"{target.after / target.before:.3f}", verdict(target))
        parts += [table, Text("")]
    return [*parts, budget_line(facts)]


def budget_line(facts: BudgetFacts) -> Text:
    """One line: the cost of the budget, and the candidate that was selected."""
    lost = facts.points_before - facts.points_after
    allowed = "" if facts.max_drop is None else f" (allowed {facts.max_drop:g})"
    drop = f"{facts.what} {facts.points_before:.4g} {numbers.ARROW} {facts.points_after:.4g}, {lost:.3g} lost{allowed}"
    if math.isnan(lost):
        drop = "nothing was compared, because the model cannot be run here"
    return Text.assemble(("budget    ", "bold"), f"{drop}; allocation by {_answers(facts)}")


def verdict(target: TargetFacts) -> str:
    """Return whether the target was met, and whether its cost was counted, measured or predicted."""
    if target.met_before:
        return f"met before pruning, {target.how}"
    return f"{'met' if target.after <= target.limit else 'met within tolerance'}, {target.how}"


def amount(kind: str, value: float) -> str:
    """Format a cost with its unit."""
    if kind == "latency":
        return f"{1e3 * value:.3g} ms"
    return numbers.count(round(value)) if kind in ("macs", "params") else numbers.size(round(value))


def _answers(facts: BudgetFacts) -> str:
    """Render the selected candidate and those it was compared with."""
    best = next((a for a in facts.answers if a.chosen), None)
    if best is None:
        return "no search needed"
    gap = "" if facts.gap is None else f" (within {100 * facts.gap:.1f} % of the bound)"
    others = ", ".join(f"{a.name} {a.fine:.4g}" for a in facts.answers if not a.chosen and not math.isnan(a.points))
    return f"{best.name}{gap}" + (f", {best.fine:.4g} against {others}" if others else "")


MAX_ROWS = 20
"""Nodes that are listed where not every one is asked for."""


def profile_table(facts: Profile, *, name_width: int, show_all: bool) -> list[RenderableType]:
    """Render the whole profile."""
    alike: dict[str, list[NodeTime]] = {}
    for node in facts.nodes:
        alike.setdefault(node.name if show_all else repr((node.op, node.ms, node.at_shares)), []).append(node)
    shown = list(alike.values())[: None if show_all else MAX_ROWS]
    columns = [(f"at {share:g}", "right") for share in SHARES]
    table = table_of(("node", "left"), ("op", "left"), ("ms", "right"), ("share", "right"), *columns)
    total = sum(node.ms for node in facts.nodes) or 1.0
    for nodes in shown:
        node, count = nodes[0], len(nodes)
        each = [f"{count * ms:.4f}" for ms in node.at_shares]
        name = numbers.shorten(node.name, name_width) + (f" and {count - 1} alike" if count > 1 else "")
        table.add_row(name, node.op, f"{count * node.ms:.4f}", f"{100 * count * node.ms / total:.1f} %", *each)
    parts: list[RenderableType] = [_title(facts), heading("Latency of nodes, by share of channels kept")]
    parts.append(table)
    num_hidden = len(facts.nodes) - sum(map(len, shown))
    if num_hidden:
        parts.append(Text(f"and {num_hidden} shorter ones (-v lists them)", style="dim"))
    if facts.steps:
        parts += [heading("Latency of one node, by its channels"), _steps(facts)]
    return [*parts, Text(""), _checked(facts)]


def _title(facts: Profile) -> Text:
    device = facts.device
    threads = f"{device['threads']} thread{'' if device['threads'] == 1 else 's'}"
    where = f"{device['processor']}, {threads}, onnxruntime {device['onnxruntime']}, {device['providers']}"
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in facts.inputs.items())
    return Text.assemble((facts.model, "bold"), f"  {facts.ms:.3g} ms for {shapes}\n{where}")


def _steps(facts: Profile) -> RenderableType:
    table = table_of(("op", "left"), ("nodes", "right"), ("varied", "left"), ("channels: ms", "left"))
    for kind in facts.steps:
        points = ", ".join(f"{count}: {ms:.3g}" for count, ms in zip(kind.channels, kind.ms, strict=True))
        table.add_row(kind.op, str(kind.nodes), kind.by, points)
    return table


def _checked(facts: Profile) -> Text:
    pairs = ", ".join(f"{p:.3g} / {m:.3g}" for p, m in facts.checks)
    text = f"{len(facts.checks)} whole runs, predicted / measured ms: {pairs}; largest error {100 * facts.error:.1f} %"
    return Text.assemble(("checked   ", "bold"), text)


def groups(
    records: Iterable[Mapping[str, Any]], *, name_width: int, max_rows: int | None = None
) -> list[RenderableType]:
    """Render the groups that can be pruned, most units first; the others are counted with their reasons."""
    rows = list(records)
    free = sorted((group for group in rows if group.get("prunable", True)), key=lambda group: -_units(group))
    # A covered group is pruned as well, with the group that covers it.
    fixed = [group for group in rows if not group.get("prunable", True) and _cause(group) != Reason.COVERED]
    cut = any(group.get("removed") for group in free)
    table = table_of(
        ("group", "right"),
        ("kind", "left"),
        ("units", "right"),
        ("steps", "right"),
        ("slots", "right"),
        ("layers", "left"),
    )
    for group in free[:max_rows]:
        size = _units(group)
        names = [str(name) for name in group.get("layers", ())] or [str(group.get("name", ""))]
        more = f" + {len(names) - 1} more" if len(names) > 1 else ""
        table.add_row(
            str(group.get("id", "")),
            str(group.get("kind", "channels")),
            numbers.change(str(size), str(size - _removed(group))) if cut else str(size),
            str(group.get("steps", size)),
            str(len(group.get("slots", ()))),
            numbers.shorten(names[0], name_width) + more,
        )
    parts: list[RenderableType] = [table] if free else []
    if max_rows is not None and len(free) > max_rows:
        parts.append(Text(f"and {len(free) - max_rows} smaller groups (-v lists them)", style="dim"))
    if fixed:
        why = reasons.tally(str(group.get("reason", "")) for group in fixed)
        parts.append(Text(f"{len(fixed)} group{'' if len(fixed) == 1 else 's'} cannot be pruned: {why}", style="dim"))
    return parts


def _cause(group: Mapping[str, Any]) -> str:
    return reasons.split(str(group.get("reason", "")))[0]


def _units(group: Mapping[str, Any]) -> int:
    return int(group.get("size", group.get("units", 0)))


def _removed(group: Mapping[str, Any]) -> int:
    removed = group.get("removed", 0)
    return removed if isinstance(removed, int) else len(removed)


def barriers(records: Iterable[Mapping[str, Any]], *, name_width: int, show_all: bool) -> list[RenderableType]:
    """Render barriers, most channels first: one row per code and operator, or with ``show_all`` one per node."""
    every_record = sorted(records, key=lambda barrier: -int(barrier.get("channels", 0)))
    records_of_model = [barrier for barrier in every_record if not _kernel(barrier)]
    aside: list[RenderableType] = []
    if len(records_of_model) < len(every_record):
        count = len(every_record) - len(records_of_model)
        aside = [
            Text(
                f"{count} kernel{' keeps its size' if count == 1 else 's keep their size'}: pruning removes "
                "channels only",
                style="dim",
            )
        ]
    if not records_of_model:
        return [Text("no barriers: every channel can be removed", style="green"), *aside]
    return [
        _barrier_table(records_of_model, name_width=name_width, show_all=show_all),
        *aside,
        *_legend(records_of_model),
    ]


def fixed_channels(records: Iterable[Mapping[str, Any]]) -> int:
    """Count the channels that barriers keep; the positions of a kernel are none."""
    return _channels(barrier for barrier in records if not _kernel(barrier))


def _kernel(barrier: Mapping[str, Any]) -> bool:
    """Return whether a barrier is the height or width of a kernel, which were never channels."""
    return _code(barrier) == Reason.SPATIAL and Reason.KERNEL in str(barrier.get("detail", ""))


def _barrier_table(records: Sequence[Mapping[str, Any]], *, name_width: int, show_all: bool) -> Table:
    if show_all:
        table = table_of(
            ("channels", "right"), ("code", "left"), ("operator", "left"), ("node", "left"), ("detail", "left")
        )
        for barrier in records:
            name = numbers.shorten(str(barrier.get("node", "")), name_width)
            table.add_row(
                str(barrier.get("channels", 0)), _code(barrier), _op(barrier), name, str(barrier.get("detail", ""))
            )
        return table
    merged: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for barrier in records:
        merged.setdefault((_code(barrier), _op(barrier)), []).append(barrier)
    rows = sorted(merged.items(), key=lambda item: -_channels(item[1]))
    table = table_of(
        ("channels", "right"), ("places", "right"), ("code", "left"), ("operator", "left"), ("for example", "left")
    )
    for (code, op), places in rows:
        example = numbers.shorten(str(places[0].get("node", "")), name_width)
        table.add_row(str(_channels(places)), str(len(places)), code, op, example)
    return table


def _code(barrier: Mapping[str, Any]) -> str:
    return str(barrier.get("code", ""))


def _op(barrier: Mapping[str, Any]) -> str:
    return str(barrier.get("op", ""))


def _channels(places: Iterable[Mapping[str, Any]]) -> int:
    return sum(int(place.get("channels", 0)) for place in places)


def _legend(records: Iterable[Mapping[str, Any]]) -> list[RenderableType]:
    """Each code that occurs, once, in plain words."""
    lines: list[RenderableType] = [Text("")]
    for code in dict.fromkeys(_code(barrier) for barrier in records):
        if code in reasons.BARRIERS:
            step = reasons.advice(code)
            text = f"{reasons.BARRIERS[code].why}{' ' + step if step else ''}"
            lines.append(Text.assemble((f"{code}: ", "bold"), text))
    return lines if len(lines) > 1 else []


def unlocks(operators: Sequence[tuple[str, int]], max_rows: int = 10) -> Table:
    """Operators that hold channels back, most channels first."""
    table = table_of(("channels", "right"), ("operator", "left"))
    for op, channels in sorted(operators, key=lambda item: -item[1])[:max_rows]:
        table.add_row(str(channels), op)
    return table


def details(report: Report, *, name_width: int) -> list[RenderableType]:
    """Render the details that the summary leaves out: every layer, how channels were chosen, and all outputs."""
    parts: list[RenderableType] = []
    if report.layers:
        parts += [layers(report.layers, name_width=name_width), Text("")]
    parts += branches(report.branches)
    parts += mixtures(report.experts)
    if report.factorized:
        parts += [*factorized_layers(report.factorized, name_width=name_width, verbose=True), Text("")]
    if report.repairs:
        parts += [*recovered_layers(report.repairs, name_width=name_width), Text("")]
    if report.budget is not None:
        parts += [*render(report.budget), Text("")]
    notes = [part for part in (settings(report), latency_note(report.latency)) if part is not None]
    parts += notes
    if report.fidelity is not None and len(report.fidelity.outputs) > 1:
        parts += fidelity(report.fidelity, name_width=name_width, max_rows=len(report.fidelity.outputs))
    return [*parts, Text("")] if notes else parts


def settings(report: Report) -> Text | None:
    """One line: how units and ranks were chosen."""
    entries = report.settings
    if not entries:
        return None
    if "criterion" not in entries:
        usual: dict[str, Any] = {"cost": "macs", "round_to": 1, "method": ""}
        how = [f"{name.replace('_', ' ')} {value}" for name, value in entries.items() if usual.get(name, "") != value]
        method = [str(entries["method"])] if entries.get("method") else []
        how = [*method, *(text for text in how if not text.startswith("method "))]
        return Text.assemble(("by        ", "bold"), ", ".join(how) if method or "depth" in entries else "a plan")
    if "pattern" in entries:
        values = (f"{name} {value}" for name, value in entries.items() if name not in ("pattern", "criterion"))
        return Text.assemble(
            ("chosen    ", "bold"), f"{entries['pattern']} by {entries['criterion']}, ", ", ".join(values)
        )
    how = [str(entries["criterion"])]
    if "scope" not in entries:
        return Text.assemble(("chosen    ", "bold"), f"by a plan (criterion {how[0]})")
    how += [f"{name.replace('_', ' ')} {entries[name]}" for name in ("scope", "policy", "normalize")]
    usual = {"group_policy": "count", "reshape_axis": "head_dim", "cost": "none"}
    how += [f"{name.replace('_', ' ')} {entries[name]}" for name, value in usual.items() if entries[name] != value]
    if entries.get("device", "") not in ("", None):
        how.append(f"multiples for {entries['device']}")
    if entries["steps"] > 1:
        how.append(f"{entries['steps']} steps, {entries['schedule']}")
    return Text.assemble(("chosen    ", "bold"), "by ", ", ".join(how))
