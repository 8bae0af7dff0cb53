"""What a user may write as a target, and what is said where it makes no sense."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.errors import UsageError
from onnxprune.targets import UNITS, Target, parse, shares, targets


@pytest.mark.parametrize(
    ("text", "kind", "value", "absolute"),
    [
        ("macs=0.5", "macs", 0.5, False),
        ("params=1", "params", 1.0, False),
        ("params=.4", "params", 0.4, False),
        ("macs=20M", "macs", 20e6, True),
        ("macs=250000", "macs", 250000.0, True),
        ("size=3MB", "size", 3e6, True),
        ("size=1.5 MiB", "size", 1.5 * 2**20, True),
        ("latency=0.6", "latency", 0.6, False),
        ("latency=12ms", "latency", 0.012, True),
        ("latency=800us", "latency", 8e-4, True),
        ("peak-memory=64MB", "peak-memory", 64e6, True),
    ],
)
def test_values(text: str, kind: str, value: float, absolute: bool) -> None:
    found = parse(text)
    assert (found.kind, found.absolute) == (kind, absolute)
    assert found.value == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("mac=0.5", "unknown kind 'mac'", "macs"),
        ("flops=0.5", "unknown kind 'flops'", "peak-memory"),
        ("macs", "not KIND=VALUE", "macs=0.5"),
        ("macs=50%", "percent sign", "macs=0.5;"),
        ("macs=half", "'half' is not a value", "0.5"),
        ("macs=50", "no share", "macs=0.5;"),
        ("size=3", "no share", "size=0.03;"),
        ("macs=0", "out of range", "more than 0"),
        ("macs=-0.5", "out of range", "more than 0"),
        ("macs=nan", "not a value", "0.5"),
        ("macs=1e999", "out of range", "more than 0"),
        ("size=3ms", "'ms' is no unit of size", "MB"),
        ("latency=12", "no share", "latency=0.12;"),
        ("latency=12MB", "'MB' is no unit of latency", "MS"),
        ("latency=", "is not a value", "12ms"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_several_ways_to_give_them() -> None:
    wanted = (Target("macs", 0.5), Target("latency", 0.012, absolute=True))
    assert targets(["macs=0.5", "latency=12ms"]) == wanted
    assert targets({"macs": 0.5, "latency": "12ms"}) == wanted
    assert targets("macs=0.5") == wanted[:1]
    assert targets(["macs=0.5", "macs=0.50"]) == wanted[:1]
    with pytest.raises(UsageError, match="given twice"):
        targets(["macs=0.5", "macs=0.4"])
    with pytest.raises(UsageError, match="no target"):
        targets([])


@given(st.sampled_from(sorted(UNITS)), st.floats(1e-5, 1.0), st.booleans())
def test_a_target_reads_back_as_it_is_written(kind: str, share: float, absolute: bool) -> None:
    target = Target(kind, share * 1e9 if absolute and kind != "latency" else share, absolute)
    again = parse(str(target))
    assert again.kind == target.kind and again.absolute == target.absolute
    assert again.value == pytest.approx(target.value, rel=1e-3)


def test_limits_of_shares_and_amounts() -> None:
    assert Target("macs", 0.5).limit(200) == 100
    assert Target("macs", 50, absolute=True).limit(200) == 50
    assert Target("macs", 0.5).with_limit(50, 200) == Target("macs", 0.25)


def test_shares() -> None:
    assert shares("0.5,0.9, 0.7") == [0.9, 0.7, 0.5]
    for text in ("0.5,2M", "0.5,,0.6", "50"):
        with pytest.raises(UsageError, match="targets"):
            shares(text)
