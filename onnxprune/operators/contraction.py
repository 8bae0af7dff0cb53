"""Operators that sum over an axis: MatMul, Gemm, Einsum. All are a product in a space of letters, then a sum."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from math import prod
from typing import Any

import numpy as np

from onnxprune.graph.view import Node
from onnxprune.labels.algebra import Shape, broadcast, known
from onnxprune.labels.label import Label, Labels
from onnxprune.operators.context import Step
from onnxprune.operators.contractions import Form, Pairwise
from onnxprune.operators.factoring import Equation, MatrixProduct, Product
from onnxprune.operators.registry import NewNode, Read, Rule, WithoutAddends, register, with_facts
from onnxprune.operators.sizes import gemm_pairs, matmul_pairs, product


def into_letters(labels: Labels, term: str, letters: str) -> Labels:
    """Map labels of an operand with subscripts ``term`` to a tensor that has every letter as an axis."""
    where = [letters.index(c) for c in term]
    if len(set(term)) != len(term):
        raise ValueError(f"repeated subscript in {term!r}")
    order = sorted(range(len(term)), key=lambda i: where[i])
    result = []
    for label in labels:
        shape = [1] * len(letters)
        for i, axis in enumerate(where):
            shape[axis] = label.ids.shape[i]
        start = -1 if label.is_grid else label.start
        result.append(Label(label.ids.transpose(order).reshape(shape), where[label.pack], start))
    return tuple(result)


def contract(step: Step, operands: Sequence[tuple[Labels, Shape, str]], output: str) -> Labels:
    """Return labels of ``einsum(operands -> output)``: unite in letter space, then reduce to the output's letters."""
    letters = "".join(dict.fromkeys("".join(term for _, _, term in operands) + output))
    rank = len(letters)
    spread: list[tuple[Labels, Shape]] = []
    for labels, shape, term in operands:
        sizes: list[int | None] = [1] * rank
        for c, n in zip(term, shape, strict=True):
            sizes[letters.index(c)] = n
        spread.append((into_letters(labels, term, letters), tuple(sizes)))
    joint = broadcast(step.atoms, spread, rank, step.reason)
    order = [letters.index(c) for c in output]
    result: Labels = ()
    for label in joint:
        output_axes = tuple(a for a in label.axes if letters[a] in output)
        if not output_axes:
            continue
        ids = label.ids if output_axes == label.axes else step.atoms.project(label, output_axes)
        pack = label.pack if label.pack in output_axes else output_axes[-1]
        ids = ids.transpose(order + [a for a in range(rank) if a not in order]).reshape([ids.shape[a] for a in order])
        result = (*result, Label(ids, order.index(pack)))
    return result


def matmul_terms(a: int, b: int) -> tuple[str, str, str]:
    """Return the subscripts of ``numpy.matmul`` for operands of rank ``a`` and ``b``."""
    batch = "abcdefghij"[: max(a, b, 2) - 2]
    left = "k" if a == 1 else batch[len(batch) - (a - 2) :] + "mk"
    right = "k" if b == 1 else batch[len(batch) - (b - 2) :] + "kn"
    out = batch + ("m" if a > 1 else "") + ("n" if b > 1 else "")
    return left, right, out


def letter_macs(terms: Sequence[str], shapes: Sequence[Any]) -> Any:
    """Return the multiply-accumulates of an einsum, one per position in the space of all letters; 0 if unknown."""
    sizes: dict[str, Any] = {}
    for term, shape in zip(terms, shapes, strict=False):
        if shape is None:
            return 0
        # An operand that broadcasts along a letter has size 1 there.
        sizes.update((c, n) for c, n in zip(term, shape, strict=True) if c not in sizes or not np.all(np.equal(n, 1)))
    return prod(sizes.values())


def output_channel_axis(terms: Sequence[str], out: str, weight: int) -> int | None:
    """Return the axis of ``out`` that the weight alone contributes, the last of several; None where there is none."""
    others = "".join(term for i, term in enumerate(terms) if i != weight)
    axes = [axis for axis, c in enumerate(out) if c in terms[weight] and c not in others]
    return axes[-1] if axes else None


