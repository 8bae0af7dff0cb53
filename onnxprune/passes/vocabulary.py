"""Vocabulary: remove the tokens that a corpus does not use, from embeddings and logits, and prove the removal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels.analysis import Analysis
from onnxprune.channels.plan import Plan, PlanVocabulary, check_model
from onnxprune.channels.selection import removed_atoms
from onnxprune.errors import BudgetError, UsageError, argument
from onnxprune.graph.view import Graph
from onnxprune.io import files
from onnxprune.io.read import with_parts
from onnxprune.io.subgraphs import outline_bodies
from onnxprune.io.write import assemble
from onnxprune.labels.label import Ids
from onnxprune.passes.comparing import Pair, calls_of, compare_everywhere, kinds_of, rounding_of
from onnxprune.passes.prepared import cut_model
from onnxprune.passes.workspace import Workspace
from onnxprune.pipeline import Context, Model, ModelParts, Pass, PassResult, Restriction
from onnxprune.pruning.rewriting import CannotRewrite
from onnxprune.pruning.vocabulary import Kept, TokenTables, find_tables, renumbered, with_front
from onnxprune.report.facts import Exactness, Fact, Sizes, VocabularyFacts
from onnxprune.runtime.compare import TOLERANCE
from onnxprune.runtime.fidelity import KnownOutputs
from onnxprune.runtime.sessions import Feed
from onnxprune.settings import named_arguments

AUTO = "auto"
_SHOWN = 5
_LARGE = 1 << 30  # worker processes, which read the model anew, are not given larger ones
_SPECIAL = re.compile(r"\w+_token_id")
_CONFIGS = ("config.json", "generation_config.json", "genai_config.json", "tokenizer.json")
_FORM = "Give ids in a text file, separated by spaces or lines, or a JSON list, or a vocab.json {token: id}."


@named_arguments()
class Vocabulary(Pass):
    """Remove the tokens that are not used: rows of embeddings, and columns of logits.

    Passes behind it see the smaller model as the original; data go on holding ids of the original.

    Args:
        tokens: ids, a file of ids, ``"auto"`` for those in the data, or {input: one of these}.
        keep_ids: put a list in front of the model, so that it takes ids of the original.
        tokenizer: config.json, tokenizer.json, or a folder with them: special tokens must not go.
        plan: a plan whose vocabulary is replayed in place of ``tokens``.
        check: prove that the removal is exact.

    Raises:
        UsageError: tokens that are no ids, out of range or none; special tokens among the removed; a config of another
            model; data with other tokens.
        BudgetError: no embedding, or it cannot be cut.
        ValidationError: the removal is not exact.
    """

    def __init__(
        self,
        tokens: Any = AUTO,
        *,
        keep_ids: bool = False,
        tokenizer: str | Path | None = None,
        plan: Plan | str | Path | None = None,
        check: bool = True,
    ) -> None:
        plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
        self.tokens, self.keep_ids, self.check = tokens, keep_ids, check
        self.tokenizer = None if tokenizer is None else Path(tokenizer)
        self.replayed = None if plan is None else plan.vocabulary
        self.digest = "" if plan is None else plan.model_sha256
        if self.replayed is not None:
            self.keep_ids = self.replayed.keep_ids

    def __call__(self, context: Context, model: Model) -> PassResult:
        """Leave the model as it is: the vocabulary was removed before the first pass."""
        return PassResult(model, changed=False)

    def restrict(self, context: Context) -> tuple[Context, Sequence[Fact]]:
        """Return the run on the model with the smaller vocabulary, and facts."""
        with context.stage("vocabulary"):
            work = _Work.of(context, self._input())
            special = special_tokens(self.tokenizer, work.tables.size)
            kept_ids = self._kept_ids(context, work, special)
            work.cut(kept_ids)
            parts = work.parts
            fronted = parts
            if self.keep_ids:
                order = np.full(work.tables.size, _unknown(special, kept_ids), np.int64)
                order[kept_ids] = np.arange(kept_ids.size)
                fronted = with_front(parts, work.tables.inputs, context.analysis.facts, order)
        facts = work.facts(kept_ids, special, self.keep_ids)
        results: list[Fact] = [facts]
        if self.check:
            with context.stage("exactness"):
                results.append(_proof(context, work, kept_ids, fronted, self.keep_ids))
        entry = PlanVocabulary(
            inputs=list(work.tables.inputs), size=work.tables.size, kept=kept_ids.tolist(), keep_ids=self.keep_ids
        )
        return work.restricted(kept_ids, entry, results)

    def finish(self, context: Context, model: Model) -> Model:
        """Return the final model, which takes ids of the original where that was asked for."""
        restriction = context.restriction
        assert restriction is not None
        entry = restriction.vocabulary
        if not entry.keep_ids:
            return model
        kept_ids, special = np.asarray(entry.kept, np.int64), special_tokens(self.tokenizer, entry.size)
        order = np.full(entry.size, _unknown(special, kept_ids), np.int64)
        order[kept_ids] = np.arange(kept_ids.size)
        parts = outline_bodies(*with_front(model.parts, entry.inputs, restriction.origin.facts, order))
        return replace(model, proto=parts[0], weights=parts[1])

    def _input(self) -> str | None:
        if self.replayed is not None:
            return self.replayed.inputs[0] if self.replayed.inputs else None
        return _named(self.tokens)[0]

    def _kept_ids(self, context: Context, work: _Work, special: Mapping[str, tuple[int, ...]]) -> Kept:
        """Return the ids to keep, rising; raises UsageError."""
        size = work.tables.size
        if self.replayed is not None:
            self._check_plan(context, size)
            return _in_range(np.asarray(self.replayed.kept, np.int64), size, "the plan")
        source = _named(self.tokens)[1]
        known = np.asarray(sorted({i for ids in special.values() for i in ids}), np.int64)
        if isinstance(source, str) and source.lower() == AUTO:
            ids = _in_range(_ids_of_data(context, work.tables.inputs), size, "the data")
            return np.union1d(ids, known)
        ids, where = read_tokens(source)
        kept_ids = _in_range(ids, size, where)
        lost = {name: [i for i in ids if i not in kept_ids] for name, ids in special.items()}
        names = [f"{name} ({', '.join(map(str, missing))})" for name, missing in lost.items() if missing]
        if names:
            raise UsageError(
                f"{argument('vocabulary')}: {where} drops special tokens: {', '.join(names)}",
                hint="Add these ids: the model or its tokenizer needs them.",
            )
        return kept_ids

    def _check_plan(self, context: Context, size: int) -> None:
        """Check that a plan's vocabulary is of this model; raises UsageError."""
        check_model(self.digest, context.analysis.loaded.sha256)
        if self.replayed is not None and self.replayed.size != size:
            raise UsageError(
                f"The plan's vocabulary has {self.replayed.size:,} tokens, that of this model {size:,}.",
                hint="Give the model that the plan was made for.",
            )


