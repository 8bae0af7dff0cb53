"""Every setting, declared once: name, allowed values, default, help, requirements, and the commands that have it.

The options of the command line (:mod:`onnxprune.cli.options`), what the calls of Python accept (:func:`checked`,
:func:`called`), the texts of errors and the page of settings (:func:`reference`) are made of these declarations. To add
a setting, add a :class:`Setting` to :data:`SETTINGS` and the argument to the calls that have it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar

from onnxprune.errors import ArgumentError, UsageError, argument, nearest, spelled

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# -- what a value may be -----------------------------------------------------------------------------------------------


class Kind:
    """Type of a setting: ``check`` validates a value of Python, ``parse`` a text of the command line.

    Attributes:
        metavar: the value in help texts.
        allowed: description of the allowed values in a few words, for the page of settings.
    """

    metavar = "VALUE"
    allowed = ""

    def check(self, value: Any, name: str) -> Any:
        """Return the checked value; ``name`` is the argument in messages.

        Raises:
            UsageError: it is not allowed.
        """
        return value

    def parse(self, text: str, name: str) -> Any:
        """Parse the value of a text.

        Raises:
            UsageError: it is not allowed.
        """
        return self.check(text, name)

    def is_off(self, value: Any) -> bool:
        """Return whether a value switches the setting off, so that it needs nothing."""
        return False


class Flag(Kind):
    """True or false."""

    metavar = ""
    allowed = "true or false"

    def check(self, value: Any, name: str) -> bool:
        """Return the checked flag; raises UsageError."""
        if not isinstance(value, bool):
            raise UsageError(f"{name}: {value!r} is not allowed", hint="Give True or False.")
        return value


class FlagOr(Flag):
    """True, false, or a word that asks for more."""

    def __init__(self, word: str) -> None:
        self.word, self.allowed = word, f"true, false or `{word}`"

    def check(self, value: Any, name: str) -> Any:
        """Return the checked flag or word; raises UsageError."""
        if not isinstance(value, bool) and value != self.word:
            raise UsageError(f"{name}: {value!r} is not allowed", hint=f"Give True, False or {self.word!r}.")
        return value


class Word(Kind):
    """One of a few words."""

    def __init__(self, *words: str, metavar: str = "") -> None:
        self.words, self.metavar = words, metavar or "|".join(words)
        self.allowed = ", ".join(f"`{word}`" for word in words)

    def check(self, value: Any, name: str) -> str:
        """Return the checked word; raises UsageError, with the nearest."""
        if value not in self.words:
            listed = f"Allowed: {', '.join(self.words)}."
            hint = nearest(str(value), self.words)
            hint = f"{hint} {listed}" if hint.startswith("Did") else listed
            raise UsageError(f"{name}: unknown value {str(value)!r}", hint=hint)
        return str(value)

    def parse(self, text: str, name: str) -> str:
        """Return the word of a text in any case."""
        return self.check(text.lower() if text.lower() in self.words else text, name)


class Integer(Kind):
    """A whole number not below ``least``; ``meaning`` names it in messages."""

    metavar = "N"

    def __init__(self, least: int, meaning: str) -> None:
        self.least, self.meaning, self.allowed = least, meaning, f"a whole number from {least}"

    def check(self, value: Any, name: str) -> int:
        """Return the checked number; raises UsageError."""
        if not _is_whole(value) or value < self.least:
            raise UsageError(f"{name}: {value} is not allowed", hint=f"Give {self.meaning}: {self.allowed}.")
        return int(value)

    def parse(self, text: str, name: str) -> int:
        """Parse the number of a text."""
        try:
            return self.check(int(text), name)
        except ValueError:
            return self.check(text, name)


class Multiple(Integer):
    """A whole number from 1, or ``auto``."""

    metavar = "N|auto"

    def __init__(self, meaning: str) -> None:
        super().__init__(1, meaning)
        self.allowed = "a whole number from 1, or `auto`"

    def check(self, value: Any, name: str) -> Any:
        """Return the checked number or ``auto``; raises UsageError."""
        return "auto" if isinstance(value, str) and value.lower() == "auto" else super().check(value, name)


class DeviceName(Kind):
    """A device whose kernels decide the multiples."""

    metavar = "NAME|FILE.json"
    allowed = "a name, a JSON file of multiples, or in Python the multiples themselves"

    def check(self, value: Any, name: str) -> Any:
        """Return the checked device; raises UsageError."""
        if not isinstance(value, str) and not hasattr(value, "writes"):
            raise UsageError(f"{name}: {value!r} is no device", hint=f"Give {self.allowed}.")
        return value


class Jobs(Kind):
    """A number of processes as joblib takes it: below 0 counts from all processors."""

    metavar = "N"
    allowed = "a whole number from 1; -1 for all processors"

    def check(self, value: Any, name: str) -> int:
        """Return the checked number; raises UsageError."""
        if not _is_whole(value) or value == 0:
            raise UsageError(f"{name}: {value} is not allowed", hint=f"Give the number of processes: {self.allowed}.")
        return int(value)


class Number(Kind):
    """A number from ``low`` to ``high``; ``open_low``: without ``low`` itself.

    Args:
        low, high: the bounds.
        meaning: meaning of the number, for messages.
        metavar: a letter for it.
        open_low: whether ``low`` is excluded.
        example: one that is allowed.
    """

    def __init__(
        self,
        low: float,
        high: float = math.inf,
        meaning: str = "a number",
        *,
        metavar: str = "X",
        open_low: bool = False,
        example: str = "",
    ) -> None:
        self.low, self.high, self.meaning, self.metavar, self.open_low = low, high, meaning, metavar, open_low
        less = "<" if open_low else "<="
        self.allowed = f"{low:g} {less} {metavar}" + (f" <= {high:g}" if high < math.inf else "")
        self.example = f", for example {example}" if example else ""

    def check(self, value: Any, name: str) -> float:
        """Return the checked number; raises UsageError."""
        low = _is_number(value) and (self.low < value if self.open_low else self.low <= value)
        if not low or not value <= self.high or value == math.inf:
            raise UsageError(
                f"{name}: {value} is not allowed", hint=f"Give {self.meaning}, {self.allowed}{self.example}."
            )
        return value if isinstance(value, int) else float(value)

    def parse(self, text: str, name: str) -> float:
        """Parse the number of a text."""
        return self.check(text if _number(text) is None else _number(text, as_integer=True), name)


class Share(Kind):
    """A share R; the error for percent suggests the share.

    Args:
        meaning: meaning of the share, for messages.
        zero, one: whether these are allowed.
    """

    metavar = "R"

    def __init__(self, meaning: str, *, zero: bool = True, one: bool = False) -> None:
        self.meaning, self.zero, self.one = meaning, zero, one
        self.allowed = f"0 {'<=' if zero else '<'} R {'<=' if one else '<'} 1"

    def check(self, value: Any, name: str) -> float:
        """Return the checked share; raises UsageError."""
        allowed = f"{self.meaning}, {self.allowed}, for example {0.8 if self.one else 0.3}."
        if not _is_number(value):
            raise UsageError(f"{name}: {value!r} is not a number", hint=self._percent(str(value)) or allowed)
        if not (0 <= value < 1 or (self.one and value == 1)):
            raise UsageError(f"{name}: {value} is out of range", hint=self._percent(str(value)) or allowed)
        if value == 0 and not self.zero:
            raise UsageError(f"{name}: {value} is out of range", hint=allowed)
        return float(value)

    def parse(self, text: str, name: str) -> float:
        """Parse the share of a text."""
        return self.check(text if _number(text) is None else _number(text, as_integer=True), name)

    def _percent(self, text: str) -> str:
        percent = _number(text.strip().removesuffix("%").strip())
        is_percent = percent is not None and 1 <= percent < 100 and (percent > 1 or "%" in text)
        return (
            f"For {percent:g} percent give {(percent or 0) / 100:g}; allowed is {self.allowed}." if is_percent else ""
        )


class CountOrShare(Kind):
    """A number of units, or a share of all; ``hint`` says of which."""

    metavar = "N|R"
    allowed = "a whole number from 1, or a share 0 < R < 1"
    hint = ""

    def check(self, value: Any, name: str) -> Any:
        """Return the checked number (int) or share (float); raises UsageError."""
        if _is_whole(value) and value >= 1:
            return int(value)
        if _is_whole(value) or not _is_number(value) or not 0 < value < 1:
            raise UsageError(f"{name}: {value} is not allowed", hint=self.hint)
        return float(value)

    def parse(self, text: str, name: str) -> Any:
        """Parse the number or share of a text."""
        return self.check(text if _number(text) is None else _number(text, as_integer=True), name)


class BranchAmount(CountOrShare):
    """A number of branches, a share of them, or ``auto``."""

    metavar = "N|R|auto"
    allowed = "a whole number from 1, a share 0 < R < 1, or `auto`"
    hint = "Give how many branches to remove, for example 2, or the share of all branches, for example 0.2."

    def check(self, value: Any, name: str) -> Any:
        """Return the checked number (int) or share (float), or ``auto``; raises UsageError."""
        return "auto" if isinstance(value, str) and value.lower() == "auto" else super().check(value, name)


class Experts(CountOrShare):
    """A number of experts per mixture, or a share of them."""

    hint = "Give how many experts to remove from every mixture, for example 2, or the share, for example 0.25."


class Tokens(Kind):
    """Ids of tokens, a file of them, or ``auto``; by input where several hold ids."""

    metavar = "FILE|auto"
    allowed = "ids, the path of a text or JSON file of ids, `auto`, or {input: one of these}"

    def check(self, value: Any, name: str) -> Any:
        """Return the value; raises UsageError for anything else."""
        is_empty = isinstance(value, str) and not value.strip()
        if is_empty or isinstance(value, type) or not isinstance(value, (str, os.PathLike, Iterable)):
            raise UsageError(f"{name}: {value!r} is not allowed", hint="Give a file of ids, a list of ids, or auto.")
        return value


class Text(Kind):
    """Any text."""

    allowed = "a text"

    def __init__(self, metavar: str = "NAME", allowed: str = "") -> None:
        self.metavar, self.allowed = metavar, allowed or self.allowed


class PathTo(Kind):
    """A path of a file or folder.

    Args:
        metavar: the value in help texts.
        what: description of what is allowed.
        attribute: name of an attribute of the objects that Python may give in its place; empty: none.
    """

    def __init__(self, metavar: str, what: str = "a path", *, attribute: str = "") -> None:
        self.metavar, self.allowed, self._attribute = metavar, what, attribute

    def check(self, value: Any, name: str) -> Any:
        """Return the path, or the object in its place; raises UsageError."""
        is_object = bool(self._attribute) and hasattr(value, self._attribute) and not isinstance(value, type)
        if not is_object and not isinstance(value, (str, os.PathLike)):
            raise UsageError(f"{name}: {value!r} is not allowed", hint=f"Give {self.allowed}.")
        return value

    def parse(self, text: str, name: str) -> Any:
        """Parse the path."""
        from pathlib import Path

        return Path(text)


class Inputs(PathTo):
    """Data: what yields them is asked when they are read."""

    def check(self, value: Any, name: str) -> Any:
        """Return the value."""
        return value


class Conversion(Kind):
    """A conversion of images to arrays."""

    allowed = "an `onnxprune.ImageOptions`"

    def check(self, value: Any, name: str) -> Any:
        """Return the checked conversion; raises UsageError."""
        if isinstance(value, type) or not hasattr(value, "std"):
            raise UsageError(f"{name}: {value!r} is not allowed", hint="Give an onnxprune.ImageOptions(...).")
        return value


class Stages(Kind):
    """Passes, in order."""

    allowed = "a list of passes"

    def check(self, value: Any, name: str) -> Any:
        """Return the checked passes; raises UsageError."""
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise UsageError(f"{name}: {value!r} is no list of passes", hint="Give a list of passes: [Finetune(100)].")
        stages = list(value)
        for stage in stages:
            if isinstance(stage, type):
                word = stage.__name__
                raise UsageError(f"{name}: {word} is a class, expected an instance", hint=f"Write {word}().")
            if not hasattr(stage, "requires"):
                raise UsageError(f"{name}: {stage!r} is not a pass", hint="Give a list of passes: [Finetune(100)].")
        return value


class Paths(PathTo):
    """Paths of files, each given on its own."""

    def check(self, value: Any, name: str) -> Sequence[Any]:
        """Return the checked paths; raises UsageError."""
        from pathlib import Path

        paths = [value] if isinstance(value, (str, Path)) else value
        if not isinstance(paths, Iterable) or not all(isinstance(p, (str, Path)) for p in paths):
            raise UsageError(f"{name}: {value!r} is not allowed", hint="Give a list of paths.")
        return tuple(paths)


class Patterns(Kind):
    """Globs over the names of nodes and weights, each given on its own."""

    metavar = "PATTERN"
    allowed = "globs over names of nodes and weights"

    def check(self, value: Any, name: str) -> Sequence[str]:
        """Return the checked globs; raises UsageError."""
        patterns = [value] if isinstance(value, str) else value
        if (
            not isinstance(patterns, Iterable)
            or isinstance(patterns, Mapping)
            or not all(isinstance(p, str) for p in patterns)
        ):
            raise UsageError(f"{name}: {value!r} is not allowed", hint="Give a list of patterns such as '*/conv1/*'.")
        return tuple(patterns)

    def parse(self, text: str, name: str) -> str:
        """One of them."""
        return text


class PerName(Kind):
    """Values by name or pattern: a mapping in Python, ``NAME=VALUE`` as often as wanted on the command line."""

    form, example = "PATTERN=VALUE", ""

    def pair(self, text: str, name: str) -> tuple[str, str]:
        """Name and value of one text; raises UsageError."""
        key, sign, value = text.rpartition("=")
        if not sign or not key:
            raise UsageError(f"{name}: {text!r} is not {self.form}", hint=self.hint(name))
        return key, value

    def hint(self, name: str) -> str:
        """Return a hint of what to give."""
        return f"For example {name} {self.example}."


class LayerShares(PerName):
    """Ratios by pattern."""

    metavar = form = "PATTERN=R"
    example = "'*/conv1/*=0.5'"
    allowed = "{pattern: ratio}"

    def __init__(self, share: Share) -> None:
        self.share = share

    def check(self, value: Any, name: str) -> Mapping[str, float]:
        """Return the checked ratios; raises UsageError."""
        if not isinstance(value, Mapping):
            raise UsageError(f"{name}: {value!r} is not allowed", hint="Give {pattern: ratio}.")
        return {
            str(pattern): self.share.check(ratio, argument("layers", key=str(pattern)))
            for pattern, ratio in value.items()
        }

    def parse(self, text: str, name: str) -> tuple[str, float]:
        """One pattern and its ratio."""
        pattern, ratio = self.pair(text, name)
        return pattern, self.share.parse(ratio, argument("layers", key=pattern))


class Shapes(PerName):
    """Shapes by the names of inputs."""

    metavar, form = "NAME=N,C,...", "NAME=SIZES"
    allowed = "{input: sizes}"

    def check(self, value: Any, name: str) -> Mapping[str, Sequence[int]]:
        """Return the checked shapes; raises UsageError."""
        hint = "Give {input: sizes}, for example {'images': (2, 3, 224, 224)}."
        if not isinstance(value, Mapping):
            raise UsageError(f"{name}: {value!r} is not allowed", hint=hint)
        for key, sizes in value.items():
            where = argument("input_shapes", key=str(key))
            if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Iterable):
                raise UsageError(f"{where}: {sizes!r} is no list of sizes", hint=hint)
            wrong = next((size for size in sizes if not hasattr(size, "__index__") or isinstance(size, bool)), None)
            if wrong is not None:
                raise UsageError(f"{where}: {wrong!r} is not a size; sizes are whole numbers from 1", hint=hint)
        return value

    def hint(self, name: str) -> str:
        """Return a hint of what to give."""
        return f"Give the input's name and every size, for example {name} images=2,3,224,224."

    def parse(self, text: str, name: str) -> tuple[str, tuple[int, ...]]:
        """One input and its sizes."""
        key, sizes = self.pair(text, name)
        parts = [part.strip() for part in sizes.split(",")]
        for part in parts:
            if not part.isdecimal() or int(part) < 1:
                where = argument("input_shapes", key=key)
                raise UsageError(
                    f"{where}: {part!r} is not a size; sizes are whole numbers from 1", hint=self.hint(name)
                )
        return key, tuple(int(part) for part in parts)


class OutputKinds(PerName):
    """Kinds of outputs by name, with the axis of their classes or attributes."""

    metavar = form = "NAME=KIND[:AXIS]"
    example = "scores=classes:1"
    kinds = ("classes", "boxes", "detections", "embedding", "signal", "sequence")
    allowed = "{output: kind}, a kind being one of " + ", ".join(f"`{kind}`" for kind in kinds) + ", and `:axis`"

    def check(self, value: Any, name: str) -> Mapping[str, tuple[str, int | None]]:
        """Return {output: (kind, axis or None)}; raises UsageError."""
        if not isinstance(value, Mapping):
            raise UsageError(f"{name}: {value!r} is not allowed", hint="Give {output: kind}.")
        return {str(key): self._kind(str(key), kind) for key, kind in value.items()}

    def parse(self, text: str, name: str) -> tuple[str, str]:
        """One output and its kind."""
        key, kind = self.pair(text, name)
        self._kind(key, kind)
        return key, kind

    def _kind(self, key: str, value: Any) -> tuple[str, int | None]:
        if isinstance(value, tuple) and len(value) == 2:  # as this returns them
            value = value[0] if value[1] is None else f"{value[0]}:{value[1]}"
        word, sign, axis = str(value).partition(":")
        where = argument("outputs", key=key)
        if word not in self.kinds:
            hint = nearest(word, self.kinds)
            listed = f"Allowed: {', '.join(self.kinds)}."
            raise UsageError(
                f"{where}: unknown kind {word!r}", hint=f"{hint} {listed}" if hint.startswith("Did") else listed
            )
        if sign and not re.fullmatch(r"-?\d+", axis):
            raise UsageError(f"{where}: {axis!r} is not an axis", hint="Give a whole number, such as classes:1.")
        return word, int(axis) if sign else None


class Ranks(PerName):
    """Ranks of all layers, or by pattern."""

    metavar = form = "[PATTERN=]R[,R]"
    allowed = "a number, one per mode, or {pattern: either}"

    def check(self, value: Any, name: str) -> Any:
        """Return the checked ranks; raises UsageError."""
        for ranks in value.values() if isinstance(value, Mapping) else (value,):
            is_list = isinstance(ranks, Sequence) and not isinstance(ranks, (str, bytes))
            if not all(hasattr(rank, "__index__") for rank in (ranks if is_list else (ranks,))):
                raise UsageError(f"{name}: {ranks!r} is not a rank", hint=f"Give {self.allowed}.")
        return value

    def parse(self, text: str, name: str) -> tuple[str, tuple[int, ...]]:
        """Parse a pattern and its ranks."""
        pattern, sign, ranks = text.rpartition("=")
        parts = [part.strip() for part in ranks.split(",")]
        if (sign and not pattern) or not all(part.isdecimal() for part in parts):
            raise UsageError(
                f"{name}: {text!r} is not a rank",
                hint=f"Give a number, one per mode (in,out), or PATTERN= in front: {name} '*/conv1/*=16,32'.",
            )
        return pattern or "*", tuple(int(part) for part in parts)


class Targets(Kind):
    """Costs, each a share of the original's or an amount."""

    metavar = "KIND=VALUE"
    allowed = "`macs=0.5`, `params=0.4`, `size=3MB`, `latency=12ms`, `peak-memory=64MB`, or a list or mapping of these"

    def check(self, value: Any, name: str) -> Any:
        """Return the checked targets; raises UsageError."""
        from onnxprune.targets import targets

        return targets(value, name)

    def parse(self, text: str, name: str) -> Any:
        """One of them."""
        from onnxprune.targets import parse

        return parse(text, name)


