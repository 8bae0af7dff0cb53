"""Corrupt the engine on purpose: every mutant must be caught by validation, or raise on the way.

A mutant that passes would mean that nothing looks at what it breaks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net
from oracle import assert_exact_cut

import onnxprune as op
from onnxprune.channels import survivors
from onnxprune.labels import algebra
from onnxprune.labels.atoms import Atoms
from onnxprune.labels.label import Label
from onnxprune.operators import contraction, convolution, elementwise, indexing, movement, normalization
from onnxprune.operators.context import Cut, Step, Table
from onnxprune.operators.movement import Concat, Pad, Reshape, Slice, Split
from onnxprune.pruning import masked

Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]


def model() -> onnx.ModelProto:
    """A bit of everything. Every stage has an output of its own: what follows could make a mistake too small to see."""
    net = Net(17, seed=3)
    x = net.op("Relu", net.norm(net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8), 8))
    gate = net.op("Sigmoid", net.conv(net.op("GlobalAveragePool", x), 8, 8, 1))
    x = net.op("Add", net.op("Mul", x, gate), net.conv(x, 8, 8))
    y = net.conv(net.conv(net.op("Relu", net.conv(x, 8, 16, 1)), 16, 16, group=16), 16, 16, group=2)
    y = net.transpose(net.reshape(y, 0, 2, 8, 6, 6), 0, 2, 1, 3, 4)
    y = net.conv(net.reshape(y, 0, 16, 6, 6), 16, 8, 1)
    left, right = net.split(net.conv(y, 8, 12), [4, 8], 1)
    joined = net.op("Concat", net.conv(x, 8, 6), left, net.slice(right, 2, 8, 1), axis=1)
    joined = net.op("Relu", net.pad(joined, [0, 2, 0, 0, 0, 0, 0, 0]))
    up = net.op("DepthToSpace", net.conv(joined, 18, 16, 1), blocksize=2)
    row = net.transpose(net.reshape(net.conv(up, 4, 6, 3, strides=[4, 4]), 0, 6, 9), 0, 2, 1)
    q, k, v = (net.transpose(net.reshape(net.linear(row, 6, 12), 0, 9, 3, 4), 0, 2, 1, 3) for _ in range(3))
    scores = net.op("Softmax", net.op("MatMul", q, net.transpose(k, 0, 1, 3, 2)), axis=-1)
    z = net.reshape(net.transpose(net.op("MatMul", scores, v), 0, 2, 1, 3), 0, 9, 12)
    z = net.op("Relu", net.linear(z, 12, 10))
    picked = net.op("Add", net.gather(z, [4, 1, 0, 7, 3, 2], 2), net.weight(6))
    total = net.op("Mul", picked, net.op("Tanh", net.op("ReduceSum", z, net.const([2]))))
    flat = net.op("Flatten", total, axis=1)
    hidden = net.op("Softmax", net.linear(flat, 54, 16, gemm=True), axis=-1)
    seen = [net.conv(x, 8, 2, 1), net.conv(y, 8, 2, 1), net.conv(up, 4, 2, 1), net.linear(z, 10, 2), total]
    return net.model(net.linear(hidden, 16, 3, gemm=True), *seen)


MODEL = model()


def test_the_engine_itself_passes() -> None:
    assert_exact_cut(MODEL)


# -- labels ------------------------------------------------------------------------------------------------------------


def swap_two_ids(patch: Patch) -> None:
    """The first label of 16 channels that is stated has two atoms exchanged."""
    stated = Table.set
    done: list[str] = []

    def wrong(self: Table, name: str, labels: Any) -> None:
        if not done and len(labels) == 1 and labels[0].ids.size == 16:
            done.append(name)
            ids = labels[0].ids.copy()
            ids.ravel()[[0, 9]] = ids.ravel()[[9, 0]]
            labels = (Label(ids, labels[0].pack),)
        stated(self, name, labels)

    patch.setattr(Table, "set", wrong)


def shift_every_label(patch: Patch) -> None:
    """Convolutions give their outputs rolled by one."""
    patch.setattr(convolution, "along", lambda ids, axis, rank: combine_along(np.roll(ids, 1), axis, rank))


def combine_along(ids: Any, axis: int, rank: int) -> Label:
    shape = [1] * rank
    shape[axis] = ids.size
    return Label(ids.reshape(shape), axis)


def forget_to_unite(patch: Patch) -> None:
    patch.setattr(Atoms, "unite", lambda self, a, b: None)


def forget_to_freeze(patch: Patch) -> None:
    patch.setattr(Atoms, "freeze", lambda self, ids, barrier: None)


def forget_fixed_axes(patch: Patch) -> None:
    patch.setattr(Atoms, "fix_axis", lambda self, label, axis, barrier: None)


def reverse_a_take(patch: Patch) -> None:
    """Slices, splits and lookups name the mirrored positions."""
    right = algebra.take

    def wrong(atoms: Any, labels: Any, axis: int, index: Any, reason: Any) -> Any:
        label = algebra.covering(labels, axis)
        if label is not None and not label.is_grid:
            index = label.ids.shape[axis] - 1 - index
        return right(atoms, labels, axis, index, reason)

    patch.setattr("onnxprune.operators.context.algebra.take", wrong)


def reverse_a_concatenation(patch: Patch) -> None:
    def wrong(self: Concat, step: Step) -> None:
        operands = [(step.labels(i), step.shape(i)) for i in reversed(range(len(step.node.inputs)))]
        axis = step.axis(0, len(step.out_shape()))
        step.set(0, algebra.concatenate(step.atoms, operands, axis, step.reason, step.node.outputs[0]))

    patch.setattr(Concat, "propagate", wrong)


def wrong_transposition(patch: Patch) -> None:
    """A permutation of five axes is taken for its inverse."""
    right = algebra.transpose
    inverse = lambda perm: np.argsort(perm).tolist() if len(perm) == 4 and perm[1] == 2 else perm  # noqa: E731
    patch.setattr(
        "onnxprune.operators.movement.algebra.transpose",
        lambda labels, perm: right(labels, [0, 1, 2, 4, 3] if len(perm) == 5 else inverse(perm)),
    )


def wrong_blocks(patch: Patch) -> None:
    """DepthToSpace DCR is read as CRD."""
    attr = Step.attr
    patch.setattr(Step, "attr", lambda self, name, default=None: "CRD" if name == "mode" else attr(self, name, default))


# -- rules -------------------------------------------------------------------------------------------------------------


def elementwise_keeps_only_the_first(patch: Patch) -> None:
    def wrong(self: elementwise.Elementwise, step: Step) -> None:
        for i in range(len(step.node.inputs)):
            step.labels(i)
        step.set(0, step.labels(0))

    patch.setattr(elementwise.Elementwise, "propagate", wrong)


def contraction_forgets_its_weight(patch: Patch) -> None:
    """MatMul does not unite what it sums over."""
    right = contraction.contract

    def wrong(step: Step, operands: Any, output: str) -> Any:
        atoms, step.atoms = step.atoms, Atoms(count=step.atoms.count)
        try:
            return right(step, operands, output)
        finally:
            step.atoms = atoms

    patch.setattr(contraction, "contract", wrong)


def batch_normalization_forgets_its_vectors(patch: Patch) -> None:
    def wrong(self: Any, step: Step) -> None:
        for i in range(5):
            step.labels(i)
        step.set(0, step.labels(0))

    patch.setattr(normalization.BatchNorm, "propagate", wrong)


def softmax_is_no_barrier(patch: Patch) -> None:
    patch.setattr(normalization.Softmax, "axes", lambda self, step: [])


def sum_without_masks(patch: Patch) -> None:
    """ReduceSum is not read by the oracle: what is removed still counts there."""
    patch.setattr(normalization.Reduce, "contracted_axes", lambda self, step: [])


# -- rewriting ---------------------------------------------------------------------------------------------------------


def skip_one_gather(patch: Patch) -> None:
    """The second weight that should shrink does not."""
    right, calls = survivors.Survivors.steps, []

    def wrong(self: Any, name: str) -> Any:
        steps = right(self, name)
        calls.append(name)
        return [] if len(calls) == 2 else steps

    patch.setattr(survivors.Survivors, "steps", wrong)


def gather_wrong_positions(patch: Patch) -> None:
    """Every weight keeps as many positions as it should, but the next ones."""
    right = survivors.Survivors.steps

    def wrong(self: Any, name: str) -> Any:
        sizes = self._table.facts.shape(name)
        return [(a, (i + 1) % sizes[a] if i.ndim == 1 else i) for a, i in right(self, name)]

    patch.setattr(survivors.Survivors, "steps", wrong)


def gather_in_the_wrong_order(patch: Patch) -> None:
    """One matrix has its rows reversed."""
    right, done = survivors.Survivors.steps, []

    def wrong(self: Any, name: str) -> Any:
        steps = right(self, name)
        if steps and not done and len(self._table.facts.shape(name)) == 4 and steps[0][1].size > 1:
            done.append(name)
            return [(a, i[::-1]) for a, i in steps]
        return steps

    patch.setattr(survivors.Survivors, "steps", wrong)


def rows_share_their_positions(patch: Patch) -> None:
    """Every row of a grid is gathered at the first row's positions."""
    right = survivors.Survivors.steps

    def wrong(self: Any, name: str) -> Any:
        return [(a, i if i.ndim == 1 else np.broadcast_to(i[:1], i.shape)) for a, i in right(self, name)]

    patch.setattr(survivors.Survivors, "steps", wrong)


