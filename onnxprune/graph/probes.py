"""Sizes of dynamic dimensions and probe shapes."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxprune.errors import ModelError, UsageError, nearest
from onnxprune.graph.view import Graph
from onnxprune.io.elements import DTYPES

_IMAGE_SIZE = 224  # what classifiers of photographs are exported with
_MAP_SIZE = 64  # for other maps: large enough to survive five halvings
_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model: its name, numpy dtype (strings: object) and shape.

    A dimension is a size, the name of a dynamic dimension, or None for an unnamed one. onnxruntime reports an input of
    unknown rank as the empty shape, like a scalar; ``scalar`` is True where the model declares a scalar.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    scalar: bool = False


Key = str | tuple[str, int]
"""An open dimension: its name, or (input, axis) of one without a name."""
Sizes = Mapping[Key, int]
Binding = dict[str, tuple[int, ...]]


class Dimensions:
    """The open dimensions of a model's inputs: their names and places, their kinds, and shapes from sizes.

    Args:
        specs: the inputs.
        overrides: whole shapes by input name, which also fix the rank of an input without one.

    Attributes:
        places: positions of each open dimension: {key: [(input, axis)]}.
        fixed: sizes that the overrides give.

    Raises:
        UsageError: an override for an unknown input, of a wrong rank, with a size below 1, against a static dimension,
            or two overrides that give one dimension two sizes.
    """

    def __init__(self, specs: Sequence[InputSpec], overrides: Mapping[str, Sequence[int]] | None = None) -> None:
        by_name = {spec.name: spec for spec in specs}
        self.fixed: dict[Key, int] = {}
        for name, sizes in (overrides or {}).items():
            if name not in by_name:
                raise UsageError(
                    f"input shape for {name!r}: the model has no input of this name", hint=nearest(name, by_name)
                )
            by_name[name] = _bind_override(by_name[name], [int(size) for size in sizes], self.fixed)
        self.specs = list(by_name.values())
        self.places: dict[Key, list[tuple[str, int]]] = {}
        for spec in self.specs:
            for axis, dim in enumerate(spec.shape):
                if not isinstance(dim, int):
                    self.places.setdefault(dim or (spec.name, axis), []).append((spec.name, axis))
        names = [key for key in self.places if isinstance(key, str)]
        self._sums = {key: tree for key in names if (tree := _formula(key)) is not None}

    def guess(self, batch: int, sequence: int) -> dict[Key, int]:
        """Return a size for every open dimension: a given one, else one suggested by its name and its place."""
        sizes = {key: _guess(*self._first(key), batch, sequence) for key in self.places}
        return self.completed({**self.with_totals({**sizes, **self.fixed}), **self.fixed}, self.fixed)

    def with_totals(self, sizes: Sizes) -> dict[Key, int]:
        """Set total lengths to the sum of past and present, where dimensions have such names."""
        result = dict(sizes)
        for key in self.places:
            name = key.removeprefix("total_") if isinstance(key, str) else key
            if name != key and name in sizes and f"past_{name}" in sizes:
                result[key] = sizes[name] + sizes[f"past_{name}"]
        return result

    def completed(self, sizes: Sizes, fixed: Sizes | None = None) -> dict[Key, int]:
        """Compute sums of other dimensions, unless they are ``fixed``."""
        named_sizes: dict[Key, int] = {k: n for k, n in sizes.items() if isinstance(k, str) and k not in self._sums}
        sums = {key: _evaluate(tree, named_sizes) for key, tree in self._sums.items() if key not in (fixed or {})}
        return {**sizes, **{key: size for key, size in sums.items() if size is not None and size > 0}}

    def is_sum(self, key: Key, sizes: Sizes) -> bool:
        """Return whether a dimension is a sum of others."""
        named_sizes: dict[Key, int] = {k: n for k, n in sizes.items() if isinstance(k, str) and k not in self._sums}
        return key in self._sums and _evaluate(self._sums[key], named_sizes) is not None

    def shapes(self, sizes: Sizes) -> Binding:
        """Return a full shape for every input."""
        return {
            spec.name: tuple(d if isinstance(d, int) else sizes[d or (spec.name, a)] for a, d in enumerate(spec.shape))
            for spec in self.specs
        }

    def kind(self, key: Key) -> str:
        """Return the kind of a dimension: ``batch``, ``sequence`` or ``extent`` (of a map)."""
        return _kind(*self._first(key))

    def extents(self) -> list[list[Key]]:
        """Return open extents of one input, where there are several: maps are mostly square."""
        keys = ([d or (s.name, a) for a, d in enumerate(s.shape) if not isinstance(d, int)] for s in self.specs)
        return [open_extents for dims in keys if len(open_extents := [k for k in dims if self.kind(k) == "extent"]) > 1]

    def _first(self, key: Key) -> tuple[InputSpec, int]:
        name, axis = self.places[key][0]
        return next(spec for spec in self.specs if spec.name == name), axis


def bind_shapes(
    specs: Sequence[InputSpec], *, batch: int, sequence: int, overrides: Mapping[str, Sequence[int]]
) -> Binding:
    """Return a full shape for every input, the same size wherever the same dynamic dimension is named.

    Sizes come, in this order, from ``overrides`` (whole shapes by input name; they bind the names they meet for the
    other inputs too), from a dimension's name (batch, sequence, sums of other names), from its place: a leading one is
    ``batch``, so is the middle one of three where the others are fixed (a state), later ones are ``sequence`` in inputs
    of rank 2 and 3 and a map's extent (224 for images of 1, 3 or 4 channels, else 64) in inputs of rank 4 and more.

    Raises:
        UsageError: an override that does not fit, see :class:`Dimensions`.
    """
    dimensions = Dimensions(specs, overrides)
    return dimensions.shapes(dimensions.guess(batch, sequence))


def inner_sample_axes(specs: Sequence[InputSpec]) -> dict[str, int]:
    """Return the axes of the samples of inputs that have them elsewhere than in front: {input: axis, 1 or more}.

    Such are the states of recurrent nets, [layers, samples, size], and caches of several layers in one tensor. Their
    leading size is fixed, and another dimension is called like the samples of other inputs, or is open where a state's
    samples are.
    """
    leading = {spec.shape[0] for spec in specs if spec.shape and not isinstance(spec.shape[0], int)}

    def is_batch(spec: InputSpec, axis: int) -> bool:
        dim = spec.shape[axis]
        if isinstance(dim, str):
            return dim in leading or "batch" in dim.lower()
        return dim is None and bool(leading) and _kind(spec, axis) == "batch"

    states = (spec for spec in specs if spec.shape and isinstance(spec.shape[0], int))
    places = {spec.name: [a for a in range(1, len(spec.shape)) if is_batch(spec, a)] for spec in states}
    return {name: axes[0] for name, axes in places.items() if len(axes) == 1}


SampleAxes = Mapping[str, int | None]
"""Axis of the samples by input; None for one that has no samples; an input that is not there has them in front."""


def sample_axes(specs: Sequence[InputSpec]) -> SampleAxes:
    """Return the axis of the samples of every input.

    Where the batch is open, an input with a fixed leading size has them elsewhere or none. Where it is fixed, states of
    a recurrent net cannot be told from other inputs if their two leading sizes are equal: they count as having none.
    """
    states = inner_sample_axes(specs)
    is_open = any(spec.shape and not isinstance(spec.shape[0], int) for spec in specs)

    def axis(spec: InputSpec) -> int | None:
        if spec.name in states or not spec.shape:
            return None if spec.scalar else states.get(spec.name, 0)
        is_unclear = len(specs) > 1 and len(spec.shape) > 2 and spec.shape[0] == spec.shape[1] != 1
        return None if isinstance(spec.shape[0], int) and (is_open or is_unclear) else 0

    return {spec.name: axis(spec) for spec in specs}


def _bind_override(spec: InputSpec, sizes: list[int], bound: dict[Key, int]) -> InputSpec:
    """Check one override against the input's own shape, bind its dimensions, and return the input with a rank."""
    stated, declared = ",".join(map(str, sizes)), format_shape(spec.shape)
    # the empty shape may be an unknown rank, which allows everything
    if spec.shape and len(sizes) != len(spec.shape):
        raise UsageError(
            f"input shape {spec.name}={stated} has {len(sizes)} sizes; the input has {len(spec.shape)}: {declared}"
        )
    for axis, size in enumerate(sizes):
        dim = spec.shape[axis] if spec.shape else None
        key = dim if isinstance(dim, str) else (spec.name, axis)
        if size < 1:
            raise UsageError(f"input shape {spec.name}={stated}: sizes must be 1 or more, axis {axis} is {size}")
        if isinstance(dim, int) and dim != size:
            raise UsageError(
                f"input shape {spec.name}={stated}: axis {axis} is fixed to {dim} in the model, not {size}",
                hint=f"The input is {declared}; only its named or '?' dimensions can be chosen.",
            )
        if not isinstance(dim, int) and bound.setdefault(key, size) != size:
            raise UsageError(f"input shape {spec.name}={stated}: {dim!r} is {size} here, {bound[key]} in another shape")
    return spec if spec.shape else replace(spec, shape=(None,) * len(sizes))