class Shares(Kind):
    """Shares with commas between them."""

    def __init__(self, letter: str, share: Share, zero: str = "") -> None:
        self.share, self.metavar, self.zero = share, f"{letter},{letter},...", zero
        self.allowed = f"a list of {share.allowed.replace('R', letter)}"

    def check(self, value: Any, name: str) -> tuple[float, ...]:
        """Return the checked shares, each once, the least first; raises UsageError."""
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise UsageError(f"{name}: {value!r} is not allowed", hint=f"Give {self.allowed}.")
        shares = tuple(sorted({self.share.check(share, name) for share in value}))
        if not shares:
            raise UsageError(f"{name} names no share", hint="For example 0.25, 0.5, 0.75.")
        if shares[0] == 0 and self.zero:
            raise UsageError(f"{name}: 0 {self.zero}", hint=f"For example {name} 0.25,0.5,0.75.")
        return shares

    def parse(self, text: str, name: str) -> tuple[float, ...]:
        """Parse the shares of a text."""
        return self.check([self.share.parse(part.strip(), name) for part in text.split(",")], name)


class CostShares(Kind):
    """Shares of the original's cost with commas between them."""

    metavar = "S,S,..."
    allowed = "a list of 0 < S <= 1"

    def check(self, value: Any, name: str) -> tuple[float, ...]:
        """Return the checked shares, each once, the largest first; raises UsageError."""
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise UsageError(f"{name}: {value!r} is not allowed", hint=f"Give {self.allowed}, such as 0.9, 0.7, 0.5.")
        return self.parse(",".join(str(share) for share in value), name)

    def parse(self, text: str, name: str) -> tuple[float, ...]:
        """Parse the shares of a text."""
        from onnxprune.targets import shares

        return tuple(shares(text, name))