def keep_the_group_attribute(patch: Patch) -> None:
    patch.setattr(convolution.Conv, "rewrite", lambda self, cut: None)


def double_the_group_attribute(patch: Patch) -> None:
    right = convolution.Conv.rewrite

    def wrong(self: Any, cut: Cut) -> None:
        set_attr = cut.set_attr
        cut.set_attr = lambda name, value: set_attr(name, value * 2 if name == "group" else value)  # type: ignore[method-assign]
        right(self, cut)

    patch.setattr(convolution.Conv, "rewrite", wrong)


def without_rewriting(*rules: type) -> Mutant:
    """These operators keep their targets, bounds and indices."""

    def mutate(patch: Patch) -> None:
        for rule in rules:
            patch.setattr(rule, "rewrite", lambda self, cut: None)

    return mutate


def slice_from_the_wrong_place(patch: Patch) -> None:
    right = movement._as_range
    wrong = lambda positions, *a: right(positions - (positions.min(initial=1) > 0), *a)  # noqa: E731
    patch.setattr(movement, "_as_range", wrong)


def mask_everything_in_the_oracle(patch: Patch) -> None:
    """The oracle itself: wrong masks must show too, it is no rubber stamp."""
    right = masked._Masks._at_probe
    patch.setattr(masked._Masks, "_at_probe", lambda self, *a: np.zeros_like(right(self, *a)))


