"""Tables of a run over many models."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]

OURS, APPROXIMATE = "onnxprune", "onnxprune --approximate"
ROUNDED = "onnxprune --approximate, rounded up"  # with torch-pruning's rounding, see onnxprune_run.rounded_up
SLACK = 0.005  # of the parameters: bookkeeping, such as BatchNormalization folded into convolutions
REALLY = 0.05  # a model counts as cut when more than this share of its parameters went
DONE = ("cut", "small", "left")


def show(records: list[Record]) -> int:
    """Print every table. Returns 1 where a model failed, else 0."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    ours = [r for r in records if r["tool"] == OURS]
    console.print(_families(ours))
    _causes(console, "Failed", [r for r in ours if r["status"] not in DONE], _cause)
    _causes(console, "Cut little or not at all", [r for r in ours if r["status"] in ("small", "left")], _reason)
    _causes(console, "Rules that raised", [r for r in ours if r.get("rule_bugs")], lambda r: _plain(r["rule_bugs"][0]))
    _second_opinion(console, ours)
    for peer in ("torch-pruning", "onnxsim"):
        if any(r["tool"] == peer for r in records):
            _peer(console, peer, records)
    return int(any(r["status"] not in DONE for r in ours))


def _families(ours: list[Record]) -> Table:
    table = Table(title="onnxprune, share of models")
    table.add_column("family")
    for column in (
        "models",
        "processed",
        "really cut",
        "left or < 5 %",
        "failed",
        "removed (median)",
        "s (median)",
        "s (worst)",
    ):
        table.add_column(column, justify="right")
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in ours:
        groups[record["family"]].append(record)
    for name, rows in [*sorted(groups.items()), ("all", ours)]:
        table.add_row(name, *_counts(rows), end_section=name == sorted(groups)[-1])
    return table


def _counts(rows: list[Record]) -> list[str]:
    n = len(rows)
    status = Counter(r["status"] for r in rows)
    cut, calm = status["cut"], status["small"] + status["left"]
    removed = [r["removed"] for r in rows if r["status"] in DONE]
    seconds = [r["total_seconds"] for r in rows if "total_seconds" in r]
    return [
        str(n),
        f"{cut + calm} ({(cut + calm) / n:.1%})",
        f"{cut} ({cut / n:.1%})",
        str(calm),
        str(n - cut - calm),
        f"{median(removed):.1%}" if removed else "",
        f"{median(seconds):.2f}" if seconds else "",
        f"{max(seconds):.1f}" if seconds else "",
    ]


def _causes(console: Console, title: str, rows: list[Record], key: Any) -> None:
    if not rows:
        return
    found: dict[str, list[str]] = defaultdict(list)
    for record in rows:
        found[key(record)].append(record["model"])
    table = Table("models", "cause", "such as", title=f"{title}: {len(rows)} models")
    for cause, names in sorted(found.items(), key=lambda item: -len(item[1])):
        table.add_row(str(len(names)), cause, ", ".join(names[:3]))
    console.print(table)


def _cause(record: Record) -> str:
    place = (record.get("where") or [""])[-1]
    parts = [record["status"], record.get("type", ""), record.get("op", ""), _plain(record.get("message", "")), place]
    return " · ".join(p for p in parts if p)


def _reason(record: Record) -> str:
    if record.get("barriers"):
        top = record["barriers"][0]
        return f"{top['code']} · {top['op']} · {_plain(top['detail'])}"
    return _plain(record.get("message", "")) or "no channel is born on a weight"


def _plain(message: str) -> str:
    """A message without names and numbers, so that equal causes count as one."""
    line = message.strip().split("\n")[0]
    return re.sub(r"[\d.]+(e-?\d+)?", "#", re.sub(r"'[^']*'|/\S+", "…", line))[:140]


def _second_opinion(console: Console, ours: list[Record]) -> None:
    asked = [r for r in ours if r["status"] in ("cut", "small") and "independent" in r]
    if not asked:
        return
    said = Counter(r["independent"] for r in asked)
    console.print(
        f"Independent check of the cuts (survivors found by value, no plan, no labels): {said[True]} agree, "
        f"{said[False]} differ, {said[None]} could not be told."
    )
    for record in asked:
        if record["independent"] is False:
            console.print(f"  differs: {record['model']} by {record['independent_error']:.3g}")
    _causes(
        console,
        "Could not be told",
        [r for r in asked if r["independent"] is None],
        lambda r: _plain(r["independent_note"]),
    )


def _peer(console: Console, peer: str, records: Iterable[Record]) -> None:
    """How the peer did, and every model that it cut correctly and we cut less."""
    by_tool: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in records:
        by_tool[record["tool"]][record["model"]] = record
    ours, theirs = by_tool[OURS], by_tool[peer]
    cut = {m: r for m, r in sorted(theirs.items()) if m in ours and _works(r) and r["removed"] > REALLY}
    wrong = sum(r["status"] in ("wrong", "differs") for r in theirs.values())
    unchecked = sum(r.get("exact") is None for r in cut.values())
    console.print(
        f"\n[bold]{peer}[/bold]: {len(theirs)} models, really cut and correct {len(cut)} "
        f"({len(cut) / max(1, len(theirs)):.1%}; {unchecked} of them only run, exactness could not be told), "
        f"wrong {wrong}, the rest failed or lost at most 5 %."
    )
    table = Table("model", peer, "ours", "approximate", "rounded up", "top reason", title=f"Cut less than {peer}")
    enough: Counter[str] = Counter()
    for model, record in cut.items():
        shares = [_removed(by_tool[tool].get(model)) for tool in (OURS, APPROXIMATE, ROUNDED)]
        first = next((i for i, share in enumerate(shares) if share >= record["removed"] - SLACK), None)
        enough[("ours", "approximate", "rounded", "less")[3 if first is None else first]] += 1
        if first is None:
            shown = [f"{share:.1%}" for share in (record["removed"], *shares)]
            table.add_row(model, *shown, _why(ours[model], by_tool[APPROXIMATE].get(model)))
    console.print(
        f"Of these {len(cut)}, onnxprune removes at least as much on {enough['ours']}, with --approximate on "
        f"{enough['approximate']} more, with the peer's rounding too on {enough['rounded']} more, "
        f"less on {enough['less']}."
    )
    if enough["less"]:
        console.print(table)


def _works(record: Record) -> bool:
    """Whether a peer's cut is right as far as anyone could tell."""
    return bool(record.get("exact") or (record.get("runs") and record.get("exact") is None))


def _removed(record: Record | None) -> float:
    return float(record.get("removed", 0.0)) if record and record["status"] in DONE else 0.0


def _why(record: Record, wider: Record | None) -> str:
    failed = next((r for r in (record, wider) if r and r["status"] not in DONE), None)
    return _cause(failed) if failed else _reason(wider or record)
