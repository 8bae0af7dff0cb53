"""The contract of passes: immutable values, what passes require and ensure, and whose fault it is."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op
from onnxprune.errors import PostconditionError, PreconditionError
from onnxprune.io.weights import ArrayWeight
from onnxprune.labels.atoms import Barrier
from onnxprune.pipeline import SAME_MODEL, Context, Model, PassResult, Requirement, apply
from onnxprune.report.facts import Remark, Settings

MODEL = Path(__file__).resolve().parents[2] / "models" / "residual.onnx"
P = op.passes


@pytest.fixture(scope="module")
def context() -> Context:
    return Context.of(MODEL)


def kernel(model: Model) -> str:
    return next(name for name, weight in model.weights.items() if len(weight.shape) == 4)


def zeroed(_: Context, model: Model) -> PassResult:
    name = kernel(model)
    return PassResult(model.with_weights({name: ArrayWeight(name, np.zeros_like(model.weights[name].read()))}))


def test_a_model_is_a_value(context: Context) -> None:
    """A pass gives another model; the one that it was given can be gone on from in any other way."""
    model = Model.of(context.analysis)
    half = P.Prune(ratio=0.5)(context, model).model
    less = P.Prune(ratio=0.2)(context, model).model
    assert model.removed is None and not model.plan.groups and model.is_analyzed
    assert half.num_parameters < less.num_parameters < model.num_parameters
    assert half.is_unproved and not half.is_factorized and half.analysis is model.analysis
    with pytest.raises(TypeError):
        half.weights["w"] = None  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        half.removed = None  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        context.seed = 1  # type: ignore[misc]
    with pytest.raises(AttributeError, match="immutable"):
        context.analysis.reshape_axis = "heads"


def test_another_choice_is_another_analysis() -> None:
    analysis = op.analyze(MODEL.with_name("attention.onnx"))
    before = [group.prunable for group in analysis.groups]
    heads = analysis.with_reshape_axis("heads")
    group = next(g for g in analysis.units.groups if g.prunable)
    why = Barrier("unsupported-form", "n", "Op", "cannot be rewritten")
    atoms = np.flatnonzero(np.isin(analysis.units.component, group.units))
    frozen = analysis.with_frozen([(atoms, why)])
    assert analysis.with_reshape_axis("head_dim") is analysis
    assert [g.prunable for g in heads.groups] != before
    assert sum(b.channels for b in frozen.barriers) == sum(b.channels for b in analysis.barriers) + group.size
    assert [g.prunable for g in analysis.groups] == before and why.detail not in {b.detail for b in analysis.barriers}


def test_a_report_is_the_sum_of_facts() -> None:
    def note(_: Context, model: Model) -> PassResult:
        return PassResult(model, [Remark("looked at"), Settings({"own": 1})], changed=False)

    result = op.Pipeline([P.Prune(ratio=0.5), note]).run(MODEL)
    assert result.report.warnings == ["looked at"] and result.report.settings["own"] == 1
    assert result.report.settings["criterion"] == "l2" and result.report.totals.macs_after > 0
    before = result.report.to_dict()
    assert result.report.to_dict() == before and result.plan is result.final.plan


def test_a_pass_of_the_old_contract_is_told_how_to_port() -> None:
    def old(state: Any) -> None:
        state.weights.clear()

    with pytest.raises(op.UsageError, match=r"Pass old follows the old contract.*") as caught:
        op.Pipeline([old])  # type: ignore[list-item]
    assert "(context, model)" in caught.value.hint and "model.with_weights" in caught.value.hint
    with pytest.raises(op.UsageError, match="no more"):
        P.State  # noqa: B018


@pytest.mark.parametrize(("stage", "message"), [
    (P.Prune, "Pass Prune is a class"),
    (lambda a, b, c: None, "takes 3 arguments"),
    (3, "3 is not a pass"),
    ("prnue", "Unknown pass 'prnue'"),
])  # fmt: skip
def test_what_is_no_pass_is_refused(stage: Any, message: str) -> None:
    with pytest.raises(op.UsageError, match=message):
        op.Pipeline([stage])


def test_what_a_pass_requires_is_asked_in_front_of_it() -> None:
    with pytest.raises(PreconditionError, match="a model without removed channels") as caught:
        op.Pipeline([P.Prune(ratio=0.5), P.Prune(ratio=0.1)]).run(MODEL)
    assert caught.value.exit_code == 2
    calls: list[int] = []

    def count(_: Context, model: Model) -> PassResult:
        calls.append(1)
        return PassResult(model, changed=False)

    with pytest.raises(PreconditionError, match="needs calibration data"):
        op.Pipeline([count, P.Recover("bias")]).run(MODEL)
    assert not calls, "what the call lacks is said before anything runs"


class Wrong(P.Pass):
    """Promises the model that it was given, and gives another."""

    ensures = (SAME_MODEL,)

    def __call__(self, context: Context, model: Model) -> PassResult:
        return zeroed(context, model)


def lost(_: Context, model: Model) -> PassResult:
    return PassResult(model.with_weights({"nowhere": ArrayWeight("nowhere", np.zeros(3, np.float32))}))


def silent(context: Context, model: Model) -> PassResult:
    return PassResult(zeroed(context, model).model, changed=False)


@pytest.mark.parametrize(("stage", "message"), [
    (Wrong(), "Pass Wrong ensures the same model"),
    (lambda context, model: None, "returned NoneType"),
    (lambda context, model: PassResult(onnx.ModelProto()), "returned ModelProto as the model"),
    (lost, "weight 'nowhere' without an initializer"),
    (silent, "another model with changed=False"),
])  # fmt: skip
def test_what_a_pass_ensures_is_asked_behind_it(stage: Any, message: str) -> None:
    with pytest.raises(PostconditionError, match=message) as caught:
        op.Pipeline([stage]).run(MODEL)
    assert caught.value.exit_code == 4


def test_an_error_names_the_pass_that_it_came_from() -> None:
    def broken(context: Context, model: Model) -> PassResult:
        raise KeyError("gone")

    with pytest.raises(KeyError) as caught:
        op.Pipeline([broken]).run(MODEL)
    assert caught.value.__notes__ == ["in pass broken"]


def test_weights_that_a_pass_has_changed_are_pruned_as_they_are() -> None:
    """A cut goes on from what passes in front of it have made."""
    result = op.Pipeline([zeroed, P.Prune(ratio=0.25), P.Exact()]).run(MODEL)
    assert result.report.exactness.passed
    name = kernel(result.final)
    assert not result.final.weights[name].read().any()
    assert result.plan.model_sha256 == op.analyze(MODEL).loaded.sha256


def test_requirements_of_a_function(context: Context) -> None:
    def seeded(_: Context, model: Model) -> PassResult:
        return PassResult(model, changed=False)

    seeded.requires = (Requirement("another seed", lambda context, _: context.seed == 1),)  # type: ignore[attr-defined]
    (stage,) = op.Pipeline([seeded]).passes
    with pytest.raises(PreconditionError, match="Pass seeded needs another seed"):
        apply(stage, context, Model.of(context.analysis))


def test_stages_are_logged_and_trials_are_not(caplog) -> None:
    net = Net(17)
    x = net.op("Relu", net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8))
    with caplog.at_level("DEBUG", logger="onnxprune"):
        op.prune(net.model(net.conv(x, 8, 4)), ratio=0.5, latency=False)
    lines = [record.getMessage() for record in caplog.records]
    assert {record.name for record in caplog.records} == {"onnxprune"}
    assert lines[0] == "analyze: started" and lines[1].startswith("analyze: done in ")
    assert len(lines) == 2 * len({line.partition(":")[0] for line in lines})
