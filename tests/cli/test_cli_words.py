"""Units, and plain words for every reason."""

from __future__ import annotations

import math

import pytest

from onnxprune.report import numbers, reasons


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
    assert reasons.tally(told, most=2) == "is a model output (3), normalised over these channels (2), other (3)"
    assert reasons.tally([""]) == "not asked, or less than one unit (1)"