def _named(tokens: Any) -> tuple[str | None, Any]:
    """Return the input that tokens are for, where it is named, and the tokens."""
    if isinstance(tokens, Mapping) and len(tokens) == 1 and not isinstance(next(iter(tokens.values())), int):
        return next(iter(tokens.items()))
    if isinstance(tokens, str) and "=" in tokens and not Path(tokens).exists():
        name, _, source = tokens.partition("=")
        return name, source
    return None, tokens


def read_tokens(source: Any) -> tuple[NDArray[np.int64], str]:
    """Return ids as they are given, and their name in messages.

    Args:
        source: a path of a text or JSON file, or ids.

    Raises:
        UsageError: no such file, something that is no id, or no id at all.
    """
    where = "the list"
    if isinstance(source, (str, Path)):
        path = Path(source)
        where = repr(str(path))
        values = _of_json(path) if path.suffix.lower() == ".json" else _of_text(path)
    else:
        values = list(np.asarray(source).ravel()) if hasattr(source, "__array__") else list(source)
    for value in values:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
            raise UsageError(f"{argument('vocabulary')}: {where} holds {value!r}, which is no token id", hint=_FORM)
    if not values:
        raise UsageError(f"{argument('vocabulary')}: {where} holds no tokens", hint=_FORM)
    too_long = next((v for v in values if abs(int(v)) >= 1 << 62), None)
    if too_long is not None:
        raise UsageError(f"{argument('vocabulary')}: {where} holds {too_long}, which is no token id", hint=_FORM)
    return np.asarray([int(v) for v in values], np.int64), where