class PatternOf(Kind):
    """A pattern of zeros: anywhere, N of M, or in blocks."""

    metavar = "PATTERN"
    allowed = "`unstructured`; `2:4` or any N:M, N of M input channels that stay; `4x1` or any block, outputs x inputs"

    def check(self, value: Any, name: str) -> str:
        """Return the checked pattern; raises UsageError."""
        text = value.strip().lower() if isinstance(value, str) else ""
        if text == "channel":
            raise UsageError(
                f"{name}: 'channel' removes whole channels, which is pruning",
                hint="Run 'onnxprune MODEL --ratio R' (onnxprune.prune): the model then gets smaller and faster.",
            )
        sizes = re.fullmatch(r"(\d+)([:x])(\d+)", text)
        if text != "unstructured" and sizes is None:
            hint = nearest(text, ("unstructured", "2:4", "1:4", "4:8", "4x1", "1x4", "8x8"))
            raise UsageError(
                f"{name}: unknown pattern {value!r}",
                hint=f"{hint if hint.startswith('Did') else ''} Give unstructured, N:M (2:4) or NxM (4x1).".strip(),
            )
        if sizes is None:
            return text
        first, sign, second = int(sizes[1]), sizes[2], int(sizes[3])
        if not first or not second:
            raise UsageError(
                f"{name}: {text} has a 0 in it", hint="Sizes are whole numbers from 1, such as 2:4 or 4x1."
            )
        if sign == ":" and first >= second:
            what = "keeps more than there are" if first > second else "keeps everything"
            raise UsageError(
                f"{name}: {text} {what}", hint="N:M keeps N of M neighbouring input channels, N < M, such as 2:4."
            )
        return "unstructured" if text == "1x1" else f"{first}{sign}{second}"


class EffortOf(Kind):
    """Length of a training: a number of steps, or a time."""

    metavar = "TIME|STEPS"
    allowed = "steps (`500`), a time (`90s`, `3m`, `1h`), `auto` (1,000 steps or 3 minutes), or `none`"

    def check(self, value: Any, name: str) -> Any:
        """Return the checked effort; raises UsageError."""
        if self.is_off(value):
            return False
        effort_of(value, name)
        return value

    def is_off(self, value: Any) -> bool:
        """Return whether nothing is to be trained."""
        return value is False or value == "none"


_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}
DEFAULT_EFFORT = (1000, 180.0)
"""Steps and seconds of a fine-tuning where nothing else is given."""


def effort_of(value: Any, name: str) -> tuple[int | None, float | None]:
    """Return the steps and the seconds of an effort; True or ``auto``: 1,000 steps or 3 minutes, whichever ends first.

    Raises:
        UsageError: it is none.
    """
    if value is True or value == "auto":
        return DEFAULT_EFFORT
    if _is_whole(value) and value > 0:
        return int(value), None
    text = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower()) if isinstance(value, str) else None
    if text is not None and float(text[1]) > 0:
        if text[2] in _SECONDS:
            return None, float(text[1]) * _SECONDS[text[2]]
        if not text[2] and text[1].isdecimal():
            return int(text[1]), None
    raise UsageError(f"{name}: {value!r} is not allowed", hint="Give steps (500), a time (90s, 3m, 1h), or none.")


class Bytes(Kind):
    """A number of bytes: whole in Python, with its unit on the command line."""

    metavar = "SIZE"
    least = 10**6
    allowed = "bytes, 1,000,000 or more (`2GB`, `500MB`)"

    def check(self, value: Any, name: str) -> int:
        """Return the checked number of bytes; raises UsageError."""
        if not _is_whole(value):
            raise UsageError(
                f"{name}: {value!r} is not a number of bytes", hint="Give a whole number, 1,000,000 or more."
            )
        if value < self.least:
            raise UsageError(f"{name}: {value} is too little", hint="Give 1MB (1,000,000 bytes) or more.")
        return int(value)

    def parse(self, text: str, name: str) -> int:
        """Parse the bytes of a text."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, flags=re.IGNORECASE)
        unit = _BYTES.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise UsageError(f"{name}: {text!r} is not a size", hint="Give a number and its unit: 2GB, 500MB.")
        size = int(float(match[1]) * unit)
        if size < self.least:
            raise UsageError(f"{name}: {text} is too little", hint="Give 1MB or more.")
        return size


class Extent(Kind):
    """Height and width of images."""

    metavar = "HxW|N"
    allowed = "height and width in pixels, or one number for both"

    def parse(self, text: str, name: str) -> tuple[int, int]:
        """Return (height, width) from a text."""
        sizes = text.lower().replace("\N{MULTIPLICATION SIGN}", "x").split("x")
        if len(sizes) > 2 or not all(size.strip().isdecimal() and int(size) for size in sizes):
            raise UsageError(
                f"{name}: {text!r} is not a size",
                hint="Give height and width in pixels, for example 224x320, or one number for both.",
            )
        return int(sizes[0]), int(sizes[-1])


class Numbers(Kind):
    """Numbers with commas between them, one per channel or one for all."""

    def __init__(self, *, counts: tuple[int, ...] = (1, 3), zero: bool = True, metavar: str = "A,B,C") -> None:
        self.counts, self.zero, self.metavar = counts, zero, metavar
        several = " or 3 numbers with commas between them" if len(counts) > 1 else " number"
        other = "" if zero else ", none of them 0" if len(counts) > 1 else " other than 0"
        self.allowed = f"1{several}{other}"

    def parse(self, text: str, name: str) -> tuple[float, ...]:
        """Parse the numbers of a text."""
        numbers = [_number(part) for part in text.split(",")]
        known = [n for n in numbers if n is not None and math.isfinite(n) and (self.zero or n)]
        if len(known) < len(numbers) or len(known) not in self.counts:
            raise UsageError(f"{name}: {text!r} is not allowed", hint=f"Give {self.allowed}.")
        return tuple(known)


class Providers(Kind):
    """Execution providers of onnxruntime."""

    metavar = "A,B"
    allowed = "names of providers, `cuda` for `CUDAExecutionProvider`"

    def check(self, value: Any, name: str) -> Any:
        """Return the checked names; raises UsageError."""
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise UsageError(f"{name}: {value!r} is not allowed", hint="Give a list of names, such as ['cpu'].")
        return value

    def parse(self, text: str, name: str) -> list[str]:
        """Parse the names of a text."""
        return text.split(",")


class Function(Kind):
    """A function that is called on the way."""

    def __init__(self, form: str) -> None:
        self.allowed = f"a function {form}"

    def check(self, value: Any, name: str) -> Any:
        """Return the checked function; raises UsageError."""
        if not callable(value) or isinstance(value, type):
            raise UsageError(f"{name}: {value!r} is no function", hint=f"Give {self.allowed}.")
        return value


class NamedFunction(Function):
    """A function, or the name of one."""

    def __init__(self, metavar: str, form: str) -> None:
        super().__init__(form)
        self.metavar, self.allowed = metavar, f"a name, or {self.allowed}"

    def check(self, value: Any, name: str) -> Any:
        """Return the checked function or name; raises UsageError."""
        return value if isinstance(value, str) else super().check(value, name)


_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # numpy's numbers are numbers, too, without importing it here
    return not isinstance(value, (bool, str)) and hasattr(value, "__float__") and hasattr(value, "__lt__")


def _number(text: str, as_integer: bool = False) -> float | None:
    """Return the number in a text, None where there is none; ``as_integer``: an integer where it is written as one."""
    try:
        return int(text) if as_integer and re.fullmatch(r"[+-]?\d+", text.strip()) else float(text)
    except ValueError:
        return None


# -- what a setting is -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Need:
    """Precondition of a setting.

    Attributes:
        of: a key of :data:`CONDITIONS`.
        because: the rest of the sentence that the setting's name begins.
        hint: next step for the user.
    """

    of: str
    because: str
    hint: str


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of one or several commands.

    Attributes:
        name: the argument in Python.
        kind: type of its values.
        typed: type on the command line, where that differs.
        help: description, one or two sentences.
        on: {command: heading of its help}; an empty heading: the call in Python alone has it.
        default: None where nothing is given.
        option: on the command line; by default ``--name`` with hyphens.
        short: a letter for it.
        brief: its line in the short help, for the few that most runs need; empty: only the whole help lists it.
        python: whether the calls in Python have it.
        many: whether the option may be repeated.
        bare: its value where the option is given without one; empty: it needs one.
        needs: its precondition.
        conflicts: arguments that decide it instead, ``plan`` or ``budget``.
        into: ``images.NAME`` for options that are parts of one argument.
        variants: {command: fields that differ there}.
    """

    name: str
    kind: Kind
    help: str
    on: Mapping[str, str]
    default: Any = None
    typed: Kind | None = None
    option: str = ""
    short: str = ""
    brief: str = ""
    python: bool = True
    many: bool = False
    bare: str = ""
    needs: Need | None = None
    conflicts: tuple[str, ...] = ()
    into: str = ""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def flag(self) -> str:
        """The option as a user types it."""
        return self.option.partition("/")[0] or f"--{self.name.replace('_', '-')}"

    def at(self, command: str) -> Setting:
        """Return the setting as one command has it."""
        return replace(self, **self.variants[command], variants={}) if command in self.variants else self


def has_budget(values: Mapping[str, Any]) -> bool:
    """Return whether a budget decides how much is removed: a target, or a loss without anything that says how much.

    Beside a ratio, a plan or ratios of layers, ``max_drop`` is a gate.
    """
    decided = any(values.get(name) for name in ("plan", "layers", "remove_dead")) or values.get("ratio") is not None
    return bool(values.get("target")) or (values.get("max_drop") is not None and not decided)


CONDITIONS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "data": lambda v: v.get("data") is not None,
    "data or datafree": lambda v: v.get("data") is not None or v.get("recover") == "datafree",
    "data or times": lambda v: (
        v.get("data") is not None or v.get("recover") == "datafree" or _kinds(v, "latency") or "targets" in v
    ),
    "data to rotate by": lambda v: v.get("data") is not None or v.get("rotate") != "yes",
    "depth": lambda v: v.get("depth") is not None,
    "vocabulary": lambda v: v.get("vocabulary") is not None,
    "budget": has_budget,
    "target": lambda v: bool(v.get("target")) or "targets" in v,
    "budget or points": lambda v: has_budget(v) or "target" not in v,
    "latency target": lambda v: _kinds(v, "latency"),
    "measured sensitivity": lambda v: v.get("sensitivity") == "measure" or "ratios" in v,
    "data for ranges": lambda v: v.get("quantize") != "qdq" or v.get("data") is not None,
    "runs": lambda v: v.get("validate") is not False,
    "learns": lambda v: v.get("finetune") not in (None, False, "none") or v.get("criterion") is not None,
    "runs or metric": lambda v: (
        v.get("validate") is not False or v.get("metric") is not None or ("target" in v and has_budget(v))
    ),
}
"""Requirements of settings, by name, as functions of the values of a call."""


def _kinds(values: Mapping[str, Any], kind: str) -> bool:
    return any(getattr(target, "kind", None) == kind for target in values.get("target") or ())


