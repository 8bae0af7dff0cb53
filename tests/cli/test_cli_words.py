"""Units, and plain words for every reason."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest

import onnxprune
from onnxprune.labels.atoms import Atoms, Reason
from onnxprune.report import numbers, reasons
from onnxprune.report.console import Screen


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1.00 K"), (9_999, "10.0 K"), (36_864, "36.9 K"), (999_499, "999 K"),
     (999_500, "1.00 M"), (25_600_000, "25.6 M"), (4_110_000_000, "4.11 G"), (1.7e12, "1.70 T"), (5e16, "50000 T")],
)  # fmt: skip
def test_counts(value, text) -> None:
    assert numbers.count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(512, "512 B"), (1_092_690, "1.09 MB"), (999_999, "1.00 MB"), (4_200_000_000, "4.20 GB")]
)
def test_sizes(value, text) -> None:
    assert numbers.size(value) == text


@pytest.mark.parametrize(
    ("before", "after", "text"), [(100, 56, "44.0 %"), (5, 5, "0 %"), (10, 11, "+10.0 %"), (0, 0, numbers.DASH)]
)
def test_share_removed(before, after, text) -> None:
    assert numbers.removed(before, after) == text


@pytest.mark.parametrize(
    ("median", "spread", "text"),
    [
        (1.518, 0.031, "1.52 ± 0.03 ms"),
        (123.4, 4.4, "123 ± 4 ms"),
        (0.0521, 0.001, "0.0521 ± 0.0010 ms"),
        (math.nan, 0, numbers.DASH),
    ],
)
def test_milliseconds(median, spread, text) -> None:
    assert numbers.milliseconds(median, spread) == text


def test_names_keep_their_end() -> None:
    assert numbers.shorten("/layer4/conv2/Conv", 12) == "…/conv2/Conv"
    assert numbers.shorten("short", 12) == "short"
    assert numbers.shorten("a/MatMul;a/BiasAdd;a/bias", 50) == "a/MatMul;…"


def test_every_reason_has_words_and_no_words_are_without_a_reason() -> None:
    assert set(reasons.BARRIERS) == set(Reason)


def test_every_reason_has_an_emitter_and_no_emitter_spells_a_code_out() -> None:
    root = Path(onnxprune.__file__).parent
    emitted, spelled = set(), []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        if place == "report/reasons.py" or place.startswith(("settings", "allocation/settings")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason":
                emitted.add(node.attr)
            text = node.value if isinstance(node, ast.Constant) else None
            if (
                isinstance(text, str)
                and "-" in text
                and text.partition(":")[0] in set(Reason)
                and place != "labels/atoms.py"
            ):
                spelled.append(f"{place}:{node.lineno} {text!r}")
    assert {reason.name for reason in Reason} == emitted
    assert not spelled


def test_a_rule_of_another_package_may_give_a_code_of_its_own() -> None:
    atoms = Atoms()
    atoms.freeze(np.arange(2), atoms.barrier("packed-by-acme", "n", "Acme", "why"))
    assert atoms.barriers[0].code == "packed-by-acme"
    assert reasons.short("packed-by-acme: why") == "packed-by-acme (why)"


@pytest.mark.parametrize("code", sorted(reasons.BARRIERS))
def test_every_code_has_words(code) -> None:
    entry = reasons.BARRIERS[code]
    assert 0 < len(entry.short) <= 36
    assert (entry.why.endswith(".") and not entry.advice) or entry.advice.endswith(".")
    assert reasons.short(f"{code}: detail") == entry.short
    assert reasons.in_words(f"{code}: detail") == entry.why


def test_unknown_codes_speak_for_themselves() -> None:
    assert reasons.short("new-code") == reasons.in_words("new-code") == "new-code"
    assert reasons.short("new-code: what it met") == "new-code (what it met)"
    assert reasons.short("some free text: with a colon") == "some free text: with a colon"
    assert reasons.advice("new-code") == ""


def test_tally_counts_and_folds() -> None:
    told = ["graph-output"] * 3 + ["normalised: /a", "normalised: /b", "c1", "c2", "c3"]
    assert reasons.tally(told, max_reasons=2) == "is a model output (3), normalised over these channels (2), other (3)"
    assert reasons.tally([""]) == "not chosen, or less than one unit (1)"


def test_long_names_of_layers_are_cut_in_warnings_and_paths_are_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = ";".join(f"MobileNet/Conv2d_{number}/BiasAdd" for number in range(20))
    file = tmp_path / ("long" * 20 + ".onnx")
    Screen.open().warn(f"{name} needs more samples than {file} has")
    said = capsys.readouterr().err
    assert str(file) in said and name not in said and "MobileNet/Conv2d_0" in said and "Conv2d_19/BiasAdd needs" in said