class MatMul(Rule):
    """Batched matrix product; the summed axes are united, heads on batch axes are aligned."""

    weights = (0, 1)
    multiplies = True

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of both operands."""
        return matmul_pairs(shapes[0], shapes[1])

    def terms(self, step: Step) -> tuple[str, str, str]:
        """Return the subscripts of the two operands and the output."""
        return self.node_terms(step.node, len(step.shape(0)), len(step.shape(1)))

    def node_terms(self, node: Node, a: int, b: int) -> tuple[str, str, str]:
        """Return the subscripts for operands of rank ``a`` and ``b``."""
        return matmul_terms(a, b)

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Return the size of the product times the size of ``k``."""
        a, b = shapes[:2]
        if a is None or b is None or out is None:
            return 0
        return prod(out) * a[self.node_terms(node, len(a), len(b))[0].index("k")]

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Return the axis that the weight contributes, on either side."""
        a, b = shapes[:2]
        if a is None or b is None:
            return rank - 1
        left, right, out = self.node_terms(node, len(a), len(b))
        return output_channel_axis((left, right), out, weight)

    def propagate(self, step: Step) -> None:
        """Contract over ``k``."""
        left, right, out = self.terms(step)
        operands = [(step.labels(0), step.shape(0), left), (step.labels(1), step.shape(1), right)]
        step.set(0, contract(step, operands, out))

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the axis ``k`` of both operands."""
        left, right, _ = self.terms(step)
        return [(0, (left.index("k"),)), (1, (right.index("k"),))]

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return the product as a form; either operand may be the weight."""
        a, b = shapes[0], shapes[1]
        if a is None or b is None:
            return None
        plain = node.op in ("MatMul", "FusedMatMul", "TransposeMatMul")
        scale = float(node.attrs.get("alpha", 1.0))
        return product_form(self.node_terms(node, len(a), len(b)), shapes, data, plain=plain, scale=scale)

    def infer(self, node: Node, shapes: list[Any], values: Any) -> list[Any] | None:
        """Return the shape of the product, where both operands fit."""
        a, b = shapes[0], shapes[1]
        return None if a is None or b is None else [product(a, b, self.node_terms(node, len(a), len(b)))]


def product_form(
    terms: tuple[str, str, str], shapes: Sequence[Shape | None], data: int, **settings: Any
) -> Form | None:
    """Return a product of two operands as a form; None where shape or letters of the weight do not allow one."""
    weight = known(shapes[1 - data]) if data < 2 else None
    if weight is None:
        return None
    ordered = (terms[data], terms[1 - data], terms[2])
    # A batch axis of size 1 broadcasts: the data may have another size there.
    if any(n == 1 and c in terms[data] and c != "k" for c, n in zip(terms[1 - data], weight, strict=True)):
        return None
    try:
        return Pairwise(ordered, weight, data=data, weight=1 - data, **settings)
    except ValueError:
        return None


class Gemm(Rule):
    """alpha * A' B' + beta * C with optional transposes."""

    weights = (0, 1)
    multiplies = True

    def addends(self, node: Node) -> Sequence[int]:
        """Return C, which is added to the product."""
        return (2,)

    def factors(self, node: Node) -> Sequence[int]:
        """Return A and B."""
        return (0, 1)

    def without(self, node: Node, positions: Collection[int], opset: int) -> WithoutAddends | None:
        """Return the product alone; before opset 11, C was no option."""
        if opset < 11 and not node.domain:
            return None
        product = NewNode(node.op, node.inputs[:2], node.outputs, node.name, node.domain, node.attrs)
        return WithoutAddends([product], {})

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the summed sizes."""
        return gemm_pairs(node, shapes[0], shapes[1])

    def terms(self, step: Step) -> tuple[str, str]:
        """Return the subscripts of A and B."""
        return self.node_terms(step.node)

    @staticmethod
    def node_terms(node: Node) -> tuple[str, str]:
        """Return the subscripts from the attributes."""
        return ("km" if node.attrs.get("transA", 0) else "mk"), ("nk" if node.attrs.get("transB", 0) else "kn")

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Return m * n * k."""
        if shapes[0] is None or shapes[1] is None or out is None:
            return 0
        return prod(out) * shapes[0][self.node_terms(node)[0].index("k")]

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Return the axis of a left weight's rows or of a right weight's columns."""
        return weight

    def propagate(self, step: Step) -> None:
        """Contract, then add C with broadcasting."""
        a, b = self.terms(step)
        product = contract(step, [(step.labels(0), step.shape(0), a), (step.labels(1), step.shape(1), b)], "mn")
        if step.has(2):
            operands: list[tuple[Labels, Shape]] = [(product, step.out_shape()), (step.labels(2), step.shape(2))]
            product = broadcast(step.atoms, operands, 2, step.reason)
        step.set(0, product)

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return shape [m, n], for forms of other domains."""
        a, b = shapes[0], shapes[1]
        if a is None or b is None:
            return [None]
        return [(a[1 if node.attrs.get("transA", 0) else 0], b[0 if node.attrs.get("transB", 0) else 1])]

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the axis ``k`` of both matrices."""
        a, b = self.terms(step)
        return [(0, (a.index("k"),)), (1, (b.index("k"),))]

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return the product as a form; either matrix may be the weight, C is the bias."""
        attrs = node.attrs
        left, right = self.node_terms(node)
        scales = {"scale": float(attrs.get("alpha", 1.0)), "bias_scale": float(attrs.get("beta", 1.0))}
        plain = "activation" not in attrs
        return product_form((left, right, "mn"), shapes, data, bias=2, plain=plain, **scales)


class Einsum(Rule):
    """Einsum without repeated subscripts inside one operand."""

    weights = tuple(range(8))
    multiplies = True

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of every letter."""
        terms = node.attrs["equation"].replace(" ", "").split("->")[0].split(",")
        sizes: dict[str, int] = {}
        for term, shape in zip(terms, shapes, strict=True):
            if "." in term:
                return
            for letter, n in zip(term, shape, strict=True):
                yield (n, sizes[letter]) if 1 not in (n, sizes.setdefault(letter, n)) else (n, n)

    def terms(self, step: Step) -> tuple[list[str], str]:
        """Return the subscripts of every operand and of the output, ellipses expanded to upper-case letters."""
        return self.node_terms(step.node, [len(step.shape(i)) for i in range(len(step.node.inputs))])

    @staticmethod
    def node_terms(node: Node, ranks: Sequence[int]) -> tuple[list[str], str]:
        """Return the subscripts for operands of these ranks."""
        left, arrow, out = node.attrs.get("equation", "").replace(" ", "").partition("->")
        terms = left.split(",")
        num_broadcast = max(
            (r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True) if "..." in t), default=0
        )
        dots = "ABCDEFGHIJ"[:num_broadcast]
        if not arrow:
            plain = left.replace("...", "").replace(",", "")
            out = ("..." if dots else "") + "".join(sorted(c for c in set(plain) if plain.count(c) == 1))
        explicit_terms = []
        for term, rank in zip(terms, ranks, strict=True):
            num_own = rank - len(term.replace("...", ""))
            explicit_terms.append(term.replace("...", dots[num_broadcast - num_own :] if num_own else ""))
        return explicit_terms, out.replace("...", dots)

    def macs(self, node: Node, shapes: Sequence[Any], out: Any) -> Any:
        """Count one per position of all letters; a sum over a single operand multiplies nothing."""
        if len(shapes) < 2 or any(s is None for s in shapes):
            return 0
        terms, _ = self.node_terms(node, [len(s) for s in shapes])
        return letter_macs(terms, shapes)

    def output_axis(self, node: Node, shapes: Sequence[Any], rank: int, weight: int) -> int | None:
        """Return the last axis that the weight contributes."""
        if any(s is None for s in shapes):
            return rank - 1
        terms, out = self.node_terms(node, [len(s) for s in shapes])
        return output_channel_axis(terms, out, weight)

    def propagate(self, step: Step) -> None:
        """Contract over the letters that are missing in the output."""
        terms, out = self.terms(step)
        if any(len(set(t)) != len(t) for t in terms):
            return
        step.set(0, contract(step, [(step.labels(i), step.shape(i), t) for i, t in enumerate(terms)], out))

    def contracted_axes(self, step: Step) -> list[tuple[int, tuple[int, ...]]]:
        """Return the axes of every operand whose letters are missing in the output."""
        terms, out = self.terms(step)
        return [(i, tuple(a for a, c in enumerate(t) if c not in out)) for i, t in enumerate(terms)]

    def form(self, node: Node, shapes: list[Shape | None], data: int) -> Form | None:
        """Return the product of two operands without an ellipsis as a form."""
        left, arrow, out = node.attrs.get("equation", "").replace(" ", "").partition("->")
        terms = left.split(",")
        if len(terms) != 2 or not arrow or "." in left + out:
            return None
        return product_form((terms[0], terms[1], out), shapes, data)