METHOD, PAIR = "Method", "Original and pruned model"
WHAT, AMOUNT, HOW, COST = "What to prune", "How much", "Scoring", "Budgets"
INPUT, RECOVER, CHECKS, MACHINE, OUTPUT = "Data", "Recovery", "Checks", "Machine", "Output"

GROUPS = (METHOD, PAIR, AMOUNT, WHAT, HOW, COST, INPUT, RECOVER, CHECKS, MACHINE, OUTPUT)
"""The groups of settings, in the order in which help lists them."""
COMMANDS = (
    "prune",
    "train",
    "recover",
    "factorize",
    "sparsify",
    "inspect",
    "compare",
    "profile",
    "sensitivity",
    "sweep",
    "criteria",
    "devices",
)
_LISTS = ("criteria", "devices")
_OF_MODELS = tuple(command for command in COMMANDS if command not in _LISTS)

MODES = ("none", "bias", "bn", "lstsq", "full", "datafree")
PENALTIES = ("group-lasso", "slimming", "l1-mask")
"""On the norms of groups of weights, on the scale of a unit, on a mask in front of it."""
METHODS = ("auto", "svd", "tucker", "cp", "spatial-svd")
WEIGHT_CRITERIA = ("magnitude", "wanda", "obs", "gradient", "snip", "snip-momentum", "taylor")
QUANTIZERS = ("dynamic", "qdq")
TARGET_KINDS = ("macs", "params", "size", "latency", "peak-memory")

_ALL_MODELS = dict.fromkeys(_OF_MODELS, INPUT)
_RUN = {command: INPUT for command in _OF_MODELS if command != "inspect"}
_SHOWN = dict.fromkeys(COMMANDS, OUTPUT)
_PLAN, _BUDGET = ("plan",), ("plan", "budget")
_DATA = Need(
    "data", f"describes how to read data, but {argument('data')} is not given", f"Give {argument('data')}, or drop it."
)

_TRAINED = Need("data", f"trains on data, but {argument('data')} is not given", f"Give {argument('data')}, or drop it.")


def _training(default: str) -> str:
    return (
        f"Then train by gradients towards the original's outputs on {argument('data')}, for this many steps or this "
        f"long, or not at all (none); undone where held-out samples are no better. {default}"
    )


def _repair(end: str) -> str:
    return (
        f"Recover accuracy from {argument('data')} in closed form: output means (bias), scale and shift (bn), "
        "weights by least squares (lstsq), or the best of them per layer (full); without data, from synthetic "
        f"data, which is weaker (datafree); default {end}."
    )


def _inputs(use: str) -> str:
    return f"Inputs: .npz (one array per input name), .npy, a folder of these, or a folder of images; {use}"


_MEASURED_ON = _inputs(
    "for recovery and for measurements (default: no recovery, measurements on seeded synthetic data)."
)
_LEAST = f"Importance criterion; default ziplm with {argument('data')}, else l2."
_NO_LAYER_NORM = "Also prune channels that GroupNorm and the like normalise over, and LayerNorm without padding"
_KEEP_MULTIPLE = Multiple("the multiple of units to keep")
_NO_BUDGET = f"Give {argument('target')} or {argument('max_drop')}, or drop it."
_MOST_LOST = "Write nothing and exit with 5 if the result loses more of the metric, else more points of fidelity."
_REMOVED = Share("A ratio R is the share of units to remove")
_ZEROS = Share("A ratio R is the share of weights to set to 0", zero=False)

