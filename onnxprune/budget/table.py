"""The table of measured times: samples per node and counts, as data that can be saved, cached and taken elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from onnxprune import documents
from onnxprune.errors import UsageError

VERSION = 3


class Sample(NamedTuple):
    """Seconds that a node took once where it read and made so many channels."""

    node: str
    reads: int
    makes: int
    seconds: float


@dataclass(slots=True)
class LatencyTable:
    """What was measured of one model on one device.

    Attributes:
        model_sha256: of the model. device: what the times depend on besides. inputs: shapes that were run.
        seconds: the whole original per run. overhead, slope: a run takes overhead + slope * (sum of its nodes' times).
        error: largest error of that at the counts where whole runs were measured, as a share.
        checks: (predicted, measured) seconds of those.
    """

    model_sha256: str
    device: dict[str, Any]
    inputs: dict[str, list[int]]
    seconds: float
    overhead: float = 0.0
    slope: float = 1.0
    samples: list[Sample] = field(default_factory=list)
    checks: list[tuple[float, float]] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Largest difference between predicted and measured, as a share of the measured."""
        return max((abs(p - m) / m for p, m in self.checks), default=0.0)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, one node per line.

        Raises:
            UsageError: the file cannot be written.
        """
        data = asdict(self) | {"samples": None}
        nodes: dict[str, list[list[float]]] = {}
        for node, reads, makes, seconds in self.samples:
            nodes.setdefault(node, []).append([reads, makes, float(f"{seconds:.4g}")])
        head = json.dumps({"version": VERSION, **{k: v for k, v in data.items() if v is not None}})
        body = ",\n ".join(f"{json.dumps(node)}: {json.dumps(found)}" for node, found in nodes.items())
        documents.write(Path(path), f'{head[:-1]},\n"nodes": {{{body}}}}}\n', "the latency table")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table.

        Raises:
            UsageError: missing, not JSON, or not a table of this version.
        """
        hint = "'onnxprune profile MODEL -o FILE' writes one."
        data = documents.read_json(Path(path), "the latency table", "latency table", missing=hint, hint=hint)
        if not isinstance(data, Mapping) or not isinstance(data.get("nodes"), Mapping):
            raise UsageError(f"{str(path)!r} is not a latency table: it has no 'nodes'.", hint=hint)
        if data.get("version") != VERSION:
            raise UsageError(f"Latency table version {data.get('version')!r} is not known.", hint=hint)
        nodes = documents.parse(
            dict[str, list[tuple[int, int, float]]], data["nodes"], f"'nodes' of {str(path)!r}", hint
        )
        table = documents.parse(cls, {**data, "samples": []}, repr(str(path)), hint)
        table.samples = [Sample(node, *sample) for node, samples in nodes.items() for sample in samples]
        times = [table.seconds, table.slope, *(measured for _, measured in table.checks)]
        if min(times) <= 0 or any(min(sample[1:]) < 0 for sample in table.samples):
            raise UsageError(f"{str(path)!r} is a damaged latency table: it has times of 0 or less.", hint=hint)
        return table

    def check_model(self, sha256: str, source: str) -> None:
        """Whether the table is of the model with this digest.

        Raises:
            UsageError: it is another model's.
        """
        if self.model_sha256 != sha256:
            raise UsageError(
                f"The latency table {source} belongs to another model (SHA-256 {self.model_sha256[:12]}..., "
                f"this one is {sha256[:12]}...).",
                hint="Run 'onnxprune profile' on this very file there.",
            )
