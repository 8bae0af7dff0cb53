"""The page of what ``--json`` writes, field by field: python tools/make_json_page.py > docs/json.md.

A field is explained by the text below it in its class, or here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from onnxprune.allocation.knapsack import GroupCurve, Sensitivity
from onnxprune.channels.analysis import GroupView, SlotView
from onnxprune.devices import Kernels
from onnxprune.importance.criteria import Description
from onnxprune.labels.atoms import Barrier
from onnxprune.report import facts
from onnxprune.report.console import SCHEMA_VERSION

INTRODUCTION = f"""# What `--json` writes

One object on stdout; everything else goes to stderr. This page describes `schema_version` {SCHEMA_VERSION} and is made
by `python tools/make_json_page.py > docs/json.md`. The version rises when a field changes its meaning or goes; new
fields may come without. Numbers that are not finite are `null`.

A run that fails writes the fields of every command and `error`; one that ended and then did not pass a gate has its
whole report beside it."""

EVERY = {
    "schema_version": ("number", "version of this description"),
    "versions": (
        "object",
        "version of `onnxprune`, `python`, `numpy`, `onnx` and `onnxruntime`; null where it is not installed",
    ),
    "command": ("text", "the command, `prune` where none was named"),
    "command_line": ("list of text", "the arguments as they were typed"),
    "settings_from": (
        "object",
        "where settings come from, by name: `command line`, or the file; all others have their defaults",
    ),
    "exit_status": (
        "number",
        "exit code of the program: 0 done, 2 bad input, 3 model not processable, 4 validation failed, 5 gate not met",
    ),
    "error": ("object", "only where the run failed: `type`, `message`, `hint` and `exit_code`"),
}
"""Fields of every command: {name: (type, meaning)}."""

COMMANDS: dict[str, tuple[type | None, dict[str, tuple[str, str]]]] = {
    "prune": (facts.Report, {
        "verdict": ("[Verdict](#verdict) or null", "verdict on the result; null where fidelity was not measured"),
        "plan": ("text or null", "the plan that was written"),
        "dry_run": ("object", "only with `--dry-run`: `skipped`, what was not done, and `would_write`, the files"),
    }),
    "factorize": (facts.Report, {
        "verdict": ("[Verdict](#verdict) or null", "verdict on the result; null where fidelity was not measured"),
        "plan": ("text or null", "the plan that was written"),
        "dry_run": ("object", "only with `--dry-run`, as for prune"),
    }),
    "sparsify": (facts.Report, {
        "verdict": ("[Verdict](#verdict) or null", "verdict on the result; null where fidelity was not measured"),
        "dry_run": ("object", "only with `--dry-run`, as for prune"),
    }),
    "train": (facts.Report, {
        "verdict": ("[Verdict](#verdict) or null", "verdict on the result; null where fidelity was not measured"),
    }),
    "compare": (facts.Report, {
        "verdict": ("[Verdict](#verdict) or null", "verdict on the result; null where fidelity was not measured"),
    }),
    "recover": (facts.Report, {
        "verdict": ("[Verdict](#verdict) or null", "verdict on the result; null where fidelity was not measured"),
        "cut": ("text", "the pruned model that was recovered"),
        "plan": ("text", "the plan that it was pruned by"),
    }),
    "inspect": (None, {
        "model": ("text", "path of the model"),
        "bytes": ("number", "size of its file"),
        "parameters": ("number", "elements of its weights"),
        "groups": ("list of [group](#groupview)", "units that compete with each other"),
        "barriers": ("list of [barrier](#barrier)", "why channels may not be removed"),
        "layers": ("list of [layer](#layerfacts)", "contractions; nothing is removed yet"),
        "unlocks": ("list of [text, number]", "operators without a rule, and how many channels a rule would free"),
        "branches": ("list of [branch](#branchfacts)", "residual branches; those without a reason can be removed"),
        "sparsity": ("list of [zeros](#sparsityfacts)", "density and pattern of every weight of a layer"),
    }),
    "profile": (facts.Profile, {"table": ("text or null", "the table of times that was written")}),
    "sensitivity": (Sensitivity, {"model": ("text", "path of the model")}),
    "sweep": (facts.SweepFacts, {}),
    "criteria": (None, {"criteria": ("list of [criterion](#description)", "every criterion, by name")}),
    "devices": (None, {
        "devices": ("list of [device](#kernels)", "every device, by name"),
        "this_machine": ("text", "the device that this machine is"),
    }),
}  # fmt: skip
"""The object behind each command, and the fields that the command adds."""

MEANINGS = {
    "LayerFacts": {
        "name": "name of the node",
        "op": "its operator",
        "channels_before, channels_after": "output channels",
        "params_before, params_after": "parameters",
        "macs_before, macs_after": "multiply-accumulates at the probe shape",
    },
    "Totals": {
        "params_before, params_after": "parameters of all weights",
        "macs_before, macs_after": "multiply-accumulates at the probe shape",
        "bytes_before, bytes_after": "size of the file; after: 0 where none was written",
    },
    "Exactness": {
        "passed": "whether the pruned model equals the masked original; null: not asked, `note` says why",
        "error": "largest absolute difference, divided by the largest absolute value of that output",
        "tolerance": "the allowed error",
        "batches": "batch sizes that were compared",
        "worst_output": "output with the largest error",
        "note": "remark, empty without one",
    },
    "OutputFidelity": {
        "output": "name of the output",
        "cosine": "cosine with the original's output",
        "snr_db": "signal-to-noise ratio in decibels",
        "top1": "share of samples with the same largest class; null for other outputs",
        "hellinger": "mean squared Hellinger distance of class probabilities; null for other outputs",
        "centred_cosine": "cosine without the means per channel; of boxes and scores the smaller one",
        "kind": "how the output was read: classes, boxes, embedding, signal, sequence",
        "axis": "axis of its classes or attributes; null without one",
    },
    "AnswerFidelity": {
        "outputs": "outputs that make up the answer",
        "kind": "how they were read",
        "points": "100 times the share of the original's answers that the model still gives",
        "lost": "what went, in words",
        "distance": "what candidates are compared by, 0 to 1: noise of the scores of classes, the lost share of others",
    },
    "Fidelity": {
        "outputs": "every output",
        "samples": "number of samples compared",
        "source": "their source: `synthetic`, or the path of the data",
        "note": "remark, empty without one",
        "points": "points of the worst answer, 0 to 100; null where nothing was compared",
        "answers": "every answer",
    },
    "Verdict": {
        "word": "`faithful` from 97 points, `degraded` from 85, else `damaged`",
        "points": "points of the worst answer",
        "reason": "the worst answer, and what was lost of it",
        "next_step": "what to do, empty where nothing is needed",
        "synthetic": "whether it was judged on made-up inputs",
    },
    "MetricFacts": {
        "name": "name of the metric",
        "before, after": "the metric of the original and of the other model",
    },
    "Latency": {
        "before_ms, after_ms": "median milliseconds of a run of the original and of the result",
        "before_spread_ms, after_spread_ms": "their interquartile ranges",
        "runs": "number of runs of each, in turn",
        "threads": "threads inside an operator",
    },
    "NodeTime": {
        "name": "name of the node",
        "op": "its operator",
        "ms": "milliseconds in the original",
        "at_shares": f"milliseconds where every group keeps {', '.join(map(str, facts.SHARES))} of its units",
    },
    "KindSteps": {
        "op": "operator",
        "nodes": "number of such nodes",
        "by": "`reads` or `makes`: whose channels are counted",
        "channels": "numbers of channels",
        "ms": "milliseconds of one node at each of them",
    },
    "Profile": {
        "model": "path of the model",
        "device": "processor, providers, threads and version of the runtime",
        "inputs": "shapes of the inputs that were run",
        "ms": "milliseconds of a run of the original",
        "error": "largest relative difference of `checks`",
        "checks": "[predicted, measured] milliseconds of pruned models that the table was not made from",
        "nodes": "time per node",
        "steps": "time per kind of node by its channels",
    },
    "SmallerRatio": {
        "ratio": "the ratio",
        "points": "points of fidelity of the model pruned by it, recovered in the same way",
    },
    "Repair": {
        "layer": "name of the layer",
        "how": "the fit; `kept`: none was better than the present weights; `left: reason`: not fitted",
        "before, after": "error on the hold-out, as a share of the target's variance",
        "rows": "rows of the fit",
        "unknowns": "unknowns per output",
        "directions": "numerical rank of the Gram matrix",
    },
    "Recovery": {
        "mode": "mode of the recovery, `none` without one",
        "why": "reason of the mode",
        "inputs": "inputs of the fit where they were not data",
        "samples": "samples in the fit",
        "aside": "samples in the hold-out",
        "before, after": "fidelity before and after the recovery",
        "undone": "whether the recovery lowered the fidelity and was reverted",
    },
    "ResizedTensor": {
        "name": "input or output of the model",
        "before, after": "its shape; open sizes by their names",
    },
    "RotatedStream": {
        "name": "its first tensor",
        "channels_before": "channels of the stream",
        "channels_after": "turned channels that are left",
        "energy": "share of the second moments of the data in these, 0 to 1",
    },
    "VocabularyFacts": {
        "inputs": "inputs of ids",
        "tables": "weights that lost rows",
        "outputs": "outputs whose last axis has a position for each remaining token",
        "tokens_before, tokens_after": "number of tokens",
        "bytes_saved": "bytes of weights that went with them",
        "special": "ids of special tokens, by name",
        "keep_ids": "whether ids stay as they were",
        "reasons": "why tables and outputs keep their size, by name",
        "map": "file of the new ids; empty where ids stay",
    },
    "ExpertFacts": {
        "name": "the node that chooses",
        "experts": "how many there are",
        "top_k": "how many are chosen for every token",
        "removed": "numbers of those that went",
        "scores": "of all, those of the least score go first; empty where a plan decided",
        "params": "elements of weights that went",
        "reason": "why none went, or fewer than asked",
    },
    "BranchFacts": {
        "name": "tensor that the branch ends in",
        "sum": "node that adds it",
        "source": "tensor beside it",
        "layers": "layers that go with it",
        "macs, params": "multiply-accumulates and parameters of these",
        "error": "change of the outputs when it was removed, a share of their variance; null where not measured",
        "macs_share, params_share": "these as shares of the model's",
        "removed": "whether it was removed",
        "reason": "why it may not go; empty where it may",
        "cache": "inputs and outputs of the model that went with it",
    },
    "FactorizedLayer": {
        "name": "name of the layer",
        "op": "its operator",
        "method": "method; empty where the layer stays whole",
        "ranks": "ranks, one per mode",
        "error": "share of the energy that the factors lose",
        "params_before, params_after": "parameters",
        "macs_before, macs_after": "multiply-accumulates",
        "before_ms, after_ms": "milliseconds of the layer on its own; null where not measured",
        "reason": "why it stays whole",
        "note": "other events, such as a fallback of the method",
    },
    "SparsifiedLayer": {
        "name": "name of the layer; `(state)` for its recurrent weight",
        "op": "its operator",
        "weight": "name of the constant",
        "pattern": "pattern of the zeros; empty where the layer was left out",
        "shape": "of the weight as a matrix: parts, contracted, outputs",
        "elements": "number of weights",
        "zeros_before, zeros": "weights that were 0 before, and are 0 now",
        "error": "share of the energy of the layer's output (without data of its weights) that was lost, before any "
        "recovery; null where not measured",
        "reason": "why it was left out",
        "note": "what was done otherwise than asked",
    },
    "ZerosFacts": {
        "elements, zeros": "weights of all layers, and how many are 0",
        "storage": "dense or sparse",
        "sparse_tensors": "number of sparse initializers",
        "weight_bytes, deflated_bytes": "size of all weights, as stored and after deflate",
        "device": "device that the model is to run on",
        "advice": "why zeros bring no speed there; empty where they do",
        "where": "which layers gain there, and from what on; empty where none does",
    },
    "Quantization": {
        "mode": "dynamic or qdq",
        "weights, elements": "weights that hold codes of 8 bits, and their elements",
        "layers": "layers whose weights could be rounded",
        "rounded": "those that were rounded to keep the outputs on the data; 0 without data",
        "corrected": "those whose bias took up what was left",
        "folded": "BatchNormalizations that went into the layer in front",
        "samples": "samples that the rounding, the biases and the ranges come from",
        "bytes_float": "size of the file before the quantization",
    },
    "SparsityFacts": {
        "name": "name of the layer; `(state)` for its recurrent weight",
        "op": "its operator",
        "weight": "name of the constant",
        "elements, zeros": "number of weights, and how many are 0",
        "pattern": "what the zeros show: N:M, blocks, unstructured; empty without zeros",
        "expected": "the N:M that most sparse layers hold, where this one could as well; else empty",
        "holds": "whether it holds the expected pattern",
    },
    "TargetFacts": {
        "kind": "macs, params, size, latency or peak-memory",
        "asked": "the target as it was given",
        "limit": "largest allowed cost, in the unit of the kind: a count, bytes or seconds",
        "before, after": "cost of the original and of the result",
    },
    "AnswerFacts": {
        "name": "name of the candidate",
        "fine": "its score, higher is better",
        "points": "points of its outputs or of the metric",
        "chosen": "whether it is the result",
    },
    "BudgetFacts": {
        "targets": "every target",
        "answers": "the best candidate of every origin of its counts",
        "gap": "no choice of counts loses less than (1 - gap) of this one, costs linearised; null where not known",
        "what": "name of the points",
        "points_before, points_after": "points of the original and of the result",
        "max_drop": "largest allowed drop; null: no limit",
        "cost": "kind of cost of the candidates",
        "candidates": "every model that was evaluated, in order",
        "losses_by": "origin of the losses that counts were chosen by",
        "losses": "loss of every group where it alone is pruned",
    },
    "CandidateFacts": {
        "name": "origin of its counts",
        "cost": "its cost as a share of the original's",
        "points": "points of its outputs or of the metric",
        "trial": "whether it was recovered from the samples of a trial, not from all",
        "chosen": "whether it is the result",
    },
    "GroupLosses": {
        "name": "name of the group",
        "units": "number of its units",
        "shares": "removed shares of the units",
        "losses": "loss at each share",
    },
    "LayerTimes": {"before, after": "{node of the original: milliseconds in the original, and in the result}"},
    "TrainingCourse": {
        "steps": "steps of the optimiser",
        "seconds": "time of the training",
        "batch": "samples of a step",
        "samples": "samples that steps are drawn from",
        "aside": "samples of the hold-out, which decide",
        "losses": "without penalties, of the first step and of the last 20 on average",
        "curve": "pairs of a step and of the points lost on the hold-out (100 less the points)",
        "before": "fidelity on the hold-out before the training",
        "after": "fidelity there with the best weights",
        "undone": "whether no step was better than the start",
        "stopped": "why it ended early; empty: it did not",
        "by_labels": "points by the labels of the hold-out before and after: accuracy in percent, or 100 R²; empty "
        "without labels",
    },
    "Finetuning": {
        "trained": "number of weights that were trained",
        "frozen": "weights that were not, with the reason",
        "augmentation": "how samples were varied",
        "blocks": "number of blocks that were trained one after the other; 0: the model was trained as a whole",
    },
    "Regularized": {
        "kind": "the penalty",
        "groups": "what its norms are taken of",
        "strength": "its strength at the end",
        "units": "units that it looked at",
        "zeros": "units among these that were 0 at the end",
        "density": "share of the trained weights that are not 0",
        "curve": "pairs of a step and of the points lost on the hold-out, a point more for every percent of the units "
        "that should be 0 and are not",
    },
    "DeadChannels": {
        "units": "units of all groups that can be pruned",
        "found": "units among these whose removal changes no output",
        "removed": "those that are gone: groups keep their form, and a unit",
        "folded": "constant channels that became part of a bias",
        "reasons": "why constant channels stay, by the node that reads them",
    },
    "SweepPoint": {
        "target": "target of the model; empty for the original",
        "macs": "multiply-accumulates",
        "params": "parameters",
        "size": "bytes of the file",
        "ms": "milliseconds of a run; 0 where not measured",
        "points": "points of its outputs or of the metric",
        "cosine": "cosine of the worst output",
        "answer": "how its counts were found",
        "best": "whether no other model has as many points for no more MACs",
        "file": "its file; empty where it was not kept",
        "error": "why there is no such model",
    },
    "SweepFacts": {
        "model": "path of the model",
        "what": "name of the points",
        "threads": "threads inside an operator when time was measured",
        "settings": "settings of the sweep",
        "points": "the models, the original first",
    },
    "Report": {
        "model": "path of the original",
        "output": "path of the model that was written; empty: none was",
        "layers": "every contraction",
        "totals": "sums over the whole model",
        "exactness": "the proof that the removal is exact",
        "fidelity": "outputs of the result against the original's; null: not compared",
        "metric": "the user's metric of both models; null where none was compared",
        "latency": "time of a run; null: not measured",
        "recovery": "recovery of the whole model",
        "repairs": "recovery of every layer",
        "finetuning": "training towards the original; null: none was asked for",
        "budget": "how a budget was met; null without one",
        "groups": "groups of units, with the indices `removed`",
        "barriers": "why channels may not be removed",
        "warnings": "what the user should know, a sentence each",
        "seconds": "time of every stage",
    },
    "Sensitivity": {"curves": "a curve per group"},
    "GroupCurve": {"group": "number of the group", "name": "its name", "units": "number of its units"},
    "GroupView": {
        "id": "number of the group",
        "kind": "`channels` or `grid`",
        "size": "number of units",
        "steps": "number of equal steps in which units may go",
        "prunable": "whether any may go",
        "reason": "why none may",
        "name": "the layer that it is named after",
        "layers": "layers with these channels",
        "slots": "places of the units in weights",
    },
    "SlotView": {
        "tensor": "name of the weight",
        "axis": "axis along which the units lie",
        "size": "length of that axis",
        "at": "a position on another axis that it is restricted to, such as the direction of a recurrent layer",
    },
    "Barrier": {
        "code": "reason; [Supported models](models.md) has them in words",
        "node": "node where it arose; empty for inputs and outputs",
        "op": "its operator",
        "detail": "what was met, in words",
        "channels": "number of channels that it holds",
    },
}  # fmt: skip
"""Meanings of fields that their classes have no text for; several names that belong together stand in one key."""

CLASSES = [facts.LayerFacts, facts.Totals, facts.Exactness, facts.Fidelity, facts.OutputFidelity, facts.AnswerFidelity]
CLASSES += [
    facts.Verdict,
    facts.MetricFacts,
    facts.Latency,
    facts.Recovery,
    facts.Repair,
    facts.Finetuning,
    facts.VocabularyFacts,
    facts.ExpertFacts,
    facts.BranchFacts,
    facts.ResizedTensor,
    facts.RotatedStream,
    facts.DeadChannels,
    facts.Regularized,
    facts.FactorizedLayer,
    facts.SparsifiedLayer,
    facts.ZerosFacts,
    facts.Quantization,
    facts.SparsityFacts,
    facts.BudgetFacts,
    facts.TargetFacts,
]
CLASSES += [facts.AnswerFacts, facts.NodeTime, facts.KindSteps, facts.SweepPoint, GroupCurve, GroupView, SlotView]
CLASSES += [facts.CandidateFacts, facts.GroupLosses, facts.LayerTimes]
CLASSES += [Barrier, Description, Kernels, facts.SmallerRatio]


def texts_below(cls: type) -> dict[str, str]:
    """{field: the text below it, or its line under Attributes}."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            found[field.target.id] = " ".join(str(text.value.value).split())
    listed = (inspect.getdoc(cls) or "").partition("Attributes:")[2]
    for names, words in re.findall(r"^ {4}([\w, ]+): ((?:.|\n {8})*)", listed, flags=re.MULTILINE):
        found |= dict.fromkeys(names.split(", "), " ".join(words.split()))
    return found


