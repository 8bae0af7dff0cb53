"""Rules, criteria and passes from outside the package: registered by a program, and announced by another package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from build import Net

import onnxprune as op
from onnxprune.channels.analysis import Analysis

MODELS = Path(__file__).parents[1] / "models"

ACME = "com.acme"


class PairMax(op.rules.Rule):
    """Channel c of the result is the larger of channels 2c and 2c + 1: a pair goes together."""

    def propagate(self, step: op.rules.Step) -> None:
        labels = step.labels(0)
        step.fix_all_but(labels, (0, 1), "spatial", "positions keep their number")
        ids = step.axis_ids(labels, 1)
        if ids is not None:
            first, second = ids.reshape(-1, 2).T
            step.unite(first, second)
            step.set(0, (op.rules.along(first, 1, len(step.out_shape())),))

    def infer(self, node, shapes, values):  # type: ignore[no-untyped-def]
        x = shapes[0]
        return [x and (x[0], x[1] // 2, *x[2:])]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    for domain, kind in op.rules.known():
        if domain == ACME or kind == "SampleOp":
            op.rules.unregister(domain, kind)
    op.criteria.unregister("acme_last")
    op.passes.unregister("acme_count")


def vendor(kind: str, *, wide: int = 8, domain: str = ACME) -> onnx.ModelProto:
    """A convolution, the vendor's operator, a convolution."""
    net = Net(17)
    x = net.conv(net.input("x", ["N", 3, 6, 6]), 3, 8)
    y = net.conv(net.op(kind, x, domain=domain), wide, 4)
    return net.model(y, check=False, shapes={y: ["N", 4, 6, 6]})


def kernels(model: onnx.ModelProto) -> list[tuple[int, ...]]:
    return [tuple(t.dims) for t in model.graph.initializer if len(t.dims) == 4]


def test_without_a_rule_a_vendor_operator_is_a_named_barrier() -> None:
    analysis = op.analyze(vendor("Swoosh"))
    found = {(b.code, b.op): b.detail for b in analysis.barriers}
    assert "com.acme.Swoosh" in found["no-rule", "Swoosh"]


def test_an_elementwise_rule_is_one_line_and_tells_shapes() -> None:
    op.rules.register(ACME, "Swoosh", rule=op.rules.Elementwise())
    result = op.prune(vendor("Swoosh"), ratio=0.5, validate=False)
    assert kernels(result.model) == [(4, 3, 3, 3), (4, 4, 3, 3)]
    onnx.checker.check_model(result.model)


def test_a_rule_of_ones_own_ties_channels_and_tells_shapes() -> None:
    op.rules.register(ACME, "PairMax")(PairMax)
    result = op.prune(vendor("PairMax", wide=4), ratio=0.5, validate=False)
    assert kernels(result.model) == [(4, 3, 3, 3), (4, 2, 3, 3)]
    removed = next(s.removed for g in result.plan.groups for s in g.slots if s.size == 8)
    assert {i // 2 for i in removed if i % 2 == 0} == {i // 2 for i in removed if i % 2 == 1}


def test_a_rule_is_proved_where_onnxruntime_has_a_kernel() -> None:
    model = vendor("SampleOp", domain="com.microsoft")
    assert "no-rule" in {b.code for b in op.analyze(model).barriers}
    op.rules.register("com.microsoft", "SampleOp", rule=op.rules.Elementwise([0]))
    result = op.prune(model, ratio=0.5, latency=False)
    assert result.report.exactness.passed
    assert kernels(result.model) == [(4, 3, 3, 3), (4, 4, 3, 3)]


def test_a_wrong_rule_is_found_out() -> None:
    """Rules may be wrong: a pair that is not tied leaves a model that is not the masked original."""

    class Shifted(op.rules.Rule):
        def propagate(self, step: op.rules.Step) -> None:
            ids = step.axis_ids(step.labels(0), 1)
            if ids is not None:
                step.set(0, (op.rules.along(np.roll(ids, 1), 1, len(step.out_shape())),))

        def infer(self, node, shapes, values):  # type: ignore[no-untyped-def]
            return [shapes[0]]

    op.rules.register("com.microsoft", "SampleOp", rule=Shifted())
    with pytest.raises(op.ValidationError, match="not exact"):
        op.prune(vendor("SampleOp", domain="com.microsoft"), ratio=0.5, criterion="random", latency=False)


def test_rules_that_overlap_are_refused() -> None:
    op.rules.register(ACME, "Swoosh", since=1, until=3, rule=op.rules.Elementwise())
    op.rules.register(ACME, "Swoosh", since=3, rule=op.rules.Elementwise())
    with pytest.raises(ValueError, match="overlap"):
        op.rules.register(ACME, "Swoosh", since=2, rule=op.rules.Elementwise())


def test_a_criterion_by_name_and_as_a_function() -> None:
    @op.criteria.register("acme_last")
    def last(slot: op.criteria.Slot) -> np.ndarray:
        """The first channels matter most."""
        return -np.arange(slot.blocks.shape[1], dtype=float)

    op.rules.register(ACME, "Swoosh", rule=op.rules.Elementwise())
    for criterion in ("acme_last", last):
        result = op.prune(vendor("Swoosh"), criterion=criterion, ratio=0.5, validate=False)
        assert next(s.removed for g in result.plan.groups for s in g.slots if s.size == 8) == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="already registered"):
        op.criteria.register("acme_last")(last)


