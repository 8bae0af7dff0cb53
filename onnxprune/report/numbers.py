"""Numbers as people read them: 1.23 M parameters, 4.56 MB, 12.3 % less, 0.87 ms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

ARROW = "\N{RIGHTWARDS ARROW}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
# No two float32 outputs differ by so little: a figure this large stands for equal outputs.
NO_DIFFERENCE_DB = 300.0
DASH = "\N{EN DASH}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """Three significant figures with the largest unit that keeps the number at 1 or more (steps of 1000)."""
    power = 0
    # 999.5 would print as 1000 at three figures: it belongs to the next unit.
    while abs(value) >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    digits = 0 if power == 0 or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {units[power]}".rstrip()


def count(value: int) -> str:
    """Elements or operations: ``999``, ``1.23 K``, ``45.6 M``, ``7.89 G``, ``1.20 T``."""
    return _scaled(value, ("", "K", "M", "G", "T"))


def size(value: int) -> str:
    """Bytes, decimal units as disks and file managers count them: ``1.09 MB``."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB"))


def removed(before: float, after: float) -> str:
    """Share removed in percent: ``43.8 %``, with a sign when it grew: ``+2.0 %``; a dash when there was nothing."""
    if before <= 0:
        return DASH
    share = 100 * (before - after) / before
    if before == after:
        return "0 %"
    return f"{share:.1f} %" if share > 0 else f"+{-share:.1f} %"


def less(before: float, after: float) -> str:
    """Return a reduction as text: ``43.8 % less``, ``2.0 % more``, ``the same``."""
    if before == after or before <= 0:
        return "the same" if before == after else DASH
    share = 100 * (before - after) / before
    return f"{share:.1f} % less" if share > 0 else f"{-share:.1f} % more"


def change(before: str, after: str) -> str:
    """``before → after``, or the one value when they are the same text."""
    return before if before == after else f"{before} {ARROW} {after}"


def milliseconds(median: float, spread: float) -> str:
    """Milliseconds, the median to three significant figures and the spread alike: ``1.52 ± 0.03 ms``."""
    if not math.isfinite(median) or median <= 0:
        return DASH
    digits = max(0, 2 - math.floor(math.log10(median)))
    return f"{median:.{digits}f} {PLUS_MINUS} {spread:.{digits}f} ms"


def short_milliseconds(value: float) -> str:
    """Milliseconds to three significant figures, without the unit."""
    if not math.isfinite(value) or value <= 0:
        return DASH
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def decibels(value: float) -> str:
    """Signal-to-noise in dB, or that there is none to measure."""
    if value >= NO_DIFFERENCE_DB:
        return "no difference"
    return f"{value:.1f} dB" if math.isfinite(value) else DASH


def seconds(value: float) -> str:
    """Format a duration: ``0.42 s``, ``12.3 s``, ``3 min 20 s``."""
    if value >= 60:
        minutes, remainder = divmod(round(value), 60)
        return f"{minutes} min {remainder} s"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"


def shorten(name: str, width: int) -> str:
    """Shorten a name to ``width`` from the front, where exporters put shared scopes: ``…/layer4/conv2/Conv``.

    Of the names that a fused node carries (``a/MatMul;a/BiasAdd;a/bias``) only the first is kept, at any width.
    """
    first, joined, _ = name.partition(";")
    if joined:
        name = f"{first};{ELLIPSIS}"
    return _end(name, width)


def _end(name: str, width: int) -> str:
    return name if len(name) <= width else ELLIPSIS + name[len(name) - width + 1 :]


def fitted(names: Sequence[str], width: int) -> list[str]:
    """Names shortened to ``width``; different names stay different.

    The end of a name stays. Where different names would become the same, both ends of them stay; where they still
    are, the text from the first difference on; where even that is the same, they are numbered.
    """
    result = _shortened(names, width, lambda name, _: _end(name, width))
    result = _shortened(names, width, lambda name, _: _ends(name, width), result)
    result = _shortened(names, width, lambda name, alike: _from_difference(name, alike, width), result)
    return _numbered(names, result, width)


def _shortened(
    names: Sequence[str], width: int, how: Callable[[str, Sequence[str]], str], present: Sequence[str] | None = None
) -> list[str]:
    """Shorten the names whose present short form stands for different names as well."""
    present = [""] * len(names) if present is None else present
    full: dict[str, dict[str, None]] = {}
    for name, shown in zip(names, present, strict=True):
        full.setdefault(shown, {})[name] = None
    alike = {shown: list(group) for shown, group in full.items()}
    return [
        how(name, alike[shown]) if shown == "" or len(alike[shown]) > 1 else shown
        for name, shown in zip(names, present, strict=True)
    ]


def _ends(name: str, width: int) -> str:
    """Return a name without its middle."""
    head = (width - 1) // 2
    return name if len(name) <= width else f"{name[:head]}{ELLIPSIS}{name[len(name) - (width - 1 - head) :]}"


def _from_difference(name: str, alike: Sequence[str], width: int) -> str:
    """Return the text of a name from a little before its first difference to others, and its end."""
    start = max(0, len(_shared_start(alike)) - 2)
    return ELLIPSIS + _ends(name[start:], width - 1) if start > 1 else _ends(name, width)


def _numbered(names: Sequence[str], shown: Sequence[str], width: int) -> list[str]:
    """Add numbers to different names that still look alike."""
    full: dict[str, set[str]] = {}
    for name, short in zip(names, shown, strict=True):
        full.setdefault(short, set()).add(name)
    numbers: dict[str, int] = {}
    result = []
    for name, short in zip(names, shown, strict=True):
        if len(full[short]) > 1:
            number = f" ({numbers.setdefault(name, len(numbers) + 1)})"
            short = _ends(name, max(width - len(number), 3)) + number
        result.append(short)
    return result


def distinct(names: Sequence[str]) -> list[str]:
    """Return names that tell things apart: those that occur more than once are numbered, ``/Conv (2)``."""
    total, met = Counter(names), Counter[str]()
    result = []
    for name in names:
        met[name] += 1
        result.append(f"{name} ({met[name]})" if total[name] > 1 else name)
    return result


def readable(names: Sequence[str]) -> list[str]:
    """Return names that tell things apart, without the scopes that all of them share."""
    return distinct(stripped(names))


def stripped(names: Sequence[str]) -> list[str]:
    """Names without the scopes (parts that end with / or .) at their front that all of them share."""
    prefix = _shared_start(names) if len(set(names)) > 1 else ""
    end = max(prefix.rfind("/"), prefix.rfind(".")) + 1
    return [name[end:] for name in names] if end > 1 and all(len(name) > end for name in names) else list(names)


def _shared_start(names: Sequence[str]) -> str:
    """Return the characters that all names begin with."""
    first, last = min(names), max(names)
    end = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:end]
