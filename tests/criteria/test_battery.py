"""What holds for every criterion: one finite score per channel, wherever the channel lies, however large its values."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import LAYOUTS, Case, draw, scores

from onnxprune.importance import criteria
from onnxprune.importance.criteria import Maps, needs_of

NAMES = criteria.names()

# The power of the score in the scale of the weights and in that of the maps.
POWERS = {
    "l1": (1, 0),
    "l2": (1, 0),
    "gm": (1, 0),
    "bn": (1, 0),
    "lamp": (0, 0),
    "random": (0, 0),
    "nuclear": (0, 1),
    "hrank": (0, 0),
    "apoz": (0, 0),
    "activation": (0, 1),
    "variance": (2, 2),
    "wanda": (1, 1),
    "obs": (2, 2),
    "ziplm": (1, 1),
    "cosine": (0, 0),
    "snp": (0, 0),
    "gradient": (0, 1),
    "snip": (1, 1),
    "snip-momentum": (1, 1),
    "taylor": (1, 1),
    "fisher": (2, 2),
    "obd": (2, 2),
}
OF_GRADIENTS = ("snip", "snip-momentum", "taylor", "fisher", "obd")
NOTHING_WITHOUT_WEIGHTS = ("l1", "l2", "bn", "lamp", "variance", "wanda", "obs", "ziplm", *OF_GRADIENTS)
NOTHING_WITHOUT_MAPS = ("nuclear", "hrank", "apoz", "activation", "variance", "wanda", "obs", "ziplm", "cosine", "snp")
NOTHING_WITHOUT_MAPS += ("gradient", *OF_GRADIENTS)


def silent(name: str, layout: str) -> bool:
    """Whether the criterion has nothing to say about that layout."""
    return name == "snp" and layout not in ("heads", "pairs")


def asked(names: tuple[str, ...] | list[str] = NAMES) -> list[tuple[str, str]]:
    return [(name, layout) for name in names for layout in LAYOUTS if not silent(name, layout)]


def given(name: str, case: Case) -> np.ndarray:
    found = scores(name, case)
    assert found is not None
    assert found.shape == case.units.shape
    assert np.isfinite(found).all()
    return found


def reordered(case: Case, seed: int) -> np.ndarray:
    """Parts in another order, and the channels within them."""
    rng = np.random.default_rng(seed)
    inside = [rng.permutation(case.units.size // case.parts) for _ in range(case.parts)]
    return np.concatenate([part * len(inside[part]) + inside[part] for part in rng.permutation(case.parts)])


def test_every_criterion_is_in_this_battery() -> None:
    assert set(POWERS) == set(NAMES)


@pytest.mark.parametrize(("name", "layout"), asked())
def test_scores_are_finite_and_tell_channels_apart(name: str, layout: str) -> None:
    found = given(name, draw(layout))
    assert (found >= 0).all()
    assert np.ptp(found) > 0


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if silent("snp", layout)])
def test_attention_has_nothing_to_say_elsewhere(layout: str) -> None:
    assert scores("snp", draw(layout)) is None


@pytest.mark.parametrize(("name", "layout"), asked())
def test_the_order_of_channels_does_not_matter(name: str, layout: str) -> None:
    case = draw(layout, seed=1)
    order = reordered(case, seed=2)
    assert np.allclose(given(name, case.permuted(order)), given(name, case)[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "layout"), asked())
def test_a_scale_is_a_power_of_the_score(name: str, layout: str) -> None:
    case = draw(layout)
    in_weights, in_maps = (1, 1) if (name, layout) == ("snp", "pairs") else POWERS[name]
    assert np.allclose(given(name, case.with_scaled(weights=4.0)), 4.0**in_weights * given(name, case), rtol=1e-9)
    assert np.allclose(given(name, case.with_scaled(maps=4.0)), 4.0**in_maps * given(name, case), rtol=1e-9)


@pytest.mark.parametrize(("name", "layout"), asked(NOTHING_WITHOUT_WEIGHTS))
def test_a_channel_without_weights_is_the_least(name: str, layout: str) -> None:
    case = draw(layout)
    dead = np.isin(case.units, [1])
    found = given(name, replace(case, weights=case.weights * ~dead[:, None, None]))
    assert (found[dead] == 0).all()
    assert (found[~dead] > 0).all()


@pytest.mark.parametrize(("name", "layout"), asked(NOTHING_WITHOUT_MAPS))
def test_a_channel_that_is_always_0_is_the_least(name: str, layout: str) -> None:
    case = draw(layout)
    dead = np.isin(case.units, [1])
    found = given(name, replace(case, maps=case.maps * ~dead[:, None, None]))
    assert (found[dead] == 0).all()
    if name != "cosine":  # whatever has a stand-in is worth nothing there either
        assert (found[~dead] > 0).all()


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
@pytest.mark.parametrize(("name", "layout"), asked())
def test_maps_of_one_value_give_finite_scores(name: str, layout: str, value: float) -> None:
    case = draw(layout)
    given(name, replace(case, maps=np.full_like(case.maps, value)))
    given(name, replace(case, maps=np.full_like(case.maps, value), weights=np.zeros_like(case.weights)))


@pytest.mark.parametrize("scale", [1e-15, 1e15])
@pytest.mark.parametrize(("name", "layout"), asked())
def test_scores_of_large_and_small_float32_are_finite(name: str, layout: str, scale: float) -> None:
    case = draw(layout).with_scaled(scale, scale)
    found = given(name, replace(case, weights=case.weights.astype(np.float32), maps=case.maps.astype(np.float32)))
    assert np.ptp(found) > 0


@pytest.mark.parametrize("name", [n for n in NAMES if n != "snp"])
def test_a_single_channel_has_a_score(name: str) -> None:
    case = draw("dense")
    single = slice(0, 1)
    given(name, Case(case.weights[single], case.maps[:, single], case.units[single], case.classes[single]))


@pytest.mark.parametrize("name", [n for n in NAMES if needs_of(criteria.get(n))])
@pytest.mark.parametrize("layout", ["heads", "pairs"])
def test_without_its_statistic_a_criterion_is_silent(name: str, layout: str) -> None:
    criterion, case = criteria.get(name), draw(layout)
    assert criterion(case.slot(), Maps()) is None
    silenced = [need for need in needs_of(criterion) if criterion(case.slot(), case.statistics(without=need)) is None]
    assert silenced
