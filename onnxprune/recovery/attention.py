"""Queries and keys: targets of two projections that preserve their product with fewer channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels.survivors import Survivors
from onnxprune.graph.canonical import weight_of
from onnxprune.graph.view import Graph
from onnxprune.importance.slots import ContractionInput, contraction_inputs, in_order, surviving
from onnxprune.labels.label import Ids, Label
from onnxprune.operators.context import Table
from onnxprune.operators.registry import Move, rule_of
from onnxprune.recovery.regression import WORTH, Real, is_validation
from onnxprune.recovery.targets import RecoveryTarget, RecoveryTargets

Array = NDArray[Any]

_MOVES = (Move.SAME, Move.SHAPE, Move.ORDER, Move.SELECT)
# Share of the largest eigenvalue below which a direction is rounding.
_NOTHING = 1e-10


@dataclass(frozen=True, slots=True)
class Side:
    """One operand of a product of activations: positions of its channels in the target tensor of its projection.

    Attributes:
        layer: the projection.
        label: label of the target tensor.
        source: positions of the channels in the original, [heads, d], flat over the label's axes.
        target: positions of the survivors of every head in the pruned tensor.
    """

    layer: RecoveryTarget
    label: Label
    source: Ids
    target: Sequence[Ids]

    def rows(self, value: Array, head: int) -> Array:
        """Return the channels of one head in the original's value, [rows, d]."""
        return _spread(value, self.label.axes)[..., self.source[head]].reshape(-1, self.source.shape[1])


@dataclass(frozen=True, slots=True)
class Pair:
    """Two projections whose outputs are multiplied; ``indices`` are those of the surviving channels of every head."""

    sides: tuple[Side, Side]
    indices: Sequence[Ids]

    @property
    def level(self) -> int:
        """The level at which both are recovered."""
        return self.sides[0].layer.level


@dataclass(slots=True)
class Mixing:
    """Targets of one projection that mix channels of the original.

    Attributes:
        label: label of the target tensor.
        parts: (positions in the original, positions in the pruned tensor, matrix [d, kept]).
    """

    label: Label
    parts: list[tuple[Ids, Ids, Real]] = field(default_factory=list)

    def apply(self, value: Array, cut: Array) -> Array:
        """Return the original's value at the surviving positions, ``cut``, with the mixed channels in their places."""
        axes = self.label.axes
        full, result = _spread(value, axes), _spread(cut, axes).copy()
        for source, target, matrix in self.parts:
            result[..., target] = full[..., source] @ matrix.astype(full.dtype)
        ends = range(-len(axes), 0)
        inner = np.moveaxis(cut, axes, ends).shape
        return np.moveaxis(result.reshape(inner), ends, axes)


def find_pairs(table: Table, component: Ids, after: Survivors, targets: RecoveryTargets) -> list[Pair]:
    """Find the products of two pruned activations whose projections are recovered together.

    Only rearrangements and scalar factors may lie between projection and product. Each projection is mixed once.
    """
    by_name = {layer.path.target: layer for level in targets.levels for layer in level}
    pairs: list[Pair] = []
    visited: set[int] = set()
    mixed: set[tuple[str, int]] = set()
    for site in contraction_inputs(table, component):
        if site.partner is None or site.node.index in visited or after.mask(site.label) is None:
            continue
        visited.add(site.node.index)
        pair = _pair(table, after, site, by_name)
        if pair is None:
            continue
        places = {(s.layer.path.target, int(p)) for s in pair.sides for p in s.source.ravel()}
        if not places & mixed:
            mixed |= places
            pairs.append(pair)
    return pairs


def _pair(table: Table, after: Survivors, site: ContractionInput, targets: Mapping[str, RecoveryTarget]) -> Pair | None:
    assert site.partner is not None
    other, order = site.partner
    atoms = in_order(site.label.ids, site.label.axes)
    width = site.label.ids.shape[site.label.pack]
    mates = [in_order(x.ids, order) for x in table.get(other) if set(x.axes) == set(order)]
    mates = [m for m in mates if m.size == atoms.size]
    if not mates:
        return None
    first, second = (a.reshape(-1, width) for a in (atoms, mates[0]))
    indices = [np.flatnonzero(~removed) for removed in after.removed[first]]
    both = [_side(table, after, *x, indices, targets) for x in ((site.tensor, first), (other, second))]
    if both[0] is None or both[1] is None or both[0].layer.level != both[1].layer.level:
        return None
    return Pair((both[0], both[1]), indices)


def _side(
    table: Table, after: Survivors, name: str, atoms: Ids, indices: Sequence[Ids], targets: Mapping[str, RecoveryTarget]
) -> Side | None:
    origin = _origin(table.graph, name, targets)
    if origin is None:
        return None
    for label in table.get(origin):
        flat = label.ids.ravel()
        order = np.argsort(flat, kind="stable")
        at = np.searchsorted(flat[order], atoms.ravel())
        # Every channel occurs exactly once.
        if at.max() >= flat.size or (flat[order][at] != atoms.ravel()).any() or np.unique(flat).size != flat.size:
            continue
        source = order[at].reshape(atoms.shape)
        place = np.full(flat.size, -1)
        survivors = surviving(after, label).ravel()
        place[survivors] = np.arange(survivors.size)
        target = [place[row[k]] for row, k in zip(source, indices, strict=True)]
        if all((t >= 0).all() for t in target):
            return Side(targets[origin], label, source, target)
    return None


