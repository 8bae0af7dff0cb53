"""The numbers that integer weights stand for, so that they are scored by size and not by code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import ModelError
from onnxprune.graph.view import Graph, Node
from onnxprune.graph.weights_of import weight_of
from onnxprune.operators.registry import Read, rule_of


def is_setting(graph: Graph, name: str) -> bool:
    """Whether a weight is only read as scale, zero point or order of codes, and says nothing by itself."""
    readers = graph.consumers.get(name, ())
    return bool(readers) and all(i in rule_of(node).settings for node, i in readers)


def real_values(graph: Graph, name: str, codes: NDArray[Any]) -> NDArray[Any]:
    """The weight ``name`` as numbers, float32, by the first node that reads it as codes.

    Codes whose scale or zero point is not a constant, and weights that no such node reads, are returned as they are.
    """
    for node, position in graph.consumers.get(name, ()):
        numbers = _numbers(graph, node, position, codes)
        if numbers is not None:
            return numbers
    return codes


def numbers_at(graph: Graph, node: Node, position: int) -> NDArray[Any] | None:
    """The weight at an input of a node, codes as the numbers that they stand for; None for activations."""
    value = weight_of(graph, node.inputs[position])
    if value is None:
        return None
    numbers = _numbers(graph, node, position, value)
    return value if numbers is None else numbers


def _numbers(graph: Graph, node: Node, position: int, codes: NDArray[Any]) -> NDArray[Any] | None:
    """The numbers that codes stand for at an input of a node; None where it reads no codes there."""
    try:
        return rule_of(node).numbers(node, position, codes, _constants(graph, node))
    except (LookupError, TypeError, ValueError) as error:
        raise ModelError(
            f"the scale or zero point of node {node.label!r} ({node.op}) does not fit {node.inputs[position]!r} "
            f"{list(codes.shape)}: {error}",
            hint="The file is damaged; export it again.",
        ) from error


def decoder(graph: Graph, node: Node, position: int) -> Callable[[NDArray[Any]], NDArray[Any]] | None:
    """What turns values of an activation that a node reads as codes into numbers; None where they are numbers."""
    read, rule = _constants(graph, node), rule_of(node)
    if rule.numbers(node, position, np.zeros((1,) * 4, np.float32), read) is None:
        return None

    def decode(codes: NDArray[Any]) -> NDArray[Any]:
        numbers = rule.numbers(node, position, codes, read)
        return codes if numbers is None else numbers

    return decode


def _constants(graph: Graph, node: Node) -> Read:
    def read(i: int) -> NDArray[Any] | None:
        name = node.inputs[i] if 0 <= i < len(node.inputs) else ""
        return weight_of(graph, name) if name else None

    return read