def _formula(dim: str) -> ast.expr | None:
    """Parse the arithmetic in a dimension's name, such as ``past_length + length``; None when it is a plain name."""
    try:
        tree = ast.parse(dim, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if isinstance(tree, ast.BinOp) else None


def _evaluate(tree: ast.expr | None, bound: Sizes) -> int | None:
    """Evaluate a dimension's arithmetic; None when a name is unbound or an operator is not one of + - * //."""
    if isinstance(tree, ast.Name):
        return bound.get(tree.id)
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.BinOp) and (apply := _ARITHMETIC.get(type(tree.op))):
        left, right = _evaluate(tree.left, bound), _evaluate(tree.right, bound)
        if left is None or right is None or (isinstance(tree.op, ast.FloorDiv) and right == 0):
            return None
        return apply(left, right)
    return None


def _kind(spec: InputSpec, axis: int) -> str:
    """Return the kind of a dynamic dimension, from its name and its place."""
    dim, rank = spec.shape[axis], len(spec.shape)
    name = dim.lower() if isinstance(dim, str) else ""
    if "batch" in name:
        return "batch"
    if "seq" in name or "token" in name:
        return "sequence"
    # The state of a recurrent net: [layers, samples, size], where one layer might as well be one sample.
    state = axis == 1 and rank == 3 and all(isinstance(n, int) and n > 1 for n in (spec.shape[0], spec.shape[2]))
    if axis == 0 or state:
        return "batch"
    cache = any(word in spec.name.lower() for word in ("past", "cache", "present"))
    return "sequence" if rank <= 3 or cache else "extent"