def mask_nothing_in_the_oracle(patch: Patch) -> None:
    patch.setattr(masked._Masks, "mask", lambda self, *a: [])


MUTANTS: dict[str, Mutant] = {
    f.__name__: f
    for f in (
        swap_two_ids, shift_every_label, forget_to_unite, forget_to_freeze, forget_fixed_axes, reverse_a_take,
        reverse_a_concatenation, wrong_transposition, wrong_blocks, elementwise_keeps_only_the_first,
        contraction_forgets_its_weight, batch_normalization_forgets_its_vectors, softmax_is_no_barrier,
        sum_without_masks, skip_one_gather, gather_wrong_positions, gather_in_the_wrong_order,
        rows_share_their_positions, keep_the_group_attribute, double_the_group_attribute, slice_from_the_wrong_place,
        mask_everything_in_the_oracle, mask_nothing_in_the_oracle,
    )
}  # fmt: skip
for _rule in (Reshape, Split, Slice, Pad, indexing.Gather):
    MUTANTS[f"{_rule.__name__.lower()}_keeps_its_operand"] = without_rewriting(_rule)


CAUGHT = (op.ValidationError, op.ModelError, AssertionError, ValueError, IndexError)
SEEDS = range(8)
"""Two atoms in each other's place only show when one goes and the other stays: some seed must tell."""


def caught(name: str, run: Callable[[int], object]) -> bool:
    """Whether some seed ends in one of the errors that mean: no such model."""
    for seed in SEEDS:
        with pytest.MonkeyPatch.context() as patch:
            MUTANTS[name](patch)
            try:
                run(seed)
            except CAUGHT:
                return True
    return False


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught_by_the_tool(name: str) -> None:
    """Whatever the mutant does, no model comes out."""
    assert caught(name, lambda seed: op.prune(MODEL, ratio=0.5, criterion="random", seed=seed, latency=False))


BLIND = {"sum_without_masks", "mask_everything_in_the_oracle", "mask_nothing_in_the_oracle"}
"""Mutants of the tool's own oracle leave the cut as it is."""


@pytest.mark.parametrize("name", sorted(MUTANTS.keys() - BLIND))
def test_mutants_are_caught_from_outside(name: str) -> None:
    """The oracle of these tests needs nothing of the tool's validation."""
    assert caught(name, lambda seed: assert_exact_cut(MODEL, seed=seed, validate=False))
