"""Rules of bodies broken on purpose: the proof sees it, in branches that no input takes as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from enclosing import IF, IF_SIZES, LOOP, LOOP_SIZES, SCAN, SCAN_SIZES, build

import onnxprune as op
from onnxprune.labels.label import Label
from onnxprune.operators import control
from onnxprune.operators.context import Step

Patch = pytest.MonkeyPatch

# The inputs that are drawn never take the second branch, and never run the Loop.
ONE_SIDED = (
    IF.replace("bool c)", ")")
    .replace("(float[N,4] x, )", "(float[N,4] x)")
    .replace(
        "h0 = ", "square = Mul(x, x)  least = ReduceMin <keepdims = 0> (square)  c = GreaterOrEqual(least, none)  h0 = "
    )
)
IDLE = LOOP.replace(", int64 trips)", ", int64 asked)").replace("first = ", "trips = Mul(asked, nothing)  first = ")


def one_sided() -> onnx.ModelProto:
    return build(ONE_SIDED, **IF_SIZES, none=np.float32(0))


def either() -> onnx.ModelProto:
    return build(IF, **IF_SIZES)


def loop() -> onnx.ModelProto:
    return build(LOOP, **LOOP_SIZES)


def idle() -> onnx.ModelProto:
    return build(IDLE, **LOOP_SIZES, nothing=np.asarray(0))


def scan() -> onnx.ModelProto:
    return build(SCAN, **SCAN_SIZES)


def started() -> onnx.ModelProto:
    """The first state is not all zeros, so that its order matters."""
    return build(SCAN, **{**SCAN_SIZES, "zero": (2, 6)})


def reversed_labels(labels: Any) -> Any:
    """The same atoms at other positions."""
    return tuple(Label(x.ids.ravel()[::-1].reshape(x.ids.shape).copy(), x.pack) for x in labels)


def mix_up(rule: type, position: int = 0) -> Callable[[Patch], None]:
    """What a marker reads is labelled in the wrong order."""

    def mutate(patch: Patch) -> None:
        right = Step.labels

        def wrong(self: Step, i: int) -> Any:
            found = right(self, i)
            mine = self.node.op == {control.Carry: "BodyCarry", control.Slice: "BodySlice", control.Tie: "BodyTie"}.get(
                rule, {control.Stack: "BodyStack"}.get(rule, "BodyJoin")
            )
            return reversed_labels(found) if mine and i == position else found

        patch.setattr(Step, "labels", wrong)

    mutate.__name__ = f"mix_up_{rule.__name__}_{position}"
    return mutate


def forget_the_recurrence(patch: Patch) -> None:
    """What an iteration gives need not be what the next one gets."""
    patch.setattr(control.Tie, "propagate", lambda self, step: (step.labels(1), step.set(0, step.labels(0))))


def forget_the_other_branch(patch: Patch) -> None:
    patch.setattr(control.Join, "propagate", lambda self, step: (step.labels(1), step.set(0, step.labels(0))))


def forget_the_first_branch(patch: Patch) -> None:
    patch.setattr(control.Join, "propagate", lambda self, step: (step.labels(0), step.set(0, step.labels(1))))


MUTANTS = [
    (forget_the_recurrence, scan),
    (forget_the_recurrence, loop),
    (forget_the_recurrence, idle),
    (forget_the_other_branch, either),
    (forget_the_other_branch, one_sided),
    (forget_the_first_branch, one_sided),
    (mix_up(control.Join, 0), one_sided),
    (mix_up(control.Join, 1), one_sided),
    (mix_up(control.Carry), started),
    (mix_up(control.Carry), idle),
    (mix_up(control.Slice), scan),
    (mix_up(control.Stack), scan),
    (mix_up(control.Stack), idle),
    (mix_up(control.Tie, 0), loop),
    (mix_up(control.Tie, 1), scan),
]


@pytest.mark.parametrize(("mutant", "model"), MUTANTS, ids=[f"{m.__name__}-{f.__name__}" for m, f in MUTANTS])
def test_a_broken_rule_is_caught(mutant: Callable[[Patch], None], model: Callable[[], onnx.ModelProto]) -> None:
    assert op.prune(model(), ratio=0.5, latency=False).report.exactness.passed
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        with pytest.raises((op.ValidationError, op.BudgetError)) as caught:
            op.prune(model(), ratio=0.5, latency=False)
        assert isinstance(caught.value, op.ValidationError)


def test_a_branch_that_no_input_can_run_is_named() -> None:
    """The original fails there at these sizes: nothing can be said, and the report says which."""
    text = ONE_SIDED.replace(
        "b = MatMul(h, we)",
        "wrong = Reshape(x, seven)  r = ReduceSum <keepdims = 0> (wrong)  b0 = MatMul(h, we)  b = Add(b0, r)",
    )
    model = build(text, **IF_SIZES, none=np.float32(0), seven=np.asarray([7, 7]))
    found = op.prune(model, ratio=0.5, latency=False).report.exactness
    assert found.passed and "the else-branch of If 'z'" in found.note
