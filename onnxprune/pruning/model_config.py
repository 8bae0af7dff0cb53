"""The configuration file of a language model (config.json, genai_config.json) with the sizes after a removal.

Numbers of heads, layers and channels are read off the graph, not off names: a number in a file has to be one that
the original has, or it is the configuration of another model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxprune.channels.analysis import Analysis
from onnxprune.errors import UsageError, argument
from onnxprune.graph import cost
from onnxprune.graph.caches import Cache, find_caches
from onnxprune.graph.values import operands_at
from onnxprune.graph.view import Node
from onnxprune.io import files
from onnxprune.operators.context import Step
from onnxprune.operators.registry import rule_of

KEYS: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "intermediate": ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "decoder_attention_heads", "encoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_size": ("head_dim", "head_size", "d_kv"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "decoder_layers", "encoder_layers"),
}
"""Names of each size, as families of models write them."""
_NESTED = ("text_config", "model", "decoder", "encoder", "language_config", "thinker_config")
Shape = Callable[[str], Any]


@dataclass(slots=True)
class Sizes:
    """Sizes of a model, as its graph has them: of every layer by the tensor that it ends in.

    Attributes:
        heads, kv_heads, head_size: of every attention.
        widths: pairs of the inputs and outputs of every layer with a weight.
        caches: keys and values that come in and go out.
        looked_up: widths of the rows of embeddings.
    """

    heads: dict[str, int] = field(default_factory=dict)
    kv_heads: dict[str, int] = field(default_factory=dict)
    head_size: dict[str, int] = field(default_factory=dict)
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    looked_up: dict[str, int] = field(default_factory=dict)
    caches: list[Cache] = field(default_factory=list)


def sizes_of(
    analysis: Analysis,
    shape: Shape,
    attributes: Mapping[str, Mapping[str, Any]] | None = None,
    known: Sequence[Cache] = (),
) -> Sizes:
    """Read the sizes of a model.

    Args:
        analysis: analysis of the model.
        shape: maps a tensor's name to its shape at the first probe, after a removal.
        attributes: attributes of nodes after it, by their first output; None: those of the analysis.
        known: caches of the original: one that a removed layer leaves as input and output is made by programs as ever.
    """
    graph = analysis.graph
    ends = {*graph.inputs, *graph.outputs}
    sizes = Sizes(caches=[cache for cache in known if ends.issuperset(cache.names)] or find_caches(graph))
    for node in graph.steps:
        output, rule = next((o for o in node.outputs if o), ""), rule_of(node)
        read = shape(node.inputs[0]) if node.inputs and node.inputs[0] else None
        if rule.bounded and read is not None and len(read) == 4 and rule.score_axis(node, 4) is not None:
            sizes.heads[output] = int(read[1] or 0)
            sizes.head_size[output] = _size_of_scores(analysis, node.inputs[0], shape)
        elif rule.caches and "num_heads" in "".join(node.attrs):
            sizes.heads[output] = _heads((attributes or {}).get(output, node.attrs), read)
        elif _looks_up(node, analysis):
            sizes.looked_up[output] = int((shape(output) or (0,))[-1] or 0)
        if cost.is_layer(node, graph) and read is not None and (result := shape(output)) is not None:
            sizes.widths[output] = int(read[-1] or 0), int(result[-1] or 0)
    for cache in sizes.caches:
        past = shape(cache.past)
        if past is not None and len(past) == 4:
            sizes.kv_heads[cache.present], sizes.head_size[cache.present] = int(past[1] or 0), int(past[3] or 0)
    return sizes


def _looks_up(node: Node, analysis: Analysis) -> bool:
    """Return whether a node looks up rows of a matrix, as of an embedding."""
    weight = analysis.graph.weights.get(node.inputs[0]) if node.inputs else None
    if weight is None or len(weight.shape) != 2:
        return False
    operands = operands_at(node, analysis.facts.probes[0])
    return any(rule_of(node).index_limit(node, i, *operands) is not None for i in range(len(node.inputs)))


def _size_of_scores(analysis: Analysis, name: str, shape: Shape) -> int:
    """Return the number of channels that scores of attention are sums over; 0 where that is not known."""
    for _ in range(8):
        node = analysis.graph.producer.get(name)
        if node is None:
            return 0
        axes = dict(rule_of(node).contracted_axes(Step(node, analysis.table))).get(0)
        if axes:
            queries = shape(node.inputs[0])
            return int(queries[axes[-1]] or 0) if queries else 0
        known = [n for n in node.inputs if n and analysis.table.get(n)] or [n for n in node.inputs if n]
        name = known[0] if known else ""
    return 0


def _heads(attributes: Mapping[str, Any], queries: Any) -> int:
    """Return the number of query heads of a node for attention."""
    if queries is not None and len(queries) == 4:
        return int(queries[1])
    return int(attributes.get("num_heads") or attributes.get("q_num_heads") or 0)


class ModelConfig:
    """A configuration file that goes with a model.

    Args:
        path: the file.

    Raises:
        UsageError: it cannot be read, or states no size.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        hint = "Give the config.json or genai_config.json that came with the model."
        missing = f"Give {argument('model_config')} the config.json or genai_config.json that came with the model."
        self._data = files.read_json(
            self.path, "the configuration", "configuration of a model", missing=missing, hint=hint
        )
        self._entries = list(_entries(self._data)) if isinstance(self._data, dict) else []
        if not self._entries:
            raise UsageError(
                f"{argument('model_config')} {str(self.path)!r} states no number of heads, layers or channels.",
                hint=hint,
            )

    def check(self, original: Analysis) -> None:
        """Check that the file is that of a model.

        Raises:
            UsageError: a size that the graph does not have.
        """
        sizes = sizes_of(original, original.facts.shape)
        for kind, names in KEYS.items():
            stated = [(key, block[key]) for block, key in self._entries if key in names]
            known = _known(sizes, kind, self._stated("hidden"))
            if stated and known and not any(_fits(value, known) for _, value in stated):
                key, value = stated[0]
                raise UsageError(
                    f"{argument('model_config')} {str(self.path)!r} is of another model: {key} is {value}, and the "
                    f"graph has {', '.join(map(str, sorted(known)))}.",
                    hint="Give the configuration that came with this model.",
                )

    def _stated(self, kind: str) -> list[int]:
        return [block[key] for block, key in self._entries if key in KEYS[kind] and isinstance(block[key], int)]

    def rewritten(
        self, original: Analysis, result: Analysis, shape: Shape, attributes: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Any], list[str]]:
        """Return the configuration of the pruned model, and remarks.

        Args:
            original: analysis of the original.
            result: analysis of the model that channels were removed from, which may lack branches.
            shape: maps a tensor's name to its shape after the removal.
            attributes: attributes of nodes after it, by their first output.
        """
        before = sizes_of(original, original.facts.shape)
        after = sizes_of(result, shape, attributes, before.caches)
        data = copy.deepcopy(self._data)
        notes: list[str] = []
        for block, key in _entries(data):
            kind = next(k for k, names in KEYS.items() if key in names)
            known = _known(before, kind, self._stated("hidden"))
            if known and _fits(block[key], known):
                block[key] = self._changed(kind, block[key], before, after)
        for block in {id(block): block for block, _ in _entries(data)}.values():
            _state_head_size(block, after)
        absent = [c.past for c in before.caches if c.past not in {c.past for c in after.caches}]
        if absent:
            notes.append(
                f"caches of removed layers went with them ({', '.join(absent[:3])}): a program that counts their names "
                f"from 0 needs others, or {argument('keep_cache')}"
            )
        return data, notes

    def _changed(self, kind: str, value: Any, before: Sizes, after: Sizes) -> Any:
        """Return the new value of a size; a list where layers differ."""
        if kind == "layers":
            fewer = _num_layers(before) - _num_layers(after)
            if value == len(before.heads) and value != _num_layers(before):
                fewer = len(before.heads) - len(after.heads)
            elif value == _num_layers(before) // 2 != _num_layers(before):
                fewer //= 2
            return value - fewer
        olds, news = (_by_layer(sizes, kind, self._stated("hidden"), value) for sizes in (before, after))
        if kind == "intermediate":  # which layers are meant follows from the original
            olds = {k: n for k, n in olds.items() if n == value}
            news = {k: after.widths[k][0] for k in olds if k in after.widths}
        elif kind == "hidden":
            news = {k: after.looked_up.get(k, after.widths.get(k, (0, 0))[0]) for k in olds if k in _names(after)}
        else:
            olds = {k: n for k, n in olds.items() if isinstance(value, list) or n == value}
            news = {k: n for k, n in news.items() if k in olds}
        numbers = list(news.values())
        if not numbers:
            return value
        return numbers[0] if len(set(numbers)) == 1 or kind == "hidden" else numbers