class FusedMatMul(MatMul):
    """onnxruntime's FusedMatMul: MatMul with transposed operands."""

    def agreements(self, node: Node, shapes: Sequence[Any], read: Read) -> Iterable[tuple[Any, Any]]:
        """Return the sizes of both operands, either of which may be transposed."""
        a, b = list(shapes[0]), list(shapes[1])
        if node.attrs.get("transA", 0):
            a[-2:] = a[:-3:-1]
        if node.attrs.get("transB", 0):
            b[-2:] = b[:-3:-1]
        return matmul_pairs(a, b)

    def node_terms(self, node: Node, a: int, b: int) -> tuple[str, str, str]:
        """Return subscripts with the last two axes of either operand swapped on request."""
        left, right, out = matmul_terms(a, b)
        # Neither transpose applies to a vector.
        if node.attrs.get("transA", 0) and a > 1:
            left = left[:-2] + left[-1] + left[-2]
        if node.attrs.get("transB", 0) and b > 1:
            right = right[:-2] + right[-1] + right[-2]
        # A batch transpose moves the first axis behind the other batch axes, after the swap of the last two.
        if node.attrs.get("transBatchA", 0) and a > 2:
            left = left[-2] + left[:-2] + left[-1]
        if node.attrs.get("transBatchB", 0) and b > 2:
            right = right[-2] + right[:-2] + right[-1]
        return left, right, out

    def infer(self, node: Node, shapes: list[Shape | None], values: list[Any]) -> list[Shape | None]:
        """Return the shape of the product."""
        a, b = shapes[0], shapes[1]
        return [None if a is None or b is None else product(a, b, self.node_terms(node, len(a), len(b)))]


register("", "MatMul", rule=with_facts(MatMul(), factoring=Product()))
register("", "Gemm", rule=with_facts(Gemm(), factoring=MatrixProduct()))
register("", "Einsum", rule=with_facts(Einsum(), factoring=Equation()))
register("com.microsoft", "FusedMatMul", rule=with_facts(FusedMatMul(), factoring=Product()))
register("com.microsoft", "FusedMatMulActivation", "TransposeMatMul", rule=FusedMatMul())
register("com.microsoft", "FusedGemm", rule=Gemm())