def _origin(graph: Graph, name: str, targets: Mapping[str, RecoveryTarget]) -> str | None:
    """Return the target tensor whose values ``name`` holds, rearranged and multiplied by one number."""
    while name not in targets:
        node = graph.producer.get(name)
        if node is None or node.domain:
            return None
        if rule_of(node).moves in _MOVES:
            name = node.inputs[0]
        elif node.op in ("Mul", "Div"):
            sizes = [None if (w := weight_of(graph, n)) is None else w.size for n in node.inputs]
            if 1 not in sizes or (node.op == "Div" and sizes[1] != 1):
                return None
            name = node.inputs[1 - sizes.index(1)]
        else:
            return None
    return name


def mixings(
    pairs: Sequence[Pair], get: Callable[[str, int], Array], batches: Callable[[Sequence[str]], Sequence[int]]
) -> dict[int, Mixing]:
    """Compute the target mixings of the projections of some pairs, {index of the projection's node: mixing}.

    Args:
        pairs: pairs of query and key projections.
        get: function that returns the value of a tensor of the original for a batch.
        batches: function that returns the batches with values of some tensors; the hold-out batches select.
    """
    result: dict[int, Mixing] = {}
    for pair in pairs:
        batches_of_pair = batches([side.layer.path.target for side in pair.sides])
        if not batches_of_pair:
            continue
        for head, indices in enumerate(pair.indices):
            if not 0 < indices.size < pair.sides[0].source.shape[1]:
                continue
            fit, judge = (
                _products(
                    pair,
                    head,
                    get,
                    [b for k, b in enumerate(batches_of_pair) if is_validation(k, len(batches_of_pair)) == h],
                )
                for h in (False, True)
            )
            both = best_subspace(*fit, indices)
            product = both[0] @ both[1].T
            if logit_error(*judge, product) >= (1.0 - WORTH) * logit_error(
                *judge, np.diag(np.isin(np.arange(len(product)), indices))
            ):
                continue
            for side, matrix in zip(pair.sides, both, strict=True):
                mixing = result.setdefault(side.layer.node.index, Mixing(side.label))
                mixing.parts.append((side.source[head], side.target[head], matrix))
    return result


def _products(pair: Pair, head: int, get: Callable[[str, int], Array], batches: Sequence[int]) -> tuple[Real, Real]:
    """Return the mean products of the channels of both sides of one head, [d, d] each."""
    width = pair.sides[0].source.shape[1]
    sums = [np.zeros((width, width)), np.zeros((width, width))]
    for total, side in zip(sums, pair.sides, strict=True):
        count = 0
        for batch in batches:
            rows = side.rows(get(side.layer.path.target, batch), head).astype(np.float64)
            total += rows.T @ rows
            count += len(rows)
        total /= max(count, 1)
    return sums[0], sums[1]


def best_subspace(queries: Real, keys: Real, indices: Ids) -> tuple[Real, Real]:
    """Return T_q, T_k [d, kept] with q T_q (k T_k)^T nearest to q k^T over all queries and keys, in the mean square.

    With C the mean products of queries and of keys (taken as independent) and U S V^T = C_q^1/2 C_k^1/2:
    T_q T_k^T = C_q^-1/2 U_r S_r V_r^T C_k^-1/2. T_q is rotated so that q T_q is nearest to the surviving queries.
    Eckart & Young, The approximation of one matrix by another of lower rank, Psychometrika 1936, in the metric of
    the data, as Yu et al. (Compressing Transformers: Features Are Low-Rank, but Weights Are Not, AAAI 2023) do.

    Args:
        queries: mean products of the queries, [d, d].
        keys: mean products of the keys, [d, d].
        indices: indices of the surviving channels.
    """
    (root_q, back_q), (root_k, back_k) = _root(queries), _root(keys)
    left_vectors, scale, right_vectors = np.linalg.svd(root_q @ root_k)
    left_vectors, scale, right_vectors = (
        left_vectors[:, : indices.size],
        scale[: indices.size],
        right_vectors[: indices.size].T,
    )
    turn = left_vectors.T @ root_q[:, indices]
    if np.linalg.cond(turn) > 1e4:
        ends = np.linalg.svd(turn)
        turn = ends[0] @ ends[2]
    return back_q @ left_vectors @ turn, back_k @ (right_vectors * scale) @ np.linalg.inv(turn).T


def logit_error(queries: Real, keys: Real, mixing: Real) -> float:
    """Return the mean square of q (I - T) k^T, T [d, d], over queries and keys."""
    difference = np.eye(len(mixing)) - mixing
    return float(np.einsum("ij,ij->", difference.T @ queries @ difference, keys))


def _root(products: Real) -> tuple[Real, Real]:
    """Return C^1/2 and its pseudo-inverse."""
    values, vectors = np.linalg.eigh(products)
    used = values > _NOTHING * max(float(values[-1]), 1e-300)
    roots = np.sqrt(np.where(used, values, 0.0))
    inverse = np.divide(1.0, roots, out=np.zeros_like(roots), where=used)
    return (vectors * roots) @ vectors.T, (vectors * inverse) @ vectors.T


def _spread(value: Array, axes: Sequence[int]) -> Array:
    """Move these axes to the end and merge them into one."""
    moved = np.moveaxis(value, axes, range(-len(axes), 0))
    return moved.reshape(*moved.shape[: moved.ndim - len(axes)], -1)