def _names(sizes: Sizes) -> set[str]:
    return {*sizes.looked_up, *sizes.widths}


def _entries(data: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every (object, key) that states a size."""
    if not isinstance(data, dict):
        return
    known = {name for names in KEYS.values() for name in names}
    for key, value in data.items():
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if key in known and (is_number or (isinstance(value, list) and all(isinstance(n, int) for n in value))):
            yield data, key
    for key in _NESTED:
        yield from _entries(data.get(key))


def _fits(value: Any, known: Sequence[int] | set[int]) -> bool:
    return all(n in known for n in value) if isinstance(value, list) else value in known


def _num_layers(sizes: Sizes) -> int:
    """Return the number of layers: of caches of keys and values, else of attentions."""
    return len(sizes.caches) // 2 if sizes.caches else len(sizes.heads)


def _known(sizes: Sizes, kind: str, hidden: Sequence[int]) -> set[int]:
    """Return the values of a size that a graph has; empty where it has no such thing to compare with."""
    if kind == "layers":
        # Encoders and decoders have attentions of two kinds per layer, and a cache of each.
        number = _num_layers(sizes)
        return {number, number // 2, len(sizes.heads)} if number else set()
    known = set(_by_layer(sizes, kind, hidden, None).values())
    return known | {n for n, _ in sizes.widths.values()} if kind == "hidden" else known


def _by_layer(sizes: Sizes, kind: str, hidden: Sequence[int], value: Any) -> dict[str, int]:
    """Return a size of every layer."""
    if kind in ("heads", "kv_heads", "head_size"):
        by_layer: dict[str, int] = getattr(sizes, kind)
        return {name: n for name, n in by_layer.items() if n} if kind != "kv_heads" else _of_keys(sizes, by_layer)
    if kind == "hidden":
        return {k: n for k, n in sizes.looked_up.items() if value is None or n == value} or {
            k: n for k, (n, _) in sizes.widths.items() if value is None or n == value
        }
    return {k: n for k, (n, out) in sizes.widths.items() if not hidden or out in hidden}


def _of_keys(sizes: Sizes, by_cache: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of every first half of a pair of caches: keys and values have the same heads."""
    names = [cache.present for cache in sizes.caches if cache.present in by_cache]
    return {name: by_cache[name] for name in names[::2]}


def _state_head_size(block: dict[str, Any], after: Sizes) -> None:
    """State the head size where it no longer is the width divided by the number of heads, as programs assume."""
    hidden, heads, key = (next((n for n in KEYS[k] if n in block), None) for k in ("hidden", "heads", "head_size"))
    numbers = {n for n in after.head_size.values() if n}
    if key is not None or hidden is None or heads is None or len(numbers) != 1:
        return
    is_implied = isinstance(block[heads], int) and block[hidden] == block[heads] * next(iter(numbers))
    if not is_implied:
        block["head_dim"] = numbers.pop()


def target_of(path: Path, output: Path) -> Path:
    """Return the path for the configuration of a model: beside it, under its name, never over the original."""
    beside = output.with_name(path.name)
    return output.with_name(f"{output.stem}.{path.name}") if beside.resolve() == path.resolve() else beside