SETTINGS: tuple[Setting, ...] = (
    # What goes
    Setting(
        "targets",
        CostShares(),
        "Budgets: shares of the original's cost.",
        {"sweep": COST},
        (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
        brief="Budgets: shares of the original's cost.",
    ),
    Setting(
        "kind",
        Word(*TARGET_KINDS),
        "Kind of cost that the budgets limit.",
        {"sweep": COST},
        "macs",
        brief="macs, params, size, latency or peak-memory.",
    ),
    Setting(
        "ratios",
        Shares("R", _REMOVED, zero="prunes nothing"),
        "Ratios to measure for each group.",
        {"sensitivity": AMOUNT},
        (0.25, 0.5, 0.75, 0.9),
        brief="Shares of each group to remove.",
    ),
    Setting(
        "regularize",
        Word(*PENALTIES),
        f"Penalty that brings units to 0: on the norms of their weights (group-lasso, see {argument('groups')}), on "
        "their scales, of BatchNormalizations or one value per channel (slimming), or on masks (l1-mask).",
        {"train": METHOD},
        "group-lasso",
        brief="group-lasso, slimming or l1-mask.",
    ),
    Setting(
        "groups",
        Word("unit", "filter", "channel", "shape"),
        "Weights in a group of group-lasso: those that make a unit and read it (unit), that make it (filter), that "
        "read it (channel), or one position of a kernel in all outputs of a layer (shape).",
        {"train": METHOD},
        "unit",
    ),
    Setting(
        "strength",
        Number(0, 1e3, "the strength of the penalty", open_low=True, metavar="S", example="1"),
        f"Fixed strength of the penalty, in place of one that follows from {argument('ratio')}.",
        {"train": METHOD},
    ),
    Setting(
        "threshold",
        Number(0, 1, "the relative size below which a unit becomes 0", metavar="T", example="0.05"),
        "Size of a unit, relative to its group's median before the training, or mask, below which it becomes 0; "
        "default 0.05 for l1-mask, else 0.001.",
        {"train": METHOD},
    ),
    Setting(
        "method",
        Word(*METHODS),
        "Factorization method; auto chooses per layer the method with the smallest error for its saving.",
        {"factorize": METHOD},
        "auto",
        conflicts=_PLAN,
        brief="auto, svd, tucker, cp or spatial-svd.",
    ),
    Setting(
        "pattern",
        PatternOf(),
        "Where zeros lie: anywhere (unstructured); 2:4 or N:M, of every M neighbouring input channels N stay; 4x1 or "
        "NxM, blocks of N outputs and M inputs.",
        {"sparsify": METHOD},
        "unstructured",
        brief="unstructured, 2:4, N:M, or blocks such as 4x1.",
    ),
    Setting(
        "ratio",
        _REMOVED,
        f"Share of units to remove, of every group or of all groups together (see {argument('scope')}).",
        {"prune": AMOUNT, "factorize": AMOUNT, "train": AMOUNT, "sparsify": AMOUNT},
        0.3,
        conflicts=_BUDGET,
        variants={
            "train": {
                "kind": Share("A ratio R is the share of the units to bring to 0 and remove", zero=False),
                "help": "Share of the units to bring to 0, of all groups together; default 0.3.",
                "default": None,
                "conflicts": (),
                "brief": "Share of the units to bring to 0.",
            },
            "factorize": {
                "kind": Share("A ratio R is the share of the cost to save", zero=False),
                "help": "Share of the cost to save, of every layer or (auto) of the model; default 0.3.",
                "default": None,
                "conflicts": _PLAN,
                "brief": "Share of the cost to save.",
            },
            "sparsify": {
                "kind": _ZEROS,
                "help": "Share of weights to set to 0, of every layer or of all together (see "
                f"{argument('scope')}); default 0.5; N:M sets it.",
                "default": None,
                "conflicts": (),
                "brief": "Share of weights to set to 0.",
            },
        },
        brief="Share of the channels to remove.",
    ),
    Setting(
        "depth",
        BranchAmount(),
        f"Remove whole residual branches (y = x + f(x)): this number or share of them, those that change the outputs "
        f"on {argument('data')} least; auto: those that a {argument('target')} is best met without. No channels are "
        f"removed unless {argument('ratio')} or {argument('target')} is given too.",
        {"prune": AMOUNT},
        conflicts=_PLAN,
        needs=Need("data", "chooses by the loss of outputs on data, and there is no data", f"Give {argument('data')}."),
        brief="Residual branches to remove: a number or a share.",
    ),
    Setting(
        "rotate",
        Word("auto", "yes", "no"),
        "Turn residual streams to the principal directions of the data first, so that pruned channels carry least; "
        "auto: if a trial at the same MACs is more faithful with it.",
        {"prune": WHAT},
        "auto",
        conflicts=_PLAN,
        needs=Need(
            "data to rotate by",
            "turns streams to the directions of data, and there is none",
            f"Give {argument('data')}.",
        ),
    ),
    Setting(
        "keep_cache",
        Flag(),
        f"Keep the inputs and outputs of caches in branches that {argument('depth')} removes: each output then equals "
        "its input.",
        {"prune": WHAT},
        False,
        needs=Need("depth", "is about the caches of removed branches", f"Give {argument('depth')}, or drop it."),
    ),
    Setting(
        "resize_io",
        Patterns(),
        "Let inputs and outputs of the model whose name matches lose channels; repeatable. Name both halves of a cache "
        "(past and present) or none.",
        {"prune": WHAT, "inspect": WHAT, "sensitivity": WHAT, "sweep": WHAT},
        (),
        many=True,
        conflicts=_PLAN,
    ),
    Setting(
        "cache_heads",
        Flag(),
        "Let the inputs and outputs of all caches of a decoder shrink: past and present lose the same heads of keys "
        "and values, or channels of every head.",
        {"prune": WHAT, "inspect": WHAT, "sensitivity": WHAT, "sweep": WHAT},
        False,
        conflicts=_PLAN,
    ),
    Setting(
        "experts",
        Experts(),
        f"Remove this number or share of the experts of every mixture, but keep as many as are chosen per token; by "
        f"routing weight times output norm on {argument('data')}, else by weight norm. No channels are removed unless "
        f"{argument('ratio')} is given too.",
        {"prune": AMOUNT},
        conflicts=("plan", "budget"),
    ),
    Setting(
        "vocabulary",
        Tokens(),
        f"Keep only the tokens with these ids, and remove the rows of embeddings and columns of logits of all others; "
        f"auto: keep the ids in {argument('data')} and special tokens. No channels are removed unless "
        f"{argument('ratio')} or {argument('target')} is given too. The map from old to new ids is written beside the "
        "model.",
        {"prune": AMOUNT},
        conflicts=_PLAN,
    ),
    Setting(
        "keep_ids",
        Flag(),
        "Keep the original's token ids at the inputs: a table in front of the model translates them.",
        {"prune": WHAT},
        False,
        needs=Need("vocabulary", "is about the ids of a smaller vocabulary", f"Give {argument('vocabulary')}."),
    ),
    Setting(
        "tokenizer",
        PathTo("PATH", "a path of config.json, tokenizer.json or a folder with them"),
        f"Files that list the special tokens, which {argument('vocabulary')} must keep: config.json, tokenizer.json, "
        "or a folder with them.",
        {"prune": WHAT},
        needs=Need("vocabulary", "is about the tokens of a vocabulary", f"Give {argument('vocabulary')}, or drop it."),
    ),
    Setting(
        "model_config",
        PathTo("FILE", "a path of config.json or genai_config.json"),
        "Configuration that came with the model (config.json, genai_config.json): a copy with the new numbers of "
        "heads, layers and channels is written beside the output.",
        {"prune": WHAT},
    ),
    Setting(
        "rank",
        Ranks(),
        "Ranks of all layers or of layers whose name matches; one per mode, 0 keeps a mode as it is; repeatable.",
        {"factorize": AMOUNT},
        many=True,
        conflicts=_PLAN,
        brief="Ranks in place of a ratio.",
    ),
    Setting(
        "energy",
        Number(0, 1, "the share of the energy to keep", open_low=True, metavar="E", example="0.95"),
        "Choose ranks that keep this share of the energy of every mode.",
        {"factorize": AMOUNT, "sparsify": AMOUNT},
        conflicts=_PLAN,
        variants={
            "sparsify": {
                "help": f"In place of {argument('ratio')}: as many zeros per layer as leave this share of its scores.",
                "conflicts": (),
            }
        },
    ),
    Setting(
        "vbmf",
        Number(-1, 1, "how far to move the ranks: to full rank (1) or to rank 1 (-1)", metavar="C"),
        "Choose ranks by variational Bayes, which separates signal from noise.",
        {"factorize": AMOUNT},
        typed=Flag(),
        conflicts=_PLAN,
    ),
    Setting(
        "calibration",
        Number(-1, 1, "how far to move the ranks: to full rank (1) or to rank 1 (-1)", metavar="C"),
        f"Move the ranks of {argument('vbmf')} towards full rank (1) or rank 1 (-1); default 0.",
        {"factorize": AMOUNT},
        python=False,
        conflicts=_PLAN,
    ),
    Setting(
        "criterion",
        NamedFunction("NAME", "from a slot (and its maps) to scores [channels]"),
        f"Importance criterion; default ziplm with {argument('data')}, else l2. By weights: l1, l2, gm, lamp, "
        f"bn, random; by feature maps of {argument('data')}: wanda, obs, variance, activation, apoz, nuclear, hrank, "
        "cosine, snp, ziplm; a registered name; or a function of a script, script.py:function.",
        {"prune": HOW, "sensitivity": HOW, "sweep": HOW, "sparsify": HOW},
        conflicts=_PLAN,
        variants={
            "sensitivity": {"help": _LEAST},
            "sweep": {"help": _LEAST},
            "sparsify": {
                "kind": Word(*WEIGHT_CRITERIA, metavar="NAME"),
                "help": f"How single weights are scored; default obs with {argument('data')}, else magnitude. wanda "
                "and obs read what flows into a layer, and obs updates the weights that stay; gradient, snip, "
                "snip-momentum and taylor read gradients.",
                "conflicts": (),
                "brief": "magnitude, wanda, obs, snip, taylor, ...",
            },
        },
    ),
    Setting(
        "layers",
        LayerShares(_REMOVED),
        "Another ratio for layers or weights whose name matches; repeatable.",
        {"prune": AMOUNT, "factorize": AMOUNT, "sparsify": AMOUNT, "sensitivity": "", "sweep": ""},
        option="--layer",
        many=True,
        conflicts=_PLAN,
        variants={
            "factorize": {"kind": LayerShares(Share("A ratio R is the share of the cost to save", zero=False))},
            "sparsify": {
                "kind": LayerShares(_ZEROS),
                "help": "Another ratio for layers or weights whose name matches, also those that are left out "
                "otherwise; repeatable.",
                "conflicts": (),
            },
        },
    ),
    Setting(
        "exclude",
        Patterns(),
        "Do not prune layers or weights whose name matches; repeatable.",
        {"prune": WHAT, "factorize": WHAT, "sparsify": WHAT, "sensitivity": WHAT, "sweep": WHAT},
        (),
        many=True,
        conflicts=_PLAN,
        variants={
            "factorize": {"help": "Do not factorize layers whose name matches; repeatable."},
            "sparsify": {"help": "Leave out layers whose name matches; repeatable.", "conflicts": ()},
        },
        brief="Do not touch these layers; repeatable.",
    ),
    Setting(
        "include",
        Patterns(),
        "Prune only layers or weights whose name matches; repeatable.",
        {"prune": WHAT, "factorize": WHAT, "sparsify": WHAT, "sensitivity": WHAT, "sweep": WHAT},
        (),
        many=True,
        conflicts=_PLAN,
        variants={
            "factorize": {"help": "Factorize only layers whose name matches; repeatable."},
            "sparsify": {
                "help": "Take only layers whose name matches, also those that are left out otherwise (first and last, "
                "depthwise, small); repeatable.",
                "conflicts": (),
            },
        },
    ),
    Setting(
        "timed",
        Flag(),
        "With method auto: keep layers that factorization does not make faster on this machine (default), or count "
        "MACs only.",
        {"factorize": WHAT},
        True,
        option="--timed/--untimed",
        conflicts=_PLAN,
    ),
    Setting(
        "approximate",
        Flag(),
        f"{_NO_LAYER_NORM}; the result is then not exact.",
        {"prune": WHAT, "recover": PAIR, "inspect": WHAT, "sensitivity": WHAT, "sweep": WHAT},
        False,
        variants={
            "recover": {"help": f"State that the model was pruned with {argument('approximate')}."},
            "inspect": {"help": "Count channels behind GroupNorm and the like as removable."},
            "sensitivity": {"help": f"{_NO_LAYER_NORM}."},
            "sweep": {"help": f"{_NO_LAYER_NORM}."},
        },
    ),
    Setting(
        "remove_dead",
        Flag(),
        "Remove only units that change no output for any input, in place of a ratio; constants that they "
        "add become part of biases.",
        {"prune": WHAT, "sparsify": WHAT, "train": WHAT},
        False,
        conflicts=_BUDGET,
        variants={
            "train": {
                "help": "Keep the units that became 0; by default they are removed, and constants that they add become "
                "part of biases.",
                "option": "--keep-dead",
                "default": True,
                "conflicts": (),
            },
            "sparsify": {
                "help": "Keep units that lose all of their weights; by default they are removed, unless that shifts "
                "the groups of N:M or blocks, and constants that they add become part of biases.",
                "option": "--keep-dead",
                "default": True,
                "conflicts": (),
            },
        },
    ),
    Setting(
        "plan",
        PathTo("FILE.json", "a plan or its file", attribute="factorized"),
        "Remove the channels that this plan lists (prune by index).",
        {"prune": WHAT, "factorize": WHAT, "recover": PAIR},
        option="--apply-plan",
        conflicts=("budget",),
        variants={
            "factorize": {"help": "Factorize the layers that this plan lists.", "conflicts": ()},
            "recover": {
                "help": "Plan of the pruned model: the channels that were removed.",
                "option": "--plan",
                "brief": "The plan that was saved with the pruned model.",
                "conflicts": (),
            },
        },
    ),
    # What the model may cost
    Setting(
        "target",
        Targets(),
        f"Budget in place of {argument('ratio')}, as a share of the original or an amount: macs=0.5, params=0.4, "
        "size=3MB, latency=0.6 or 12ms, peak-memory=64MB; repeatable.",
        {"prune": COST},
        many=True,
        brief="A budget: macs=0.5, size=3MB, latency=12ms.",
    ),
    Setting(
        "max_drop",
        Number(
            0, math.inf, "the allowed loss of the metric, in points of fidelity where no metric is given", example="1.0"
        ),
        f"Allowed loss of the metric; without {argument('target')}, {argument('ratio')} or a plan, find the smallest "
        "model within this loss.",
        {"prune": COST, "recover": CHECKS, "factorize": CHECKS, "sparsify": CHECKS, "train": CHECKS, "compare": CHECKS},
        needs=Need(
            "runs or metric",
            f"needs the models to run, but {argument('validate', False)} forbids that",
            f"Drop one of the two, or give {argument('metric')}.",
        ),
        variants={
            "recover": {"help": _MOST_LOST, "brief": "Write nothing if more is lost."},
            "factorize": {"help": _MOST_LOST, "brief": "Write nothing if more is lost."},
            "sparsify": {"help": _MOST_LOST, "brief": "Write nothing if more is lost."},
            "train": {"help": _MOST_LOST, "brief": "Write nothing if more is lost."},
            "compare": {
                "help": "Exit with 5 if the second model loses more of the metric, else of fidelity.",
                "brief": "Fail if the metric, or fidelity, loses more.",
            },
        },
    ),
    Setting(
        "metric",
        NamedFunction("FILE.py:FUNCTION", "from the path of a model to a number, higher is better"),
        "Function from the path of a model to a number, higher is better; default fidelity in points.",
        {
            "prune": CHECKS,
            "recover": CHECKS,
            "factorize": CHECKS,
            "sparsify": CHECKS,
            "train": CHECKS,
            "compare": CHECKS,
            "sensitivity": CHECKS,
            "sweep": CHECKS,
        },
        variants={"compare": {"brief": "Measure your own metric, such as mAP, too."}},
    ),
    Setting(
        "sensitivity",
        PathTo(
            "FILE.json|measure",
            "a file of sensitivities, the result of `onnxprune.sensitivity`, or `measure`",
            attribute="curves",
        ),
        "Allocate by the measured sensitivity of each group as well: from a file of 'onnxprune sensitivity', or "
        "measured first (takes minutes; cached for later runs).",
        {"prune": COST},
        typed=Text("FILE.json|measure"),
        needs=Need("budget", "guides the allocation of a budget, but no budget is given", _NO_BUDGET),
    ),
    Setting(
        "jobs",
        Jobs(),
        "Number of processes that measure sensitivities; default one per processor.",
        {"prune": MACHINE, "sensitivity": MACHINE, "sweep": MACHINE},
        typed=Integer(1, "the number of processes"),
        needs=Need(
            "measured sensitivity",
            "applies only when sensitivities are measured",
            f"Give {argument('sensitivity', 'measure')}, or drop it.",
        ),
        variants={
            "sweep": {
                "help": "Number of processes, each of which prunes to one of the budgets at a time; default 1. With "
                f"{argument('kind', 'latency')} only candidates of a budget are distributed.",
                "needs": None,
            }
        },
    ),
    Setting(
        "factorize",
        Flag(),
        "Factorize layers where that loses less than pruning them, or never; not with a peak-memory target. Default "
        f"with {argument('data')}: where pruning alone damages the model.",
        {"prune": COST, "sweep": COST},
        option="--factorize/--no-factorize",
        needs=Need(
            "budget or points",
            "factorizes layers to meet a budget, but no budget is given",
            f"Give {argument('target')} or {argument('max_drop')}; 'onnxprune factorize' factorizes layers by a ratio.",
        ),
        variants={
            "sweep": {
                "help": f"Factorize layers as well; for {argument('kind')} macs, params and size.",
                "default": False,
                "option": "",
            }
        },
    ),
    Setting(
        "trials",
        Integer(0, "how many allocations to try"),
        "Number of allocations to try around the best one; default with recovery: as many as take about half a "
        "minute, else none.",
        {"prune": COST, "sweep": COST},
        needs=Need(
            "target",
            "refines the allocation for a target, but no target is given",
            f"Give {argument('target')}, or drop it.",
        ),
        variants={
            "sweep": {
                "help": "Number of allocations to try around the best one of each budget; default with recovery: as "
                "many as take about half a minute, else none."
            }
        },
    ),
    Setting(
        "latency_table",
        PathTo("FILE.json", "a table of times or its file", attribute="overhead"),
        "Layer times of another device, written there by 'onnxprune profile MODEL -o FILE.json'.",
        {"prune": COST},
        needs=Need(
            "latency target",
            "holds measured times, but no latency target is given",
            f"Give {argument('target', 'latency=0.6')}, or drop the table.",
        ),
    ),
    Setting(
        "providers",
        Providers(),
        "Execution providers of onnxruntime for latency measurements; default cpu.",
        {"prune": MACHINE, "compare": MACHINE, "profile": MACHINE, "sweep": MACHINE, "sensitivity": ""},
    ),
    Setting(
        "threads",
        Integer(1, "how many threads an operator may use"),
        "Threads per operator in latency measurements; default all processors.",
        {"prune": MACHINE, "compare": MACHINE, "profile": MACHINE, "sweep": MACHINE, "sensitivity": ""},
    ),
    Setting(
        "seconds",
        Number(0, math.inf, "how many seconds to measure", metavar="N", open_low=True),
        "How long to measure; at least 12 pruned models are timed.",
        {"profile": MACHINE},
        60,
        typed=Integer(1, "how many seconds to measure"),
        brief="How long to measure.",
    ),
    # How units are chosen
    Setting(
        "scope",
        Word("auto", "local", "global", "isomorphic", "slamp"),
        "Which units compete: those of each group, of all groups, of groups of the same structure, or all by SLAMP "
        f"scores; auto: local, or global under the default criterion with {argument('data')}.",
        {"prune": HOW, "factorize": AMOUNT, "sparsify": AMOUNT, "sensitivity": "", "sweep": ""},
        "auto",
        conflicts=_BUDGET,
        variants={
            "sparsify": {
                "kind": Word("local", "global"),
                "help": "Apply the ratio to every layer (local), or let the weights of all layers compete by their "
                "shares of their layers' scores (global).",
                "default": "local",
                "conflicts": (),
            },
            "factorize": {
                "kind": Word("local", "global"),
                "help": "Apply the ratio to every layer, or to the model as one budget; default global for auto, else "
                "local.",
                "default": None,
                "conflicts": _PLAN,
            },
        },
    ),
    Setting(
        "policy",
        Word("sum", "average", "max", "backward"),
        "How to combine the scores of a unit in several weights.",
        {"prune": HOW, "sensitivity": "", "sweep": ""},
        "sum",
        conflicts=_PLAN,
    ),
    Setting(
        "normalize",
        Word("auto", "mean", "none", "root", "standard", "tss", "linear", "softmax", "measured"),
        "How to make scores of different weights comparable.",
        {"prune": HOW, "sensitivity": "", "sweep": ""},
        "auto",
        conflicts=_PLAN,
    ),
    Setting(
        "group_policy",
        Word("count", "sum", "average", "none"),
        "Heads and convolution groups: remove own indices in each (count), the same indices in all by the sum or "
        "average of scores, or none.",
        {"prune": HOW, "sensitivity": "", "sweep": ""},
        "count",
        conflicts=_PLAN,
    ),
    Setting(
        "reshape_axis",
        Word("head_dim", "heads", "both"),
        "Attention heads: prune channels within heads, whole heads where possible, or both.",
        {"prune": HOW, "sensitivity": "", "sweep": ""},
        "head_dim",
        conflicts=_PLAN,
    ),
    Setting(
        "max_ratio",
        Share("The share of its units that a group may lose", zero=False, one=True),
        "Largest share that a group may lose; default 0.9 where groups compete, else all but one unit.",
        {"prune": AMOUNT, "sensitivity": "", "sweep": ""},
        conflicts=_PLAN,
    ),
    Setting(
        "cost",
        Word("auto", "none", "macs", "params", "latency"),
        "Divide scores by the cost that removing the unit saves; auto: none, or macs under the default criterion with "
        f"{argument('data')}.",
        {"prune": HOW, "factorize": AMOUNT, "sensitivity": "", "sweep": ""},
        "auto",
        conflicts=_BUDGET,
        variants={
            "factorize": {
                "kind": Word("macs", "params"),
                "help": f"Cost that {argument('ratio')} is a share of.",
                "default": "macs",
                "conflicts": _PLAN,
            }
        },
    ),
    Setting(
        "round_to",
        _KEEP_MULTIPLE,
        "Keep a multiple of N per group where possible; auto: per layer the multiple that the device's kernels prefer.",
        {"prune": AMOUNT, "factorize": AMOUNT, "sweep": AMOUNT, "sensitivity": ""},
        "auto",
        conflicts=_PLAN,
        variants={
            "factorize": {
                "kind": Integer(1, "the multiple for ranks"),
                "help": "Choose ranks that are multiples of N.",
                "default": 1,
            },
        },
    ),
    Setting(
        "device",
        DeviceName(),
        f"Where the result is to be fast, for {argument('round_to', 'auto')}: avx512, avx2, arm64, tensorrt, hexagon, "
        "ethos-u, ascend, xnnpack, openvino, coreml, or a file of multiples; default this machine.",
        {"prune": AMOUNT, "sweep": AMOUNT, "sparsify": MACHINE, "sensitivity": ""},
        conflicts=_PLAN,
        variants={
            "sparsify": {
                "help": "Where the result is to run: warns where zeros in this pattern are worth nothing; default "
                "this machine's processor.",
                "conflicts": (),
            }
        },
    ),
    Setting(
        "step",
        Integer(1, "the multiple of units to remove"),
        "Remove a multiple of N units per group.",
        {"prune": AMOUNT, "sensitivity": "", "sweep": ""},
        1,
        conflicts=_PLAN,
    ),
    Setting(
        "rounding",
        Word("nearest", "up", "down"),
        "How to round the numbers of units that follow from ratios.",
        {"prune": AMOUNT, "sensitivity": "", "sweep": ""},
        "nearest",
        conflicts=_BUDGET,
    ),
    Setting(
        "steps",
        Integer(1, "a number of steps"),
        f"Prune in N steps and score again before each; {argument('finetune')} then trains between, too.",
        {"prune": AMOUNT, "sparsify": AMOUNT, "sensitivity": "", "sweep": ""},
        1,
        conflicts=_BUDGET,
        variants={
            "sparsify": {
                "help": "Set zeros in N steps and score again before each; "
                f"{argument('finetune')} then trains between, too.",
                "conflicts": (),
            }
        },
    ),
    Setting(
        "schedule",
        Word("linear", "exp", "cos", "cube"),
        f"How the removed share grows over {argument('steps')}.",
        {"prune": AMOUNT, "sparsify": AMOUNT, "sensitivity": "", "sweep": ""},
        "linear",
        conflicts=_BUDGET,
        variants={"sparsify": {"help": f"How the share of zeros grows over {argument('steps')}.", "conflicts": ()}},
    ),
    Setting(
        "progressive",
        Word("none", "weights", "blocks"),
        f"Blocks of a {argument('pattern')} such as 4x1 become 0 in two of the {argument('steps')}: first half of "
        "their weights, by single scores (weights) or as smaller blocks (blocks), the others one step later.",
        {"sparsify": AMOUNT},
        "none",
        bare="weights",
        brief="Set blocks to 0 in halves, over the steps.",
    ),
    # What is read
    Setting(
        "input_shapes",
        Shapes(),
        "Shape of an input whose sizes are not in the model; repeatable.",
        _ALL_MODELS,
        option="--input-shape",
        many=True,
        variants={
            "inspect": {
                "help": "Shape of an input, with every size.",
                "brief": "Shape of an input whose sizes are open.",
            }
        },
    ),
    Setting(
        "data",
        Inputs("FILE|DIR", "a file, a folder, arrays, an iterable of these or a reader"),
        _inputs("for recovery and validation (default: no recovery, validation on seeded synthetic data)."),
        _RUN,
        variants={
            "factorize": {"help": _inputs("measure errors at the outputs of layers, and recover afterwards.")},
            "sparsify": {
                "help": _inputs("score weights by the activations that they multiply, and recover afterwards.")
            },
            "recover": {"help": _inputs("for recovery and for measurements.")},
            "compare": {
                "help": _inputs("for measurements (default: seeded synthetic data)."),
                "brief": "Inputs to compare on: .npz, .npy, images.",
            },
            "profile": {"help": _inputs("one sample is run (default: seeded synthetic data).")},
            "sensitivity": {"help": _MEASURED_ON},
            "sweep": {"help": _MEASURED_ON},
        },
        brief="Inputs to calibrate on: .npz, .npy, images.",
    ),
    Setting("samples", Integer(1, "how many samples to use"), "Use N samples of the data.", _RUN, needs=_DATA),
    Setting(
        "batch_size",
        Integer(1, "how many samples to run at a time"),
        "Samples per run, where the batch size of the model is open; default 16.",
        _RUN,
        needs=_DATA,
    ),
    Setting(
        "image_size",
        Extent(),
        "Resize and crop images to this size; default the model's.",
        _RUN,
        python=False,
        needs=_DATA,
        into="images.size",
    ),
    Setting(
        "mean",
        Numbers(),
        "Subtract this mean per channel, from pixels in 0..1.",
        _RUN,
        python=False,
        needs=_DATA,
        into="images.mean",
    ),
    Setting(
        "std",
        Numbers(zero=False),
        "Divide by this standard deviation per channel, after the mean is subtracted.",
        _RUN,
        python=False,
        needs=_DATA,
        into="images.std",
    ),
    Setting(
        "layout",
        Word("nchw", "nhwc"),
        "Position of the channel axis of images; default: the axis of size 1 or 3.",
        _RUN,
        python=False,
        needs=_DATA,
        into="images.layout",
    ),
    Setting(
        "pixel_order",
        Word("rgb", "bgr"),
        "Order of the colour channels; default rgb.",
        _RUN,
        python=False,
        needs=_DATA,
        into="images.order",
    ),
    Setting(
        "pixel_scale",
        Numbers(counts=(1,), zero=False, metavar="X"),
        f"Factor for pixels of 0..255, before {argument('mean')}; default 1/255.",
        _RUN,
        python=False,
        needs=_DATA,
        into="images.scale",
    ),
    Setting(
        "images", Conversion(), "Image preprocessing: `onnxprune.ImageOptions`.", dict.fromkeys(_RUN, ""), needs=_DATA
    ),
    Setting(
        "cache",
        PathTo("DIR", "a folder"),
        "Cache intermediate results in this folder; a repeated or interrupted run resumes from them.",
        {
            "prune": MACHINE,
            "train": MACHINE,
            "recover": MACHINE,
            "sensitivity": MACHINE,
            "sweep": MACHINE,
            "profile": "",
        },
        variants={
            "train": {
                "help": "Keep the state of the training in this folder; an interrupted training resumes from it."
            },
            "prune": {
                "needs": Need(
                    "data or times",
                    f"caches results computed from data, but {argument('data')} is not given",
                    f"Give {argument('data')}, or drop it.",
                )
            },
        },
    ),
    Setting("seed", Integer(0, "a seed"), "Seed of all random numbers.", dict.fromkeys(_RUN, MACHINE), 0),
    Setting(
        "custom_op_libraries",
        Paths("FILE", "paths of shared libraries"),
        "A shared library of custom operators, known to every session of onnxruntime; repeatable.",
        dict.fromkeys(_RUN, MACHINE),
        (),
        option="--custom-op-library",
        many=True,
    ),
    # What is repaired and checked
    Setting(
        "recover",
        Word(*MODES),
        _repair(f"full with {argument('data')}, else none"),
        {command: RECOVER for command in _RUN if command not in ("profile", "compare", "train")},
        variants={"recover": {"kind": Word(*MODES[1:]), "help": _repair("full"), "default": "full"}},
    ),
    Setting(
        "finetune",
        EffortOf(),
        _training(f"Default with 512 samples or more: as long as {argument('effort')} allows."),
        {**dict.fromkeys(("prune", "factorize", "sparsify", "recover"), RECOVER), "train": METHOD},
        needs=_TRAINED,
        bare="auto",
        variants={
            **{command: {"help": _training("Default none.")} for command in ("factorize", "sparsify", "recover")},
            "train": {
                "help": "Steps or time to train, six tenths with the penalty and the others behind the removal; "
                "default 1,000 steps or 3 minutes, whichever ends first.",
                "needs": None,
                "brief": "Steps or time to train.",
            },
        },
        brief="Train towards the original on the data.",
    ),
    Setting(
        "labels",
        Inputs("FILE", "classes or values of the samples: an array, or a .npy or .npz file"),
        f"Labels of {argument('data')}, one per sample: half of the loss of {argument('finetune')} is on them, and "
        "criteria of gradients take their loss.",
        {**dict.fromkeys(("prune", "factorize", "sparsify", "recover"), RECOVER), "train": INPUT},
        needs=Need(
            "learns",
            f"is used by {argument('finetune')} and by criteria of gradients, but neither is given",
            f"Give {argument('finetune')} or a criterion such as {argument('criterion', 'taylor')}, or drop it.",
        ),
        variants={
            "train": {
                "help": f"Labels of {argument('data')}, one per sample: half of the loss is on them.",
                "needs": None,
            }
        },
    ),
    Setting(
        "augment",
        Word("auto", "none", "shift", "flip"),
        f"Variants of images in {argument('finetune')}: shifted and mirrored (auto), one of the two, or none; only "
        "those that change the original's answers little.",
        dict.fromkeys(("prune", "factorize", "sparsify", "recover"), RECOVER),
        "auto",
    ),
    Setting(
        "blocks",
        Word("auto", "no", "yes"),
        f"Let {argument('finetune')} train one block of the model after the other; auto: with fewer than 512 samples "
        "try both ways, and go on with the better one on held-out samples.",
        dict.fromkeys(("prune", "factorize", "sparsify", "recover"), RECOVER),
        "no",
        bare="yes",
    ),
    Setting(
        "pattern_lock",
        Flag(),
        "Keep zeros of weights at 0 in recovery and fine-tuning, or let them change; without either, fine-tuning "
        "a model that holds a pattern of zeros is refused.",
        dict.fromkeys(("prune", "factorize", "recover", "sparsify"), RECOVER),
        option="--pattern-lock/--no-pattern-lock",
        variants={
            "sparsify": {
                "help": "Keep zeros of weights at 0 in recovery and fine-tuning (default), or refuse recovery and "
                "fine-tuning.",
                "default": True,
            }
        },
    ),
    Setting(
        "quantize",
        Word(*QUANTIZERS),
        f"Then quantize to 8 bits: dynamic finds ranges at run time, qdq on {argument('data')}; fidelity is that of "
        "the quantized model. Default: not.",
        dict.fromkeys(("prune", "factorize", "sparsify", "recover"), RECOVER),
        needs=Need(
            "data for ranges",
            f"finds the ranges of activations on data, but {argument('data')} is not given",
            f"Give {argument('data')}, or {argument('quantize', 'dynamic')}, which finds them at run time.",
        ),
        brief="Then store and compute in 8 bits.",
    ),
    Setting(
        "effort",
        Word("quick", "normal", "thorough"),
        "Bounds on the work of searches and recoveries: quick for a first answer, with fewer candidates, samples and "
        "rows; the report lists the stages that were skipped.",
        {"prune": COST, "recover": MACHINE, "sweep": COST},
        "normal",
        brief="quick, normal or thorough.",
    ),
    Setting(
        "memory_limit",
        Bytes(),
        "Memory for activations, for example 2GB; the rest goes to temporary files.",
        {command: MACHINE for command in _RUN if command not in ("profile", "compare")},
        needs=Need(
            "data or datafree",
            f"limits the activations of data, but {argument('data')} is not given",
            f"Give {argument('data')}, or drop it.",
        ),
    ),
    Setting(
        "validate",
        Flag(),
        "Do not run the models; check their structure only.",
        {"prune": CHECKS, "factorize": CHECKS, "sparsify": CHECKS},
        True,
        option="--no-validate",
        variants={
            "factorize": {"help": "Do not compare the outputs of the models or time them."},
            "sparsify": {"help": "Do not compare the outputs of the models or time them."},
        },
    ),
    Setting(
        "min_fidelity",
        Number(0, 100, "points of fidelity, or up to 1 a cosine", open_low=True, example="95"),
        "Write nothing and exit with 5 when fidelity falls below X points, the percentage of the original's answers "
        "that the result reproduces; X up to 1 is the cosine of each output, centred per channel.",
        {
            "prune": CHECKS,
            "recover": CHECKS,
            "factorize": CHECKS,
            "sparsify": CHECKS,
            "train": CHECKS,
            "compare": CHECKS,
        },
        needs=Need(
            "runs", f"needs the models to run, but {argument('validate', False)} forbids that", "Drop one of the two."
        ),
        variants={
            "compare": {
                "help": "Exit with 5 when fidelity falls below X points, the percentage of the original's answers that "
                "the second model reproduces; X up to 1 is the cosine of each output, centred per channel.",
                "brief": "Fail if fidelity falls below X points.",
            },
        },
        brief="Write nothing if fidelity falls below X.",
    ),
    Setting(
        "outputs",
        OutputKinds(),
        "Meaning of an output, where names, values and the graph suggest another one, with the axis of its classes or "
        "attributes; repeatable.",
        {command: CHECKS for command in _RUN if command != "profile"},
        option="--output-kind",
        many=True,
    ),
    Setting(
        "latency",
        Flag(),
        "Measure the latency before and after.",
        {"prune": "", "factorize": "", "sparsify": "", "train": "", "compare": "", "sweep": ""},
        True,
        variants={
            command: {
                "kind": FlagOr("layers"),
                "help": "Measure the latency before and after; `layers`: also that of each layer, for the page.",
            }
            for command in ("prune", "factorize", "sparsify", "train")
        },
    ),
    # What is written and shown
    Setting(
        "output",
        PathTo("OUT.onnx"),
        "Output file; default MODEL.pruned.onnx beside the input.",
        {
            **dict.fromkeys(("prune", "recover", "factorize", "sparsify", "train"), OUTPUT),
            **dict.fromkeys(("profile", "sensitivity"), OUTPUT),
        },
        short="-o",
        python=False,
        variants={
            "recover": {"help": "Output file; default CUT.recovered.onnx beside the pruned model."},
            "factorize": {"help": "Output file; default MODEL.factorized.onnx beside the input."},
            "train": {"help": "Output file; default MODEL.trained.onnx beside the input."},
            "sparsify": {"help": "Output file; default MODEL.sparse.onnx beside the input."},
            "profile": {
                "kind": PathTo("FILE.json"),
                "help": f"Write the latency table, for {argument('latency_table')} on another machine.",
            },
            "sensitivity": {
                "kind": PathTo("FILE.json"),
                "help": f"Write the sensitivities, for {argument('sensitivity')}.",
            },
        },
        brief="Where to write.",
    ),
    Setting(
        "storage",
        Word("dense", "sparse"),
        "How zeros are stored: dense, which every runtime reads, or as sparse initializers where that is smaller "
        "(onnxruntime turns them into dense ones when it loads the model).",
        {"sparsify": OUTPUT},
        "dense",
    ),
    Setting(
        "folder",
        PathTo("DIR", "a folder"),
        "Write the models of the sweep to this folder: NAME.SHARE.onnx.",
        {"sweep": OUTPUT},
        option="--models",
    ),
    Setting(
        "plan_file",
        PathTo("FILE.json"),
        "Write the plan as well: the removed channels of every group.",
        {"prune": OUTPUT, "factorize": OUTPUT},
        option="--plan",
        python=False,
        variants={"factorize": {"help": "Write the plan as well: methods and ranks."}},
    ),
    Setting(
        "explain",
        Flag(),
        "Explain which layers were pruned less than asked, and why; list the groups.",
        {"prune": OUTPUT, "recover": OUTPUT, "factorize": OUTPUT, "sparsify": OUTPUT},
        False,
        python=False,
        variants={
            "sparsify": {"help": "Explain why layers were left out."},
            "recover": {"help": "Explain why layers were not recovered."},
            "factorize": {"help": "Explain why layers were not factorized."},
        },
    ),
    Setting(
        "html",
        PathTo("FILE.html"),
        "Write a self-contained HTML page with the plot as well.",
        {"sensitivity": OUTPUT, "sweep": OUTPUT},
        python=False,
        brief="Also write a page with the plot.",
    ),
    Setting(
        "report",
        PathTo("FILE.html"),
        "Write a self-contained HTML page as well: verdict, sizes, the network, every layer, and why layers stayed.",
        {
            "prune": OUTPUT,
            "recover": OUTPUT,
            "factorize": OUTPUT,
            "sparsify": OUTPUT,
            "train": OUTPUT,
            "compare": OUTPUT,
        },
        python=False,
    ),
    Setting(
        "markdown",
        PathTo("FILE|-"),
        "Write the report as Markdown as well, for a comment on a pull request; - prints it in place of the summary.",
        {
            "prune": OUTPUT,
            "recover": OUTPUT,
            "factorize": OUTPUT,
            "sparsify": OUTPUT,
            "train": OUTPUT,
            "compare": OUTPUT,
        },
        python=False,
    ),
    Setting(
        "dry_run",
        Flag(),
        "Choose, and report what would be removed, but write no file. Skipped as well, and listed: timing; without a "
        "budget also the proof of exactness, the comparison of outputs, the gate on it, and recovery.",
        {"prune": OUTPUT, "factorize": OUTPUT, "sparsify": OUTPUT},
        False,
        python=False,
        variants={
            "factorize": {
                "help": "Choose, and report what would be factorized, but write no file. Skipped as well, and listed: "
                "timing of the whole model, the comparison of outputs, the gate on it, and recovery."
            },
            "sparsify": {
                "help": "Choose, and report which weights would become 0, but write no file. Skipped as well, and "
                "listed: timing, the comparison of outputs, the gate on it, and recovery."
            },
        },
    ),
    Setting(
        "config",
        PathTo("FILE.toml", "a TOML file"),
        "Read settings from this file; default: the nearest onnxprune.toml, or pyproject.toml with [tool.onnxprune], "
        "from the working directory upwards. Options on the command line win.",
        _SHOWN,
        python=False,
    ),
    Setting("no_config", Flag(), "Read no file of settings.", _SHOWN, False, python=False),
    Setting(
        "json",
        Flag(),
        "Write one JSON object to stdout and everything else to stderr.",
        _SHOWN,
        False,
        python=False,
    ),
    Setting("quiet", Flag(), "Print errors only.", _SHOWN, False, short="-q", python=False),
    Setting(
        "verbose",
        Flag(),
        "List every layer; -vv shows tracebacks.",
        _SHOWN,
        False,
        short="-v",
        python=False,
        variants={"inspect": {"help": "List every layer, group and barrier; -vv shows tracebacks."}},
    ),
    Setting(
        "progress",
        Function("of the name of a stage and the share of it that is done"),
        "Function that is called with the progress of each stage.",
        dict.fromkeys(_RUN, ""),
    ),
)
"""All settings, in the order in which help lists them under a heading."""


# -- reading them ------------------------------------------------------------------------------------------------------


@functools.cache
def settings_of(command: str) -> Mapping[str, Setting]:
    """Return the settings of a command or its call, by name, with their present defaults."""
    return {setting.name: setting.at(command) for setting in SETTINGS if command in setting.on}


def options_of(command: str) -> list[Setting]:
    """Return the settings that a command has as options, in the order of its help."""
    there = [setting for setting in settings_of(command).values() if setting.on[command]]
    return sorted(there, key=lambda setting: GROUPS.index(setting.on[command]))


def default(name: str, command: str = "prune") -> Any:
    """Return the default value of a setting."""
    return settings_of(command)[name].default


def words(name: str, command: str = "prune") -> tuple[str, ...]:
    """Return the allowed words of a setting."""
    kind = settings_of(command)[name].kind
    assert isinstance(kind, Word)
    return kind.words


def checked(name: str, value: Any, command: str = "prune") -> Any:
    """Return a value checked by its setting; None stays None where the default is None.

    Args:
        name: the argument.
        value: value of the argument.
        command: whose argument.

    Raises:
        UsageError: it is not allowed; ``argument`` of the error is ``name``.
    """
    setting = settings_of(command)[name]
    return value if value is None and setting.default is None else setting.kind.check(value, argument(name))


def check_needs(command: str, values: Mapping[str, Any]) -> None:
    """Check that every argument that was given has the other arguments that it needs.

    Args:
        command: whose values.
        values: by name; a missing one, None or the default was not given.

    Raises:
        UsageError: one lacks another argument.
    """
    for name, setting in settings_of(command).items():
        value, need = values.get(name), setting.needs
        if need is None or value is None or (setting.default is not None and value == setting.default):
            continue
        if setting.kind.is_off(value):
            continue
        if not CONDITIONS[need.of](values):
            raise UsageError(f"{argument(name)} {need.because}", hint=need.hint)


def check_dead_alone(arguments: Mapping[str, Any]) -> None:
    """Reject arguments that choose units beside ``remove_dead``, which leaves no choice.

    Args:
        arguments: values of such arguments, by name; a ratio of 0 and None choose nothing.

    Raises:
        UsageError: there is one.
    """
    name = next((n for n, value in arguments.items() if value is not None and not (n == "ratio" and value == 0)), "")
    if name:
        raise UsageError(
            f"{argument(name)} has no meaning with {argument('remove_dead')}, which only removes dead units",
            hint=f"Drop one of the two; to prune further, give the result to a second run with {argument(name)}.",
        )


def called(command: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function check its arguments by the settings of a command, as a decorator.

    Every argument that is a setting is checked before the function runs, a name that there is not is compared with
    all that there are, and arguments that need others are looked at together.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        known = settings_of(command)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = _bound(function.__name__, signature, args, kwargs)
            for name, value in bound.arguments.items():
                setting = known.get(name)
                if setting is not None and not (value is None and signature.parameters[name].default is None):
                    bound.arguments[name] = setting.kind.check(value, argument(name))
            check_needs(command, {**dict.fromkeys(set(known) & set(signature.parameters)), **bound.arguments})
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


_OF_PASSES: Mapping[str, Kind] = {
    **{name: Patterns() for name in ("include", "exclude")},
    **{name: Flag() for name in ("approximate", "check", "exact", "faithful", "keep_cache", "keep_ids", "trained")},
    "batch_size": Integer(1, "the number of samples of a step"),
    "between": Stages(),
    "features": Integer(0, "the number of tensors between blocks to compare"),
    "loss": Function("f(outputs, targets, labels) that returns its value and its gradients"),
    "memory_limit": Bytes(),
    "plan": PathTo("FILE.json", "a plan or its file", attribute="factorized"),
    "rank": Ranks(),
    "rate": Number(0, meaning="the rate of the training", open_low=True, example="0.001"),
    "timed": FlagOr("layers"),
    "tokenizer": PathTo("PATH", "a path of config.json, tokenizer.json or a folder with them"),
    "tokens": Tokens(),
}
"""Types of arguments that mean the same in every pass; passes check what is a setting by its name in them."""


def named_arguments(**renamed: str) -> Callable[[type[T]], type[T]]:
    """Make a class check its arguments, and compare misspelt ones with all that it has, as a decorator.

    Args:
        renamed: {former name: name} of arguments; a former name warns and is taken.
    """

    def decorate(cls: type[T]) -> type[T]:
        construct = cls.__init__
        full = inspect.signature(construct)
        signature = full.replace(parameters=list(full.parameters.values())[1:])

        @functools.wraps(construct)
        def init(self: T, *args: Any, **kwargs: Any) -> None:
            for former, name in renamed.items():
                if former in kwargs:
                    warnings.warn(
                        f"The argument {former} of {cls.__name__} is called {name}", DeprecationWarning, stacklevel=2
                    )
                    value = kwargs.pop(former)
                    kwargs.setdefault(name, value)
            for name, value in _bound(cls.__name__, signature, args, kwargs).arguments.items():
                kind = _OF_PASSES.get(name)
                if kind is not None and not (value is None and signature.parameters[name].default is None):
                    kind.check(value, argument(name))
            construct(self, *args, **kwargs)

        cls.__init__ = init  # type: ignore[assignment, method-assign]
        return cls

    return decorate


def _bound(
    name: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """Bind arguments to a signature.

    Raises:
        ArgumentError: an argument is unknown, missing, or one too many.
    """
    for key in kwargs:
        if key not in signature.parameters:
            raise ArgumentError(f"{name}() has no argument {key!r}", hint=nearest(key, signature.parameters))
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"{name}(): {error}", hint=f"It takes {signature}.") from None


def record_of(cls: type[T], arguments: Mapping[str, Any]) -> T:
    """Build a record from those arguments of a call that its fields are named after; others keep their defaults.

    Public calls write their arguments out, so that editors show them; a record declares what becomes of them once.

    Args:
        cls: a dataclass.
        arguments: {name: value}, such as ``locals()`` at the beginning of a call.
    """
    names = (entry.name for entry in dataclasses.fields(cls))  # type: ignore[arg-type]
    return cls(**{name: arguments[name] for name in names if name in arguments})


# -- showing them ------------------------------------------------------------------------------------------------------


def spell(command: str) -> Callable[[str, str, str], str]:
    """Return the spelling of arguments for users of a command: as options."""
    known = settings_of(command) if command in COMMANDS else {}
    all_settings = {setting.name: setting for setting in SETTINGS}

    def one(name: str, key: str, value: str) -> str:
        setting = known.get(name) or all_settings.get(name)
        if setting is None:
            return f"--{name.replace('_', '-')}" + (f" {key}" if key else "") + (f" {value}" if value else "")
        off = setting.option.partition("/")[2] or setting.flag
        if isinstance(setting.typed or setting.kind, Flag):
            return off if value == "False" else setting.flag
        return setting.flag + (f" {key}" if key else "") + (f" {value}" if value else "")

    return one


def reference() -> str:
    """Return the page of settings, in Markdown."""
    lines = [_INTRODUCTION]
    for heading in GROUPS:
        rows = [
            _row(setting.at(command), command)
            for setting in SETTINGS
            for command in COMMANDS
            if setting.on.get(command) == heading and _is_new(setting, command, heading)
        ]
        if rows:
            lines += [
                f"\n## {heading}\n",
                "| option | in Python | allowed | default | commands | |",
                "|---|---|---|---|---|---|",
            ]
            lines += rows
    python_only = [_row(setting, next(iter(setting.on))) for setting in SETTINGS if not any(setting.on.values())]
    lines += [
        "\n## In Python alone\n",
        "| option | in Python | allowed | default | commands | |",
        "|---|---|---|---|---|---|",
        *python_only,
    ]
    return "\n".join(lines) + "\n"


_INTRODUCTION = """# Settings

Every option of the command line and every argument of `onnxprune.prune` and its siblings. This page is made from
`onnxprune/settings.py`: `python -m onnxprune.settings > docs/settings.md`."""


def _is_new(setting: Setting, command: str, heading: str) -> bool:
    """Return whether no command before this one has the same under the same heading."""
    mine = setting.at(command)
    before = (c for c in COMMANDS[: COMMANDS.index(command)] if setting.on.get(c) == heading)
    return all(_shown(setting.at(c)) != _shown(mine) for c in before)


def _shown(setting: Setting) -> tuple[Any, ...]:
    return setting.help, setting.kind.allowed, setting.default, setting.option


def _row(setting: Setting, command: str) -> str:
    heading = setting.on[command]
    same = [c for c in COMMANDS if setting.on.get(c) == heading and _shown(_declared(setting).at(c)) == _shown(setting)]
    metavar = (setting.typed or setting.kind).metavar
    option = setting.option.replace("/", "`, `") or setting.flag
    shown = f"`{', '.join(filter(None, (setting.short, option)))}{' ' + metavar if metavar else ''}`" if heading else ""
    where = f"`{setting.into or setting.name}`" if setting.python or setting.into else ""
    cells = [
        shown,
        where,
        setting.kind.allowed,
        _default(setting),
        ", ".join(same),
        spelled(setting.help, spell(command)),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _declared(setting: Setting) -> Setting:
    return next(s for s in SETTINGS if s.name == setting.name)


def _default(setting: Setting) -> str:
    if setting.default is None or setting.default == () or isinstance(setting.typed or setting.kind, Flag):
        return ""
    value = setting.default
    return f"`{','.join(map(str, value)) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    print(reference(), end="")
