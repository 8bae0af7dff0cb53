"""Rules of fused operators broken on purpose: the proof sees it, or onnxruntime refuses the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from fused import cut
from test_classical import finish, floats, start
from test_experts import mixture
from test_packed import on_codes

import onnxprune as op
from onnxprune.operators import attention, classical, experts
from onnxprune.operators.context import Cut, Step

Patch = pytest.MonkeyPatch


def scaled() -> onnx.ModelProto:
    net, x = start()
    y = net.op("Scaler", x, domain="ai.onnx.ml", offset=floats(10), scale=floats(10, 1))
    table = np.random.default_rng(2).standard_normal(20).astype(np.float32).tolist()
    y = net.op("LinearRegressor", y, domain="ai.onnx.ml", coefficients=table, intercepts=floats(2), targets=2)
    return finish(net, y, wide=2)


def forget_the_scale(patch: Patch) -> None:
    patch.setattr(attention.QAttention, "set_scale", lambda self, cut, before, after: None)


def forget_the_gate(patch: Patch) -> None:
    """The two halves of a fused gate are taken for neighbours where they interleave."""
    right = Step.attr
    patch.setattr(
        Step, "attr", lambda self, name, default=None: 2 if name == "swiglu_fusion" else right(self, name, default)
    )


def let_experts_go(patch: Patch) -> None:
    patch.setattr(Step, "freeze", lambda self, labels, code, detail: None)
    patch.setattr(Step, "fix", lambda self, labels, axis, code, detail: None)


def forget_the_second_layer(patch: Patch) -> None:
    right = experts.override

    def wrong(step: Step, chain: list[str], labels: Any, axes: Any) -> None:
        if axes == (2,):
            return
        right(step, chain, labels, axes)

    patch.setattr(experts, "override", wrong)


def swap_inner_channels(patch: Patch) -> None:
    right = experts.override

    def wrong(step: Step, chain: list[str], labels: Any, axes: Any) -> None:
        if axes == (2,):
            labels = tuple(type(x)(x.ids[..., ::-1].copy(), x.pack) for x in labels)
        right(step, chain, labels, axes)

    patch.setattr(experts, "override", wrong)


def keep_the_coefficients(patch: Patch) -> None:
    patch.setattr(classical.Linear, "rewrite", lambda self, cut: None)


def keep_the_first_features(patch: Patch) -> None:
    right = Cut.keep

    def wrong(self: Cut, name: str, axis: int) -> Any:
        keep = right(self, name, axis)
        return None if keep is None else np.sort(keep)[::-1]

    patch.setattr(Cut, "keep", wrong)


MUTANTS: list[tuple[Callable[[Patch], None], Callable[[], onnx.ModelProto]]] = [
    (forget_the_scale, on_codes),
    (forget_the_gate, lambda: mixture(activation="swiglu", fusion=1)),
    (let_experts_go, mixture),
    (forget_the_second_layer, mixture),
    (swap_inner_channels, mixture),
    (keep_the_coefficients, scaled),
    (keep_the_first_features, scaled),
]


NEWEST_RUNTIME = {forget_the_gate}
"""Mutants of operators that an older onnxruntime does not know."""


@pytest.mark.parametrize(
    ("mutant", "model"),
    [
        pytest.param(m, model, id=m.__name__, marks=[pytest.mark.newest_runtime] * (m in NEWEST_RUNTIME))
        for m, model in MUTANTS
    ],
)
def test_a_broken_rule_is_caught(mutant: Callable[[Patch], None], model: Callable[[], onnx.ModelProto]) -> None:
    assert cut(model()).report.exactness.passed
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        with pytest.raises(op.ValidationError):
            cut(model())