def _guess(spec: InputSpec, axis: int, batch: int, sequence: int) -> int:
    """Return a size for a dynamic dimension."""
    kind = _kind(spec, axis)
    return batch if kind == "batch" else sequence if kind == "sequence" else _extent(spec)


def _extent(spec: InputSpec) -> int:
    """Return the extent of a map: a fixed one of the same input, 224 for channels of an image, else a small one."""
    rank = len(spec.shape)
    channel_axis = next((a for a in (1, rank - 1) if spec.shape[a] in (1, 3, 4)), None)
    extents = [d for a, d in enumerate(spec.shape) if a not in (0, 1, channel_axis) and isinstance(d, int) and d > 1]
    if extents:
        return extents[0]
    return _IMAGE_SIZE if rank == 4 and channel_axis is not None else _MAP_SIZE


def format_shape(shape: Sequence[int | str | None]) -> str:
    """Format a shape as people write it: ``[N, 3, ?, ?]``."""
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in shape) + "]"


Pair = tuple[tuple[int, int], tuple[int, int]]
_KINDS = ("batch", "sequence", "extent")
# (batch, sequence) of the two probes: a size that differs between them is dynamic, and a constant size is caught.
_SIZES = ((2, 16), (3, 24))
# A batch of 1 is often constant in a graph that declares it free; audio models need longer sequences.
_FALLBACKS = (((1, 16), (1, 24)), ((2, 512), (3, 640)), ((1, 512), (1, 640)), ((1, 16000), (1, 20000)))


