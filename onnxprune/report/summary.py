"""The summary of a run: about a dozen lines for a decision; tables of layers come with ``-v`` and in pages."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, RenderableType
from rich.text import Text

from onnxprune.errors import Note, argument
from onnxprune.report import numbers, reasons, sparsity, tables
from onnxprune.report.console import LABEL, Line
from onnxprune.report.facts import BudgetFacts, Latency, MetricFacts, Report, Totals

_LESS, _MORE = "bold green", "yellow"


def summary(report: Report, *, name_width: int, spelled: Callable[[str], str] = str) -> list[RenderableType]:
    """Render the summary: verdict, sizes, speed, fidelity, proof, recovery, and the layers that were not pruned.

    Args:
        report: of pruning, factorizing or recovering a model.
        name_width: room for names.
        spelled: writes arguments in texts as the reader does.
    """
    lines = [*tables.verdict_line(report.verdict, spelled), *_sizes(report.totals), *_budget(report.budget)]
    lines += [*_speed(report.latency), *_metric(report.metric)]
    lines += [part for part in tables.fidelity(report.fidelity, name_width=name_width)[:1] if isinstance(part, Text)]
    lines += [*_proofs(report), *tables.flushed(report.flushed), *tables.regularized(report.regularized)]
    lines += tables.dead(report.dead)
    recovered = tables.summary(report, spelled)
    lines += [*([] if recovered is None else [recovered]), *tables.finetuned(report.finetuning)]
    lines += [*tables.vocabulary_line(report.vocabulary), *tables.experts_line(report.experts)]
    lines += [
        *tables.rotated(report.rotations),
        *tables.branches_line(report.branches),
        *tables.resized_line(report.resized),
        *unpruned(report),
        *sparsity.lines(report),
        *_quantized(report),
        *_advice(report, spelled),
    ]
    lines += [labelled("left out", ", ".join(report.left_out))] if report.left_out else []
    return [*map(Line, lines)]


def text(report: Report, *, width: int | None = None) -> str:
    """Return the summary as plain text.

    Args:
        report: of a run.
        width: of a terminal to wrap lines for; None: one line each.
    """
    written = io.StringIO()
    console = Console(file=written, width=width or 1000, no_color=True, highlight=False, markup=False, emoji=False)
    for part in summary(report, name_width=width or 1000):
        console.print(part, soft_wrap=width is None)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def labelled(label: str, *parts: str | tuple[str, str]) -> Text:
    """Return a text behind its label."""
    return Text.assemble((f"{label:<{LABEL}}", "bold"), *parts)


def _sizes(sums: Totals) -> Iterator[Text]:
    """Parameters, MACs and file size, before and after, with the share removed; values stand below each other."""
    counted = [
        ("params", sums.params_before, sums.params_after, numbers.count),
        ("MACs", sums.macs_before, sums.macs_after, numbers.count),
        ("file size", sums.bytes_before, sums.bytes_after if sums.bytes_before else 0, numbers.size),
    ]
    known = [(label, before, after, show(before), show(after)) for label, before, after, show in counted if after]
    width = max((len(row[3]) for row in known), default=0)
    right = max((len(row[4]) for row in known), default=0)
    for label, before, after, one, other in known:
        style = _LESS if after < before else _MORE if after > before else ""
        change = f"{one:>{width}} {numbers.ARROW} {other:>{right}}"
        yield labelled(label, change, "  ", (numbers.less(before, after), style))


def _budget(facts: BudgetFacts | None) -> Iterator[Text]:
    """One line for each target, and one for its cost."""
    if facts is None:
        return
    for target in facts.targets:
        before, limit, after = (tables.amount(target.kind, x) for x in (target.before, target.limit, target.after))
        change = f"{before} {numbers.ARROW} {after}, allowed {limit}"
        yield labelled("target", f"{target.asked}: {change}, {tables.verdict(target)}")
    yield tables.budget_line(facts)


def _quantized(report: Report) -> Iterator[Text]:
    """One line on weights in 8 bits, how they were fitted, and the bytes saved."""
    facts = report.quantization
    if facts is None:
        return
    what = f"{facts.mode}, {facts.weights} weights in 8 bits"
    if facts.rounded:
        what += f", {facts.rounded} of {facts.layers} rounded to keep outputs, {facts.corrected} biases corrected"
        what += f" ({facts.samples} samples)"
    change = numbers.change(numbers.size(facts.bytes_float), numbers.size(report.totals.bytes_after))
    yield labelled("quantized", f"{what}: {change}")


def speed(facts: Latency) -> str:
    """Return the measured speed in words, by its interval."""
    times = f"{facts.speedup:.2f}{numbers.TIMES}"
    interval = ""
    if facts.speedup_interval is not None:
        low, high = facts.speedup_interval
        interval = f" (95 % interval {low:.2f} to {high:.2f})"
    what = facts.speed_verdict
    text = f"no difference measured: {times}" if what == "no difference" else f"{times} as fast"
    return text + interval


def _speed(facts: Latency | None) -> Iterator[Text]:
    if facts is None:
        return
    style = {"faster": _LESS, "slower": _MORE}.get(facts.speed_verdict, "")
    threads = "1 thread" if facts.threads == 1 else f"{facts.threads or 'default'} threads"
    before, after = map(numbers.short_milliseconds, (facts.before_ms, facts.after_ms))
    yield labelled("speed", (speed(facts), style), f", {before} {numbers.ARROW} {after} ms, {threads}")


def _metric(facts: MetricFacts | None) -> Iterator[Text]:
    if facts is not None:
        yield labelled("metric", f"{facts.name} {numbers.change(f'{facts.before:.4g}', f'{facts.after:.4g}')}")


def _proofs(report: Report) -> Iterator[Text]:
    """Lines on exactness: of the removal, of the factorization, of a plan that was applied before."""
    proof = report.exactness
    if proof.passed is not None or report.layers:
        yield tables.exactness(proof)
    elif proof.note and not report.factorized:
        yield labelled("plan", proof.note)
    if report.product is not None:
        yield tables.product(report)


def unpruned(report: Report) -> list[Text]:
    """Return one line on the layers that kept their size, with the reasons, most frequent first."""
    unchanged = [layer for layer in report.layers if layer.channels_before == layer.channels_after]
    lines = []
    if unchanged and (report.groups or not report.branches):
        why = reasons.tally((tables.reason(layer) for layer in unchanged), max_reasons=3)
        lines.append(labelled("unpruned", f"{len(unchanged)} of {_layers(report.layers)}: {why}"))
    if report.factorized:
        methods = Counter(layer.method for layer in report.factorized if layer.method)
        how = ", ".join(f"{name} ({count})" for name, count in methods.most_common())
        reasons_text = reasons.tally((layer.reason for layer in report.factorized if not layer.method), max_reasons=3)
        methods_text = f"{methods.total()} of {_layers(report.factorized)} factorized"
        lines.append(
            labelled(
                "layers", methods_text, f": {how}" if how else "", f"; not: {reasons_text}" if reasons_text else ""
            )
        )
    return lines


def _advice(report: Report, spelled: Callable[[str], str]) -> Iterator[Text]:
    """One line where factorized layers take longer with less work: more layers have to be started."""
    timed, sums = report.latency, report.totals
    is_slower = timed is not None and timed.speed_verdict == "slower" and sums.macs_after < sums.macs_before
    if not is_slower or not report.factorized or report.layers:
        return
    how = spelled(Note(argument("method", "auto")))
    advice = f"fewer MACs but slower: {how} factorizes only layers that get faster on this machine"
    yield Text.assemble((f"{'advice':<{LABEL}}", "bold"), (advice, _MORE))


def _layers(facts: Sequence[object]) -> str:
    return f"{len(facts)} layer{'' if len(facts) == 1 else 's'}"
