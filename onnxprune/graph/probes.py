"""Probe sizes: concrete shapes for inputs with dynamic dimensions, used for analysis and validation only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from onnxprune.errors import ModelError
from onnxprune.graph.binding import Dimensions, InputSpec, Key, Sizes
from onnxprune.graph.view import Graph
from onnxprune.model.elements import DTYPES

Pair = tuple[tuple[int, int], tuple[int, int]]
_KINDS = ("batch", "sequence", "extent")
# (batch, sequence) of the two probes: what differs between them is dynamic, and a baked-in size is caught.
_SIZES = ((2, 16), (3, 24))
# A batch of 1 is often baked into a graph that declares it free; audio models want longer sequences.
_FALLBACKS = (((1, 16), (1, 24)), ((2, 512), (3, 640)), ((1, 512), (1, 640)), ((1, 16000), (1, 20000)))


def input_specs(graph: Graph) -> list[InputSpec]:
    """Name, dtype (strings: object) and declared shape of every graph input that is a tensor."""
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
        """(batch, sequence) at two probes, likeliest first, those that come to the same left out."""
        seen = set()
        for pair in (_SIZES, *_FALLBACKS):
            key = repr([sorted(self.dimensions.guess(*one).items(), key=repr) for one in pair])
            if key not in seen:
                seen.add(key)
                yield pair

    def first(self, pair: Pair) -> dict[Key, int]:
        """Guesses, and what the user gave."""
        return self.dimensions.guess(*pair[0])

    def others(self, bound: Sizes, pair: Pair) -> Iterator[dict[Key, int]]:
        """Other sizes than those of the first probe: of all open dimensions, then of some."""
        batch = pair[0][0] != pair[1][0]
        for kinds in (_KINDS, ("sequence", "extent"), ("batch", "sequence"), ("batch",), ("sequence",), ("extent",)):
            if batch or "batch" not in kinds:
                yield {
                    key: self._other(key, size) if self._counts(key) in kinds else size for key, size in bound.items()
                }

    def _counts(self, key: Key) -> str:
        return self.dimensions.kind(key)

    def _other(self, key: Key, size: int) -> int:
        """Another size of that kind: none that the first divides, where labels that repeat could hide a mistake."""
        match self._counts(key):
            case "batch":
                return size + 1
            case "sequence":
                return size + max(1, size // (2 if size < 256 else 4))
        return size + 32  # what is halved five times on the way still fits


def open_sizes(graph: Graph, overrides: Mapping[str, Sequence[int]] | None = None) -> OpenSizes:
    """The open dimensions of a graph's inputs. Overrides hold for the first probe: the model leaves them open still.

    Raises:
        UsageError: an override names no input, has the wrong rank or contradicts a static dimension.
    """
    return OpenSizes(Dimensions(input_specs(graph), overrides))


def beyond(dimensions: Dimensions, first: Sizes, second: Sizes) -> Iterator[dict[Key, int]]:
    """Sizes that neither of two probes has where these differ: a single sample, shorter sequences, other maps."""
    for kinds in (_KINDS, ("batch",), ("sequence", "extent")):
        wish = {
            key: _third(dimensions.kind(key), size, second[key])
            if size != second[key] and dimensions.kind(key) in kinds
            else size
            for key, size in first.items()
        }
        yield dimensions.with_totals(wish)


def _third(kind: str, first: int, second: int) -> int:
    if kind == "batch":
        return 1 if 1 not in (first, second) else max(first, second) + 2
    if kind == "sequence":
        return max(1, first * 5 // 8) if first > 1 else second + 3
    return first - 32 if first > 64 else second + 32