def input_specs(graph: Graph) -> list[InputSpec]:
    """Return name, dtype (strings: object) and declared shape of every graph input that is a tensor."""
    specs = []
    for info in graph.proto.graph.input:
        if info.name not in graph.inputs or info.type.WhichOneof("value") != "tensor_type":
            continue
        tensor = info.type.tensor_type
        dtype = DTYPES.get(tensor.elem_type)
        if dtype is None:
            raise ModelError(
                f"input {info.name!r} has the unknown element type {tensor.elem_type}",
                hint="The file is damaged, or newer than the installed onnx: pip install -U onnx ml_dtypes",
            )
        dims = tuple(d.dim_value if d.dim_value > 0 else (d.dim_param or None) for d in tensor.shape.dim)
        specs.append(InputSpec(info.name, dtype, dims, tensor.HasField("shape") and not dims))
    return specs


@dataclass(frozen=True, slots=True)
class OpenSizes:
    """Sizes to try for the open dimensions of a model's inputs."""

    dimensions: Dimensions

    def pairs(self) -> Iterator[Pair]:
        """Return (batch, sequence) at two probes, likeliest first, without pairs that give the same sizes."""
        tried = set()
        for pair in (_SIZES, *_FALLBACKS):
            key = repr([sorted(self.dimensions.guess(*one).items(), key=repr) for one in pair])
            if key not in tried:
                tried.add(key)
                yield pair

    def first(self, pair: Pair) -> dict[Key, int]:
        """Return guessed sizes, and the sizes that the user gave."""
        return self.dimensions.guess(*pair[0])

    def others(self, bound: Sizes, pair: Pair) -> Iterator[dict[Key, int]]:
        """Yield sizes that differ from those of the first probe: of all open dimensions, then of some."""
        batch = pair[0][0] != pair[1][0]
        for kinds in (_KINDS, ("sequence", "extent"), ("batch", "sequence"), ("batch",), ("sequence",), ("extent",)):
            if batch or "batch" not in kinds:
                yield {
                    key: self._other(key, size) if self._counts(key) in kinds else size for key, size in bound.items()
                }

    def _counts(self, key: Key) -> str:
        return self.dimensions.kind(key)

    def _other(self, key: Key, size: int) -> int:
        """Return another size of that kind that the first does not divide: labels that repeat could hide a fault."""
        match self._counts(key):
            case "batch":
                return size + 1
            case "sequence":
                return size + max(1, size // (2 if size < 256 else 4))
        return size + 32  # a map that is halved five times still fits


def open_sizes(graph: Graph, overrides: Mapping[str, Sequence[int]] | None = None) -> OpenSizes:
    """Return the open dimensions of a graph's inputs. Overrides hold for the first probe: the model leaves them open.

    Raises:
        UsageError: an override names no input, has the wrong rank or contradicts a static dimension.
    """
    return OpenSizes(Dimensions(input_specs(graph), overrides))


def beyond(dimensions: Dimensions, first: Sizes, second: Sizes) -> Iterator[dict[Key, int]]:
    """Return sizes of neither probe where the two differ: a single sample, shorter sequences, other maps."""
    for kinds in (_KINDS, ("batch",), ("sequence", "extent")):
        candidate = {
            key: _third(dimensions.kind(key), size, second[key])
            if size != second[key] and dimensions.kind(key) in kinds
            else size
            for key, size in first.items()
        }
        yield dimensions.with_totals(candidate)


def _third(kind: str, first: int, second: int) -> int:
    if kind == "batch":
        return 1 if 1 not in (first, second) else max(first, second) + 2
    if kind == "sequence":
        return max(1, first * 5 // 8) if first > 1 else second + 3
    return first - 32 if first > 64 else second + 32
