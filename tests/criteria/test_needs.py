"""How a criterion says which statistics of feature maps it reads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from onnxprune.importance import criteria, statistics
from onnxprune.importance.criteria import Maps, Slot, needs_of


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    for name in ("acme_one", "acme_two", "acme_gram"):
        criteria.unregister(name)


def of_weights(slot: Slot) -> Any:
    return slot.matrix.std(axis=1)


def of_maps(slot: Slot, maps: Maps) -> Any:
    return maps["mean"]


def test_every_need_of_a_built_in_criterion_is_a_statistic() -> None:
    for name in criteria.names():
        assert set(needs_of(criteria.get(name))) <= {*statistics.names(), *statistics.GRADIENTS}
    assert needs_of(criteria.get("l2")) == ()
    assert needs_of(criteria.get("obs")) == ("gram", "square")


def test_a_plain_function_needs_what_its_arguments_say() -> None:
    def with_an_option(slot: Slot, power: float = 2.0) -> Any:
        return slot.matrix.sum(axis=1) ** power

    class OfMaps:
        def __call__(self, slot: Slot, maps: Maps) -> Any:
            return maps["mean"]

    assert needs_of(of_weights) == ()
    assert needs_of(with_an_option) == ()
    assert needs_of(of_maps) == ("moments",)
    assert needs_of(OfMaps()) == ("moments",)
    assert needs_of(partial(of_maps, maps=Maps())) == ()
    assert needs_of(min) == ()  # does not tell its arguments


def test_a_function_can_be_marked_without_a_name() -> None:
    @criteria.needs("gram", "rank")
    def marked(slot: Slot, maps: Maps) -> Any:
        return maps["rank"]

    assert needs_of(marked) == ("gram", "rank")
    assert criteria.register("acme_gram")(marked) is marked
    assert needs_of(criteria.get("acme_gram")) == ("gram", "rank")


def test_a_registered_criterion_needs_what_it_said() -> None:
    criteria.register("acme_one")(lambda slot: slot.matrix.sum(axis=1))
    criteria.register("acme_two", needs=("similarity",))(lambda slot, maps: maps["similarity"].sum(axis=0))
    assert needs_of(criteria.get("acme_one")) == ()
    assert needs_of(criteria.get("acme_two")) == ("similarity",)
