"""The weights of a model block by block, each with the tensor that the block makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnxprune.gradients.static import StaticGraph


@dataclass(frozen=True, slots=True)
class Block:
    """A residual block, a stage, or the head of a model.

    Attributes:
        target: the tensor that it makes; empty for the head, which makes the outputs.
        weights: the weights in it.
    """

    target: str
    weights: Sequence[str]


def blocks_of(graph: StaticGraph, targets: Iterable[str], weights: Iterable[str]) -> list[Block]:
    """Return the blocks of a model: between two targets, and behind the last; those without weights are left out.

    Args:
        graph: the model.
        targets: tensors between blocks, in order.
        weights: the weights to train.
    """
    remaining = list(weights)
    blocks = []
    for target in targets:
        reached = _upstream(graph, target)
        blocks.append(Block(target, [w for w in remaining if w in reached]))
        remaining = [w for w in remaining if w not in reached]
    blocks.append(Block("", remaining))
    return [block for block in blocks if block.weights]


def _upstream(graph: StaticGraph, target: str) -> set[str]:
    """Return the tensors that a tensor is computed from."""
    reached = {target}
    for node in reversed(graph.nodes):
        if any(o in reached for o in node.outputs):
            reached.update(i for i in node.inputs if i)
    return reached
