"""Settings, declared once: what calls accept, what errors name, and that nothing else repeats them."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import onnxprune as op
from onnxprune.allocation.settings import Options
from onnxprune.errors import ArgumentError, Note, UsageError, argument, spelled
from onnxprune.factorization.decompositions import METHODS
from onnxprune.factorization.settings import Options as FactorOptions
from onnxprune.pipeline import RunSettings
from onnxprune.recovery import MODES
from onnxprune.runtime.images import LAYOUTS, ORDERS
from onnxprune.settings import SETTINGS, checked, default, settings_of, spell, words
from onnxprune.targets import UNITS

MODEL = Path(__file__).parents[1] / "models" / "residual.onnx"
CALLS: dict[str, Callable[..., Any]] = {
    "prune": op.prune,
    "recover": op.recover,
    "factorize": op.factorize,
    "sparsify": op.sparsify,
    "train": op.train,
    "inspect": op.analyze,
    "compare": op.compare,
    "profile": op.profile,
    "sensitivity": op.sensitivity,
    "sweep": op.sweep,
}


@pytest.mark.parametrize("command", CALLS)
def test_calls_have_their_settings_and_no_others(command: str) -> None:
    """Signatures are written out, so that editors show them: with the names and defaults that are declared."""
    parameters = inspect.signature(CALLS[command]).parameters
    known = {name: setting for name, setting in settings_of(command).items() if setting.python}
    assert set(parameters) - {"model", "original", "cut"} == set(known)
    for name in known:
        own = parameters[name].default
        assert own in (None, inspect.Parameter.empty) or own == known[name].default, name
        assert f"{name}:" in str(CALLS[command].__doc__), f"{name} is not explained"


def test_words_are_those_that_the_code_knows() -> None:
    assert words("recover") == MODES
    assert words("method", "factorize") == ("auto", *METHODS)
    assert words("kind", "sweep") == tuple(UNITS)
    assert (words("layout"), words("pixel_order")) == (LAYOUTS, ORDERS)
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize(
    ("given", "name", "message"),
    [
        ({"max_drop": -1}, "max_drop", "max_drop: -1 is not allowed"),
        ({"ratio": 30}, "ratio", "ratio: 30 is out of range"),
        ({"ratio": "0.3"}, "ratio", "ratio: '0.3' is not a number"),
        ({"ratio": True}, "ratio", "ratio: True is not a number"),
        ({"layers": {"a*": 2}}, "layers", "layers['a*']: 2 is out of range"),
        ({"layers": [("a", 0.1)]}, "layers", "layers: [('a', 0.1)] is not allowed"),
        ({"include": 3}, "include", "include: 3 is not allowed"),
        ({"samples": 3}, "samples", "samples describes how to read data, but data is not given"),
        ({"finetune": 5}, "finetune", "finetune trains on data, but data is not given"),
        ({"data": [], "samples": 0}, "samples", "samples: 0 is not allowed"),
        ({"progress": True}, "progress", "progress: True is no function"),
        ({"progress": dict}, "progress", "is no function"),
        ({"criterion": 5}, "criterion", "criterion: 5 is no function"),
        ({"trials": 3}, "trials", "trials refines the allocation for a target"),
        ({"jobs": 2}, "jobs", "jobs applies only when sensitivities are measured"),
        ({"seed": -1}, "seed", "seed: -1 is not allowed"),
        ({"approximate": "no"}, "approximate", "approximate: 'no' is not allowed"),
        ({"memory_limit": "2GB"}, "memory_limit", "memory_limit: '2GB' is not a number of bytes"),
        ({"min_fidelity": 0}, "min_fidelity", "min_fidelity: 0 is not allowed"),
        ({"min_fidelity": 0.9, "validate": False}, "min_fidelity", "validate=False forbids that"),
        ({"recover": "lstq"}, "recover", "recover: unknown value 'lstq'"),
        ({"providers": "cpu"}, "providers", "providers: 'cpu' is not allowed"),
    ],
)
def test_errors_name_the_argument_of_python(given: dict[str, Any], name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        op.prune(MODEL, **given)
    assert caught.value.argument == name
    assert message in str(caught.value) and "--" not in str(caught.value)


def test_the_command_line_spells_the_same_error_as_an_option() -> None:
    with pytest.raises(UsageError) as caught:
        op.prune(MODEL, recover="full")
    message, hint = caught.value.spelled(spell("prune"))
    assert "--recover" in message and "--data" in hint
    assert "--" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.spelled(spell("prune")) == (message, hint) and again.argument == caught.value.argument


def test_errors_that_are_passed_on_keep_their_arguments(tmp_path: Path) -> None:
    path = tmp_path / "d.onnx"
    path.write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(op.ModelError) as caught:
        op.prune(path)
    assert caught.value.hint.endswith("inputs go to data.")
    assert caught.value.spelled(spell("prune"))[1].endswith("inputs go to --data.")


def test_marks_never_show() -> None:
    text = f"{argument('layers', key='a')} {argument('validate', False)} {argument('plan')} {argument('ratio', 0.5)}"
    assert spelled(text) == "layers['a'] validate=False plan ratio=0.5"
    assert spelled(text, spell("prune")) == "--layer a --no-validate --apply-plan --ratio 0.5"
    assert spelled(argument("plan"), spell("recover")) == "--plan"
    note = Note(text)
    assert note == spelled(text) and pickle.loads(pickle.dumps(note)).marked == text


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_name_that_there_is_not_is_compared_with_all_that_there_are(call: Callable[..., Any]) -> None:
    with pytest.raises(ArgumentError, match="input_shape'") as caught:
        call(MODEL, input_shape={"x": [1]})
    assert caught.value.hint == "Did you mean 'input_shapes'?"
    with pytest.raises(TypeError):
        call(MODEL, input_shape={})
    with pytest.raises(ArgumentError, match="too many positional"):
        call(MODEL, MODEL, MODEL, MODEL)


def test_passes_compare_names_as_well() -> None:
    wrong: Any
    for wrong, meant in (({"criteron": "l2"}, "criterion"), ({"scop": "local"}, "scope"), ({"rato": 0.3}, "ratio")):
        with pytest.raises(ArgumentError, match=f"Did you mean '{meant}'"):
            op.passes.Prune(**wrong)
    for stage, wrong, meant in (
        (op.passes.Factorize, {"metod": "svd"}, "method"),
        (op.passes.Recover, {"mod": "bn"}, "mode"),
        (op.passes.Validate, {"timd": False}, "timed"),
    ):
        with pytest.raises(ArgumentError, match=f"Did you mean '{meant}'"):
            stage(**wrong)


@pytest.mark.parametrize(
    ("stage", "options"), [(op.passes.Prune, Options), (op.Budget, Options), (op.passes.Factorize, FactorOptions)]
)
def test_signatures_of_passes_show_every_option_by_name(stage: type, options: type) -> None:
    parameters = inspect.signature(stage).parameters
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
    for entry in fields(options):
        assert parameters[entry.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[entry.name].default == entry.default


def test_arguments_of_calls_are_declared_once() -> None:
    """Calls write out what records declare: an argument has one type and one default, wherever it stands."""
    calls = [(call, (Options, RunSettings)) for call in (op.prune, op.sensitivity, op.sweep)]
    calls += [(op.factorize, (FactorOptions, RunSettings)), (op.passes.Pipeline.run, (RunSettings,))]
    calls += [(call, (RunSettings,)) for call in (op.recover, op.finetune, op.compare, op.profile)]
    for call, records in calls:
        parameters = inspect.signature(call).parameters
        for entry in (entry for record in records for entry in fields(record)):
            if entry.name in parameters and (call, entry.name) != (op.finetune, "data"):
                assert parameters[entry.name].default == entry.default, (call, entry.name)
                if entry.name != "outputs":
                    assert parameters[entry.name].annotation == entry.type, (call, entry.name)
    for entry in fields(Options):
        assert entry.name in inspect.signature(op.sweep).parameters


def test_records_and_passes_are_not_changed_after_construction() -> None:
    stage = op.passes.Prune("l1", 0.5, scope="global")
    with pytest.raises(AttributeError):
        stage.ratio = 0.9  # type: ignore[misc]
    other = replace(stage, ratio=0.25)
    assert (other.request.ratio, other.request.scope, stage.request.ratio) == (0.25, "global", 0.5)
    assert stage != op.passes.Prune("l1", 0.5, scope="global") and repr(op.passes.Factorize()) == "<pass Factorize>"


def test_one_text_is_one_pattern() -> None:
    assert checked("include", "conv*") == ("conv*",)
    assert default("ratio") == 0.3


def test_library_code_writes_no_options_of_the_command_line() -> None:
    """Who calls from Python reads names of arguments; the command line spells them as options by itself."""
    root = Path(op.__file__).parent
    option = re.compile(rf"(?<![\w-])(?:{'|'.join(setting.flag for setting in SETTINGS)})\b")
    commands = re.compile(r"'onnxprune [^']*'|python -m tf2onnx.*")
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("cli/", "report/")) or name == "settings.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        found = [t.value for t in texts if id(t) not in docs and option.search(commands.sub("", t.value))]
        assert not found, f"{name}: {found}"
