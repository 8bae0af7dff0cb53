"""A wrong type or value of any argument is a typed error, spelled as whoever reads it writes arguments."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import onnxprune as op
from onnxprune.errors import argument
from onnxprune.settings import SETTINGS, Setting, spell

MODEL = Path(__file__).parents[2] / "models" / "residual.onnx"
ODD = object()
PASSES = [stage for stage in map(op.passes.__getattribute__, op.passes.__all__) if inspect.isclass(stage)]
PASSES = [stage for stage in PASSES if issubclass(stage, op.passes.Pass) and stage is not op.passes.Pass]


def three(first: Any, second: Any, third: Any) -> Any:
    return first


def raising(slot: Any) -> Any:
    raise KeyError("no such layer")


PRUNE: list[tuple[dict[str, Any], str]] = [
    ({"rotate": "maybe"}, "rotate: unknown value 'maybe'"),
    ({"rotate": "yes"}, "rotate turns streams"),
    ({"vocabulary": 5}, "vocabulary: 5 is not allowed"),
    ({"vocabulary": ""}, "vocabulary: '' is not allowed"),
    ({"experts": 0}, "experts: 0 is not allowed"),
    ({"experts": "few"}, "experts: few is not allowed"),
    ({"quantize": "int4"}, "quantize: unknown value 'int4'"),
    ({"quantize": True}, "quantize: unknown value 'True'"),
    ({"cache_heads": "yes"}, "cache_heads: 'yes' is not allowed"),
    ({"cache_heads": True}, "cache_heads: the model has no cache"),
    ({"resize_io": 5}, "resize_io: 5 is not allowed"),
    ({"resize_io": "nothing"}, "resize_io='nothing' matches no input or output"),
    ({"model_config": 5}, "model_config: 5 is not allowed"),
    ({"model_config": "nowhere.json"}, "Give model_config the config.json"),
    ({"keep_ids": 1}, "keep_ids: 1 is not allowed"),
    ({"keep_ids": True}, "keep_ids is about the ids of a smaller vocabulary"),
    ({"tokenizer": 5}, "tokenizer: 5 is not allowed"),
    ({"tokenizer": "nowhere"}, "tokenizer is about the tokens of a vocabulary"),
    ({"augment": "turn"}, "augment: unknown value 'turn'"),
    ({"plan": 5}, "plan: 5 is not allowed"),
    ({"target": 5}, "target: 5 is not allowed"),
    ({"input_shapes": [1]}, "input_shapes: [1] is not allowed"),
    ({"input_shapes": {"x": ["a"]}}, "input_shapes['x']: 'a' is not a size"),
    ({"max_drop": -1}, "max_drop: -1 is not allowed"),
    ({"progress": True}, "progress: True is no function"),
    ({"ratoi": 0.3}, "Did you mean 'ratio'?"),
    ({"criterion": raising}, "The criterion raising failed"),
    ({"criterion": three}, "cannot be called with a slot"),
]


@pytest.mark.parametrize(("given", "message"), PRUNE)
def test_wrong_values_in_python(given: dict[str, Any], message: str) -> None:
    with pytest.raises(op.UsageError) as caught:
        op.prune(MODEL, **given, validate=False, latency=False)
    assert message in str(caught.value) and caught.value.hint and "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rotate maybe", "--rotate: unknown value 'maybe'"),
        ("--experts few", "--experts: few is not allowed"),
        ("--quantize int4", "--quantize: unknown value 'int4'"),
        ("--quantize qdq", "--quantize dynamic"),
        ("--cache-heads", "--cache-heads: the model has no cache"),
        ("--resize-io nothing", "--resize-io nothing matches no input"),
        ("--model-config nowhere.json", "Give --model-config the config.json"),
        ("--keep-ids", "--keep-ids is about the ids"),
        ("--tokenizer nowhere", "Give --vocabulary"),
        ("--augment turn", "--augment: unknown value 'turn'"),
        ("--max-drop -1", "--max-drop: -1 is not allowed"),
        ("--ratoi 0.3", "Did you mean --ratio?"),
    ],
)
def test_wrong_values_on_the_command_line(run: Any, tmp_path: Path, arguments: str, message: str) -> None:
    done = run(MODEL, "-o", tmp_path / "small.onnx", *arguments.split())
    assert done.exit_code == 2 and message in done.stderr and "hint: " in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.python], ids=lambda setting: setting.name)
def test_no_setting_takes_what_has_no_meaning(setting: Setting) -> None:
    if setting.name in ("data", "labels"):  # asked for inputs when they are read
        return
    for command in setting.on:
        for wrong in (ODD, object):
            with pytest.raises(op.UsageError) as caught:
                setting.at(command).kind.check(wrong, argument(setting.name))
            message, _ = caught.value.spelled(spell(command))
            assert caught.value.argument == setting.name and caught.value.hint
            if setting.on[command]:
                assert message.startswith(setting.at(command).flag), (command, message)


@pytest.mark.parametrize("stage", PASSES, ids=lambda stage: stage.__name__)
def test_passes_name_their_wrong_arguments(stage: type) -> None:
    names = set(inspect.signature(stage).parameters)
    given = {"cut": MODEL, "plan": op.Plan()} if stage is op.passes.Adopt else {}
    assert repr(stage(**given)).startswith("<") and len(repr(stage(**given))) < 80
    checked = {"amount", "include", "exclude", "plan", "keep_ids", "tokenizer", "between", "mode", "kind", "augment"}
    for name in names & checked:
        with pytest.raises(op.UsageError, match=r"not allowed|no list of passes|unknown value|Unknown way"):
            stage(**{**given, name: ODD})
    with pytest.raises(TypeError):
        stage(**given, nonsense=1)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (op.passes.Prune, "A pipeline is a list of passes"),
        ("prune", "A pipeline is a list of passes"),
        (op.passes.Validate(), "A pipeline is a list of passes"),
        ([op.passes.Prune], "Prune is a class, expected an instance"),
        ([3], "3 is not a pass"),
    ],
)
def test_pipelines_take_lists_of_instances(passes: Any, message: str) -> None:
    with pytest.raises(op.UsageError, match=message) as caught:
        op.Pipeline(passes)
    assert caught.value.hint
    with pytest.raises(op.UsageError, match="Finetune is a class, expected an instance"):
        op.passes.Prune(between=[op.passes.Finetune])


def test_names_of_the_package_are_its_api() -> None:
    assert sorted(dir(op)) == sorted([*op.__all__, "__version__"])
    for room in (op.criteria, op.devices, op.passes, op.rules, op.statistics):
        assert sorted(dir(room)) == sorted(room.__all__)
    calls = [getattr(op, name) for name in op.__all__ if inspect.isfunction(getattr(op, name))]
    for call in calls:
        kinds = {p.kind for p in inspect.signature(call).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, call


def test_former_names_of_rules_warn() -> None:
    with pytest.warns(DeprecationWarning, match="Move.SELECT"):
        assert op.rules.Move.SOME is op.rules.Move.SELECT  # type: ignore[attr-defined]
    form = op.rules.Pairwise(("ni", "oi", "no"), (4, 3))
    with pytest.warns(DeprecationWarning, match="output_letters"):
        assert form.made == form.output_letters == "o"
    with pytest.raises(AttributeError):
        op.rules.Move.NONE  # noqa: B018