def _of_json(path: Path) -> list[Any]:
    data = files.read_json(path, "the tokens", "file of tokens", hint=_FORM)
    if isinstance(data, Mapping):
        return list(data.values())
    if not isinstance(data, list):
        raise UsageError(f"{argument('vocabulary')}: {str(path)!r} is no list of ids", hint=_FORM)
    return data


def _of_text(path: Path) -> list[Any]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(f"{argument('vocabulary')}: {str(path)!r} cannot be read: {why}", hint=_FORM) from None
    words = text.replace(",", " ").split()
    return [int(word) if re.fullmatch(r"[+-]?\d+", word) else word for word in words]


def _in_range(ids: NDArray[np.int64], size: int, where: str) -> Kept:
    """Return the ids once each, rising.

    Raises:
        UsageError: one is out of range, or all tokens are kept, or one alone.
    """
    unique = np.unique(ids)
    outside = [int(i) for i in unique if not 0 <= i < size]
    if outside:
        raise UsageError(
            f"{argument('vocabulary')}: {where} holds ids out of range: {_listed(outside)} (the model has {size:,} "
            f"tokens, 0 to {size - 1})",
            hint="Give the ids of this model's own tokenizer.",
        )
    if unique.size < 2:
        raise UsageError(f"{argument('vocabulary')}: {where} holds a single token", hint="Give two or more.")
    return unique


def _listed(ids: Sequence[int]) -> str:
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(map(str, ids[:_SHOWN])) + more


def _ids_of_data(context: Context, inputs: Sequence[str]) -> NDArray[np.int64]:
    """Return the ids that the data hold.

    Raises:
        UsageError: there are no data, or they hold no tokens.
    """
    if context.calibration is None:
        raise UsageError(
            f"{argument('vocabulary', AUTO)} keeps the ids that occur in {argument('data')}, which is not given",
            hint=f"Give {argument('data')}, or a file of ids.",
        )
    ids = np.zeros(0, np.int64)
    for feed in context.inputs():
        ids = np.union1d(ids, np.concatenate([feed[name].ravel().astype(np.int64) for name in inputs]))
    if not ids.size:
        raise UsageError(f"{argument('data')} holds no tokens", hint=f"Its arrays {', '.join(inputs)} are empty.")
    return ids


# -- special tokens ----------------------------------------------------------------------------------------------------


def special_tokens(place: Path | None, size: int) -> dict[str, tuple[int, ...]]:
    """Return the special tokens of a model, {name: ids}.

    Args:
        place: a configuration, a tokenizer.json, or a folder with them; None: none are known.
        size: number of tokens of the model.

    Raises:
        UsageError: no such file, or it is of another model.
    """
    if place is None:
        return {}
    paths = [place / name for name in _CONFIGS if (place / name).is_file()] if place.is_dir() else [place]
    if not paths:
        raise UsageError(
            f"{argument('tokenizer')}: the folder {str(place)!r} has none of {', '.join(_CONFIGS)}",
            hint="Give the folder that the model was exported from, or one of these files.",
        )
    ids_by_name: dict[str, tuple[int, ...]] = {}
    for path in paths:
        data = files.read_json(
            path,
            "the configuration",
            "configuration of a model",
            missing=f"Give {argument('tokenizer')} a config.json, a tokenizer.json or their folder.",
        )
        sizes = [n for n in _values(data, re.compile("vocab_size")) if isinstance(n, int)]
        ids_by_name.update(
            _added(data) if isinstance(data, Mapping) and "added_tokens" in data else dict(_special(data))
        )
        highest = max((i for ids in ids_by_name.values() for i in ids), default=0)
        if highest >= size or any(n > size for n in sizes):
            what = f"token {highest}" if highest >= size else f"{max(sizes):,} tokens"
            raise UsageError(
                f"{argument('tokenizer')}: {str(path)!r} is of another model: it has {what}, and this one {size:,} "
                "tokens",
                hint="Give the configuration of this model.",
            )
    if not ids_by_name:
        raise UsageError(
            f"{argument('tokenizer')}: {str(place)!r} names no special tokens",
            hint="config.json has bos_token_id and others, tokenizer.json added_tokens.",
        )
    return ids_by_name


