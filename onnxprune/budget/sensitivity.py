"""What cutting each group alone does to the model, at several shares: as data that can be saved and cached."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune import documents
from onnxprune.errors import UsageError

VERSION = 2


@dataclass(slots=True)
class GroupCurve:
    """One group cut alone, at rising shares: ``noise`` is what its outputs differ by from the original's.

    Attributes:
        group, name, units: which. shares: of its units that went. noise: |a - b|^2 / |a|^2, at most 1, the mean over
            outputs. points: the metric, or per cent of agreement.
    """

    group: int
    name: str
    units: int
    shares: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    points: list[float] = field(default_factory=list)


@dataclass(slots=True, repr=False)
class Sensitivity:
    """Curves of all groups of a model.

    Attributes:
        model_sha256: of the model. settings: criterion, way to repair, data and metric that were used.
        what: what the points are. original: the original's points. metric: whether they are the user's metric.
    """

    model_sha256: str
    settings: dict[str, Any]
    what: str
    original: float
    metric: bool = False
    curves: list[GroupCurve] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<Sensitivity: {len(self.curves)} groups, {self.what}>"

    def losses(self) -> dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """{group: (shares removed, losses)}: what the metric lost in place of noise, where there is one.

        Noise stays in it as a share of what the metric may lose at most, to tell apart what the metric does not.
        """
        scale = max((self.original - min(c.points) for c in self.curves if c.points), default=0.0)
        found = {}
        for curve in self.curves:
            noise, lost = np.array(curve.noise), np.maximum(self.original - np.array(curve.points), 0.0)
            loss = lost + 0.1 * max(scale, 1e-12) * noise if self.metric else noise
            found[curve.group] = np.array(curve.shares), loss
        return found

    def save(self, path: str | Path) -> None:
        """Write the curves as JSON.

        Raises:
            UsageError: the file cannot be written.
        """
        data = asdict(self)
        lines = ",\n  ".join(json.dumps(curve) for curve in data.pop("curves"))
        head = json.dumps({"version": VERSION, **data})
        documents.write(Path(path), f'{head[:-1]},\n "curves": [\n  {lines}\n ]}}\n', "the sensitivities")

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read curves.

        Raises:
            UsageError: missing, not JSON, or not sensitivities of this version.
        """
        hint = "'onnxprune sensitivity MODEL --data D -o FILE' writes one."
        kind = "file of sensitivities"
        data = documents.read_json(Path(path), "the sensitivities", kind, missing=hint, hint=hint)
        if not isinstance(data, Mapping) or not isinstance(data.get("curves"), list):
            raise UsageError(f"{str(path)!r} holds no sensitivities: it has no 'curves'.", hint=hint)
        if data.get("version") != VERSION:
            raise UsageError(f"Sensitivities of version {data.get('version')!r} are not known.", hint=hint)
        result = documents.parse(cls, data, repr(str(path)), hint)
        for curve in result.curves:
            if len({len(curve.shares), len(curve.noise), len(curve.points)}) != 1:
                raise UsageError(f"{str(path)!r} is damaged: group {curve.group} has lists of different lengths.")
            rising = all(a < b for a, b in zip([0.0, *curve.shares], curve.shares, strict=False))
            if not rising or max(curve.shares, default=0.0) > 1 or min(curve.noise, default=0.0) < 0:
                raise UsageError(
                    f"{str(path)!r} is damaged: group {curve.group} has negative noise, or shares that do not rise.",
                    hint=hint,
                )
        return result

    def check_model(self, sha256: str, source: str) -> None:
        """Whether the curves are of the model with this digest.

        Raises:
            UsageError: they are another model's.
        """
        if self.model_sha256 != sha256:
            raise UsageError(
                f"The sensitivities {source} belong to another model (SHA-256 {self.model_sha256[:12]}..., "
                f"this one is {sha256[:12]}...).",
                hint="Run 'onnxprune sensitivity' on this very file.",
            )