def test_a_pass_by_name_and_as_a_function() -> None:
    seen: list[int] = []

    @op.passes.register("acme_count")
    def count(context: op.passes.Context, model: op.passes.Model) -> op.passes.PassResult:
        """How many groups lost something."""
        seen.append(len(model.plan.groups))
        return op.passes.PassResult(model, changed=False)

    op.rules.register(ACME, "Swoosh", rule=op.rules.Elementwise())
    for stages in ([op.passes.Prune(ratio=0.5), "acme_count"], ["prune", count]):
        op.Pipeline(stages).run(vendor("Swoosh"))
    assert seen == [1, 1]
    with pytest.raises(op.UsageError, match="acme_cuont"):
        op.Pipeline(["acme_cuont"])
    with pytest.raises(ValueError, match="already registered"):
        op.passes.register("acme_count")(count)


EXTENSION = """
import numpy as np
from onnxprune.passes import Pass, PassResult
from onnxprune.report.facts import Remark
from onnxprune.rules import Elementwise, register

register("com.acme", "Swoosh", rule=Elementwise())

def last(slot):
    return -np.arange(slot.blocks.shape[1], dtype=float)

class Note(Pass):
    def __call__(self, context, model):
        return PassResult(model, [Remark("noted by acme")], changed=False)
"""
POINTS = {"onnxprune.rules": "swoosh = acme_ext", "onnxprune.importance.criteria": "acme_last = acme_ext:last",
          "onnxprune.passes": "acme_note = acme_ext:Note"}  # fmt: skip


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A package that announces a rule, a criterion and a pass, as a wheel would install it."""
    folder = tmp_path / "site"
    info = folder / "acme_ext-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "acme_ext.py").write_text(EXTENSION)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-ext\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(f"[{group}]\n{point}\n" for group, point in POINTS.items()))
    return folder


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_another_package_announces_a_rule_and_a_criterion(installed: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "m.onnx", tmp_path / "small.onnx"
    onnx.save(vendor("Swoosh"), source)
    options = ["--criterion", "acme_last", "--ratio", "0.5", "--no-validate"]
    done = run(installed, "-m", "onnxprune", str(source), "-o", str(target), *options)
    assert done.returncode == 0, done.stderr
    assert kernels(onnx.load(target)) == [(4, 3, 3, 3), (4, 4, 3, 3)]
    first = [next(t for t in onnx.load(f).graph.initializer if len(t.dims) == 4) for f in (source, target)]
    before, after = (onnx.numpy_helper.to_array(t) for t in first)
    np.testing.assert_array_equal(after, before[:4])


def test_another_package_announces_a_pass(installed: Path, tmp_path: Path) -> None:
    onnx.save(vendor("Swoosh"), tmp_path / "m.onnx")
    script = "import sys, onnxprune as op; print(op.Pipeline(['prune', 'acme_note']).run(sys.argv[1]).report.warnings)"
    done = run(installed, "-c", script, str(tmp_path / "m.onnx"))
    assert done.returncode == 0, done.stderr
    assert "noted by acme" in done.stdout


def test_an_extension_that_does_not_load_is_named(installed: Path, tmp_path: Path) -> None:
    (installed / "acme_ext.py").write_text("import no_such_module_of_acme")
    onnx.save(vendor("Swoosh"), tmp_path / "m.onnx")
    done = run(installed, "-m", "onnxprune", str(tmp_path / "m.onnx"), "--no-validate")
    assert done.returncode == 2
    assert "acme-ext" in done.stderr
    assert "no_such_module_of_acme" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "site"]


def _raises(slot: op.criteria.Slot) -> np.ndarray:
    raise ValueError("no such weight")


def _needs_three(slot: op.criteria.Slot, maps: object, more: object) -> None: ...


def _needs_none() -> None: ...


def _needs_a_name(slot: op.criteria.Slot, *, name: str) -> None: ...


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (_raises, "_raises failed for .*: ValueError: no such weight"),
        (lambda slot: np.array(["a"] * slot.blocks.shape[1]), "TypeError: it returned"),
        (_needs_three, "'_needs_three' cannot be called with a slot and maps"),
        (_needs_none, "'_needs_none' cannot be called"),
        (_needs_a_name, "'_needs_a_name' cannot be called"),
    ],
)
def test_a_criterion_that_fails_is_an_error_of_its_own(criterion: Any, message: str) -> None:
    with pytest.raises(op.ExtensionError, match=message) as caught:
        op.prune(MODELS / "residual.onnx", criterion=criterion, latency=False)
    assert caught.value.exit_code == 2 and caught.value.hint


def test_the_face_can_be_explored() -> None:
    assert set(dir(op)) == {*op.__all__, "__version__"}
    for name in op.__all__:
        assert getattr(op, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        op.prun  # noqa: B018


def test_results_show_themselves_in_a_line() -> None:
    result = op.prune(MODELS / "residual.onnx", latency=False)
    analysis = op.analyze(MODELS / "residual.onnx")
    stages: list[Any] = [op.passes.Prune(), op.passes.Recover("none"), op.passes.Validate(), op.passes.Factorize()]
    stages += [op.Budget(op.BudgetSpec.of("macs=0.5"))]
    shown = (result, result.report, result.plan, analysis, analysis.groups[0], result.context, result.final)
    for one in (*shown, op.Pipeline(stages), *stages):
        assert len(repr(one)) < 200 and repr(one).startswith("<") and " at 0x" not in repr(one), repr(one)


def test_an_old_name_still_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match="onnxprune.recover"):
        assert op.repair is op.recover
    assert "repair" not in dir(op)


def test_a_rule_of_ones_own_says_which_sizes_have_to_agree() -> None:
    """An open dimension gets the size at which the vendor's operator runs."""

    class Lookup(op.rules.Rule):
        def agreements(self, node, shapes, read):  # type: ignore[no-untyped-def]
            yield shapes[0][-1], shapes[1][0]

    net = Net(17)
    x, table = net.input("x", ["N", "width"]), net.const(np.ones((11, 4), np.float32))
    y = net.op("Lookup", x, table, domain=ACME)
    model = net.model(y, check=False, shapes={y: ["N", 4]})
    free = Analysis(model).facts.probes[0].inputs["x"]
    op.rules.register(ACME, "Lookup", rule=Lookup())
    probes = Analysis(model).facts.probes
    assert free[1] != 11 and all(probe.inputs["x"][1] == 11 for probe in probes)


def test_a_criterion_in_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line takes a function of a file, which runs once although it registers a name."""
    monkeypatch.chdir(tmp_path)
    Path("acme.py").write_text(
        "import onnxprune as op\n\n\n"
        "@op.criteria.register('acme_last')\n"
        "def last(slot):\n"
        "    return -slot.matrix.std(axis=1)\n"
    )
    assert op.criteria.get("acme.py:last") is op.criteria.get("acme.py:last") is op.criteria.get("acme_last")
    results = [
        op.prune(MODELS / "residual.onnx", criterion=name, ratio=0.3, validate=False) for name in ("acme.py:last", "l2")
    ]
    assert results[0].plan.criterion == "acme.py:last"
    assert results[0].plan.groups != results[1].plan.groups
    with pytest.raises(op.UsageError, match="has no function 'lost'") as caught:
        op.criteria.get("acme.py:lost")
    assert "'last'" in str(caught.value.hint)