def _added(data: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the special tokens of a tokenizer.json."""
    tokens = data["added_tokens"] if isinstance(data["added_tokens"], list) else []
    special = [t for t in tokens if isinstance(t, Mapping) and t.get("special") and isinstance(t.get("id"), int)]
    return {str(token.get("content", token["id"])): (token["id"],) for token in special}


def _special(data: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield entries of a configuration that are ids of tokens, wherever they stand."""
    for key, value in _items(data):
        ids = value if isinstance(value, list) else [value]
        token_ids = tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0)
        if _SPECIAL.fullmatch(key) and token_ids:
            yield key, token_ids


def _items(data: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield str(key), value
            yield from _items(value)


def _values(data: Any, key: re.Pattern[str]) -> list[Any]:
    return [value for name, value in _items(data) if key.fullmatch(name)]


def _unknown(special: Mapping[str, tuple[int, ...]], kept_ids: Kept) -> int:
    """Return the new id of tokens that were removed: that of unknown ones, else one that no table has."""
    ids = special.get("unk_token_id", special.get("<unk>", special.get("[UNK]", ())))
    return int(np.searchsorted(kept_ids, ids[0])) if ids and ids[0] in kept_ids else int(kept_ids.size)


# -- the cut -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Work:
    """The tables of a model, and the model without some of their rows.

    Attributes:
        context: context of the run.
        tables: the tables.
        analysis: analysis of the model in which they may lose rows.
        outputs: outputs that lose positions.
        reasons: why others do not, by name.
        parts: the smaller model, bodies inlined.
    """

    context: Context
    tables: TokenTables
    analysis: Analysis
    outputs: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    parts: ModelParts = field(init=False)

    @classmethod
    def of(cls, context: Context, input_name: str | None) -> _Work:
        """Find the tables; raises UsageError or BudgetError."""
        loaded = context.analysis.loaded
        tables = find_tables(Graph.of(loaded.proto, loaded.weights), context.analysis.facts, input_name)
        return cls(context, tables, Analysis(loaded, input_shapes=context.input_shapes, opened=tables.opened))

    def cut(self, kept_ids: Kept) -> None:
        """Remove all rows but some; raises BudgetError where the tables cannot be cut."""
        units, size = self.analysis.units, self.tables.size
        lost = np.ones(size, bool)
        lost[kept_ids] = False
        removed = np.zeros(units.frozen.size, bool)
        rows: list[Ids] = []
        for name in dict.fromkeys(lookup.name for lookup in self.tables.lookups):
            components, why = self._components(name, 0)
            if components is None:
                raise BudgetError(
                    f"The vocabulary cannot be cut: the rows of {name!r} keep their size: {why}.",
                    hint="Export the model with logits as its output, without a softmax or a choice behind them.",
                )
            rows.append(components)
        for name in self.tables.outputs:
            components, why = self._components(name, -1)
            mixed = components is not None and any(
                np.isin(components, r).any() and (components != r).any() for r in rows
            )
            if components is None or mixed:
                self.reasons[name] = why or "its positions are in another order"
            else:
                self.outputs.append(name)
                rows.append(components)
        for components in rows:
            removed[components[lost]] = True
        try:
            proto, weights = cut_model(self.analysis, removed_atoms(units, removed))
        except CannotRewrite as stop:
            raise BudgetError(f"The vocabulary cannot be cut: {stop}.") from stop
        self.parts = renumbered((proto, weights), self.tables, self.analysis.facts, kept_ids, self.outputs)

    def _components(self, name: str, axis: int) -> tuple[Ids | None, str]:
        """Return the units along an axis; None, and the reason, where they cannot go one by one."""
        rank = len(self.analysis.facts.shape(name) or ())
        several, tied = "they are computed from several tensors", "several of them go together"
        return self.analysis.single_units(name, axis % rank, several, tied)

    def facts(self, kept_ids: Kept, special: Mapping[str, tuple[int, ...]], keep_ids: bool) -> VocabularyFacts:
        """Return the facts about the cut."""
        before = self.context.analysis.loaded.weights
        after = self.parts[1]
        saved = sum(w.nbytes for w in before.values()) - sum(w.nbytes for w in after.values())
        return VocabularyFacts(
            inputs=list(self.tables.inputs),
            tables=sorted({root for lookup in self.tables.lookups for root in lookup.roots}),
            outputs=self.outputs,
            tokens_before=self.tables.size,
            tokens_after=int(kept_ids.size),
            bytes_saved=saved,
            special={name: list(ids) for name, ids in special.items()},
            keep_ids=keep_ids,
            reasons=self.reasons,
        )

    def restricted(self, kept_ids: Kept, entry: PlanVocabulary, facts: list[Fact]) -> tuple[Context, Sequence[Fact]]:
        """Return the run on the smaller model, whose inputs are translated, and facts."""
        context, original = self.context, self.context.analysis
        loaded = with_parts(original.loaded, *self.parts)
        shapes, approximate = context.input_shapes, original.approximate
        small = Analysis(loaded, input_shapes=shapes, approximate=approximate, resizing=original.resizing)
        translate = _Translation(self.tables.inputs, self.tables.size, kept_ids)
        calibration = context.calibration
        other = replace(
            context,
            analysis=small,
            source=assemble(*outline_bodies(*self.parts)) if loaded.size < _LARGE else context.source,
            calibration=None if calibration is None else calibration.through(small, translate),
            known=KnownOutputs.within(context.memory_limit),
            restriction=Restriction(original, entry),
        )
        sizes = Sizes(
            params_before=original.parameters,
            params_after=small.parameters,
            macs_before=sum(layer.macs_before for layer in original.layers),
            macs_after=sum(layer.macs_before for layer in small.layers),
        )
        return other, [*facts, sizes]


@dataclass(frozen=True, slots=True)
class _Translation:
    """Ids of the original to new ones, in calls of the model."""

    inputs: Sequence[str]
    size: int
    kept_ids: Kept

    def __call__(self, feed: Feed) -> Feed:
        """Return the call with new ids; raises UsageError where it holds a token that was removed."""
        order = np.full(self.size, -1, np.int64)
        order[self.kept_ids] = np.arange(self.kept_ids.size)
        new = dict(feed)
        for name in self.inputs:
            ids = feed[name]
            inside = (ids >= 0) & (ids < self.size)
            missing = np.unique(ids[~inside | (order[np.where(inside, ids, 0)] < 0)])
            if missing.size:
                raise UsageError(
                    f"{argument('data')}: {name!r} holds {missing.size} tokens that {argument('vocabulary')} drops: "
                    f"{_listed(missing.tolist())}",
                    hint=f"Add them, or use {argument('vocabulary', AUTO)}: the ids that occur in the data.",
                )
            new[name] = order[ids].astype(ids.dtype)
        return new


# -- the proof ---------------------------------------------------------------------------------------------------------


def _proof(context: Context, work: _Work, kept_ids: Kept, result: ModelParts, keep_ids: bool) -> Exactness:
    """Compare with the original on its own ids, whose logits are gathered; also at sizes that no probe has.

    Raises:
        ValidationError: they differ.
    """
    analysis, loaded = context.analysis, context.analysis.loaded
    positions = dict.fromkeys(work.outputs, kept_ids)
    inputs = () if keep_ids else work.tables.inputs
    reference = with_front((loaded.proto, loaded.weights), inputs, analysis.facts, kept_ids, positions)
    small = Analysis(with_parts(loaded, *work.parts), input_shapes=context.input_shapes)

    def original(feed: Feed) -> Feed:
        ids = work.tables.inputs if keep_ids else ()
        return {name: kept_ids[a].astype(a.dtype) if name in ids else a for name, a in feed.items()}

    calls = ((original(feed), is_needed) for feed, is_needed in calls_of(context, small))
    with Workspace.of(analysis) as trial, trial.blaming():
        models = outline_bodies(*reference), outline_bodies(*result)
        pair = Pair(trial, *models, kinds_of(analysis), rounding_of(analysis, TOLERANCE))
        return compare_everywhere(pair, calls, "The model with fewer tokens")
