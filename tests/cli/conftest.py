"""An API that answers at once with known facts, so that what the command shows and how it fails can be pinned down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from onnxprune.cli import main
from onnxprune.report.facts import Exactness, Fidelity, Latency, LayerFacts, OutputFidelity, Report, Totals


def layer(name: str, before: int, after: int, reason: str = "") -> LayerFacts:
    """A 3x3 convolution on 16 channels over 8x8 positions."""
    return LayerFacts(
        name, "Conv", before, after, before * 144, after * 144, before * 144 * 64, after * 144 * 64, reason
    )


def small_report() -> Report:
    """One layer cut, one left because of its reason."""
    return Report(
        model="m.onnx",
        layers=[layer("/conv1/Conv", 64, 45), layer("/head/Conv", 10, 10, "graph-output")],
        totals=Totals(10_656, 7_920, 681_984, 506_880, 43_000, 32_100),
        exactness=Exactness(True, 3.1e-7, 1e-5, [1, 3], "logits"),
        fidelity=Fidelity([OutputFidelity("logits", 0.9312, 8.4, 0.912)], 64),
        latency=Latency(1.52, 0.91, 0.03, 0.02, 50, 1),
        groups=[
            {"id": 0, "kind": "channels", "name": "/conv1/Conv", "size": 64, "steps": 64, "removed": list(range(19)),
             "layers": ["/conv1/Conv"], "slots": [{"tensor": "w", "axis": 0}], "prunable": True, "reason": ""},
            {"id": 1, "kind": "channels", "name": "/head/Conv", "size": 10, "steps": 10, "removed": [],
             "layers": ["/head/Conv"], "slots": [], "prunable": False, "reason": "graph-output"},
        ],
        barriers=[
            {"code": "graph-output", "node": "/head/Conv", "op": "Conv", "detail": "logits", "channels": 10},
            {"code": "no-rule", "node": "/odd", "op": "vendor.Odd", "detail": "", "channels": 128},
        ],
    )  # fmt: skip


@dataclass
class FakeApi:
    """What ``onnxprune.prune`` and ``onnxprune.analyze`` were called with, and what they answer or raise."""

    report: Report = field(default_factory=small_report)
    error: BaseException | None = None
    save_error: BaseException | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    def prune(self, model: Path, **options: Any) -> Any:
        self.calls.append({"model": model, **options})
        options["progress"]("analyse", 0.0)
        options["progress"]("analyse", 1.0)
        if self.error is not None:
            raise self.error
        return SimpleNamespace(report=self.report, save=self._save)

    def analyze(self, model: Path, **options: Any) -> Any:
        self.calls.append({"model": model, **options})
        if self.error is not None:
            raise self.error
        facts = self.report
        return SimpleNamespace(
            groups=facts.groups,
            barriers=facts.barriers,
            layers=facts.layers,
            unlocks=[("vendor.Odd", 128)],
            parameters=facts.totals.params_before,
        )

    def _save(self, path: Path, *, plan: Path | None = None) -> None:
        if self.save_error is not None:
            raise self.save_error
        Path(path).write_bytes(b"cut model")
        if plan is not None:
            Path(plan).write_text('{"version": 1}')


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setattr("onnxprune.prune", fake.prune, raising=False)
    monkeypatch.setattr("onnxprune.analyze", fake.analyze, raising=False)
    monkeypatch.setattr("onnxprune.passes.sparsity.measure_sparsity", lambda analysis: [])
    monkeypatch.setattr("onnxprune.passes.depth.residual_branches", lambda analysis: [])
    return fake


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that stands for a model: the answering API never reads it."""
    path = tmp_path / "m.onnx"
    path.write_bytes(b"model bytes")
    return path


def without_progress(text: str) -> str:
    """Leave out the lines that name stages."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.endswith(" ...\n"))


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the command in this process, as its script does; gives stdout, stderr and the exit code apart.

    Without ``-v``, stderr comes without the lines of progress, which are tested for themselves.
    """

    def invoke(*args: Any) -> Result:
        result = CliRunner().invoke(main, [str(arg) for arg in args], prog_name="onnxprune")
        if "-v" not in args and "-vv" not in args:
            result.stderr_bytes = without_progress(result.stderr).encode()
        return result

    return invoke