def meaning(cls: type, name: str) -> str:
    """What a field means; a field that nobody explains is an error."""
    bases = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    here = {n: words for b in bases for names, words in MEANINGS.get(b.__name__, {}).items() for n in names.split(", ")}
    words = texts_below(cls).get(name) or here.get(name)
    assert words, f"explain {cls.__name__}.{name}: a text below the field, or a line in tools/make_json_page.py"
    return words.replace("``", "`").replace("|", "\\|").rstrip(".")


def kind(of: Any) -> str:
    """A type in words, with a link to what it is made of."""
    if of is Any:
        return "any"
    if of is type(None):
        return "null"
    origin, parts = typing.get_origin(of), typing.get_args(of)
    if origin in (list, tuple) and parts:
        return f"list of {kind(parts[0])}"
    if origin is not None and parts and origin not in (dict, Mapping):
        return " or ".join(dict.fromkeys(kind(part) for part in parts))
    if isinstance(of, type) and dataclasses.is_dataclass(of):
        return f"[{of.__name__}](#{of.__name__.lower()})"
    plain = {str: "text", int: "number", float: "number", bool: "true or false", list: "list", tuple: "list"}
    return plain.get(of, "object")


def fields(cls: type) -> Iterator[tuple[str, str, str]]:
    """Name, type and meaning of every field of a class."""
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name == "network":  # for drawings, no part of the object
            continue
        yield field.name, kind(types[field.name]), meaning(cls, field.name)


def table(rows: Iterator[tuple[str, str, str]]) -> list[str]:
    return ["", "| field | type | |", "|---|---|---|", *(f"| `{name}` | {of} | {words} |" for name, of, words in rows)]


def page() -> str:
    """The page, in Markdown."""
    lines = [INTRODUCTION, "\n## Every command", *table((n, *rest) for n, rest in EVERY.items())]
    for command, (cls, more) in COMMANDS.items():
        own = [] if cls is None else list(fields(cls))
        lines += [f"\n## {command}", *table(iter([*own, *((n, *rest) for n, rest in more.items())]))]
    for cls in CLASSES:
        lines += [f"\n## {cls.__name__}", *table(fields(cls))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
